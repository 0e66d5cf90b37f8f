"""The summary of a data set's splits, and its warnings, before a training."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from ...text import named
from ..formats.keypoints import count_labelled
from ..formats.labels import LabelledImages
from .inspection import duplicates

TABLE_COLUMNS = 3  # of classes, side by side if there are many
MANY_CLASSES = 12


@dataclass(frozen=True)
class Look:
    """The result of ``look``.

    Attributes:
        summary: lines on each split, and a table with the number of boxes of each class.
        warnings: a line for each kind of fault: labels or images left out, classes that can't be
            learnt, images of one split in another.
    """

    summary: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"Look at this: {line}" for line in self.warnings)])


def look(splits: Mapping[str, LabelledImages]) -> Look:
    """Summarise the splits of a data set, of which the first is the training split.

    Image files are read to find duplicates if their sizes and last bytes agree between splits.
    """
    boxes = {
        name: Counter(a["category_id"] for r in split.records for a in r["annotations"])
        for name, split in splits.items()
    }
    warnings = [
        f"{name}: {line}" for name, split in splits.items() for line in split.faults.lines()
    ]
    train = next(iter(splits))
    classes = splits[train].classes
    absent = [c for i, c in enumerate(classes) if not boxes[train][i]]
    if absent:
        warnings.append(f"classes without a box in {train}: {named(absent)}")
    for name in list(splits)[1:]:
        both = duplicates(splits[train].records, splits[name].records)
        if both:
            pairs = [a if a == b else f"{b} is {a}" for a, b in both]
            warnings.append(
                f"images of {name} that are also in {train}, so its AP will be too high: "
                f"{len(both)} ({named(pairs)})"
            )
    lines = [_describe(name, split) for name, split in splits.items()]
    return Look("\n".join([*lines, _table(classes, boxes)]), tuple(warnings))


def _describe(name: str, split: LabelledImages) -> str:
    records = split.records
    empty = sum(not record["annotations"] for record in records)
    sizes = Counter((record["width"], record["height"]) for record in records)
    (width, height), most = sizes.most_common(1)[0]
    sides = [max(size) for size in sizes.elements()]
    shapes = f"all {width} × {height}"
    if len(sizes) > 1:
        shapes = (
            f"{len(sizes)} sizes, the longer side {min(sides)} to {max(sides)} pixels, {most} of "
            f"{width} × {height}"
        )
    areas = [a["bbox"][2] * a["bbox"][3] for r in records for a in r["annotations"]]
    low, middle, high = np.sqrt(np.percentile(areas, (5, 50, 95)))
    difficult = sum("difficult" in a for r in records for a in r["annotations"])
    ignored = f", {difficult} of them difficult (evaluation ignores these)" if difficult else ""
    points, names = "", split.keypoints.names
    if names:
        seen = sum(count_labelled([a]) > 0 for r in records for a in r["annotations"])
        points = f"\n  {len(names)} keypoints ({named(names, most=40)}), labelled in {seen} boxes"
    return (
        f"{name}: {split.source}\n"
        f"  {len(records)} images ({shapes}), {empty} without a box\n"
        f"  {len(areas)} boxes{ignored}; the square root of their area is {low:.0f} to "
        f"{high:.0f} pixels (5th to 95th percentile), the median {middle:.0f}{points}"
    )


def _table(classes: tuple[str, ...], boxes: Mapping[str, Counter[int]]) -> str:
    rows = [[c, *(counts[i] for counts in boxes.values())] for i, c in enumerate(classes)]
    columns = TABLE_COLUMNS if len(rows) > MANY_CLASSES else 1
    length = -(-len(rows) // columns)
    pieces = [rows[i * length : (i + 1) * length] for i in range(columns)]
    side_by_side = [
        [cell for piece in pieces for cell in (piece[i] if i < len(piece) else [])]
        for i in range(length)
    ]
    return tabulate(side_by_side, ["boxes of", *boxes] * columns, tablefmt="simple")
