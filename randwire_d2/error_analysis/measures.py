"""The numbers of an analysis: what a detector finds and misses in a data set with ground truth."""

from collections import Counter
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from .matching import Matches, Task, confusion, error_kinds, match

# The numbers of COCOeval's summary; those of precision are COCOEvaluator's.
METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl",
)  # fmt: skip
CURVE_IOUS = (0.5, 0.75)
BINS = 20  # of scores


@dataclass(frozen=True)
class Operation:
    """How well a detector does at a threshold of its scores, and at an IoU of 0.5.

    Attributes:
        threshold: the least score of the detections; nan if there is no such score.
        precision, recall, f1: 0 … 1; nan where they have no meaning.
    """

    threshold: float
    precision: float
    recall: float
    f1: float

    def __str__(self) -> str:
        rates = ("precision", self.precision), ("recall", self.recall), ("F1", self.f1)
        return ", ".join(f"{name} {number(value, 2)}" for name, value in rates)


@dataclass(frozen=True)
class ClassResult:
    """What was found of a class.

    Attributes:
        objects, detections: their numbers; detections with at least the threshold's score.
        metrics: COCOEvaluator's AP, AP50, AP75, APs, APm and APl, 0 … 100; nan without objects.
        chosen: at the threshold of the analysis.
        best: at the threshold with the largest F1; all nan if no object was found.
    """

    name: str
    objects: int
    detections: int
    metrics: dict[str, float]
    chosen: Operation
    best: Operation


@dataclass(frozen=True)
class ImageErrors:
    """An image with objects that were not found as what they are, or detections of none."""

    image_id: int
    file_name: str
    not_found: int
    false: int


@dataclass(frozen=True)
class Analysis:
    """What a detector finds and misses in a data set.

    Attributes:
        task: whether boxes or masks have to overlap.
        threshold: the least score of the detections that are counted, where a count needs one.
        images, objects, detections: how many there are; all detections, whatever their scores.
        metrics: METRICS -> 0 … 100; nan where there are no objects of a size.
        classes: by category id, which is the order in all that follows.
        confusion: (K + 1, K + 1), see ``matching.confusion``.
        errors: ``matching.KINDS`` -> how many.
        precision: at each of CURVE_IOUS, of 101 recalls 0 … 1, and of each class, (2, 101, K);
            nan for a class without objects.
        scores: detections that are true, and false, in BINS of equal width, (2, BINS).
        sweep: precision, recall and F1 of all classes together at the thresholds 0, 0.01 … 1,
            (101, 3); nan where they have no meaning.
        chosen, best: of all classes together, as of one.
        worst: the images with errors, the most first.
    """

    task: Task
    threshold: float
    images: int
    objects: int
    detections: int
    metrics: dict[str, float]
    classes: tuple[ClassResult, ...]
    confusion: NDArray[np.int64]
    errors: dict[str, int]
    precision: NDArray[np.float64]
    scores: NDArray[np.int64]
    sweep: NDArray[np.float64]
    chosen: Operation
    best: Operation
    worst: tuple[ImageErrors, ...]

    @property
    def names(self) -> list[str]:
        return [result.name for result in self.classes]

    def confused_pairs(self) -> list[tuple[str, str, int]]:
        """(class, found as, how often), the most frequent first."""
        counts = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[: np.count_nonzero(counts)]
        pairs = zip(*np.unravel_index(order, counts.shape))
        return [(self.names[i], self.names[j], int(counts[i, j])) for i, j in pairs]


def number(value: float, digits: int = 1) -> str:
    """A number for people; a dash for nan."""
    return "–" if isnan(value) else f"{value:.{digits}f}"


