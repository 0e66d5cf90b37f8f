"""Find the splits of a data set, and their format, by a path.

A path is one of:

- a folder with ``train/_annotations.coco.json`` and ``valid/``, or ``val/``, as Roboflow exports
  COCO's format; or one such split's folder itself;
- a folder in COCO's own layout: ``annotations/instances_train*.json`` and ``instances_val*.json``,
  with images in ``train*/`` and ``val*/``, in ``images/`` or in the folder itself;
- a file in COCO's format and the folder of its images, ``train.json:images``; without the folder,
  images lie as above, or beside the file;
- YOLO's ``data.yaml``, or the folder that holds it (``yolo``);
- a folder of Pascal VOC's, or the Annotations in it (``voc``).
"""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from ...text import named
from .coco_json import read_coco
from .labels import LabelledImages
from .voc import FOLDERS, VocFile, image_sets, is_voc, parse_voc, read_voc
from .yolo import read_data_yaml, read_yolo

ROBOFLOW = "_annotations.coco.json"
VALIDATION = ("valid", "val", "validation")
EXPECTED = (
    "expected is a folder in COCO's layout (annotations/instances_train*.json) or Roboflow's "
    f"(train/{ROBOFLOW}), annotations.json:images, YOLO's data.yaml, or a folder of Pascal VOC's "
    "(Annotations, JPEGImages)"
)

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
    other = _find(path_val, parse, _voc_folder(_parts(path)[0]))
    return {"train": splits["train"], "val": other.get("val", other["train"])}


def _parts(path: str) -> list[str]:
    before, colon, after = path.rpartition(":")
    return [before, after] if colon and before and not os.path.exists(path) else [path]


def _find(path: str, parse: Callable[[Path], VocFile], of_classes: str = "") -> dict[str, Reader]:
    """The readers of the splits at one path.

    Args:
        parse: parses a file of a VOC folder.
        of_classes: the VOC folder that defines the classes ("": the folder that is read).
    """
    place, *images = _parts(path)
    for part in (place, *images):
        if not os.path.exists(part):
            raise ValueError(f"{part!r} does not exist; {EXPECTED}")
    if images:
        return {"train": partial(read_coco, place, *images)}
    if os.path.isfile(place):
        if place.endswith(".json"):
            return {"train": _coco(Path(place))}
        if place.endswith((".yaml", ".yml")):
            return _yolo(place)
        raise ValueError(f"{place!r} is no data set; {EXPECTED}")
    coco, voc = _coco_files(Path(place)), _voc_folder(place)
    data_yaml = os.path.join(place, "data.yaml")
    formats = {"COCO": bool(coco), "YOLO": os.path.isfile(data_yaml), "VOC": bool(voc)}
    found = [name for name, there in formats.items() if there]
    if not found:
        raise ValueError(f"{place!r} holds no data set; {EXPECTED}")
    if len(found) > 1:
        raise ValueError(
            f"{place!r} holds {' and '.join(found)}; give one of them: annotations.json:images, "
            "data.yaml, or the folder Annotations"
        )
    if coco:
        return {split: _coco(file) for split, file in coco.items()}
    if voc:
        return {
            split: partial(read_voc, voc, names, of_classes or voc, parse)
            for split, names in image_sets(voc).items()
        }
    return _yolo(data_yaml)


def _coco_files(folder: Path) -> dict[str, Path]:
    """The COCO files of a folder's splits; empty if there is none for training."""
    if (folder / ROBOFLOW).is_file():
        return {"train": folder / ROBOFLOW}
    of_train, *of_val = (folder / split / ROBOFLOW for split in ("train", *VALIDATION))
    own = {
        split: sorted((folder / "annotations").glob(f"instances_{split}*.json"))
        for split in ("train", "val")
    }
    if of_train.is_file():
        own = {"train": [of_train], "val": [path for path in of_val if path.is_file()]}
    for split, files in own.items():
        if len(files) > 1:
            raise ValueError(
                f"{str(folder)!r} has several files for {split}: {named(files)}; "
                "give --data annotations.json:images --data-val annotations.json:images"
            )
    return {split: files[0] for split, files in own.items() if files} if own["train"] else {}


def _coco(file: Path) -> Reader:
    """The reader of a COCO file whose images lie where COCO's do, or beside the file."""
    split, root = file.stem.removeprefix("instances_"), file.parent.parent
    places = [root / split, root / "images" / split, root / "images", root]
    if file.parent.name != "annotations":
        places = [file.parent]
    images = next((place for place in places if place.is_dir()), file.parent)
    return partial(read_coco, str(file), str(images))


def _yolo(path: str) -> dict[str, Reader]:
    classes, splits, keypoints, shape = read_data_yaml(path)
    folder = os.path.dirname(path)
    return {
        split: partial(read_yolo, f"{path}:{split}", folder, images, classes, keypoints, shape)
        for split, images in splits.items()
    }


def _voc_folder(place: str) -> str:
    """The VOC folder that a path, or the path of its Annotations, names; "" if there is none."""
    folder = os.path.dirname(place) if os.path.basename(place) == FOLDERS[0] else place
    return folder if is_voc(folder) else ""
