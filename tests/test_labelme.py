"""LabelMe's shapes become the objects that LabelMe shows."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
from helpers import raises_one_line

from randwire_d2.data.formats.labelme import (
    AGAIN,
    BAD_SHAPE,
    BELOW,
    IGNORED,
    NO_AREA,
    OTHER,
    parse_labelme,
)
from randwire_d2.data.formats.layouts import find_splits

HEIGHT, WIDTH = 32, 48


def shape(kind: str | None, *points: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"label": "cat", "points": [list(p) for p in points], "shape_type": kind, **more}


def png(pixels: np.ndarray) -> str:
    return base64.b64encode(cv2.imencode(".png", pixels.astype(np.uint8) * 255)[1]).decode()


def put(folder: Path, *shapes: Any, stem: str = "a", **more: Any) -> Path:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    content = {"shapes": shapes, "imagePath": f"{stem}.jpg", "imageData": None, **size, **more}
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(content))
    return path


def parsed(folder: Path, *shapes: Any) -> list[dict[str, Any]]:
    """The annotations of shapes without fault."""
    file = parse_labelme(put(folder, *shapes))
    assert file is not None and file.size == (HEIGHT, WIDTH) and file.faults == []
    assert file.image == str(folder / "a.jpg") and {name for name, _ in file.objects} == {"cat"}
    return [found for _, found in file.objects]


def pixels(found: dict[str, Any]) -> np.ndarray:
    mask = found["segmentation"]
    if isinstance(mask, list):
        rings = pycocotools.mask.frPyObjects(mask, HEIGHT, WIDTH)
        mask = pycocotools.mask.merge(rings)
    return pycocotools.mask.decode(mask).astype(bool)


def test_boxes_and_outlines(tmp_path: Path) -> None:
    """Wrong: a box depends on which corner was clicked first; a tilted box loses its outline."""
    tilted = (10.0, 4.0), (16.0, 10.0), (12.0, 14.0), (6.0, 8.0)
    found = parsed(
        tmp_path,
        shape("rectangle", (20.5, 4), (8, 16.25)),
        shape("rectangle", (8, 4), (20, 4), (20, 16), (8, 16)),  # X-AnyLabeling's
        shape("polygon", *tilted[:3]),
        shape(None, *tilted[:3]),  # LabelMe's before version 4
        shape("oriented_rectangle", *tilted),
        shape("rotation", *tilted),
    )
    assert [a["bbox"] for a in found[:2]] == [[8, 4, 12.5, 12.25], [8, 4, 12, 12]]
    assert not any("segmentation" in a for a in found[:2])
    assert [a["bbox"] for a in found[2:]] == [[10, 4, 6, 10]] * 2 + [[6, 4, 10, 10]] * 2
    ring = [v for point in tilted for v in point]
    assert [a["segmentation"] for a in found[2:]] == [[ring[:6]]] * 2 + [[ring]] * 2


def test_a_circle_is_its_disc(tmp_path: Path) -> None:
    """Wrong: the second point is taken for a corner, or the polygon is a coarse one."""
    (found,) = parsed(tmp_path, shape("circle", (20, 15), (23, 19)))
    assert found["bbox"] == [15, 10, 10, 10]
    x, y = np.array(found["segmentation"][0]).reshape(-1, 2).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert math.isclose(area, math.pi * 25, rel_tol=0.002)


def test_a_mask_lies_where_it_was_painted(tmp_path: Path) -> None:
    """Wrong: it is a pixel too small, shifted or filled; its box is that of the PNG."""
    painted = np.zeros((5, 4), bool)
    painted[1:4, 1:3] = painted[2, 0] = True
    (found,) = parsed(tmp_path, shape("mask", (10, 20), (13, 24), mask=png(painted)))
    assert found["bbox"] == [10, 21, 3, 3]
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[20:25, 10:14] = painted
    assert np.array_equal(pixels(found), expected)


def test_a_group_is_one_object(tmp_path: Path) -> None:
    """Wrong: a car behind a pole is two cars; groups of other labels, or no group, are joined."""
    left, right = ((2, 2), (8, 2), (8, 8), (2, 8)), ((12, 4), (18, 4), (18, 10), (12, 10))
    painted = shape("mask", (30, 5), (31, 6), mask=png(np.ones((2, 2), bool)), group_id=2)
    found = parsed(
        tmp_path,
        shape("polygon", *left, group_id=1),
        shape("polygon", *right, group_id=2),
        shape("polygon", *right, group_id=1),
        painted,
        shape("polygon", *left, group_id=None),
        shape("polygon", *left, group_id=None),
        shape("polygon", *left, group_id=3),
        shape("rectangle", *right[::2], group_id=3),
    )
    assert [a["bbox"] for a in found] == [
        [2, 2, 16, 8], [12, 4, 20, 6], [2, 2, 6, 6], [2, 2, 6, 6], [2, 2, 16, 8],
    ]  # fmt: skip
    assert len(found[0]["segmentation"]) == 2 and pixels(found[0]).sum() == 2 * 36
    assert pixels(found[1]).sum() == 36 + 4 and pixels(found[1])[5, 30]
    assert "segmentation" not in found[4]  # a part is only a box
    far = shape("polygon", (2, 2), (1e9, 2), (1e9, 9), group_id=2)  # pycocotools would crash
    assert "segmentation" not in parsed(tmp_path, painted, far)[0]
    other = {**shape("polygon", *right, group_id=1), "label": "dog"}
    file = parse_labelme(put(tmp_path, shape("polygon", *left, group_id=1), other))
    assert file is not None and [name for name, _ in file.objects] == ["cat", "dog"]


def test_what_has_no_area_is_left_out(tmp_path: Path) -> None:
    """Wrong: a point becomes an object, or a damaged shape ends the reading with a traceback."""
    bad: list[Any] = [
        None, {}, shape("polygon", (1, 1), (2, 2)), shape("rectangle", (1, 1)), shape("circle"),
        shape("cuboid", (1, 1), (9, 1), (9, 9)), {**shape("rectangle", (1, 1), (2, 2)), "label": 3},
        {**shape("rectangle"), "points": [[1, "a"], [2, 2]]}, {**shape("rectangle"), "points": 1},
        shape("mask", (1, 1), (2, 2)), shape("mask", (1, 1), (2, 2), mask="no PNG"),
        shape("mask", (1, 1), (2, 2), mask=""), shape("mask", (1, 1), (2, 2), mask="aaaa"),
        shape("mask", (math.nan, 1), (2, 2), mask=png(np.ones((2, 2)))),
        shape("mask", (1, 1), (3, 3), mask=png(np.ones((2, 2)))),
        shape("mask", (1, 1), (2, 2), mask=png(np.zeros((2, 2)))),
        shape("mask", (47, 1), (48, 2), mask=png(np.ones((2, 2)))),
        shape("mask", (-1, 1), (0, 2), mask=png(np.ones((2, 2)))),
    ]  # fmt: skip
    lines = [shape("point", (1, 1)), shape("line", (1, 1), (9, 9)), shape("linestrip", (1, 1))]
    ignored = {**shape("rectangle", (1, 1), (9, 9)), "label": "__ignore__"}
    path = put(tmp_path, *bad, *lines, ignored)
    file = parse_labelme(path)
    assert file is not None and not file.objects
    kinds = [BAD_SHAPE] * len(bad) + [NO_AREA] * len(lines) + [IGNORED]
    assert file.faults == [(kind, f"{path}: shapes[{i}]") for i, kind in enumerate(kinds)]
    for size in ({"imageHeight": None}, {"imageWidth": -3}, {"imageHeight": 10**9}):
        file = parse_labelme(put(tmp_path, shape("mask", (1, 1), (1, 1), mask=png(np.ones((1, 1)))),
                                 **size))  # fmt: skip
        assert (
            file is not None
            and file.size is None
            and [kind for kind, _ in file.faults] == [BAD_SHAPE]
        )


def test_a_folder_of_files(tmp_path: Path) -> None:
    """Wrong: another program's file ends the reading; an unknown class or no JSON is no message."""
    put(tmp_path, shape("rectangle", (1, 1), (9, 9)), shape("point", (3, 3)))
    put(tmp_path, stem="b")
    (tmp_path / "other.json").write_text("[]")
    found = find_splits(str(tmp_path))["train"]()
    assert found.classes == ("cat",) and [len(r["annotations"]) for r in found.records] == [1, 0]
    assert [(r["height"], r["width"]) for r in found.records] == [(HEIGHT, WIDTH)] * 2
    assert found.faults.kinds == {OTHER, NO_AREA}
    val = tmp_path / "val"
    path = put(val, {**shape("rectangle", (1, 1), (9, 9)), "label": "dog"})
    with raises_one_line(ValueError, match="class 'dog', which is none of the 1: cat"):
        find_splits(str(tmp_path), str(val))["val"]()
    path.write_text(path.read_text()[:-1])
    with raises_one_line(ValueError, match="is no JSON"):
        find_splits(str(val))["train"]()


