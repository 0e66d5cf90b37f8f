"""Pascal VOC's folders: Annotations, JPEGImages and ImageSets/Main.

A box's corners are the outermost pixels, counted from 1: as in Detectron2's reader, 1 is subtracted
from xmin and ymin. They are whole numbers by convention; where a file has fractions, those are
kept, to a thousandth of a pixel. There are no polygons. supervision's reader decodes every image
to learn the size that the file states, and rounds boxes to float32; Detectron2's knows VOC's own
20 classes only.
"""

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets.folder import is_image_file

from ..text import brief, one_line
from .labels import Faults, LabelledImages, annotation, check_classes, image_ids, named
from .paths import read_text

FOLDERS = ("Annotations", "JPEGImages")
LABEL_MAP = "labelmap.txt"  # CVAT's and Datumaro's: a class on each line, up to the colon
NOT_FOUR = "objects whose bndbox is not four numbers (left out)"
NO_FILE = "images without a file in Annotations (left out)"
NO_SIZE = "annotations without the image's size (it is taken from the image)"
DIGITS = 3


def is_voc(folder: str) -> bool:
    return all(os.path.isdir(os.path.join(folder, name)) for name in FOLDERS)


def image_sets(folder: str) -> dict[str, list[str]]:
    """The names of the images of each split: of train and val, or of VOC's trainval and test.

    Where there are no lists, train is all that is in Annotations.
    """
    main = Path(folder, "ImageSets", "Main")
    lists = {path.stem: path for path in main.glob("*.txt")}
    for train, val in (("train", "val"), ("trainval", "test")):
        if train in lists:
            return {
                split: [line.strip() for line in read_text(lists[name]).splitlines() if line]
                for split, name in (("train", train), ("val", val))
                if name in lists
            }
    return {"train": sorted(path.stem for path in Path(folder, FOLDERS[0]).glob("*.xml"))}


def voc_classes(folder: str) -> tuple[str, ...]:
    """The names in labelmap.txt, or those of all objects in Annotations, sorted.

    Raises:
        ValueError: there is none, or a file can't be read; one line.
    """
    label_map = Path(folder, LABEL_MAP)
    if label_map.is_file():
        lines = read_text(label_map).splitlines()
        names = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
        return check_classes(str(label_map), [n for n in names if n not in ("", "background")])
    files = sorted(Path(folder, FOLDERS[0]).glob("*.xml"))
    found = {_text(o, "name") for path in files for o in _parse(path).findall("object")}
    return check_classes(folder, sorted(found - {""}))


def read_voc(folder: str, names: list[str], classes: tuple[str, ...]) -> LabelledImages:
    """Read the images of these names, without extension.

    Raises:
        ValueError: a file of annotations can't be read, or has an object of no class of
            ``classes``; one line.
    """
    images = {Path(f).stem: f for f in sorted(os.listdir(os.path.join(folder, FOLDERS[1])))
              if is_image_file(f)}  # fmt: skip
    faults = Faults()
    records = []
    for name, image_id in zip(names, image_ids(names)):
        file_name = os.path.join(folder, FOLDERS[1], images.get(name, f"{name}.jpg"))
        record: dict[str, Any] = {"file_name": file_name, "image_id": image_id, "annotations": []}
        path = Path(folder, FOLDERS[0], f"{name}.xml")
        if path.is_file():
            _read(path, record, classes, faults)
            records.append(record)
        else:
            faults.add(NO_FILE, str(path))
    category_ids = tuple(range(1, len(classes) + 1))
    return LabelledImages(folder, records, classes, category_ids, faults, image_root=folder)


def _read(path: Path, record: dict[str, Any], classes: tuple[str, ...], faults: Faults) -> None:
    root = _parse(path)
    try:
        size = [int(float(_text(root, f"size/{key}"))) for key in ("height", "width")]
    except (ValueError, OverflowError):
        size = [0]
    if all(size):
        record["height"], record["width"] = size
    else:
        faults.add(NO_SIZE, str(path))
    for o in root.findall("object"):
        name = _text(o, "name")
        if name not in classes:
            raise ValueError(
                f"{str(path)!r} has an object of the class {brief(name)}, which is none "
                f"of the {len(classes)}: {named(classes, len(classes), 80)}"
            )
        try:
            left, top, right, bottom = (
                float(_text(o, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            faults.add(NOT_FOUR, str(path))
            continue
        left, top = left - 1, top - 1
        box = [round(v, DIGITS) for v in (left, top, right - left, bottom - top)]
        found = annotation(box, classes.index(name))
        if _text(o, "difficult") == "1":
            found["difficult"] = True
        record["annotations"].append(found)


class _NoDoctype(ElementTree.TreeBuilder):
    """Entities, which could fill the memory or name other files, are declared in a DOCTYPE."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which VOC's files have not; remove it")


def _parse(path: Path) -> ElementTree.Element:
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        return ElementTree.parse(path, parser).getroot()
    except (OSError, ValueError, ElementTree.ParseError) as e:
        raise ValueError(f"{str(path)!r} can't be read as VOC's XML: {one_line(e)}") from e


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
