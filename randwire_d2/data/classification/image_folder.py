"""Register folders with one subfolder of images per class, ImageNet's layout, in Detectron2; and
tar shards of such images (``shards``), which are accepted wherever such a folder is.

Importing this module registers ``imagenet_train`` and ``imagenet_val``, which are the folders
``imagenet/train`` and ``imagenet/val`` under ``$DETECTRON2_DATASETS`` (default ``datasets``; read
once, on import, as Detectron2 does). Torchvision's ``ImageFolder`` lists the images.
"""

import logging
import os
from collections.abc import Iterable, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from ...text import check_one_line, named, prefixed
from ..images.names import is_image_file, unreadable
from ..paths import existing_path
from .shards import find_shards, read_shards

DATASETS_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
EVALUATOR_TYPE = "image_folder"

logger = logging.getLogger(__name__)


def register_image_folder(name: str, root: str) -> None:
    """Register ``root/<class>/**/*.jpg`` (any of ``names.READABLE``) as a data set.

    The folder is read when the data set is first requested. ``DatasetCatalog.get(name)`` is a list
    of ``{"file_name": str, "label": int}`` in torchvision's order; a label is an index into the
    sorted class names. The metadata has evaluator_type, image_root and, after the first request,
    classes.
    """
    DatasetCatalog.register(name, lambda: _load(name, root))
    MetadataCatalog.get(name).set(evaluator_type=EVALUATOR_TYPE, image_root=root)


def _load(name: str, root: str) -> list[dict]:
    paths: list[str] = []

    def is_read(path: str) -> bool:
        paths.append(path)
        return is_image_file(path)

    listing = ImageFolder(PathManager.get_local_path(root), is_valid_file=is_read)
    if passed_over := unreadable(paths):
        logger.warning(f"{name!r} has images that are left out: {passed_over}")
    _note_classes(name, listing.classes)
    return [{"file_name": file_name, "label": label} for file_name, label in listing.samples]


def register_shards(name: str, shards: Sequence[str]) -> None:
    """Register tar shards as a data set, as ``register_image_folder`` does for a folder.

    Detectron2's PathManager can open the file_name of the records. The metadata has shards instead
    of image_root.
    """
    DatasetCatalog.register(name, lambda: _load_shards(name, shards))
    MetadataCatalog.get(name).set(evaluator_type=EVALUATOR_TYPE, shards=tuple(shards))


def _load_shards(name: str, shards: Sequence[str]) -> list[dict]:
    records, classes = read_shards(shards)
    _note_classes(name, classes)
    return records


def _note_classes(name: str, classes: list[str]) -> None:
    # ``set`` would refuse other classes than before, but the folder may have changed.
    vars(MetadataCatalog.get(name))["classes"] = classes


def register_folders(names: Iterable[str]) -> None:
    """Register each name that is a folder of images, or names shards (``find_shards``), under
    ``$DETECTRON2_DATASETS`` or as a path by itself.

    Other names, and those already registered, are skipped. Each process has its own catalog: call
    this again in processes that ``launch`` starts.
    """
    for name in names:
        if not name or name in DatasetCatalog:
            continue
        for path in (os.path.join(DATASETS_ROOT, name), name):
            shards = find_shards(path)
            if any(map(os.path.exists, shards)):
                register_shards(name, shards)
                break
            if os.path.isdir(path):
                register_image_folder(name, path)
                break


def image_folder_classes(name: str) -> list[str]:
    """The class names of a registered image folder, in the order of their labels.

    This reads only the folder, no files; a built-in set is drawn if it doesn't exist. For shards,
    their cached index is read.

    Raises:
        ValueError: the data set is no image folder, has no class folders, or one with a control
            character in its name, or has damaged shards; one line.
    """
    if shards := _shards_of(name):
        return read_shards(shards)[1]
    root = _local_root(name)
    try:
        classes = find_classes(root)[0]
    except FileNotFoundError as e:
        raise ValueError(
            f"{name!r}: {root!r} has no class folders; an image folder has its images in one "
            "folder per class"
        ) from e
    except OSError as e:
        raise ValueError(f"{name!r}: {e}") from e
    check_one_line(name, classes)
    return classes


def check_image_folders(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Check registered data sets for training and testing a classifier; return their classes.

    In folders, only one image per class is searched for. Shards are read from end to end the first
    time; a built-in set is drawn if it doesn't exist.

    Raises:
        ValueError: a data set is missing, is no image folder, or has a class without images, or
            two of them have different classes; one line that names data set, folder and classes.
    """
    names = list(dict.fromkeys([*train, *test]))
    if not names:
        raise ValueError("no data sets are given; a classifier's are image folders")
    found = {name: _check(name) for name in names}
    first, classes = names[0], found[names[0]]
    for name in names[1:]:
        missing = {
            first: sorted(set(classes) - set(found[name])),
            name: sorted(set(found[name]) - set(classes)),
        }
        if any(missing.values()):
            only = [f"only in {where!r}: {_quoted(cs)}" for where, cs in missing.items() if cs]
            raise ValueError(
                f"{first!r} and {name!r} have different classes ({'; '.join(only)}); give both "
                "the same class folders"
            )
        if classes != found[name]:
            raise ValueError(
                f"{first!r} and {name!r} have the same classes in another order; sort "
                "the classes.txt of shards, and their labels with it"
            )
    return classes


def _check(name: str) -> list[str]:
    if shards := _shards_of(name):
        return _check_shards(name, shards)
    classes = image_folder_classes(name)
    root = _local_root(name)
    with prefixed(f"{name!r}", OSError):
        empty = [c for c in classes if not _has_image(os.path.join(root, c))]
    if empty:
        there = (f for c in empty for _, _, names in os.walk(os.path.join(root, c)) for f in names)
        way_out = unreadable(there) or "remove what is no class, or put its images there"
        raise ValueError(f"{name!r}: no images in {_quoted(empty)} of {root!r}; {way_out}")
    return classes


def _check_shards(name: str, shards: Sequence[str]) -> list[str]:
    records, classes = read_shards(shards)
    present = {record["label"] for record in records}
    if empty := [c for label, c in enumerate(classes) if label not in present]:
        raise ValueError(
            f"{name!r}: no images in {_quoted(empty)}; labels begin with 0, and each line of "
            "classes.txt is a class"
        )
    return classes


def _shards_of(name: str) -> Sequence[str]:
    # MetadataCatalog.get would create the metadata of an unknown name.
    return MetadataCatalog.get(name).get("shards", ()) if name in DatasetCatalog else ()


def _local_root(name: str) -> str:
    if name not in DatasetCatalog:
        raise ValueError(
            f"no data set {name!r} is registered, and there is no such folder here or in "
            f"{DATASETS_ROOT!r} (the environment variable DETECTRON2_DATASETS)"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != EVALUATOR_TYPE:
        raise ValueError(
            f"{name!r} is no image folder; a classifier needs data sets with one folder of images "
            "per class"
        )
    return existing_path(name, metadata.image_root)


def _has_image(folder: str) -> bool:
    """Whether torchvision finds an image in a folder or its subfolders; stops at the first.

    os.walk would read a whole folder before it yields the first name.
    """
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            elif is_image_file(entry.name):
                return True
    return any(_has_image(f) for f in folders)


def _quoted(items: list[str]) -> str:
    return named([*map(repr, items)])


for _split in ("train", "val"):
    # Reloading this module is harmless.
    if f"imagenet_{_split}" not in DatasetCatalog:
        register_image_folder(f"imagenet_{_split}", os.path.join(DATASETS_ROOT, "imagenet", _split))
