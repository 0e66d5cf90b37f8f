"""Read YOLO's labels, a text file for each image, as Ultralytics' data.yaml or others name them.

supervision's DetectionDataset.from_yolo is not used: it rounds boxes to float32 and turns polygons
into pixels, so that a data set's boxes would differ from those of its COCO file. Coordinates are
scaled to pixels here and rounded to a thousandth of a pixel, as Detectron2 rounds the ground truth
of its COCO evaluation. So an integer coordinate that was divided by the image's size is restored.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...text import brief, one_line
from ...yaml_tags import load_yaml
from ..images.names import images_of
from ..images.probing import probe_all
from ..paths import files_below, files_in, in_threads, read_text
from .keypoints import Keypoints, of_classes
from .labels import (
    DIGITS,
    Faults,
    LabelledImages,
    annotation,
    bounding_box,
    check_classes,
    image_ids,
)

NO_LABEL = "label lines that are neither class x y width height nor a polygon (left out)"
NO_POSE = "label lines that are not class x y width height and kpt_shape's keypoints (left out)"

_DESCRIBES = re.compile(rb"^names:.*^train:|^train:.*^names:", re.MULTILINE | re.DOTALL)

Shape = tuple[int, int]  # kpt_shape: keypoints, numbers per keypoint; (0, 0) if there are none


class YoloSet(NamedTuple):
    """Classes, the image paths of "train" and, if there is one, "val", keypoints, and kpt_shape."""

    classes: tuple[str, ...]
    splits: dict[str, list[str]]
    keypoints: Keypoints = Keypoints()
    shape: Shape = (0, 0)


# Where images are if no file says so: the first place that exists is that of the split.
Places = dict[str, tuple[str, ...]]
_USUAL: Places = {
    "train": ("images/train", "train", "images"),
    "val": ("images/val", "valid", "val"),
}
# Files with a class on each line: darknet's, which CVAT exports, and those of Label Studio,
# LabelImg and AnyLabeling.
CLASS_LISTS: dict[str, Places] = {
    "obj.names": {"train": ("obj_train_data",), "val": ("obj_valid_data",)},
    "classes.txt": {"train": (*_USUAL["train"], "."), "val": _USUAL["val"]},
}


def find_yolo(folder: str, is_own: bool) -> str:
    """The file in a folder that describes a YOLO data set; "" if there is none.

    Args:
        is_own: whether to look for data.yaml, or for its content under another name, and for
            ``CLASS_LISTS``.
    """
    if is_own:
        paths = [os.path.join(folder, "data.yaml")]
    else:
        others = sorted([*files_in(folder, ".yaml"), *files_in(folder, ".yml")])
        paths = [str(path) for path in others if _DESCRIBES.search(path.read_bytes())]
        paths += [os.path.join(folder, sub, n) for n in CLASS_LISTS for sub in ("", "labels")]
    return next(filter(os.path.isfile, paths), "")


def read_yolo_set(path: str) -> YoloSet:
    """Read data.yaml, or a file of ``CLASS_LISTS``, but no labels.

    Raises:
        ValueError: the file has another content, or names a file that does not exist; one line.
    """
    if os.path.basename(path) not in CLASS_LISTS:
        return _data_yaml(path)
    classes = check_classes(path, read_text(path).rstrip().splitlines())
    folder = os.path.dirname(path)
    folder = os.path.dirname(folder) if os.path.basename(folder) == "labels" else folder
    given = _existing(path, folder, CLASS_LISTS[os.path.basename(path)])
    return YoloSet(classes, {s: _images(path, folder, place) for s, place in given.items()})


def _existing(path: str, folder: str, places: Places) -> dict[str, str]:
    """The first place of each split that exists in a folder.

    Args:
        path: the file that describes the data set, for the error.
    """
    there = {
        split: [name for name in names if os.path.exists(os.path.join(folder, name))]
        for split, names in places.items()
    }
    if not there["train"]:
        raise ValueError(
            f"{path!r} names no training images: it has no 'train', and {folder!r} has no "
            f"{' or '.join(places['train'])}"
        )
    return {split: names[0] for split, names in there.items() if names}


def _data_yaml(path: str) -> YoloSet:
    text = read_text(path)
    try:
        content = load_yaml(text)
    except yaml.YAMLError as e:
        raise ValueError(f"{path!r} is no YAML of plain values: {one_line(e)}") from e
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise ValueError(f"{path!r} is no data.yaml of YOLO's: it has no 'names' of its classes")
    names = content["names"]
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise ValueError(
                f"{path!r}: the keys of 'names' are not 0 … {len(names) - 1}: {brief(list(names))}"
            )
        names = [names[i] for i in range(len(names))]
    classes = check_classes(path, names)
    if content.get("nc", len(classes)) != len(classes):
        raise ValueError(f"{path!r} has nc {brief(content['nc'])}, but {len(classes)} names")
    given = {split: content[split] for split in ("train", "val") if content.get(split)}
    if "train" not in given:  # supervision writes none
        given = _existing(path, os.path.dirname(path), _USUAL)
    splits = {split: _images(path, content.get("path"), place) for split, place in given.items()}
    return YoloSet(classes, splits, *_keypoints(path, classes, content))


def _keypoints(
    path: str, classes: tuple[str, ...], content: dict[str, Any]
) -> tuple[Keypoints, Shape]:
    shape, flip_idx = content.get("kpt_shape"), content.get("flip_idx")
    if shape is None:
        return Keypoints(), (0, 0)
    if (
        not isinstance(shape, list)
        or [type(n) for n in shape] != [int, int]
        or shape[0] < 1
        or shape[1] not in (2, 3)
    ):
        raise ValueError(
            f"{path!r} has kpt_shape {brief(shape)}; it must be the number of keypoints and the "
            "numbers of each, 2 or 3, such as [17, 3]; leave it out for boxes or polygons"
        )
    number = shape[0]
    if flip_idx is not None and not (
        isinstance(flip_idx, list)
        and len(flip_idx) == number
        and all(type(j) is int and 0 <= j < number for j in flip_idx)
        and all(flip_idx[j] == i for i, j in enumerate(flip_idx))
    ):
        raise ValueError(
            f"{path!r} has flip_idx {brief(flip_idx)}; it must say which of kpt_shape's "
            f"{number} keypoints, 0 … {number - 1}, each becomes in a mirror image, such as "
            "[0, 2, 1]"
        )
    names = content.get("kpt_names")
    lists = [names.get(i) if isinstance(names, dict) else None for i in range(len(classes))]
    lists = [found if isinstance(found, list) and len(found) == number else None for found in lists]
    return of_classes(dict(zip(classes, lists)), number, flip_idx=flip_idx), (number, shape[1])


def read_yolo(source: str, folder: str, images: list[str], about: YoloSet) -> LabelledImages:
    """Read the label files of images. An image without a label file has no boxes.

    Args:
        source: the name of the data set in messages.
        folder: the folder of the data set.
        images: the paths of images; an image that can't be read has no boxes either.
        about: the data set; with keypoints, there are no polygons.

    Raises:
        ValueError: no label file exists, or a label's class is not in ``classes``; one line.
    """
    classes, shape = about.classes, about.shape
    labels = [label_file(image) for image in images]
    texts = in_threads(_text, labels)
    if all(text is None for text in texts):
        raise ValueError(f"{source!r}: not one of {len(labels)} label files exists, {labels[:1]}")
    faults = Faults()
    records = []
    ids = image_ids([Path(image).stem for image in images])
    files = probe_all(images)
    for image, label, text, image_id, file in zip(images, labels, texts, ids, files):
        record: dict[str, Any] = {"file_name": image, "image_id": image_id, "annotations": []}
        if file.size is not None and text is not None:
            found = _labels(label, text, file.size, classes, shape, faults)
            record["annotations"] = list(found)
        records.append(record)
    category_ids = tuple(range(1, len(classes) + 1))
    return LabelledImages(
        source, records, classes, category_ids, faults, image_root=folder, keypoints=about.keypoints
    )


def label_file(image: str) -> str:
    """An image's label file, as in Ultralytics: in labels/ for images/, else beside the image."""
    before, folder, after = image.rpartition(f"{os.sep}images{os.sep}")
    path = f"{before}{os.sep}labels{os.sep}{after}" if folder else image
    return os.path.splitext(path)[0] + ".txt"


