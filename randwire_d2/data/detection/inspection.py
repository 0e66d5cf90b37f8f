"""Leave out images and boxes that can't be used, count their faults, and find duplicate images.

Most image files are checked by their first and last bytes only (``images.probing``), so that the
118,000 images of COCO take a minute rather than an hour.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...text import brief
from ..formats.labels import Faults, LabelledImages
from ..formats.rle import LONGEST, is_short, rle_fault
from ..images.probing import TO_8_BITS, ImageFile, digest, probe_all

MISSING = "images whose file is missing (left out)"
BROKEN = "images that can't be read (left out)"
DEEP = (
    "images of more than 8 bits per pixel, whose values above 255 would all be white (left out; "
    f"convert them, {TO_8_BITS})"
)
RESIZED = "images of another size than their annotations say (left out)"
MOST_UNUSABLE = 0.5  # share of the images; above it, the path or the labels are probably wrong
NOT_FINITE = "boxes with NaN or infinite numbers (left out)"
EMPTY = "boxes without area (left out)"
OUTSIDE = "boxes outside their image (left out)"
HUGE = "boxes more than twice as wide or high as their image (left out)"
BEYOND = "boxes that reach beyond their image (training clips them)"
TWICE = (
    "boxes that come again in their image, of the same class (evaluation wants each to be found)"
)
BAD_MASK = (
    "masks that can't be read, of another size than their image, or with an outline of more than "
    f"{LONGEST} times its longer side (left out, and boxes)"
)
MARGIN = 1.0  # pixels beyond the image that are no fault; they occur in COCO itself
NOT_POINTS = "keypoints that are not three finite numbers for each name (left out, boxes are not)"
NOT_VISIBLE = "keypoints whose visibility is not 0, 1 or 2 (left out, boxes are not)"
POINTS_OUTSIDE = "objects with keypoints outside their image (training leaves those points out)"
HARMLESS = {BEYOND, TWICE, POINTS_OUTSIDE}


def clean(split: LabelledImages) -> LabelledImages:
    """Remove the images and boxes that can't be used from a split, and count its faults.

    Every image gets the height and width of its file. The split is changed in place.

    Raises:
        ValueError: there are no images, more than half can't be used, no box but crowds is left,
            or no box is larger than a pixel; one line.
    """
    faults, before = split.faults, len(split.records)
    records = []
    files = probe_all([record["file_name"] for record in split.records])
    for record, file in zip(split.records, files):
        if _check_file(record, file, faults):
            kept = [a for a in record["annotations"] if _check(a, record, faults)]
            record["annotations"] = kept
            boxes = {(a["category_id"], *a["bbox"]) for a in kept}
            for _ in range(len(kept) - len(boxes)):
                faults.add(TWICE, record["file_name"])
            for annotation in kept if split.keypoints.names else ():
                _settle_keypoints(annotation, record, len(split.keypoints.names), faults)
            records.append(record)
    split.records = records
    unusable = before - len(records)
    if not before:
        raise ValueError(f"{split.source!r} has no images")
    if unusable > MOST_UNUSABLE * before:
        raise ValueError(
            f"{split.source!r}: {unusable} of {before} images can't be used; "
            f"{'; '.join(faults.lines())}"
        )
    _check_boxes(split)
    if faults.kinds - HARMLESS:  # then the file has more content than the records
        split.json_file = None
    return split


def _check_boxes(split: LabelledImages) -> None:
    annotations = [a for record in split.records for a in record["annotations"]]
    if all(a.get("iscrowd", 0) for a in annotations):
        crowds = f" but {len(annotations)} crowds (iscrowd 1)" if annotations else ""
        what = f": {'; '.join(split.faults.lines())}" if split.faults else ""
        raise ValueError(
            f"{split.source!r}: not one of its {len(split.records)} images has a box{crowds}{what}"
            "; label some, or name another split"
        )
    if all(max(a["bbox"][2:]) <= 1 for a in annotations):
        raise ValueError(
            f"{split.source!r}: not one of its {len(annotations)} boxes is larger than a pixel, as "
            f"if they were fractions of the image ({brief(annotations[0]['bbox'])}); give x, y, "
            "width and height in pixels"
        )


def _check_file(record: dict[str, Any], file: ImageFile, faults: Faults) -> bool:
    name = record["file_name"]
    if file.is_deep:
        faults.add(DEEP, name)
        return False
    if file.size is None:
        missing = not os.path.isfile(name)
        faults.add(MISSING if missing else BROKEN, name if missing else f"{name}: {file.error}")
        return False
    width, height = file.size
    said = record.setdefault("width", width), record.setdefault("height", height)
    if said != file.size:
        turned = ", as EXIF turns it" if file.turned else ""
        faults.add(RESIZED, f"{name}: {width} × {height}{turned}, not {said[0]} × {said[1]}")
        return False
    return True


def _check(annotation: Mapping[str, Any], record: Mapping[str, Any], faults: Faults) -> bool:
    """Whether an annotation can be used; its fault is counted."""
    fault = _fault(annotation, record["width"], record["height"])
    if fault:
        box = ", ".join(f"{v:g}" for v in annotation["bbox"])
        faults.add(fault, f"{record['file_name']}: {box}")
    return fault in (None, BEYOND)


def _fault(annotation: Mapping[str, Any], width: int, height: int) -> str | None:
    x, y, w, h = annotation["bbox"]
    if not math.isfinite(x + y + w + h):
        return NOT_FINITE
    if w <= 0 or h <= 0:
        return EMPTY
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return OUTSIDE
    if w > 2 * width or h > 2 * height:
        return HUGE
    segmentation = annotation.get("segmentation")
    if segmentation is not None and not _is_mask(segmentation, width, height):
        return BAD_MASK
    if min(x, y) < -MARGIN or x + w > width + MARGIN or y + h > height + MARGIN:
        return BEYOND
    return None


def _is_mask(segmentation: Any, width: int, height: int) -> bool:
    if isinstance(segmentation, dict):
        return not rle_fault(segmentation) and list(segmentation["size"]) == [height, width]
    is_list = isinstance(segmentation, Iterable)
    return is_list and all(is_short(polygon, width, height) for polygon in segmentation)


def _settle_keypoints(
    annotation: dict[str, Any], record: Mapping[str, Any], number: int, faults: Faults
) -> None:
    """Convert an annotation's keypoints to Detectron2's form, like ``load_coco_json``: coordinates
    in the labels are pixel indices, so 0.5 is added to them.

    An object whose keypoints are missing or faulty keeps its box, with no labelled keypoint.

    Args:
        record: the record of the image, with height and width.
        number: the number of keypoint names.
    """
    values = annotation.get("keypoints") or []
    fault = (
        _keypoint_fault(values, 3 * number, record["width"], record["height"]) if values else None
    )
    if fault:
        faults.add(fault, record["file_name"])
    if not values or fault not in (None, POINTS_OUTSIDE):
        values = [0] * (3 * number)
    annotation["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(values)]


def _keypoint_fault(values: object, length: int, width: int, height: int) -> str | None:
    if not isinstance(values, list) or len(values) != length:
        return NOT_POINTS
    # JSON's integers can be too large for a float; a comparison with NaN is false.
    if not all(isinstance(v, int | float) and abs(v) < 2**53 for v in values):
        return NOT_POINTS
    points = list(zip(values[::3], values[1::3], values[2::3]))
    if not all(v in (0, 1, 2) for *_, v in points):
        return NOT_VISIBLE
    ends = width - 1 + MARGIN, height - 1 + MARGIN
    inside = all(-MARGIN <= x <= ends[0] and -MARGIN <= y <= ends[1] for x, y, v in points if v)
    return None if inside else POINTS_OUTSIDE


def duplicates(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Find the images of the second split that are also in the first, by their files' content.

    Complete files are read, each once, only if their sizes and last bytes are equal.

    Returns:
        Pairs of file names: the one in the first split, and the one in the second.
    """
    names = dict.fromkeys(record["file_name"] for record in first)
    others = [record["file_name"] for record in second]
    paths = [*names, *others]
    keys = {path: file.key for path, file in zip(paths, probe_all(paths))}
    by_key: dict[Any, list[str]] = {}
    for name in names:
        by_key.setdefault(keys[name], []).append(name)
    by_content: dict[Any, dict[bytes, str]] = {}  # by key, for the files that were read
    found = []
    for name in others:
        key = keys[name]
        alike = by_key.get(key, [])
        if name in names:
            found.append((name, name))
        elif alike:
            if key not in by_content:
                by_content[key] = {digest(other): other for other in reversed(alike)}
            if (same := by_content[key].get(digest(name))) is not None:
                found.append((same, name))
    return found
