"""The measures of an analysis: a detector's results on a data set with ground truth."""

from collections import Counter
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from .matching import Matches, Task, confusion, error_kinds, match

# The metrics of COCOeval's summary; COCOEvaluator reports those of precision.
METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl",
)  # fmt: skip
CURVE_IOUS = (0.5, 0.75)
BINS = 20  # bins of the histogram of scores


@dataclass(frozen=True)
class Operation:
    """A detector's operating point: a threshold of its scores, at an IoU of 0.5.

    Attributes:
        threshold: the least score of the detections; nan if there is no such score.
        precision, recall, f1: 0 … 1; nan if they are undefined (0 / 0).
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
    """The results for a class.

    Attributes:
        objects: the number of objects.
        detections: the number of detections whose score is at least the analysis's threshold.
        metrics: COCOEvaluator's AP, AP50, AP75, APs, APm and APl, 0 … 100; nan without objects.
        chosen: the operating point at the threshold of the analysis.
        best: the operating point with the largest F1; all nan if no object was found.
    """

    name: str
    objects: int
    detections: int
    metrics: dict[str, float]
    chosen: Operation
    best: Operation


@dataclass(frozen=True)
class ImageErrors:
    """An image with objects that were not found, or with false detections."""

    image_id: int
    file_name: str
    not_found: int
    false: int


@dataclass(frozen=True)
class Analysis:
    """The analysis of a detector on a data set.

    Attributes:
        task: ``"bbox"`` or ``"segm"``: whether the IoU is of boxes or of masks.
        threshold: the least score of the detections, for all counts that need a threshold.
        images, objects, detections: their numbers; detections of any score.
        metrics: METRICS -> 0 … 100; nan if there are no objects of a size.
        classes: the classes by category id; the arrays below have the same order.
        confusion: (K + 1, K + 1), see ``matching.confusion``.
        errors: ``matching.KINDS`` -> their numbers.
        precision: at each of CURVE_IOUS, at 101 recalls 0 … 1, for each class, (2, 101, K); nan
            for a class without objects.
        scores: histograms of the true and the false detections' scores, (2, BINS).
        sweep: precision, recall and F1 of all classes together at the thresholds 0, 0.01 … 1,
            (101, 3); nan if they are undefined.
        chosen, best: as in ``ClassResult``, for all classes together.
        worst: the images with errors, those with the most first.
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
        """(class, detected class, number), the most frequent pairs first."""
        counts = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[: np.count_nonzero(counts)]
        pairs = zip(*np.unravel_index(order, counts.shape))
        return [(self.names[i], self.names[j], int(counts[i, j])) for i, j in pairs]


def number(value: float, digits: int = 1) -> str:
    """A number as text; a dash for nan."""
    return "–" if isnan(value) else f"{value:.{digits}f}"


def analyze(truth: COCO, results: list[dict[str, Any]], task: Task, threshold: float) -> Analysis:
    """Analyse a detector's results.

    Args:
        truth: the data set, with ``annotations``.
        results: the detections, in COCO's results format.
        task: ``"bbox"`` or ``"segm"``: whether the IoU is of boxes or of masks.
        threshold: the least score of the detections, for all counts that need a threshold.
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
    """The results for class ``k``; precision is (IoUs, recalls, sizes, limits of detections)."""
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
    """A class's AP as COCOEvaluator computes it: the mean of the values that are not nan."""
    there = precision[~np.isnan(precision)]
    return float(np.mean(there) * 100) if there.size else nan


def _operation(score: NDArray, true: NDArray, objects: int, threshold: float) -> Operation:
    kept = score >= threshold
    hits, found = int(np.count_nonzero(true & kept)), int(np.count_nonzero(kept))
    return Operation(threshold, *_rates(hits, found, objects))


def _rates(hits: float, found: float, objects: float) -> tuple[float, float, float]:
    """Precision, recall and F1; nan if undefined."""
    return (
        hits / found if found else nan,
        hits / objects if objects else nan,
        2 * hits / (found + objects) if objects else nan,
    )


def _best(score: NDArray, true: NDArray, objects: int) -> Operation:
    """The operating point with the largest F1, at the highest such score; nan if each F1 is 0."""
    if not true.any():
        return Operation(nan, nan, nan, nan)
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(true[order])
    f1 = 2 * hits / (np.arange(len(hits)) + 1 + objects)
    # A threshold includes all detections of one score, or none.
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
