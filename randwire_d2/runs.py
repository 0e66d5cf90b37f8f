"""A run on disk: config, metrics, progress, checkpoints and results of an OUTPUT_DIR.

Detectron2's trainer writes config.yaml, metrics.json, the checkpoints and what its evaluators leave
in inference/. An evaluation (``--eval-only``) has a folder of its own below evaluations/, with the
config that it ran with and results.json: it leaves what the training wrote as it is.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from .config import classifier_config, merge_in_one_line
from .files import atomic_open

EVALUATIONS = "evaluations"

Metrics = dict[int, dict[str, float]]


class RunFolder:
    """The OUTPUT_DIR of a training, or the folder of an evaluation.

    Its methods read what is there now; a training may be at work.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def final_checkpoint(self) -> Path:
        """What a training writes last."""
        return self.path / "model_final.pth"

    @property
    def detections_file(self) -> Path:
        """What COCOEvaluator wrote of the last evaluation."""
        return self.path / "inference" / "coco_instances_results.json"

    @property
    def results_file(self) -> Path:
        """Of an evaluation; a training's results are among its metrics."""
        return self.path / "results.json"

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self.path / "last_checkpoint").is_file()

    def config(self) -> CfgNode:
        """The config of the run, a detector's or a classifier's; a copy.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is none of this project's.
        """
        path = _existing(self.config_file, "config.yaml of an OUTPUT_DIR")
        return _read_config(str(path), path.stat().st_mtime_ns).clone()

    def metrics(self) -> Metrics:
        """What Detectron2's JSONWriter wrote: iteration -> name -> value.

        A run that was killed and resumed goes back some iterations; what it wrote of them before
        does not count. Nor does a line that the kill cut off.

        Raises:
            FileNotFoundError: there is no metrics.json.
            ValueError: the file is not of this format, or empty.
        """
        path = _existing(self.metrics_file, "metrics.json of a training")
        metrics: Metrics = {}
        for line in path.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
                iteration = values.pop("iteration")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # cut off
            if metrics and iteration < next(reversed(metrics)):
                metrics = {i: kept for i, kept in metrics.items() if i < iteration}
            metrics.setdefault(iteration, {}).update(values)
        if not metrics:
            raise ValueError(f"{path} holds no line of Detectron2's metrics.json: train first")
        return metrics

    def progress(self) -> "Progress":
        """How far the training is; 0 where it has not begun."""
        try:
            metrics = self.metrics()
            end = self.config().SOLVER.MAX_ITER - 1
        except (OSError, ValueError):
            return Progress(0.0, {})
        last = max(metrics)
        return Progress(min(last / max(end, 1), 1.0) if last < end else 1.0, metrics[last])

    def results(self) -> dict[str, dict[str, float]]:
        """Of an evaluation: task -> name -> value.

        Raises:
            FileNotFoundError: there is no results.json.
            ValueError: the file is damaged.
        """
        path = _existing(self.results_file, "results.json of an evaluation")
        try:
            return dict(json.loads(path.read_text())["results"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e}); evaluate again") from e

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write those of an evaluation."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_open(self.results_file) as f:
            json.dump({"results": results}, f, indent=1)


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        done: the part of its iterations, 0 … 1.
        last: what it wrote at its last iteration.
    """

    done: float
    last: Mapping[str, float]


def evaluation_folder(cfg: CfgNode) -> Path:
    """The folder of an evaluation with a config: the same one each time, another for another."""
    digest = hashlib.sha256(cfg.dump().encode()).hexdigest()
    return Path(cfg.OUTPUT_DIR, EVALUATIONS, digest[:12])


@lru_cache(maxsize=256)  # a sweep asks every few seconds, and a config takes a while to read
def _read_config(path: str, modified: int) -> CfgNode:
    cfg = classifier_config()
    # It may be somebody else's: no tags that run code.
    merge_in_one_line(path, lambda: cfg.merge_from_file(path, allow_unsafe=False))
    return cfg


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected was the {what}: train and evaluate first "
            "(tools/train_net.py), or name another folder"
        )
    return path
