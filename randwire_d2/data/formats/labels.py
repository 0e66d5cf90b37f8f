"""The result of a reader of labelled images, in Detectron2's form, and the faults it found."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from detectron2.structures import BoxMode

from ...text import MOST_NAMED, brief, check_one_line, named
from .keypoints import Keypoints

DIGITS = 3  # decimals of a coordinate in pixels, if a reader computes it
VALIDATION = ("valid", "val", "validation")  # the names of folders and lists for validation


class Faults:
    """The number of faults of each kind, and the first places where they were found."""

    def __init__(self) -> None:
        self._count = Counter[str]()
        self._first: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._count)

    def add(self, kind: str, where: str) -> None:
        self._count[kind] += 1
        if self._count[kind] <= MOST_NAMED:
            self._first.setdefault(kind, []).append(where)

    @property
    def kinds(self) -> set[str]:
        return set(self._count)

    def lines(self) -> list[str]:
        """One line for each kind: kind, number, and the first places."""
        return [
            f"{kind}: {self._count[kind]} ({named(first, number=self._count[kind])})"
            for kind, first in self._first.items()
        ]


@dataclass
class LabelledImages:
    """One split of a data set.

    Attributes:
        source: the file or folder that was read, for messages.
        records: Detectron2's standard dicts: file_name, image_id, annotations, and height and width
            (pixels) if the labels tell them. An annotation has bbox [x, y, width, height] in
            pixels, bbox_mode XYWH_ABS, category_id (an index into classes), iscrowd, and, if the
            labels have them: segmentation (polygons or a compressed RLE), difficult (True; Pascal
            VOC only) and keypoints. The keypoints are in COCO's form, unchecked, until
            ``detection.inspection.clean`` converts them to Detectron2's.
        classes: the names of the classes.
        category_ids: the ids of the classes in COCO's files, in the same order.
        faults: the faults that were found; most left out an image or an annotation.
        json_file: the COCO file, if the records have all its content and COCO's evaluation can
            read it; else None.
        image_root: the folder that image paths in the data set's own files are relative to.
        keypoints: the keypoints that all classes share.
    """

    source: str
    records: list[dict[str, Any]]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    faults: Faults = field(default_factory=Faults)
    json_file: str | None = None
    image_root: str | None = None
    keypoints: Keypoints = field(default_factory=Keypoints)

    @property
    def num_boxes(self) -> int:
        return sum(len(record["annotations"]) for record in self.records)

    def inside(self, file_name: str) -> str:
        """An image's path relative to ``image_root``; it stays the same if the data set moves."""
        return os.path.relpath(file_name, self.image_root).replace(os.sep, "/")

    def checksum(self) -> str:
        """The SHA-256 of classes, images, their order, ids, sizes, boxes and keypoints, in hex.

        It does not depend on the folder of the data set, nor on masks.
        """
        found = hashlib.sha256(repr((self.classes, self.keypoints)).encode())
        for record in self.records:
            boxes = [
                (a["category_id"], a["iscrowd"], a["bbox"], a.get("keypoints"))
                for a in record["annotations"]
            ]
            size = record.get("width"), record.get("height")
            # repr also encodes names that are not valid Unicode.
            name = self.inside(record["file_name"])
            found.update(repr((name, record["image_id"], size, boxes)).encode())
        return found.hexdigest()


def annotation(bbox: list[float], category: int, iscrowd: int = 0) -> dict[str, Any]:
    """An annotation in Detectron2's form, without a segmentation.

    Args:
        bbox: x and y of the upper left corner, width and height, in pixels.
    """
    return {
        "bbox": bbox,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "iscrowd": iscrowd,
    }


def bounding_box(points: list[float]) -> list[float]:
    """The box [x, y, width, height] around points [x0, y0, x1, y1, …]."""
    left, top = min(points[::2]), min(points[1::2])
    right, bottom = max(points[::2]), max(points[1::2])
    return [left, top, round(right - left, DIGITS), round(bottom - top, DIGITS)]


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that a float can hold, or NaN or infinite."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53)


def image_ids(stems: list[str]) -> list[int]:
    """Image ids for formats without ids: the numbers that are the file names, as in COCO.

    If the names are not all different positive numbers that fit COCO's evaluation (int64), the ids
    are the images' positions, from 1 on.

    Args:
        stems: the file names without folder and extension, in order.
    """
    numbers = [int(stem) if stem.isdecimal() else 0 for stem in stems]
    if all(0 < n < 2**63 for n in numbers) and len(set(numbers)) == len(numbers):
        return numbers
    return list(range(1, len(stems) + 1))


def check_classes(source: str, classes: Iterable[object]) -> tuple[str, ...]:
    """Convert class names to text and check them.

    Raises:
        ValueError: there is no name, a name comes twice or has several lines; one line.
    """
    names = tuple(map(str, classes))
    check_one_line(source, names)
    if not names:
        raise ValueError(f"{source!r} names no classes")
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if twice:
        raise ValueError(f"{source!r} names a class twice: {named(twice, most=80)}")
    return names


def check_known(path: str, name: str, classes: Collection[str]) -> None:
    """
    Raises:
        ValueError: an object in a file of labels has a class that is none of these; one line.
    """
    if name not in classes:
        raise ValueError(
            f"{path!r} has an object of the class {brief(name)}, which is none "
            f"of the {len(classes)}: {named(classes, most=80)}"
        )
