"""What a reader of labelled images returns, in Detectron2's form, and the faults it met."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from detectron2.structures import BoxMode

from ...text import MOST_NAMED, check_one_line, named
from .keypoints import Keypoints


class Faults:
    """How often each kind of fault was met, and where at first."""

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
        source: the file or folder it was read from, for messages.
        records: Detectron2's standard dicts: file_name, image_id, annotations, and height and width
            (pixels) where the labels tell them. An annotation has bbox [x, y, width, height] in
            pixels, bbox_mode XYWH_ABS, category_id (an index into classes), iscrowd, and
            segmentation (polygons or a compressed RLE) where there is one, difficult (True) if
            Pascal VOC calls the object so, and keypoints where the data set has them, in the form
            of its reader, after ``detection.inspection.clean`` in Detectron2's.
        classes: their names.
        category_ids: the ids that classes have in COCO's files, in the same order.
        faults: what was wrong with what is not among the records.
        json_file: the COCO file, if the records are all that is in it, and COCO's evaluation can
            read it.
        image_root: the folder that the names of images begin in, in the data set's own files.
        keypoints: those that objects of all classes have.
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
        """The name of an image in the data set, wherever that lies."""
        return os.path.relpath(file_name, self.image_root).replace(os.sep, "/")

    def checksum(self) -> str:
        """Of images, their order, sizes, boxes and keypoints; the same wherever the set lies."""
        found = hashlib.sha256(repr((self.classes, self.keypoints)).encode())
        for record in self.records:
            boxes = [
                (a["category_id"], a["iscrowd"], a["bbox"], a.get("keypoints"))
                for a in record["annotations"]
            ]
            size = record.get("width"), record.get("height")
            # repr also of names that are no Unicode.
            name = self.inside(record["file_name"])
            found.update(repr((name, record["image_id"], size, boxes)).encode())
        return found.hexdigest()


def annotation(bbox: list[float], category: int, iscrowd: int = 0) -> dict[str, Any]:
    """An annotation of Detectron2's, without a segmentation.

    Args:
        bbox: x and y of the upper left corner, width, height; pixels.
    """
    return {
        "bbox": bbox,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "iscrowd": iscrowd,
    }


def image_ids(stems: list[str]) -> list[int]:
    """The ids of images in formats that have none: the numbers in their names, as COCO's have.

    Where the names are not all different positive numbers that COCO's evaluation can hold, their
    positions, from 1 on.

    Args:
        stems: the names without folder and extension, in their order.
    """
    numbers = [int(stem) if stem.isdecimal() else 0 for stem in stems]
    if all(0 < n < 2**63 for n in numbers) and len(set(numbers)) == len(numbers):
        return numbers
    return list(range(1, len(stems) + 1))


def check_classes(source: str, classes: Iterable[object]) -> tuple[str, ...]:
    """Class names as text.

    Raises:
        ValueError: there is none, one comes twice, or one is of more than a line; one line.
    """
    names = tuple(map(str, classes))
    check_one_line(source, names)
    if not names:
        raise ValueError(f"{source!r} names no classes")
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if twice:
        raise ValueError(f"{source!r} names a class twice: {named(twice, most=80)}")
    return names