def test_subfolders_and_what_else_is_in_them(tmp_path: Path) -> None:
    """Wrong: with files in the folder itself, those in its subfolders are left out, and nobody is
    told; or a training whose OUTPUT_DIR is a subfolder can't be resumed."""
    box = shape("rectangle", (1, 1), (9, 9))
    path = put(tmp_path, box)
    put(tmp_path / "more", box, stem="b")
    put(tmp_path / "more", box, stem="c", imagePath=f"{'c' * 5000}.jpg")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}\n{}\n")
    (tmp_path / "run" / "gone.json").symlink_to("nowhere.json")
    found = find_splits(str(tmp_path))["train"]()
    assert len(found.records) == 1 and found.faults.kinds == {BELOW}
    path.unlink()
    found = find_splits(str(tmp_path))["train"]()
    assert len(found.records) == 2 and found.faults.kinds == {OTHER}


def test_two_files_of_an_image_are_told(tmp_path: Path) -> None:
    """Wrong: beside a copy of a file, the image's objects are silently doubled, or background."""
    put(tmp_path, shape("rectangle", (1, 1), (9, 9)))
    put(tmp_path, shape("rectangle", (1, 1), (9, 9)), stem="b")
    assert not find_splits(str(tmp_path))["train"]().faults
    put(tmp_path, shape("rectangle", (11, 11), (19, 19)), stem="a_copy", imagePath="a.jpg")
    assert find_splits(str(tmp_path))["train"]().faults.kinds == {AGAIN}
