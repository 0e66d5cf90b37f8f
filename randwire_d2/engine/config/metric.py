"""The metric that determines the best of a training's evaluations, SOLVER.BEST_METRIC."""

import math
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ...config import is_classifier
from ...runs import RunFolder

# The metrics of COCOEvaluator for each task.
_COCO = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


def best_metric(cfg: CfgNode) -> str:
    """The name of SOLVER.BEST_METRIC in metrics.json."""
    name, prefix = cfg.SOLVER.BEST_METRIC, set_prefix(cfg)
    return str(name) if name.startswith(prefix) else f"{prefix}{name}"


def set_prefix(cfg: CfgNode) -> str:
    """The prefix, in metrics.json, of the test set of SOLVER.BEST_METRIC; "" for a single set."""
    sets = [f"{test}/" for test in cfg.DATASETS.TEST]
    if len(sets) < 2:
        return ""
    return next((test for test in sets if cfg.SOLVER.BEST_METRIC.startswith(test)), sets[0])


def best_evaluation(
    run: RunFolder, metric: str, end: int | None = None
) -> tuple[int, float] | None:
    """The iteration and the value of a run's best evaluation, the first one of equals, among
    iterations below ``end``; None if there is none."""
    best: tuple[int, float] | None = None
    for iteration, value in run.evaluations(metric, end):
        if improves(metric, value, best and best[1]):
            best = iteration, value
    return best


def improves(metric: str, value: float, best: float | None) -> bool:
    """Whether a value is finite and better than the best one before, or the first (None)."""
    if not math.isfinite(value):
        return False
    return best is None or (value < best if is_loss(metric) else value > best)


def is_loss(metric: str) -> bool:
    return "loss" in metric.rsplit("/", 1)[-1]


def check_best_metric(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: no evaluation gives SOLVER.BEST_METRIC, as far as that is known before one.
    """
    known = _known_metrics(cfg)
    # The names of a detector's losses are only known to its code.
    loss = cfg.TEST.LOSS and best_metric(cfg).removeprefix(set_prefix(cfg)).startswith("val_")
    if known is not None and not loss and best_metric(cfg) not in known:
        raise ValueError(
            f"SOLVER.BEST_METRIC: no evaluation gives {cfg.SOLVER.BEST_METRIC!r}; they give "
            f"{', '.join(known)}"
        )


def _known_metrics(cfg: CfgNode) -> list[str] | None:
    """The names of the metrics of evaluations; None if they aren't known before one."""
    names = []
    for test in cfg.DATASETS.TEST:
        if is_classifier(cfg):
            found = ["classification/top1", "classification/top5"]
        elif MetadataCatalog.get(test).get("evaluator_type") == "coco":
            found = _coco_metrics(cfg, MetadataCatalog.get(test).get("thing_classes", ()))
        else:
            return None
        names += [f"{test}/{name}" for name in found] if len(cfg.DATASETS.TEST) > 1 else found
    return names or None


def _coco_metrics(cfg: CfgNode, classes: Iterable[str]) -> list[str]:
    tasks = ["bbox"] + ["segm"] * cfg.MODEL.MASK_ON + ["keypoints"] * cfg.MODEL.KEYPOINT_ON
    names = [f"{task}/{name}" for task in tasks for name in _COCO[task]]
    return names + [f"{task}/AP-{name}" for task in tasks for name in classes]
