"""Read COCO's instances format like Detectron2's ``load_coco_json``, but name a file's faults.

On an invalid file, Detectron2's reader fails with a KeyError or an assertion, and it makes a class
of the root category (``supercategory: none``) that Roboflow's exports begin with. supervision's
DetectionDataset rounds boxes to float32 and keeps masks as pixels. On a valid file, the records
here equal those of ``load_coco_json``, which a test compares.
"""

import codecs
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pycocotools.mask

from ...text import brief, named, one_line, parse_json
from ..paths import read_text
from .keypoints import Keypoints, of_classes
from .labels import Faults, LabelledImages, annotation, check_classes, is_number

NO_IMAGE = "annotations of an image that is not in the file (left out)"
NOT_FOUR = "boxes that are not four numbers (left out)"
NO_POLYGON = "masks without a polygon of three points (their objects are left out)"
NO_CROWD = "annotations whose iscrowd is neither 0 nor 1 (left out)"
IGNORED = 'annotations with "ignore" (left out)'


def is_coco(json_file: Path) -> bool:
    """Whether a file looks like one in COCO's instances format; it is not parsed."""
    content = json_file.read_bytes()
    return all(b'"%s"' % key in content for key in (b"images", b"annotations", b"categories"))


def read_coco(json_file: str, *image_roots: str) -> LabelledImages:
    """Read a file in COCO's instances format; images need no height and width.

    Args:
        image_roots: the folder of the images. Of several, it is the first that has one of the first
            images or, if none has, the first.

    Raises:
        ValueError: the file has another format, two images or categories have the same id, or an
            annotation has a category that the file doesn't have; one line.
    """
    content = _parse(json_file)
    images, annotations, categories = (
        _list(json_file, content, key) for key in ("images", "annotations", "categories")
    )
    used = {_key(a, "category_id") for a in annotations}
    before = len(categories)
    categories = _without_root(_by_id(json_file, "category", categories, "name"), used)
    index = {category["id"]: i for i, category in enumerate(categories)}
    keypoints, faults = _keypoints(categories, annotations), Faults()
    records = {}
    images = _by_id(json_file, "image", images, "file_name")
    image_root = _root(image_roots, [str(image["file_name"]) for image in images[:10]])
    for image in images:
        record: dict[str, Any] = {
            "file_name": _path(image_root, str(image["file_name"])),
            "image_id": image["id"],
            "annotations": [],
        }
        record |= {k: int(image[k]) for k in ("height", "width") if _is_whole(image.get(k))}
        records[image["id"]] = record
    for entry in annotations:
        image_id = _key(entry, "image_id")
        found = _annotation(json_file, entry, index) if image_id in records else NO_IMAGE
        if isinstance(found, str):
            faults.add(found, _where(entry))
        else:
            if keypoints.names:
                found["keypoints"] = entry.get("keypoints")
            records[image_id]["annotations"].append(found)
    evaluable = (
        len(categories) == before
        and not _has_mark(json_file)
        and _is_evaluable(images, annotations, keypoints)
    )
    return LabelledImages(
        json_file,
        list(records.values()),
        check_classes(json_file, (category["name"] for category in categories)),
        tuple(index),
        faults,
        json_file if evaluable else None,
        image_root,
        keypoints,
    )


def _root(roots: Sequence[str], names: list[str]) -> str:
    """The first folder that has an image of one of these names."""
    has_images = (r for r in roots if any(os.path.isfile(_path(r, name)) for name in names))
    return next(has_images, roots[0])


def _path(root: str, name: str) -> str:
    path = os.path.join(root, name)
    if "\\" in name and not os.path.exists(path):  # written on Windows
        return os.path.join(root, name.replace("\\", "/"))
    return path


def _parse(json_file: str) -> dict[str, Any]:
    text = read_text(json_file)
    try:
        content = parse_json(text)
    except ValueError as e:
        raise ValueError(f"{json_file!r} is no JSON: {one_line(e)}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{json_file!r} is not in COCO's format: it holds no object")
    return content


