"""Read LabelMe's labels, a JSON file per image, which X-AnyLabeling writes, too.

Rectangles are boxes; polygons, circles, oriented rectangles and masks are objects with a mask. As
in LabelMe, shapes with the same label and group_id are parts of one object. Coordinates are pixels,
and (0, 0) is the upper left corner of the image, as EXIF turns it. The images that LabelMe may have
embedded in its files are not read.
"""

import base64
import io
import math
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
from PIL import Image

from ...text import one_line, parse_json
from ..paths import files_below, files_in, in_threads, read_text
from .labels import (
    DIGITS,
    Faults,
    LabelledImages,
    annotation,
    bounding_box,
    check_classes,
    check_known,
    image_ids,
    is_number,
)
from .rle import is_short

MOST_FILES = 20  # that are looked into, to tell the format
NO_AREA = "points and lines (left out)"
BAD_SHAPE = "shapes that are not as LabelMe writes them (left out)"
IGNORED = "shapes labelled __ignore__ (left out)"
OTHER = "JSON files without LabelMe's imagePath and shapes (left out)"
BELOW = "JSON files in subfolders of a folder that has its own (left out)"
AGAIN = "JSON files of an image that another one labels, too (it is trained on with each)"
CORNERS = 64  # of a circle's polygon, whose area is 0.2% less
MOST_PIXELS = 2**28  # of an image; Pillow refuses larger ones

_IGNORED = "__ignore__"  # as in LabelMe's own converter to COCO's format
_POLYGONS = ("polygon", "oriented_rectangle", "rotation")  # the last is X-AnyLabeling's
_WITHOUT_AREA = ("point", "points", "line", "linestrip")


class LabelmeFile(NamedTuple):
    """The content of a JSON file: the image's path and size, objects, and faults with their places.

    An object is a class name and an annotation whose category_id is still missing. The size is
    (height, width), None if it isn't stated.
    """

    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str, dict[str, Any]]]
    faults: list[tuple[str, str]]


class LabelmeFolder(NamedTuple):
    """A folder's JSON files, those in its subfolders that are left out, and the folder."""

    root: str
    files: list[Path]
    left_out: list[Path]


def find_labelme(folder: str) -> LabelmeFolder | None:
    """The JSON files in a folder, if LabelMe's are among the first of them; else those in its
    subfolders, if they are there; else None."""
    own = files_in(folder, ".json")
    paths = sorted(path for path in files_below(folder) if path.endswith(".json"))
    below = [Path(path) for path in paths if os.path.isfile(path)]
    if _are_labelme(own):
        others = sorted(set(below).difference(own))
        return LabelmeFolder(folder, own, others if _are_labelme(others) else [])
    return LabelmeFolder(folder, below, []) if _are_labelme(below) else None


def _are_labelme(files: list[Path]) -> bool:
    contents = (path.read_bytes() for path in files[:MOST_FILES])
    return any(b'"shapes"' in text and b'"imagePath"' in text for text in contents)


def read_labelme(
    folder: LabelmeFolder, of_classes: LabelmeFolder, parse: Callable[[Path], LabelmeFile | None]
) -> LabelledImages:
    """Read the files of a folder. An image without a file is left out.

    Args:
        of_classes: the folder whose labels are the classes, sorted.
        parse: ``parse_labelme``, or a cache of it; it is called from several threads.

    Raises:
        ValueError: a file can't be read, or has an object of an unknown class; one line.
    """
    of_training = in_threads(parse, of_classes.files)
    names = {name for file in of_training if file for name, _ in file.objects}
    classes = check_classes(of_classes.root, sorted(names))
    index = {name: i for i, name in enumerate(classes)}
    faults, found, images = Faults(), [], set[str]()
    for path, file in zip(folder.files, in_threads(parse, folder.files), strict=True):
        if file is None:
            faults.add(OTHER, str(path))
            continue
        for fault, place in file.faults:
            faults.add(fault, place)
        if file.image in images:
            faults.add(AGAIN, str(path))
        images.add(file.image)
        found.append((path, file))
    for path in folder.left_out:
        faults.add(BELOW, str(path))
    records = []
    for image_id, (path, file) in zip(image_ids([path.stem for path, _ in found]), found):
        for name, _ in file.objects:
            check_known(str(path), name, index)
        own = [{**about, "category_id": index[name]} for name, about in file.objects]
        record = {"file_name": file.image, "image_id": image_id, "annotations": own}
        if file.size is not None:
            record["height"], record["width"] = file.size
        records.append(record)
    category_ids = tuple(range(1, len(classes) + 1))
    root = folder.root
    return LabelledImages(root, records, classes, category_ids, faults, image_root=root)


