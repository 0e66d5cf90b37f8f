"""Find the splits of a data set, and their format, by a path.

A path is one of:

- a folder in COCO's own layout: ``annotations/instances_train*.json`` and ``instances_val*.json``;
- a folder with other COCO files, in it or in annotations/: one for each split, if their names tell
  train and val, or a single one (CVAT, Label Studio, FiftyOne); or the same in train/ and valid/,
  or val/ (Roboflow); or one such split's folder itself;
- a file in COCO's format and the folder of its images, ``train.json:images``; without the folder,
  and in the layouts above, images lie in a folder named like the split, in images/ or data/, in
  the folder of the data set or beside the file;
- YOLO's ``data.yaml``, or the folder that has it, or one with another list of classes (``yolo``);
- a folder of Pascal VOC's files, or its train/ and valid/ (``voc``).
"""

import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...text import named
from .coco_json import is_coco, read_coco
from .labels import VALIDATION, LabelledImages
from .voc import VocFile, VocFolder, find_voc, image_sets, parse_voc, read_voc
from .yolo import CLASS_LISTS, find_yolo, read_yolo, read_yolo_set

ROBOFLOW = "_annotations.coco.json"
EXPECTED = (
    "expected is a folder in COCO's format (annotations/instances_train*.json, "
    f"train/{ROBOFLOW}), YOLO's (data.yaml) or Pascal VOC's (Annotations, JPEGImages), "
    "as labelling tools export them, or annotations.json:images"
)
MOST_JSON = 20  # files that are looked into; LabelMe writes one per image

Reader = Callable[[], LabelledImages]


def absolute(path: str) -> str:
    """Make a path, or both parts of ``file.json:folder``, absolute; "" stays ""."""
    if not path:
        return ""
    return ":".join(os.path.abspath(os.path.expanduser(part)) for part in _parts(path))


def find_splits(path: str, path_val: str = "") -> dict[str, Reader]:
    """The readers of a data set's splits, "train" and, if there is one, "val".

    Args:
        path: see this module's docstring.
        path_val: the validation split's path; it takes precedence over a split that ``path`` has.

    Raises:
        ValueError: a path does not exist, or has no data set in a known format, or more than one;
            one line.
    """
    parse = cache(parse_voc)  # each file is parsed once, for class names and boxes
    splits = _find(path, parse)
    if not path_val:
        return splits
    kind, found = _detect(path) if os.path.isdir(path) else ("", {})
    other = _find(path_val, parse, found["train"][0] if kind == "VOC" else None)
    return {"train": splits["train"], "val": other.get("val", other["train"])}


def _parts(path: str) -> list[str]:
    before, colon, after = path.rpartition(":")
    return [before, after] if colon and before and not os.path.exists(path) else [path]


def _find(
    path: str, parse: Callable[[Path], VocFile], of_classes: VocFolder | None = None
) -> dict[str, Reader]:
    """The readers of the splits at one path.

    Args:
        parse: parses an XML file of a VOC folder.
        of_classes: the VOC folder that defines the classes (None: the one for training).
    """
    place, *images = _parts(path)
    for part in (place, *images):
        if not os.path.exists(part):
            raise ValueError(f"{part!r} does not exist; {EXPECTED}")
    if images:  # Label Studio's names contain the folder: images/photo.jpg
        return {"train": partial(read_coco, place, *images, os.path.dirname(place))}
    if os.path.isfile(place):
        if place.endswith(".json"):
            return {"train": _coco(Path(place))}
        if place.endswith((".yaml", ".yml")) or os.path.basename(place) in CLASS_LISTS:
            return _yolo(place)
        raise ValueError(f"{place!r} is no data set; {EXPECTED}")
    kind, found = _detect(place)
    if kind == "YOLO":
        return _yolo(found["train"])
    if kind == "COCO":
        return {split: _coco(file) for split, file in found.items()}
    of_classes = of_classes or found["train"][0]
    return {
        split: partial(read_voc, folder, names, of_classes, parse)
        for split, (folder, names) in found.items()
    }