def _has_mark(json_file: str) -> bool:
    """Whether a file begins with a byte order mark, which COCO's own reader refuses."""
    with open(json_file, "rb") as f:
        return f.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _list(json_file: str, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(
            f"{json_file!r} is not in COCO's instances format: it has no list of {key!r}"
        )
    return found


def _by_id(
    json_file: str, what: str, entries: list[dict[str, Any]], name: str
) -> list[dict[str, Any]]:
    """Sort entries by their ids; each must have a unique integer id and a name."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        key = entry.get("id")
        if name not in entry:
            raise ValueError(f"{json_file!r}: {what} {brief(key)} has no {name!r}")
        if not isinstance(key, int):
            raise ValueError(
                f"{json_file!r}: {what} {brief(entry[name])} has the id {brief(key)}, which is no "
                f"integer; number each {what}, and refer to the numbers in the annotations"
            )
        if key in found:
            raise ValueError(
                f"{json_file!r}: two {what} entries, {brief(found[key][name])} and "
                f"{brief(entry[name])}, have the id {key}; give each its own"
            )
        found[key] = entry
    return [found[key] for key in sorted(found)]


def _without_root(categories: list[dict[str, Any]], used: set[Any]) -> list[dict[str, Any]]:
    """Leave out the root category that Roboflow writes, which no annotation has."""
    above = {str(category.get("supercategory")) for category in categories}
    return [
        category
        for category in categories
        if category["id"] in used
        or category.get("supercategory") != "none"
        or str(category["name"]) not in above
    ]


def _keypoints(categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Keypoints:
    """The keypoints of the categories, with the first skeleton. If no category has names, as in
    files of Detectron2's ``convert_to_coco_json``, the annotations tell their number."""
    lists = [found for a in annotations if isinstance(found := a.get("keypoints"), list)]
    number = max((len(found) // 3 for found in lists), default=0)
    skeleton = next((c["skeleton"] for c in categories if c.get("skeleton")), None)
    return of_classes({str(c["name"]): c.get("keypoints") for c in categories}, number, skeleton)


def _is_evaluable(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], keypoints: Keypoints
) -> bool:
    """Whether COCO's evaluation can read the file unchanged.

    It ignores a match with the annotation whose id is 0, and Roboflow's ids begin with 0. If the
    categories have keypoints, every annotation must have keypoints and a correct num_keypoints.
    """
    ids = {a.get("id") for a in annotations if isinstance(a.get("id"), int)}
    return (
        0 not in ids
        and len(ids) == len(annotations)
        and all(is_number(a.get("area")) and a.get("iscrowd") in (0, 1) for a in annotations)
        and all(isinstance(image.get(k), int) for image in images for k in ("height", "width"))
        and (not keypoints.names or all(map(_counts_keypoints, annotations)))
    )


def _counts_keypoints(entry: dict[str, Any]) -> bool:
    found = entry.get("keypoints")
    return (
        isinstance(found, list)
        and len(found) > 0
        and entry.get("num_keypoints") == sum(v in (1, 2) for v in found[2::3])
    )


def _where(entry: dict[str, Any]) -> str:
    return f"annotation {brief(entry.get('id'))}"


def _annotation(
    json_file: str, entry: dict[str, Any], index: dict[int, int]
) -> dict[str, Any] | str:
    """An entry's annotation in Detectron2's form, or its fault as text."""
    category, box = _key(entry, "category_id"), entry.get("bbox")
    segmentation = entry.get("segmentation")
    if category not in index:
        raise ValueError(
            f"{json_file!r}: {_where(entry)} has the category_id "
            f"{brief(entry.get('category_id'))}, which is none of its {len(index)} categories "
            f"({named(index)})"
        )
    polygons = segmentation if isinstance(segmentation, list) else []
    valid = [p for p in polygons if isinstance(p, list) and len(p) % 2 == 0 and len(p) >= 6]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return NOT_FOUR
    if entry.get("ignore") or (polygons and not valid):
        return IGNORED if entry.get("ignore") else NO_POLYGON
    crowd = entry.get("iscrowd")
    if crowd not in (None, 0, 1):  # to Detectron2, all but 0 are crowds, even None
        return NO_CROWD
    found = annotation(box, index[category], int(crowd or 0))
    if isinstance(segmentation, dict):
        found["segmentation"] = _compressed(segmentation)
    elif valid:
        found["segmentation"] = valid
    return found


def _is_whole(value: Any) -> bool:
    return is_number(value) and value % 1 == 0  # some programs write 640.0


def _key(entry: dict[str, Any], name: str) -> Any:
    """The integer that an entry has under a name; None if it is missing or of another type."""
    return entry[name] if isinstance(entry.get(name), int) else None


def _compressed(rle: dict[str, Any]) -> dict[str, Any]:
    """An RLE compressed as in Detectron2; {}, which fits no image, if it can't be read."""
    if not isinstance(rle.get("counts"), list):
        return rle
    try:
        return pycocotools.mask.frPyObjects(rle, *rle["size"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