def analyze(truth: COCO, results: list[dict[str, Any]], task: Task, threshold: float) -> Analysis:
    """Measure what a detector finds and misses.

    Args:
        truth: the data set, with ``annotations``.
        results: its detections, in COCO's results format; pycocotools adds to them.
        task: whether boxes or masks have to overlap.
        threshold: the least score of the detections that are counted, where a count needs one.
    """
    matches = match(truth, results, task)
    evaluation = matches.evaluation
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])
    curves = [np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))[0] for iou in CURVE_IOUS]
    stats = np.where(evaluation.stats < 0, np.nan, 100 * evaluation.stats)
    return Analysis(
        task=task,
        threshold=threshold,
        images=len(truth.imgs),
        objects=len(matches.object),
        detections=len(results),
        metrics=dict(zip(METRICS, stats.tolist())),
        classes=tuple(
            _class_result(truth.cats[category]["name"], matches, k, precision[:, :, k], threshold)
            for k, category in enumerate(evaluation.params.catIds)
        ),
        confusion=confusion(matches, threshold),
        errors=error_kinds(matches, threshold),
        precision=precision[curves, :, :, 0, -1],
        scores=np.stack(
            [
                np.histogram(matches.score[matches.true == true], BINS, (0, 1))[0]
                for true in (True, False)
            ]
        ),
        sweep=_sweep(matches),
        chosen=_operation(matches.score, matches.true, len(matches.object), threshold),
        best=_best(matches.score, matches.true, len(matches.object)),
        worst=_worst(truth, matches, threshold),
    )


def _class_result(
    name: str, matches: Matches, k: int, precision: NDArray, threshold: float
) -> ClassResult:
    """
    Args:
        precision: of the class, (IoUs, recalls, sizes, limits of detections).
    """
    own = matches.detection_class == k
    score, true = matches.score[own], matches.true[own]
    objects = int(np.count_nonzero(matches.object_class == k))
    parts = [precision[:, :, 0], precision[0, :, 0], precision[5, :, 0]]
    parts += [precision[:, :, size] for size in (1, 2, 3)]
    return ClassResult(
        name=name,
        objects=objects,
        detections=int(np.count_nonzero(score >= threshold)),
        metrics={name: _mean(part[..., -1]) for name, part in zip(METRICS, parts)},
        chosen=_operation(score, true, objects, threshold),
        best=_best(score, true, objects),
    )


def _mean(precision: NDArray) -> float:
    """AP as COCOEvaluator computes it for a class: it takes the mean of what is there."""
    there = precision[~np.isnan(precision)]
    return float(np.mean(there) * 100) if there.size else nan


def _operation(score: NDArray, true: NDArray, objects: int, threshold: float) -> Operation:
    kept = score >= threshold
    hits, found = int(np.count_nonzero(true & kept)), int(np.count_nonzero(kept))
    return Operation(threshold, *_rates(hits, found, objects))


def _rates(hits: float, found: float, objects: float) -> tuple[float, float, float]:
    """Precision, recall, and F1."""
    return (
        hits / found if found else nan,
        hits / objects if objects else nan,
        2 * hits / (found + objects) if objects else nan,
    )


def _best(score: NDArray, true: NDArray, objects: int) -> Operation:
    """At the score with the largest F1; of several, the highest. nan if each F1 is 0."""
    if not true.any():
        return Operation(nan, nan, nan, nan)
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(true[order])
    f1 = 2 * hits / (np.arange(len(hits)) + 1 + objects)
    # A threshold takes all detections of its score, or none.
    f1[:-1][np.diff(score[order]) == 0] = -1
    return _operation(score, true, objects, float(score[order[f1.argmax()]]))


def _sweep(matches: Matches) -> NDArray[np.float64]:
    thresholds = np.linspace(0, 1, 101)
    hits, found = (
        len(scores) - np.searchsorted(np.sort(scores), thresholds)
        for scores in (matches.score[matches.true], matches.score)
    )
    return np.array([_rates(h, f, len(matches.object)) for h, f in zip(hits, found)])


def _worst(truth: COCO, matches: Matches, threshold: float) -> tuple[ImageErrors, ...]:
    false = Counter(matches.detection_image[(matches.score >= threshold) & ~matches.true].tolist())
    not_found = Counter(matches.object_image[matches.found_at < threshold].tolist())
    return tuple(
        ImageErrors(image, truth.imgs[image]["file_name"], not_found[image], false[image])
        for image, _ in (not_found + false).most_common()
    )
