"""The keypoints of a data set: names, pairs that a horizontal flip swaps, and the skeleton."""

import colorsys
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...text import brief

_SIDE = re.compile(r"left|right|(?<![a-z])[lr](?![a-z])", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass(frozen=True)
class Keypoints:
    """The keypoints that the objects of all classes of a data set share.

    Attributes:
        names: in the order of an annotation's keypoints; empty if the classes share none.
        flips: pairs of names that a horizontal flip swaps; None if they aren't known.
        connections: pairs of names that a line of the skeleton joins.
        why: the reason for empty names, to follow "has no keypoint_names"; "" if it isn't known.
    """

    names: tuple[str, ...] = ()
    flips: tuple[tuple[str, str], ...] | None = None
    connections: tuple[tuple[str, str], ...] = ()
    why: str = ""


def of_classes(
    given: Mapping[str, object], number: int, skeleton: object = None, flip_idx: object = None
) -> Keypoints:
    """The keypoints that all classes share; without names if the classes' names differ.

    Args:
        given: each class's list of keypoint names; any other value counts as no names.
        number: the number of keypoints if no class has names; they are numbered then.
        skeleton: pairs of keypoint numbers from 1 on, as in COCO's files.
        flip_idx: the index of each keypoint's mirror image, as in YOLO's files; already checked.
    """
    lists = {c: tuple(map(str, v)) for c, v in given.items() if isinstance(v, list) and v}
    (first, names), *others = lists.items() or [("", ())]
    for other, its_names in others:
        if its_names != names:
            kinds = f"{first!r} has {brief(names)}, {other!r} {brief(its_names)}"
            return Keypoints(why=f" that all classes share, as a Keypoint R-CNN's do ({kinds})")
    if len(set(names)) < len(names) or not names:  # equal names can't be told apart
        names = tuple(f"keypoint {i}" for i in range(len(names) or number))
    flips = _flips(names)
    if isinstance(flip_idx, list):
        flips = tuple((names[i], names[j]) for i, j in enumerate(flip_idx) if i < j)
    return Keypoints(names, flips, _connections(names, skeleton))


def _flips(names: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """Pair names by left and right, or l and r; None if the pairs can't be found.

    Keypoints whose names tell no side, such as numbers, may have sides; a single one has no pair.
    """
    mirrored = [_SIDE.sub(_swapped, name) for name in names]
    pairs = [(a, b) for a, b in zip(names, mirrored) if a != b]
    if not all(b in names for _, b in pairs) or (not pairs and len(names) > 1):
        return None
    return tuple((a, b) for a, b in pairs if names.index(a) < names.index(b))


def _swapped(match: re.Match[str]) -> str:
    side, other = match[0], _OTHER_SIDE[match[0].lower()]
    return other.upper() if side.isupper() else other.title() if side[0].isupper() else other


def _connections(names: Sequence[str], skeleton: object) -> tuple[tuple[str, str], ...]:
    pairs = skeleton if isinstance(skeleton, list) else []
    numbers = range(1, len(names) + 1)
    return tuple(
        (names[pair[0] - 1], names[pair[1] - 1])
        for pair in pairs
        if isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int and n in numbers for n in pair)
    )


def connection_rules(
    connections: Iterable[Sequence[str]],
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Detectron2's keypoint_connection_rules (name, name, RGB 0 … 255), in different colours."""
    pairs = list(connections)
    hues = (colorsys.hsv_to_rgb(i / len(pairs), 1, 1) for i in range(len(pairs)))
    colors = (tuple(round(255 * c) for c in hue) for hue in hues)
    return [(a, b, color) for (a, b), color in zip(pairs, colors)]


def count_labelled(annotations: Iterable[Mapping[str, Any]]) -> int:
    """The number of labelled keypoints of all annotations, whether visible or occluded."""
    return sum(v > 0 for a in annotations for v in a.get("keypoints", ())[2::3])
