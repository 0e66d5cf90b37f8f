"""Read Pascal VOC's labels, an XML file per image, in VOC's own folders or in others.

A box's corners are its outermost pixels, counted from 1; as in Detectron2's reader, 1 is subtracted
from xmin and ymin. Coordinates are integers by convention; fractions in a file are kept, to a
thousandth of a pixel. There are no polygons. supervision's reader decodes every image to learn the
size that the file states, and rounds boxes to float32. Detectron2's reader needs lists in ImageSets
and, for classes other than VOC's own 20, their names.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ...text import one_line
from ..images.names import images_of
from ..paths import files_in, in_threads, read_text
from .labels import (
    DIGITS,
    VALIDATION,
    Faults,
    LabelledImages,
    annotation,
    check_classes,
    check_known,
    image_ids,
)

FOLDERS = ("Annotations", "JPEGImages")
LABEL_MAP = "labelmap.txt"  # CVAT's and Datumaro's: a class on each line, up to the colon
NOT_FOUR = "objects whose bndbox is not four numbers (left out)"
NO_FILE = "images without an XML file (left out)"
NO_SIZE = "annotations without the image's size (it is taken from the image)"


class VocObject(NamedTuple):
    name: str
    box: list[float] | None  # x, y, width, height; None where bndbox is not four numbers
    is_difficult: bool


class VocFile(NamedTuple):
    """The content of an XML file; size is (height, width), None if it isn't stated."""

    size: tuple[int, int] | None
    objects: list[VocObject]


class VocFolder(NamedTuple):
    """The folder of a data set, that of its XML files, and that of its images."""

    root: str
    labels: str
    images: str

    def label_files(self) -> list[Path]:
        return files_in(self.labels, ".xml")

    def names(self) -> list[str]:
        """The names of the images with an XML file, without extension."""
        return [path.stem for path in self.label_files()]


def find_voc(place: str, is_own: bool) -> VocFolder | None:
    """The VOC data set in a folder, or in the folder whose Annotations is given.

    Args:
        is_own: whether to look for VOC's own folders, or for XML files in annotations and images in
            images, or for both in one folder, as LabelImg and Roboflow write them.
    """
    root = os.path.dirname(place) if os.path.basename(place).lower() == "annotations" else place
    own = VocFolder(root, *(os.path.join(root, name) for name in FOLDERS))
    if is_own:
        return own if os.path.isdir(own.labels) and os.path.isdir(own.images) else None
    if not os.path.isdir(root):
        return None
    folders = {e.name.lower(): e.path for e in os.scandir(root) if e.is_dir()}
    labels, images = (folders.get(name, root) for name in ("annotations", "images"))
    found = VocFolder(root, labels, images)
    stems = {os.path.splitext(name)[0] for name in images_of(os.listdir(images))}
    return found if stems.intersection(found.names()) else None


def image_sets(folder: VocFolder) -> dict[str, list[str]]:
    """The image names of "train" and "val", from the lists of train and val or trainval and test.

    The names have no extension. Without lists, train has every image with an XML file.
    """
    main = Path(folder.root, "ImageSets", "Main")
    lists = {path.stem.lower(): path for path in main.glob("*.txt")}
    for train, validation in (("train", VALIDATION), ("trainval", ("test",))):
        if train in lists:
            files = [lists[train], *[lists[name] for name in validation if name in lists][:1]]
            lines = [read_text(path).splitlines() for path in files]
            return {s: [x.strip() for x in found if x] for s, found in zip(("train", "val"), lines)}
    return {"train": folder.names()}


def voc_classes(folder: VocFolder, parse: Callable[[Path], VocFile]) -> tuple[str, ...]:
    """The class names in labelmap.txt or, without that, of all objects in the XML files, sorted.

    Args:
        parse: ``parse_voc``, or a cache of it; it is called from several threads.

    Raises:
        ValueError: there are no classes, or a file can't be read; one line.
    """
    label_map = Path(folder.root, LABEL_MAP)
    if label_map.is_file():
        lines = read_text(label_map).splitlines()
        names = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
        return check_classes(str(label_map), [n for n in names if n not in ("", "background")])
    files = in_threads(parse, folder.label_files())
    found = {o.name for file in files for o in file.objects}
    return check_classes(folder.root, sorted(found - {""}))


def read_voc(
    folder: VocFolder, names: list[str], of_classes: VocFolder, parse: Callable[[Path], VocFile]
) -> LabelledImages:
    """Read the annotations of some images of a folder.

    Args:
        names: the names of the images, without extension.
        of_classes: the folder whose ``voc_classes`` are the classes.
        parse: see ``voc_classes``.

    Raises:
        ValueError: a file can't be read, or has an object of an unknown class; one line.
    """
    classes = voc_classes(of_classes, parse)
    index = {name: i for i, name in enumerate(classes)}
    images = {Path(f).stem: f for f in images_of(os.listdir(folder.images))}
    faults = Faults()
    records = []
    paths = [Path(folder.labels, f"{name}.xml") for name in names]
    files = in_threads(lambda path: parse(path) if path.is_file() else None, paths)
    for name, image_id, path, file in zip(names, image_ids(names), paths, files, strict=True):
        if file is None:
            faults.add(NO_FILE, str(path))
            continue
        file_name = os.path.join(folder.images, images.get(name, f"{name}.jpg"))
        record: dict[str, Any] = {"file_name": file_name, "image_id": image_id, "annotations": []}
        _take(file, str(path), record, index, faults)
        records.append(record)
    category_ids = tuple(range(1, len(classes) + 1))
    return LabelledImages(
        folder.root, records, classes, category_ids, faults, image_root=folder.root
    )


def _take(
    file: VocFile, path: str, record: dict[str, Any], index: dict[str, int], faults: Faults
) -> None:
    if file.size is not None:
        record["height"], record["width"] = file.size
    else:
        faults.add(NO_SIZE, path)
    for name, box, is_difficult in file.objects:
        check_known(path, name, index)
        if box is None:
            faults.add(NOT_FOUR, path)
            continue
        found = annotation(box, index[name])
        if is_difficult:
            found["difficult"] = True
        record["annotations"].append(found)


def parse_voc(path: Path) -> VocFile:
    """Parse an XML file.

    Raises:
        ValueError: the file can't be read as VOC's XML; one line.
    """
    root = _parse(path)
    try:
        height, width = (int(float(_text(root, f"size/{key}"))) for key in ("height", "width"))
    except (ValueError, OverflowError):
        height = width = 0
    objects = [
        VocObject(_text(o, "name"), _box(o), _text(o, "difficult") == "1")
        for o in root.findall("object")
    ]
    return VocFile((height, width) if height and width else None, objects)


def _box(element: ElementTree.Element) -> list[float] | None:
    box = element.find("bndbox")  # find takes one name in C, but a path in Python
    if box is None:
        return None
    try:
        left, top, right, bottom = (
            float(_text(box, key)) for key in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    left, top = left - 1, top - 1
    return [round(v, DIGITS) for v in (left, top, right - left, bottom - top)]


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuse a DOCTYPE: it may declare entities that fill the memory or name other files."""

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