def parse_labelme(path: Path) -> LabelmeFile | None:
    """Parse a JSON file; None if it is another program's, such as the metrics of a training.

    Raises:
        ValueError: the file can't be read as JSON; one line.
    """
    text = read_text(path)
    if '"shapes"' not in text:
        return None
    try:
        content = parse_json(text)
    except ValueError as e:
        raise ValueError(f"{str(path)!r} is no JSON: {one_line(e)}") from e
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not isinstance(content.get("imagePath"), str):
        return None
    size = _size(content.get("imageHeight"), content.get("imageWidth"))
    parts: dict[Hashable, tuple[str, list[dict[str, Any]]]] = {}
    faults = []
    for i, shape in enumerate(shapes):
        part = _annotation(shape, size)
        if isinstance(part, str):
            faults.append((part, f"{path}: shapes[{i}]"))
        else:
            group = shape.get("group_id")
            key = (shape["label"], group) if isinstance(group, int) else i
            parts.setdefault(key, (shape["label"], []))[1].append(part)
    objects = [(name, _joined(own)) for name, own in parts.values()]
    return LabelmeFile(_image(path, content["imagePath"]), size, objects, faults)


def _size(height: object, width: object) -> tuple[int, int] | None:
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        return None
    return (height, width) if height * width <= MOST_PIXELS else None


def _image(path: Path, given: str) -> str:
    """The path of a file's image. If it isn't where the file says, it is looked for beside the
    file, and where datasets with a folder for labels have their images."""
    name = given.replace("\\", "/")
    folder, base = path.parent, os.path.basename(name)
    places = [
        folder / name, folder / base, folder.parent / "images" / base, folder.parent / base,
    ]  # fmt: skip
    found = next((place for place in places if os.path.isfile(place)), places[0])
    return os.path.normpath(found)


def _annotation(shape: Any, size: tuple[int, int] | None) -> dict[str, Any] | str:
    """A shape as an annotation without category_id, or its fault."""
    points = shape.get("points") if isinstance(shape, dict) else None
    if not isinstance(points, list) or not all(map(_is_point, points)):
        return BAD_SHAPE
    label, kind = shape.get("label"), shape.get("shape_type") or "polygon"
    if not isinstance(label, str) or not label:
        return BAD_SHAPE
    if label == _IGNORED or kind in _WITHOUT_AREA:
        return IGNORED if label == _IGNORED else NO_AREA
    flat = [round(v, DIGITS) for point in points for v in point]
    if kind == "rectangle" and len(points) >= 2:
        return annotation(bounding_box(flat), 0)
    if kind == "circle" and len(points) == 2:
        return _circle(*points)
    if kind == "mask" and len(points) == 2:
        return _mask(shape.get("mask"), points, size)
    if kind in _POLYGONS and len(points) >= 3:
        return _polygon(flat)
    return BAD_SHAPE


def _is_point(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _polygon(ring: list[float]) -> dict[str, Any]:
    return {**annotation(bounding_box(ring), 0), "segmentation": [ring]}


def _circle(center: list[float], rim: list[float]) -> dict[str, Any]:
    radius = math.dist(center, rim)
    ring = []
    for angle in (2 * math.pi * i / CORNERS for i in range(CORNERS)):
        ring += [center[0] + radius * math.cos(angle), center[1] + radius * math.sin(angle)]
    return _polygon([round(v, DIGITS) for v in ring])


def _mask(
    png: object, points: list[list[float]], size: tuple[int, int] | None
) -> dict[str, Any] | str:
    """A mask, from the PNG of its pixels between two points, which are its outermost pixels."""
    try:
        (left, top), (right, bottom) = ((int(x), int(y)) for x, y in points)
        if size is None or min(left, top) < 0 or bottom >= size[0] or right >= size[1]:
            return BAD_SHAPE
        with Image.open(io.BytesIO(base64.b64decode(str(png), validate=True))) as image:
            if image.size != (right - left + 1, bottom - top + 1):
                return BAD_SHAPE
            pixels = np.asarray(image.convert("L")) > 0
    except Exception:  # a NaN, no base64; a damaged PNG raises many kinds of errors
        return BAD_SHAPE
    if not pixels.any():
        return BAD_SHAPE
    whole = np.zeros(size, np.uint8, order="F")
    whole[top : bottom + 1, left : right + 1] = pixels
    rle = pycocotools.mask.encode(whole)
    return {**annotation(pycocotools.mask.toBbox(rle).tolist(), 0), "segmentation": rle}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One object's annotation from those of its parts; it has a mask if all of them have one."""
    if len(parts) == 1:
        return parts[0]
    boxes = [part["bbox"] for part in parts]
    found = annotation(bounding_box([v for x, y, w, h in boxes for v in (x, y, x + w, y + h)]), 0)
    masks = [part["segmentation"] for part in parts if "segmentation" in part]
    rings = [ring for mask in masks if isinstance(mask, list) for ring in mask]
    rles = [mask for mask in masks if not isinstance(mask, list)]
    if len(masks) < len(parts):
        return found
    if not rles:
        return {**found, "segmentation": rings}
    height, width = rles[0]["size"]
    if not all(is_short(ring, width, height) for ring in rings):
        return found
    rles += pycocotools.mask.frPyObjects(rings, height, width) if rings else []
    return {**found, "segmentation": pycocotools.mask.merge(rles)}