def _text(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    return Path(path).read_text(encoding="utf-8-sig", errors="replace")


def _labels(
    path: str,
    text: str,
    size: tuple[int, int],
    classes: tuple[str, ...],
    shape: Shape,
    faults: Faults,
) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        words, where = line.split(), f"{path}:{number}"
        if not words:
            continue
        try:
            category, *values = map(float, words)
        except ValueError:
            faults.add(NO_LABEL, where)
            continue
        if not 0 <= category < len(classes) or category % 1:
            raise ValueError(
                f"{where} has the class {one_line(words[0], 40)}, but {len(classes)} are named, "
                f"0 … {len(classes) - 1}"
            )
        if shape[0]:
            if len(values) == 4 + math.prod(shape):
                found = annotation(_box(values[:4], size), int(category))
                yield {**found, "keypoints": _points(values[4:], size, shape[1])}
            else:
                faults.add(NO_POSE, where)
        elif len(values) == 4:
            yield annotation(_box(values, size), int(category))
        elif len(values) >= 6 and len(values) % 2 == 0:
            yield _polygon(values, size, int(category))
        else:
            faults.add(NO_LABEL, where)


def _box(values: list[float], size: tuple[int, int]) -> list[float]:
    x, y, width, height = values
    corner = (x - width / 2) * size[0], (y - height / 2) * size[1]
    return [round(v, DIGITS) for v in (*corner, width * size[0], height * size[1])]


def _points(values: list[float], size: tuple[int, int], numbers: int) -> list[float]:
    """Keypoints in COCO's form: x, y (pixels) and visibility. Without a third number, a keypoint is
    not labelled if a coordinate is negative or both are 0."""
    points: list[float] = []
    for i in range(0, len(values), numbers):
        x, y, *visible = values[i : i + numbers]
        points += [round(x * size[0], DIGITS), round(y * size[1], DIGITS)]
        points += visible or [0 if min(x, y) < 0 or x == y == 0 else 2]
    return points


def _polygon(values: list[float], size: tuple[int, int], category: int) -> dict[str, Any]:
    points = [round(v * size[i % 2], DIGITS) for i, v in enumerate(values)]
    return {**annotation(bounding_box(points), category), "segmentation": [points]}


def _images(path: str, root: object, given: object) -> list[str]:
    """The image paths of a split: all images below its folders, and those listed in text files."""
    images: list[str] = []
    for name in given if isinstance(given, list) else [given]:
        place = _find(path, str(root or ""), str(name))
        if os.path.isdir(place):
            images += images_of(files_below(place))
        else:
            lines = [line.strip() for line in read_text(place).split("\n")]
            images += _listed(os.path.dirname(place), [line for line in lines if line])
    if not images:
        raise ValueError(f"{path!r}: there are no images in {brief(given)}")
    return images


def _find(path: str, root: str, name: str) -> str:
    """Find a file or folder that data.yaml names.

    Ultralytics looks for a relative ``path`` in its own folder of data sets, Roboflow writes
    ``../train`` for ``train``, and an absolute path may be another machine's. So the folder of
    data.yaml is searched, too, also without the first parts of such a name.
    """
    folder = os.path.dirname(path)
    roots = [_join(folder, root), *([os.path.abspath(root), folder] if root else [])]
    is_elsewhere = name.startswith(("..", "/")) or name[1:2] == ":"
    names = [name, *(_shortened(name) if is_elsewhere else [])]
    places = [_join(r, n) for r in roots for n in names]
    for place in places:
        if os.path.exists(place):
            return place
    raise ValueError(f"{path!r} names {brief(name)}, which does not exist: {brief(places[0])}")


def _listed(folder: str, lines: list[str]) -> list[str]:
    """The paths of listed images. If the first does not exist as it is listed (darknet's lists
    begin with ``data/``, others with another machine's folder), all lose as many first parts as it
    takes until it does."""
    paths = [_join(folder, line) for line in lines]
    if paths and not os.path.exists(paths[0]):
        for skipped, name in enumerate(_shortened(lines[0])):
            if os.path.exists(_join(folder, name)):
                return [_join(folder, "/".join(_parts(line)[skipped:])) for line in lines]
    return paths


def _shortened(name: str) -> list[str]:
    """A path as a relative one, then without its first part, without its first two, and so on."""
    parts = _parts(name)
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _join(folder: str, name: str) -> str:
    return os.path.normpath(os.path.join(folder, name))
