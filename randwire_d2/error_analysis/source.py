"""The inputs of an analysis: a run's detections, and the ground truth of its data set."""

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..config import is_classifier
from ..engine import register_data
from ..inference.prediction.output import IMAGES as PREDICTED
from ..inference.prediction.unfinished import STAMPS, read_note
from ..runs import RunFolder
from ..text import brief, one_line, parse_json


@dataclass(frozen=True)
class Source:
    """Detections, and their data set.

    Attributes:
        dataset: the name of the data set in Detectron2's catalogs.
        results: the coco_instances_results.json that COCOEvaluator wrote.
        folder: the default folder of the analysis.
        data: the path by which the user gave the data set; ``""`` if it was given by name.
    """

    dataset: str
    results: Path
    folder: Path
    data: str = ""


def source_of_run(path: str | os.PathLike[str]) -> Source:
    """The detections of a training's last evaluation; without one, of the newest ``--eval-only``.

    Args:
        path: the OUTPUT_DIR of a training, or the folder of an evaluation.

    Raises:
        FileNotFoundError: the path is neither.
        ValueError: the run is a classifier's, or its data set can't be used.
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
    # The evaluators of several sets write to the same file; the last set's results stay.
    data = cfg.DATASETS.PATH_VAL or cfg.DATASETS.PATH
    return Source(cfg.DATASETS.TEST[-1], run.detections_file, run.path / "analysis", data)


def ground_truth(dataset: str) -> COCO:
    """The ground truth of a data set, as COCOEvaluator reads it.

    Args:
        dataset: the name of the data set in Detectron2's catalogs.

    Raises:
        FileNotFoundError: its files are missing.
        ValueError: it has no objects, or COCOEvaluator does not evaluate it.
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


def check_ids(source: Source, truth: COCO) -> None:
    """Compare ids with the list of images and classes beside the detections, if there is one:
    COCOEvaluator's for a data set without a COCO file, or tools/predict.py's images.json.

    An id of YOLO's or VOC's labels may be an index in sorted names, which changes with the files.

    Raises:
        ValueError: an id means another image or class now, or an image is new; one line.
    """
    for name in (f"{source.dataset}_coco_format.json", PREDICTED):
        path = source.results.parent / name
        if not path.is_file():
            continue
        try:
            listed = parse_json(path.read_bytes())
            images = {one["id"]: _base(one) for one in listed["images"]}
            classes = {one["id"]: str(one["name"]) for one in listed["categories"]}
        except (ValueError, LookupError, TypeError) as e:
            raise ValueError(
                f"{path} is damaged ({one_line(e)}): evaluate or predict again, or move it away if "
                "it is another program's"
            ) from e
        # A class may have been renamed; but a name with another id means that the ids changed.
        named = {str(one["name"]): i for i, one in truth.cats.items()}
        moved = [f"class {i}, {brief(c)}, is {named[c]} now" for i, c in classes.items()
                 if named.get(c, i) != i]  # fmt: skip
        now = {i: _base(one) for i, one in truth.imgs.items()}
        if name == PREDICTED and not now.keys() <= images.keys():
            skipped = _given(path.parent) - set(images.values())
            images |= {i: n for i, n in now.items() if i not in images and n in skipped}
        moved += [f"image {i}, {brief(n)}, was {brief(images[i]) if i in images else 'not there'}"
                  for i, n in now.items() if images.get(i) != n]  # fmt: skip
        if moved:
            raise ValueError(
                f"{source.results} is not of what the data set {source.dataset!r} has now: "
                f"{moved[0]}, as {path} says; evaluate again, or predict with --dataset"
            )


def _given(folder: Path) -> set[str]:
    """The names of all images that tools/predict.py was given, with those that it could not read or
    compute, which have no detections.

    Raises:
        ValueError: the tool's file with these names is damaged; one line.
    """
    note = read_note(folder)
    return {os.path.basename(path) for path in note[STAMPS]} if note else set()


def _base(image: Mapping[str, Any]) -> str:
    """The name of an image's file, without its folder."""
    return os.path.basename(str(image["file_name"]))
