"""A run on disk: config, metrics, progress, checkpoints and results of an OUTPUT_DIR.

Detectron2's trainer writes config.yaml, metrics.json, the checkpoints and, by its evaluators,
inference/. An evaluation (``--eval-only``) does not change these files: it writes to its own folder
OUTPUT_DIR/evaluations/<digest>, with its config.yaml, log.txt, inference/ and results.json:

    {"weights": "/absolute/path/of/model_final.pth",    the file that was evaluated, or its URL
     "training": "/absolute/path/of",                   the OUTPUT_DIR it lies in; null if none
     "results": {"bbox": {"AP": 41.2, …}}}              task -> name -> value

Task and name are those of metrics.json ("bbox/AP"). With several test sets a task begins with the
set's ("coco_2017_val/bbox"), with test-time augmentation it ends in _TTA.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from operator import getitem
from pathlib import Path

from detectron2.config import CfgNode

from .config import classifier_config, merge_file
from .files import atomic_open, without_options
from .text import one_line, parse_json
from .weight_files.reading import iteration_of, read_iteration

EVALUATIONS = "evaluations"
# The keys that do not change the results of an evaluation.
_INDIFFERENT = (
    "OUTPUT_DIR", "SEED", "SOLVER", "DATALOADER", "MODEL.DEVICE", "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS", "TEST.IMS_PER_PROCESS", "TEST.LOSS",
)  # fmt: skip
# The checkpoints that a training can go on from; model_best.pth has no training state.
_RESUMABLE = re.compile(r"model_(\d+|final)\.pth")
_CHECKPOINT = re.compile(r"model_(\d+|final|best)\.pth(\.before)?")

logger = logging.getLogger(__name__)

Metrics = dict[int, dict[str, float]]

# The key of a line in metrics.json from which a resumed training repeats iterations: earlier lines
# of this iteration and later ones do not count.
ANEW = "done_anew"


class RunFolder:
    """The OUTPUT_DIR of a training, or the folder of an evaluation.

    Its methods read the files as they are now; a training may be running.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = Path(path)
        self.config_file = path / "config.yaml"
        # Detectron2 writes it for a LazyConfig that YAML can't express; nothing reads it.
        self.pickled_config = path / "config.yaml.pkl"
        # The translation of a LazyConfig's config.yaml to YAML's keys.
        self.detector_file = path / "detector.yaml"
        self.metrics_file = path / "metrics.json"
        # The log of Detectron2's tools: command line, versions, progress.
        self.log_file = path / "log.txt"
        # A training holds the lock of this file as long as it runs.
        self.lock_file = path / "training.lock"
        # How the stages of a training run; see ``engine.hooks.shadow_steps``.
        self.stages_file = path / "stages.json"
        # The checkpoint at the end of a training.
        self.final_checkpoint = path / "model_final.pth"
        # The weights that did best in an evaluation (SOLVER.BEST_METRIC).
        self.best_checkpoint = path / "model_best.pth"
        # A classifier's network for detectors; or that of another run, which a run starts from.
        self.backbone = path / "backbone.pth"
        # COCOEvaluator's detections in the last evaluation.
        self.detections_file = path / "inference" / "coco_instances_results.json"
        # The results of an evaluation; those of a training are among its metrics.
        self.results_file = path / "results.json"

    @property
    def is_evaluation(self) -> bool:
        """Whether this is an evaluation's folder; it may have no results yet."""
        return self.path.resolve().parent.name == EVALUATIONS

    @property
    def is_lazy(self) -> bool:
        """Whether its config.yaml is a LazyConfig's."""
        lines = self.config_file.read_bytes().splitlines() if self.config_file.is_file() else ()
        return any(line.startswith(b"optimizer:") for line in lines)

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self.path / "last_checkpoint").is_file()

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint for ``--resume``, which the file last_checkpoint names; if it is damaged
        or missing, the newest undamaged one, with a warning.

        Raises:
            FileNotFoundError: there is no file last_checkpoint.
            ValueError: all checkpoints are damaged; one line.
        """
        name = self._last
        try:
            if not name:
                raise ValueError(f"{self.path / 'last_checkpoint'} is empty")
            read_iteration(self.path / name)
            return self.path / name
        except (OSError, ValueError) as e:
            reason = str(e)
        for path in self._resumable():
            if iteration_of(path) is not None:
                logger.warning(f"{reason}: the newest checkpoint that is whole is {path}")
                return path
        raise ValueError(
            f"{reason}: no checkpoint of {self.path} is whole; train anew, without --resume"
        )

    @property
    def _last(self) -> str:
        return (self.path / "last_checkpoint").read_text(errors="replace").strip()

    def _resumable(self) -> list[Path]:
        """The checkpoints to resume from, the latest iteration first; file times are unreliable."""
        files = self.periodic_checkpoints()
        if (last := iteration_of(self.final_checkpoint)) is not None:
            files[last] = self.final_checkpoint
        return [files[iteration] for iteration in sorted(files, reverse=True)]

    def periodic_checkpoints(self) -> dict[int, Path]:
        """The checkpoints of SOLVER.CHECKPOINT_PERIOD: iteration -> file, in order."""
        numbers = ((_RESUMABLE.fullmatch(path.name), path) for path in sorted(self.path.iterdir()))
        return {int(m[1]): path for m, path in numbers if m and m[1] != "final"}

    def left(self, but: str = "") -> list[Path]:
        """The files of a training that could seem to be those of the next one in this folder:
        checkpoints, metrics, detections, evaluations; none if there is no checkpoint.

        Args:
            but: MODEL.WEIGHTS of the next training; if it is backbone.pth, that is left out.
        """
        pointer = self.path / "last_checkpoint"  # first: it is what --resume looks for
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        found = [self.path / name for name in names if _CHECKPOINT.fullmatch(name)]
        if not found and not pointer.is_file():
            return []
        found = [pointer, *found, self.backbone, self.metrics_file, self.stages_file]
        found += sorted(self.path.glob("events.out.tfevents.*"))  # TensorBoard draws them all
        found += [self.detections_file.parent, self.path / "inference_TTA", self.path / EVALUATIONS]
        if Path(without_options(but)).resolve() == self.backbone.resolve():
            found.remove(self.backbone)
        return [path for path in found if path.exists()]

    def checkpoint(self) -> Path:
        """The checkpoint to use: the best, else the final, else the last one. The final one does
        not count if a longer training has gone on from it.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        final = self.final_checkpoint
        if self.best_checkpoint.is_file():
            return self.best_checkpoint
        if final.is_file() and not (self.can_resume and self._last != final.name):
            return final
        if not self.can_resume:
            raise FileNotFoundError(
                f"{self.path} holds no checkpoint (model_best.pth, model_final.pth or "
                "last_checkpoint): name the OUTPUT_DIR of a training, or a .pth file"
            )
        return self.last_checkpoint

    def config(self) -> CfgNode:
        """A copy of the run's config, a detector's or a classifier's.

        Raises:
            FileNotFoundError: there is no config.yaml.
            ValueError: it is not a config of this project, or a LazyConfig without detector.yaml.
        """
        path = _existing(self.config_file, "config.yaml of an OUTPUT_DIR")
        if self.is_lazy:
            if not self.detector_file.is_file():
                raise ValueError(
                    f"{path} is a LazyConfig's, which is Python and not read, and there is no "
                    f"{self.detector_file.name} beside it: the training's log says why"
                )
            path = self.detector_file
        return _read_config(str(path), path.stat().st_mtime_ns).clone()

    def metrics(self) -> Metrics:
        """Read what Detectron2's JSONWriter wrote: iteration -> name -> value.

        A resumed run goes back some iterations; their earlier lines do not count, nor does a
        truncated line.

        Raises:
            FileNotFoundError: there is no metrics.json.
            ValueError: the file is not of this format, or empty.
        """
        path = _existing(self.metrics_file, "metrics.json of a training")
        metrics: Metrics = {}
        for line in path.read_text(errors="replace").splitlines():
            try:
                values = parse_json(line)
                iteration = values.pop("iteration")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # cut off
            if not isinstance(iteration, int):
                continue
            if ANEW in values or (metrics and iteration < next(reversed(metrics))):
                metrics = {i: kept for i, kept in metrics.items() if i < iteration}
            if ANEW in values:
                continue
            values = {name: v for name, v in values.items() if isinstance(v, int | float)}
            metrics.setdefault(iteration, {}).update(values)
        if not metrics:
            raise ValueError(f"{path} holds no line of Detectron2's metrics.json: train first")
        return metrics

    def iterations(self) -> list[int]:
        """The iterations in ``metrics``; none if there is no metrics.json yet."""
        try:
            return [*self.metrics()]
        except (OSError, ValueError):
            return []

    def evaluations(self, metric: str, end: int | None = None) -> list[tuple[int, float]]:
        """A metric in the training's evaluations at iterations below ``end``: (iteration, value),
        in order; none if there is no metrics.json yet."""
        try:
            metrics = self.metrics()
        except (OSError, ValueError):
            return []
        return [
            (iteration, values[metric])
            for iteration, values in metrics.items()
            if metric in values and (end is None or iteration < end)
        ]

    def progress(self) -> "Progress":
        """The progress of the training; 0 if it has not begun."""
        try:
            metrics = self.metrics()
            solver = self.config().SOLVER
        except (OSError, ValueError):
            return Progress(0.0, {})
        last, end = max(metrics), solver.MAX_ITER - 1
        # A model_final.pth of an earlier iteration is of a shorter training.
        ended = last >= end or (
            solver.PATIENCE and iteration_of(self.final_checkpoint) in (last - 1, last)
        )
        return Progress(1.0 if ended else last / end, metrics[last])

    def evaluation(self) -> "Evaluation":
        """Read the results of an evaluation.

        Raises:
            FileNotFoundError: there is no results.json.
            ValueError: the file is damaged.
        """
        path = _existing(self.results_file, "results.json of an evaluation")
        try:
            written = parse_json(path.read_text())
            results = {task: dict(values) for task, values in written["results"].items()}
            return Evaluation(str(written["weights"]), written["training"], results)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is damaged ({one_line(e)}); evaluate again") from e

    def last_evaluation(self) -> "RunFolder | None":
        """The newest evaluation with results in an OUTPUT_DIR; None if there is none."""
        done = (self.path / EVALUATIONS).glob("*/results.json")
        newest = max(done, key=lambda path: path.stat().st_mtime, default=None)
        return None if newest is None else RunFolder(newest.parent)

    def slower_stages(self) -> dict[str, dict[str, str]] | None:
        """Read what ``write_slower_stages`` wrote; None if that can't be read."""
        try:
            written = parse_json(self.stages_file.read_text())
            return {name: dict(modes) for name, modes in written.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write_slower_stages(self, slower: dict[str, dict[str, str]]) -> None:
        """Save which stages run node by node, and why: a stage's name -> mode -> reason."""
        with atomic_open(self.stages_file) as f:
            json.dump(slower, f, indent=1)

    def write_evaluation(self, evaluation: "Evaluation") -> None:
        """Write results.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_open(self.results_file) as f:
            json.dump(asdict(evaluation), f, indent=1)


@dataclass(frozen=True)
class Evaluation:
    """The content of results.json.

    Attributes:
        weights: the file that was evaluated, an absolute path or a URL.
        training: the OUTPUT_DIR of the training that wrote it, an absolute path; None if it is in
            no OUTPUT_DIR.
        results: task -> name -> value, such as "bbox" -> "AP" -> 41.2.
    """

    weights: str
    training: str | None
    results: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Progress:
    """The progress of a training.

    Attributes:
        done: the part of the iterations that are done, 0 … 1.
        last: the metrics of the last iteration, by name.
    """

    done: float
    last: Mapping[str, float]


def evaluation_config(cfg: CfgNode, resume: bool) -> CfgNode:
    """The config of an evaluation: MODEL.WEIGHTS is the file itself, OUTPUT_DIR its own folder.

    Args:
        cfg: its OUTPUT_DIR is that of the training, if there was one.
        resume: whether the last checkpoint in OUTPUT_DIR, if there is one, replaces MODEL.WEIGHTS,
            as with ``--resume``.
    """
    own, run = cfg.clone(), RunFolder(cfg.OUTPUT_DIR)
    own.defrost()
    if resume and run.can_resume:
        own.MODEL.WEIGHTS = str(run.last_checkpoint)
    if own.MODEL.WEIGHTS and "://" not in own.MODEL.WEIGHTS:
        own.MODEL.WEIGHTS = os.path.abspath(own.MODEL.WEIGHTS)
    own.OUTPUT_DIR = str(evaluation_folder(own))
    own.freeze()
    return own


def evaluation_folder(cfg: CfgNode) -> Path:
    """The folder of an evaluation, whose name depends only on the config.

    Args:
        cfg: its OUTPUT_DIR is that of the training, or an evaluation's folder.
    """
    decisive = cfg.clone()
    decisive.defrost()
    for key in _INDIFFERENT:
        *nodes, name = key.split(".")
        reduce(getitem, nodes, decisive).pop(name, None)
    if cfg.SOLVER.EMA.DECAY:
        decisive["EMA"] = True  # which of a checkpoint's weights are evaluated
    # Not the YAML, whose aliases depend on which values happen to be the same object.
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    run = RunFolder(cfg.OUTPUT_DIR)
    # An evaluation that is repeated from its own config.yaml stays where it is.
    root = run.path.parent.parent if run.is_evaluation else run.path
    return root / EVALUATIONS / digest[:12]


def training_of(weights: str) -> str | None:
    """The OUTPUT_DIR that contains a checkpoint, an absolute path; None if there is none."""
    run = RunFolder(os.path.dirname(os.path.abspath(weights)))
    return str(run.path) if run.config_file.is_file() else None


@lru_cache(maxsize=256)  # a sweep asks every few seconds, and a config takes a while to read
def _read_config(path: str, modified: int) -> CfgNode:
    cfg = classifier_config()
    merge_file(cfg, path)
    return cfg


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected was the {what}: train and evaluate first "
            "(tools/train_net.py), or name another folder"
        )
    return path
