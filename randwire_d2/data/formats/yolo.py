"""Read Ultralytics' data.yaml: images in folders or lists, with a text file of labels for each.

supervision's DetectionDataset.from_yolo is not used: it rounds boxes to float32 and turns polygons
into pixels, so that a data set's boxes would differ from those of its COCO file. Coordinates are
scaled to pixels here and rounded to a thousandth of a pixel, as Detectron2 rounds the ground truth
of its COCO evaluation. So an integer coordinate that was divided by the image's size is restored.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...text import brief, one_line
from ...yaml_tags import load_yaml
from ..images.names import images_of
from ..images.probing import probe_all
from ..paths import files_below, in_threads, read_text
from .keypoints import Keypoints, of_classes
from .labels import Faults, LabelledImages, annotation, check_classes, image_ids

NO_LABEL = "label lines that are neither class x y width height nor a polygon (left out)"
NO_POSE = "label lines that are not class x y width height and kpt_shape's keypoints (left out)"
DIGITS = 3  # decimals of coordinates in pixels

Shape = tuple[int, int]  # kpt_shape: keypoints, numbers per keypoint; (0, 0) if there are none


def read_data_yaml(path: str) -> tuple[tuple[str, ...], dict[str, list[str]], Keypoints, Shape]:
    """Read data.yaml, but no labels.

    Returns:
        The classes, the image paths of "train" and, if named, "val", the keypoints, and kpt_shape.

    Raises:
        ValueError: the file is no data.yaml, or names a file that does not exist; one line.
    """
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
    if not content.get("train"):
        raise ValueError(f"{path!r} names no training images: it has no 'train'")
    splits = {
        split: _images(path, content.get("path"), content[split])
        for split in ("train", "val")
        if content.get(split)
    }
    return classes, splits, *_keypoints(path, classes, content)


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


def read_yolo(
    source: str,
    folder: str,
    images: list[str],
    classes: tuple[str, ...],
    keypoints: Keypoints,
    shape: Shape,
) -> LabelledImages:
    """Read the label files of images. An image without a label file has no boxes.

    Args:
        source: the name of the data set in messages.
        folder: the folder of data.yaml.
        images: the paths of images; an image that can't be read has no boxes either.
        classes, keypoints, shape: see ``read_data_yaml``; with keypoints, there are no polygons.

    Raises:
        ValueError: no label file exists, or a label's class is not in ``classes``; one line.
    """
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
        source, records, classes, category_ids, faults, image_root=folder, keypoints=keypoints
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
    left, top = min(points[::2]), min(points[1::2])
    right, bottom = max(points[::2]), max(points[1::2])
    box = [left, top, round(right - left, DIGITS), round(bottom - top, DIGITS)]
    return {**annotation(box, category), "segmentation": [points]}


def _images(path: str, root: object, given: object) -> list[str]:
    """The image paths of a split: all images below its folders, and those listed in text files."""
    images: list[str] = []
    for name in given if isinstance(given, list) else [given]:
        place = _find(path, str(root or ""), str(name))
        if os.path.isdir(place):
            images += images_of(files_below(place))
        else:
            lines = read_text(place).split("\n")
            folder = os.path.dirname(place)
            images += [_join(folder, line.strip()) for line in lines if line.strip()]
    if not images:
        raise ValueError(f"{path!r}: there are no images in {brief(given)}")
    return images


def _find(path: str, root: str, name: str) -> str:
    """Find a file or folder that data.yaml names; Roboflow writes ``../train`` for ``train``."""
    folder = os.path.dirname(path)
    roots = [_join(folder, root), *([os.path.abspath(root)] if root else [])]
    names = [name, *([name[3:]] if name.startswith("../") else [])]
    places = [_join(r, n) for r in roots for n in names]
    for place in places:
        if os.path.exists(place):
            return place
    raise ValueError(f"{path!r} names {brief(name)}, which does not exist: {brief(places[0])}")


def _join(folder: str, name: str) -> str:
    return os.path.normpath(os.path.join(folder, name))
