"""What an analysis reads: a run's detections, and the ground truth of its data set."""

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..config import is_classifier
from ..engine import register_data
from ..runs import RunFolder


@dataclass(frozen=True)
class Source:
    """Detections, and the data set that they are in.

    Attributes:
        dataset: its name in Detectron2's catalogs.
        results: the coco_instances_results.json that COCOEvaluator wrote.
        folder: where the analysis goes unless another folder is asked for.
        data: what people know the data set as, if not by its name: the path that it was given by.
    """

    dataset: str
    results: Path
    folder: Path
    data: str = ""


def source_of_run(path: str | os.PathLike[str]) -> Source:
    """What the last evaluation during a training found; without one, the newest of ``--eval-only``.

    Args:
        path: the OUTPUT_DIR of a training, or the folder of an evaluation.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is a classifier's, or its data set can't be used.
    """
    run = RunFolder(path)
    if not run.detections_file.is_file():
        run = run.last_evaluation() or run
    cfg = run.config()
    if is_classifier(cfg):
        raise ValueError(
            f"{run.path} is a classifier's run; only a detector's has detections to analyse "
            "(tools/collect_results.py shows a classifier's results)"
        )
    if not cfg.DATASETS.TEST:
        raise ValueError(f"{run.config_file} names no data set in DATASETS.TEST")
    register_data(cfg)
    # The evaluators of several sets write to one file; the last one's stays.
    data = cfg.DATASETS.PATH_VAL or cfg.DATASETS.PATH
    return Source(cfg.DATASETS.TEST[-1], run.detections_file, run.path / "analysis", data)


def ground_truth(dataset: str) -> COCO:
    """The objects of a data set, as COCOEvaluator takes them.

    Args:
        dataset: its name in Detectron2's catalogs.

    Raises:
        FileNotFoundError: its files are missing.
        ValueError: it has no objects, or is not evaluated as COCO is.
    """
    metadata = MetadataCatalog.get(dataset)
    kind = metadata.get("evaluator_type", "coco")
    if not kind.startswith("coco"):
        raise ValueError(
            f"the data set {dataset!r} is evaluated as {kind!r}, not as COCO is; the analysis "
            "would not be that evaluator's"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        if json_file := metadata.get("json_file"):
            truth = COCO(PathManager.get_local_path(json_file))
        else:
            truth = COCO()
            truth.dataset = convert_to_coco_dict(dataset)
            truth.createIndex()
    if not truth.anns:
        raise ValueError(f"the data set {dataset!r} has no annotations to compare detections with")
    return truth