def _detect(place: str) -> tuple[str, dict[str, Any]]:
    """The format in a folder, and the files or folders of its splits.

    What the formats' authors prescribe takes precedence over what others make of it.
    """
    finders: dict[str, Callable[[str, bool], dict[str, Any]]]
    finders = {"COCO": _find_coco, "YOLO": _find_yolo, "VOC": _find_voc}
    for is_own in (True, False):
        found = {kind: splits for kind, find in finders.items() if (splits := find(place, is_own))}
        if len(found) > 1:
            raise ValueError(
                f"{place!r} holds {' and '.join(found)}; give one of them: "
                "annotations.json:images, data.yaml or classes.txt, or the folder Annotations"
            )
        if found:
            return next(iter(found.items()))
    raise ValueError(f"{place!r} holds no data set; {_why(place)}")


def _why(place: str) -> str:
    """What else is in a folder, or what is expected there."""
    if os.path.isfile(os.path.join(place, "annotations.xml")):
        return "annotations.xml is CVAT's own format; export as COCO 1.0 instead"
    return EXPECTED


def _find_coco(place: str, is_own: bool) -> dict[str, Path]:
    """The COCO files of a folder's splits; empty if there is none for training.

    Args:
        is_own: whether to look for COCO's own names and Roboflow's, or for others.
    """
    folder, files = Path(place), dict[str, list[Path]]()
    if is_own:
        roboflow = [folder / split / ROBOFLOW for split in ("train", *VALIDATION)]
        for split in ("train", "val"):
            files[split] = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
        if (folder / ROBOFLOW).is_file():
            files = {"train": [folder / ROBOFLOW]}
        elif roboflow[0].is_file():
            files = {"train": roboflow[:1], "val": [p for p in roboflow[1:] if p.is_file()]}
    elif of_train := _coco_in(folder / "train"):
        files = {
            "train": of_train,
            "val": [p for name in VALIDATION for p in _coco_in(folder / name)],
        }
    else:
        both = _coco_in(folder)
        files = {name: [p for p in both if _is_of(name, p)] for name in ("train", "val", "test")}
        others = [p for p in both if not any(p in found for found in files.values())]
        files = {"train": files["train"] or others, "val": files["val"]}
    for split, found in files.items():
        if len(found) > 1:
            raise ValueError(
                f"{place!r} has several files for {split}: {named(found)}; "
                "give --data annotations.json:images --data-val annotations.json:images"
            )
    return {split: found[0] for split, found in files.items() if found} if files["train"] else {}


def _coco_in(folder: Path) -> list[Path]:
    """The COCO files in a folder and in its annotations/; instances_*.json alone, if there are any,
    as COCO's other tasks have files of the same form."""
    files = sorted([*folder.glob("*.json"), *(folder / "annotations").glob("*.json")])
    files = [file for file in files if is_coco(file)] if len(files) <= MOST_JSON else []
    return [file for file in files if file.stem.startswith("instances_")] or files


def _is_of(split: str, file: Path) -> bool:
    """Whether a file's name has a word that begins with the name of a split."""
    return re.search(rf"(?<![a-z]){split}", file.stem.lower()) is not None


def _coco(file: Path) -> Reader:
    """The reader of a COCO file whose images lie where COCO's do, or beside the file."""
    split, is_inside = file.stem.removeprefix("instances_"), file.parent.name == "annotations"
    root = file.parent.parent if is_inside else file.parent
    places = [root / split, root / "images" / split, root / "images", root / "data"]
    places = [*places, root] if is_inside else [root, *places]
    return partial(read_coco, str(file), *(str(place) for place in places if place.is_dir()))


def _yolo(path: str) -> dict[str, Reader]:
    about = read_yolo_set(path)
    return {
        split: partial(read_yolo, f"{path}:{split}", os.path.dirname(path), images, about)
        for split, images in about.splits.items()
    }


def _find_yolo(place: str, is_own: bool) -> dict[str, str]:
    path = find_yolo(place, is_own)
    return {"train": path} if path else {}


def _find_voc(place: str, is_own: bool) -> dict[str, tuple[VocFolder, list[str]]]:
    """The VOC folders of a place's splits and the names of their images; empty if there are none
    for training."""
    if whole := find_voc(place, is_own):
        return {split: (whole, names) for split, names in image_sets(whole).items()}
    splits = {}
    for split, names in (("train", ["train"]), ("val", VALIDATION)):
        for name in [] if is_own else names:
            if split not in splits and (found := find_voc(os.path.join(place, name), is_own)):
                splits[split] = found, found.names()
    return splits if "train" in splits else {}
