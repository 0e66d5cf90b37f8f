"""The keypoints of a data set: their names, which change places in a mirror, which are joined."""

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
    """What the objects of a data set have, whatever their class.

    Attributes:
        names: in the order of an annotation's keypoints; none, if there are none for a detector.
        flips: pairs of names that change places in a mirror image; None if that isn't known.
        connections: pairs of names that a line joins.
        why: the reason why there are none, to follow "has no keypoint_names"; "" if none is known.
    """

    names: tuple[str, ...] = ()
    flips: tuple[tuple[str, str], ...] | None = None
    connections: tuple[tuple[str, str], ...] = ()
    why: str = ""


def of_classes(
    given: Mapping[str, object], number: int, skeleton: object = None, flip_idx: object = None
) -> Keypoints:
    """
    Args:
        given: from classes to what should be a list of their keypoints' names; falsy for none.
        number: of keypoints where no class has names: then they are numbered.
        skeleton: pairs of numbers, from 1 on, as COCO has them.
        flip_idx: which keypoint each becomes in a mirror image, as YOLO has it; it is valid.
    """
    lists = {c: tuple(map(str, v)) for c, v in given.items() if isinstance(v, list) and v}
    (first, names), *others = lists.items() or [("", ())]
    for other, its_names in others:
        if its_names != names:
            kinds = f"{first!r} has {brief(names)}, {other!r} {brief(its_names)}"
            return Keypoints(why=f" that all classes share, as a Keypoint R-CNN's do ({kinds})")
    if len(set(names)) < len(names) or not names:  # of two alike none can be told
        names = tuple(f"keypoint {i}" for i in range(len(names) or number))
    flips = _flips(names)
    if isinstance(flip_idx, list):
        flips = tuple((names[i], names[j]) for i, j in enumerate(flip_idx) if i < j)
    return Keypoints(names, flips, _connections(names, skeleton))


def _flips(names: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """By left and right, or l and r, in the names.

    Names that tell no sides, such as numbers, may have them all the same; a single one has none.
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
    """Detectron2's keypoint_connection_rules, each of a colour of its own."""
    pairs = list(connections)
    hues = (colorsys.hsv_to_rgb(i / len(pairs), 1, 1) for i in range(len(pairs)))
    colors = (tuple(round(255 * c) for c in hue) for hue in hues)
    return [(a, b, color) for (a, b), color in zip(pairs, colors)]


def count_labelled(annotations: Iterable[Mapping[str, Any]]) -> int:
    """The points of objects that are labelled, whether they are seen or hidden."""
    return sum(v > 0 for a in annotations for v in a.get("keypoints", ())[2::3])
