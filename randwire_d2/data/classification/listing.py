"""The images of folders and shards, listed once for all processes of a machine.

Listing ImageNet's 1.28 million files on a network disk takes minutes. So lists are kept, also for a
training's evaluations, and sent to other processes. They are kept as Detectron2's
``DatasetFromList``, which takes a hundred bytes per image, a fifth of a dict.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from torch.utils.data import ConcatDataset

from ...text import prefixed
from .image_folder import image_folder_classes, register_folders


class Listing(NamedTuple):
    """The {"file_name", "label"} of each image of a data set, and the names of its classes."""

    images: DatasetFromList
    classes: list[str]


_kept: dict[str, Listing] = {}


def list_anew(names: Iterable[str]) -> Mapping[str, Listing]:
    """List data sets, and forget earlier lists, because the files may have changed.

    Raises:
        ValueError: a data set can't be listed; one line.
    """
    _kept.clear()
    for name in names:
        listed(name)
    return _kept


def listed(name: str) -> Listing:
    """The listing of a data set, which is made at the first call.

    Raises:
        ValueError: the data set can't be listed; one line.
    """
    if name not in _kept:
        register_folders([name])
        with prefixed(f"{name!r}", OSError):
            records = DatasetCatalog.get(name)
            # The listing sets the metadata's classes; image_folder_classes would read shards again.
            classes = MetadataCatalog.get(name).get("classes") or image_folder_classes(name)
        _kept[name] = Listing(DatasetFromList(records, copy=False), classes)
    return _kept[name]


def listed_images(names: Sequence[str]) -> Any:
    """The concatenated images of data sets, an object with ``len`` and indices."""
    found = [listed(name).images for name in names]
    return found[0] if len(found) == 1 else ConcatDataset(found)


def count_listed() -> dict[str, int]:
    """The number of images of each listed data set."""
    return {name: len(listing.images) for name, listing in _kept.items()}


def known_listings() -> Mapping[str, Listing]:
    """All listings of this process, for ``take_listings``."""
    return _kept


def take_listings(listings: Mapping[str, Listing]) -> None:
    """Replace this process's listings by those of another process of the run."""
    _kept.clear()
    _kept.update(listings)
