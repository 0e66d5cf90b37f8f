"""Match detections with objects as COCO's tools do, and classify the false detections.

pycocotools' COCOeval does all matching. Its evaluation, with the settings of Detectron2's
COCOEvaluator, gives every AP; its matches at an IoU of 0.5 give everything else here. Within a
class, detections are matched by descending score. Crowds and the detections on them are ignored,
and so are detections of a class beyond the 100 best of an image.
"""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Task = Literal["bbox", "segm"]

IOU = 0.5  # the least IoU of a detection that found an object
NEAR = 0.1  # the least IoU of a detection that is near an object; TIDE's value
# The kinds of errors; a false detection gets the first that fits.
KINDS = {
    "place": f"at an object of its class, but with an IoU below {IOU:g}",
    "class": "on an object of another class",
    "duplicate": "on an object that another detection has found",
    "class and place": f"at an object of another class, with an IoU below {IOU:g}",
    "background": "where no object is",
    "missed": "objects that no detection is on or at",
}


@dataclass(frozen=True)
class Matches:
    """The objects (G) and detections (D) of a data set, and their matches; crowds are left out.

    Attributes:
        evaluation: the finished COCOeval, for every IoU, size and number of detections.
        detection: the ids of the detections, (D,).
        detection_image, detection_class: their images and the indices of their classes, (D,).
        score: their scores, (D,).
        true: whether the detections found an object, at an IoU of 0.5, (D,).
        object: the ids of the objects, (G,).
        object_image, object_class: their images and the indices of their classes, (G,).
        found_at: the scores of the detections that found the objects; -inf if none did, (G,).
    """

    evaluation: COCOeval
    detection: NDArray[np.int64]
    detection_image: NDArray[np.int64]
    detection_class: NDArray[np.int64]
    score: NDArray[np.float64]
    true: NDArray[np.bool_]
    object: NDArray[np.int64]
    object_image: NDArray[np.int64]
    object_class: NDArray[np.int64]
    found_at: NDArray[np.float64]


