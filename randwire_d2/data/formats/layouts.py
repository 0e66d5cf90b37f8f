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
- a folder of Pascal VOC's files, or its train/ and valid/ (``voc``);
- a folder of LabelMe's files, or with subfolders of them, or its train/ and valid/ (``labelme``).
"""

import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...text import named
from ..paths import files_in
from .coco_json import is_coco, read_coco
from .labelme import find_labelme, parse_labelme, read_labelme
from .labels import VALIDATION, LabelledImages
from .voc import find_voc, image_sets, parse_voc, read_voc
from .yolo import CLASS_LISTS, find_yolo, read_yolo, read_yolo_set

ROBOFLOW = "_annotations.coco.json"
EXPECTED = (
    "expected is a folder in COCO's format (annotations/instances_train*.json, "
    f"train/{ROBOFLOW}), YOLO's (data.yaml), Pascal VOC's (Annotations, JPEGImages) or LabelMe's "
    "(a .json file per image), as labelling tools export them, or annotations.json:images"
)
MOST_JSON = 20  # files that may be COCO's; LabelMe writes one per image

Reader = Callable[[], LabelledImages]
Parsers = dict[str, Callable[[Path], Any]]  # of an image's labels, by format
Splits = dict[str, Any]  # what a format's reader needs for "train" and, if there is one, "val"


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
    parse: Parsers = {"VOC": cache(parse_voc), "LabelMe": cache(parse_labelme)}  # each file once
    kind, found = _find(path)
    training = found["train"]
    splits = _readers(kind, found, training, parse)
    if not path_val:
        return splits
    kind_val, found = _find(path_val)
    of_classes = training if kind_val == kind else found["train"]
    other = _readers(kind_val, found, of_classes, parse)
    return {"train": splits["train"], "val": other.get("val", other["train"])}


def _readers(kind: str, found: Splits, training: Any, parse: Parsers) -> dict[str, Reader]:
    """The readers of the splits that were found.

    Args:
        training: the split whose labels define the classes of VOC and LabelMe.
        parse: parsers of these formats' files.
    """
    if kind == "COCO":
        return {split: partial(read_coco, *paths) for split, paths in found.items()}
    if kind == "YOLO":
        return _yolo(found["train"])
    if kind == "LabelMe":
        return {s: partial(read_labelme, f, training, parse[kind]) for s, f in found.items()}
    return {
        split: partial(read_voc, folder, names, training[0], parse[kind])
        for split, (folder, names) in found.items()
    }


def _parts(path: str) -> list[str]:
    before, colon, after = path.rpartition(":")
    return [before, after] if colon and before and not os.path.exists(path) else [path]


def _find(path: str) -> tuple[str, Splits]:
    """The format of the data set at a path, and its splits."""
    place, *images = _parts(path)
    for part in (place, *images):
        if not os.path.exists(part):
            raise ValueError(f"{part!r} does not exist; {EXPECTED}")
    if images:  # Label Studio's names contain the folder: images/photo.jpg
        return "COCO", {"train": (place, *images, os.path.dirname(place))}
    if os.path.isdir(place):
        return _detect(place)
    if place.endswith(".json"):
        return "COCO", {"train": _with_roots(Path(place))}
    if place.endswith((".yaml", ".yml")) or os.path.basename(place) in CLASS_LISTS:
        return "YOLO", {"train": place}
    raise ValueError(f"{place!r} is no data set; {EXPECTED}")


def _detect(place: str) -> tuple[str, Splits]:
    """The format of the data set in a folder, and its splits.

    What the formats' authors prescribe takes precedence over what others make of it.
    """
    finders: dict[str, Callable[[str, bool], Splits]]
    finders = {"COCO": _find_coco, "YOLO": _find_yolo, "VOC": _find_voc, "LabelMe": _find_labelme}
    for is_own in (True, False):
        found = {kind: splits for kind, find in finders.items() if (splits := find(place, is_own))}
        if len(found) > 1:
            raise ValueError(
                f"{place!r} holds {' and '.join(found)}; give one of them, "
                "annotations.json:images, data.yaml or classes.txt, or move the others elsewhere"
            )
        if found:
            return next(iter(found.items()))
    raise ValueError(f"{place!r} holds no data set; {_why(place)}")


def _why(place: str) -> str:
    """What else is in a folder, or what is expected there."""
    if os.path.isfile(os.path.join(place, "annotations.xml")):
        return "annotations.xml is CVAT's own format; export as COCO 1.0 instead"
    return EXPECTED


def _find_coco(place: str, is_own: bool) -> Splits:
    """The COCO files of a folder's splits, each with the places where its images may be; empty if
    there is none for training.

    Args:
        is_own: whether to look for COCO's own names and Roboflow's, or for others.
    """
    files = _coco_files(Path(place)) if is_own else _other_coco_files(Path(place))
    for split, found in files.items():
        if len(found) > 1:
            raise ValueError(
                f"{place!r} has several files for {split}: {named(found)}; "
                "give --data annotations.json:images --data-val annotations.json:images"
            )
    if not files["train"]:
        return {}
    return {split: _with_roots(found[0]) for split, found in files.items() if found}


def _coco_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that have COCO's own names, or Roboflow's."""
    train, *validation = (folder / split / ROBOFLOW for split in ("train", *VALIDATION))
    if (folder / ROBOFLOW).is_file():
        return {"train": [folder / ROBOFLOW]}
    if train.is_file():
        return {"train": [train], "val": [path for path in validation if path.is_file()]}
    annotations = folder / "annotations"
    return {s: sorted(annotations.glob(f"instances_{s}*.json")) for s in ("train", "val")}