def match(truth: COCO, results: list[dict[str, Any]], task: Task) -> Matches:
    """Match detections with the objects of a data set.

    Args:
        truth: the data set, with ``annotations``.
        results: the detections, in COCO's results format.
        task: whether boxes or masks have to overlap.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _load(truth, results, task), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    classes = {category: k for k, category in enumerate(evaluation.params.catIds)}
    everything = evaluation.params.areaRng[0]
    detections: list[tuple] = []
    objects: list[tuple] = []
    for found in evaluation.evalImgs:
        if found is None or found["aRng"] != everything:
            continue
        image, k = found["image_id"], classes[found["category_id"]]
        # Do not use dtMatches: there, the id 0 of an object means that there is no match.
        finders = found["gtMatches"][0]
        hits, scores = set(finders), dict(zip(found["dtIds"], found["dtScores"]))
        kept = zip(scores.items(), found["dtIgnore"][0])
        detections += ((i, image, k, score, i in hits) for (i, score), skip in kept if not skip)
        pairs = zip(found["gtIds"], finders, found["gtIgnore"])
        objects += ((i, image, k, scores.get(by, -np.inf)) for i, by, skip in pairs if not skip)
    return Matches(
        evaluation, *_columns(detections, int, int, int, float, bool),
        *_columns(objects, int, int, int, float),
    )  # fmt: skip


def confusion(matches: Matches, threshold: float) -> NDArray[np.int64]:
    """Compute the confusion matrix at an IoU of 0.5.

    Detections that found an object of their class come first. The others are then matched with the
    remaining objects, whatever their classes.

    Args:
        threshold: the least score of the detections.

    Returns:
        (K + 1, K + 1): a row for each object class, and one for detections without an object; a
        column for each detected class, and one for objects that were not found.
    """
    evaluation = matches.evaluation
    counts = np.zeros((len(evaluation.params.catIds) + 1,) * 2, np.int64)
    kept = matches.score >= threshold
    hit, left = kept & matches.true, kept & ~matches.true
    np.add.at(counts, (matches.detection_class[hit],) * 2, 1)

    missed = matches.found_at < threshold
    class_of_object = dict(zip(matches.object[missed], matches.object_class[missed]))
    class_of_detection = dict(zip(matches.detection[left], matches.detection_class[left]))
    with contextlib.redirect_stdout(io.StringIO()):
        blind = COCOeval(
            _part(evaluation.cocoGt, class_of_object), _part(evaluation.cocoDt, class_of_detection),
            evaluation.params.iouType,
        )  # fmt: skip
        blind.params.useCats = 0
        blind.params.iouThrs = np.array([IOU])
        blind.params.areaRng = blind.params.areaRng[:1]
        blind.params.maxDets = [max(len(class_of_detection), 1)]
        blind.evaluate()
    for found in filter(None, blind.evalImgs):
        for i, by in zip(found["gtIds"], found["gtMatches"][0]):
            counts[class_of_object.pop(i), class_of_detection.pop(by) if by else -1] += 1
    for k in class_of_detection.values():
        counts[-1, k] += 1
    return counts


def error_kinds(matches: Matches, threshold: float) -> dict[str, int]:
    """Count the kinds of errors as TIDE tells them apart (Bolya et al., 2020, section 2.2).

    Args:
        threshold: the least score of the detections.

    Returns:
        dict[str, int]: the counts, by the names of ``KINDS``.
    """
    counts = dict.fromkeys(KINDS, 0)
    key = "bbox" if matches.evaluation.params.iouType == "bbox" else "segmentation"
    false = (matches.score >= threshold) & ~matches.true
    missed = matches.found_at < threshold
    at_errors: set[int] = set()
    objects_of = _rows_by(matches.object_image)
    for image, rows in _rows_by(matches.detection_image, np.flatnonzero(false)).items():
        objects = objects_of.get(image, np.empty(0, np.int64))
        if not len(objects):
            counts["background"] += len(rows)
            continue
        found = [matches.evaluation.cocoDt.anns[i][key] for i in matches.detection[rows]]
        there = [matches.evaluation.cocoGt.anns[i][key] for i in matches.object[objects]]
        ious = mask.iou(found, there, [0] * len(there))
        same = matches.detection_class[rows][:, None] == matches.object_class[objects]
        own, other = np.where(same, ious, 0), np.where(same, 0, ious)
        for of_own, of_other in zip(own, other):
            kind = _kind(of_own.max(), of_other.max())
            counts[kind] += 1
            if kind in ("class", "place"):
                at_errors.add(objects[(of_other if kind == "class" else of_own).argmax()])
    counts["missed"] = len(set(np.flatnonzero(missed)) - at_errors)
    return counts


def _kind(own: float, other: float) -> str:
    """The kind of a false detection.

    Args:
        own, other: its largest IoU with an object of its class, and of another class.
    """
    if NEAR <= own < IOU:
        return "place"
    if other >= IOU:
        return "class"
    if own >= IOU:
        return "duplicate"
    return "class and place" if other >= NEAR else "background"


def _load(truth: COCO, results: list[dict[str, Any]], task: Task) -> COCO:
    if not results:  # loadRes fails without a first result
        return _part(truth, ())
    # Without boxes, pycocotools takes the size from the mask, as with COCOEvaluator.
    left_out = {"bbox"} if task == "segm" else set()
    # Pass copies: loadRes changes its argument.
    return truth.loadRes(
        [{k: v for k, v in result.items() if k not in left_out} for result in results]
    )


def _part(coco: COCO, ids: Iterable[int]) -> COCO:
    """A data set with some of the annotations of another."""
    part = COCO()
    part.dataset = {**coco.dataset, "annotations": coco.loadAnns(list(ids))}
    with contextlib.redirect_stdout(io.StringIO()):
        part.createIndex()
    return part


def _columns(rows: list[tuple], *kinds: type) -> list[NDArray]:
    columns = zip(*rows) if rows else [()] * len(kinds)
    return [np.array(column, kind) for column, kind in zip(columns, kinds)]


def _rows_by(values: NDArray, rows: NDArray | None = None) -> dict[int, NDArray[np.int64]]:
    """For each value, the indices of the rows that have it; ``rows`` restricts them."""
    rows = np.arange(len(values)) if rows is None else rows
    order = rows[np.argsort(values[rows], kind="stable")]
    distinct, starts = np.unique(values[order], return_index=True)
    return dict(zip(distinct.tolist(), np.split(order, starts[1:]))) if len(order) else {}