def _other_coco_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that have COCO's content under other names."""
    if train := _coco_in(folder / "train"):
        return {"train": train, "val": [p for v in VALIDATION for p in _coco_in(folder / v)]}
    both = _coco_in(folder)
    train, val, test = ([p for p in both if _is_of(s, p)] for s in ("train", "val", "test"))
    others = [path for path in both if path not in (*train, *val, *test)]
    return {"train": train or others, "val": val}


def _coco_in(folder: Path) -> list[Path]:
    """The COCO files in a folder and in its annotations/; instances_*.json alone, if there are any,
    as COCO's other tasks have files of the same form."""
    files = [*files_in(folder, ".json"), *files_in(folder / "annotations", ".json")]
    files = [file for file in files if is_coco(file)] if len(files) <= MOST_JSON else []
    return [file for file in files if file.stem.startswith("instances_")] or files


def _is_of(split: str, file: Path) -> bool:
    """Whether a file's name has a word that begins with the name of a split."""
    return re.search(rf"(?<![a-z]){split}", file.stem.lower()) is not None


def _with_roots(file: Path) -> list[str]:
    """A COCO file, and the folders where its images may be: where COCO's are, or beside it."""
    split, is_inside = file.stem.removeprefix("instances_"), file.parent.name == "annotations"
    root = file.parent.parent if is_inside else file.parent
    places = [root / split, root / "images" / split, root / "images", root / "data"]
    places = [*places, root] if is_inside else [root, *places]
    return [str(file), *(str(place) for place in places if place.is_dir())]


def _yolo(path: str) -> dict[str, Reader]:
    about = read_yolo_set(path)
    return {
        split: partial(read_yolo, f"{path}:{split}", os.path.dirname(path), images, about)
        for split, images in about.splits.items()
    }


def _find_yolo(place: str, is_own: bool) -> Splits:
    path = find_yolo(place, is_own)
    return {"train": path} if path else {}


def _find_voc(place: str, is_own: bool) -> Splits:
    """The VOC folders of a place's splits and the names of their images; empty if there are none
    for training."""
    if whole := find_voc(place, is_own):
        return {split: (whole, names) for split, names in image_sets(whole).items()}
    found = {} if is_own else _in_subfolders(place, partial(find_voc, is_own=False))
    return {split: (folder, folder.names()) for split, folder in found.items()}


def _find_labelme(place: str, is_own: bool) -> Splits:
    """The folders with LabelMe's files; a data set may have more beside its own labels."""
    if is_own:
        return {}
    if splits := _in_subfolders(place, find_labelme):
        return splits
    whole = find_labelme(place)
    return {"train": whole} if whole else {}


def _in_subfolders(place: str, find: Callable[[str], Any]) -> Splits:
    """What is found in the folders of the splits; empty if there is nothing for training."""
    splits: Splits = {}
    for split, names in (("train", ["train"]), ("val", VALIDATION)):
        for name in names:
            if split not in splits and (found := find(os.path.join(place, name))):
                splits[split] = found
    return splits if "train" in splits else {}
