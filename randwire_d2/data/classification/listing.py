"""What is in folders of images and in shards, listed once for all processes of a machine.

ImageNet's 1.28 million files take minutes to list where they lie on a network disk. So what was
listed is kept, for the evaluations of a training too, and handed to other processes. It is kept as
Detectron2's ``DatasetFromList``: a hundred bytes of each image, a fifth of what its dict takes.
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
    """List data sets, and forget what was listed before: the files may be others.

    Raises:
        ValueError: one can't be listed; one line.
    """
    _kept.clear()
    for name in names:
        listed(name)
    return _kept


def listed(name: str) -> Listing:
    """What is in a data set, listed unless that is known.

    Raises:
        ValueError: it can't be listed; one line.
    """
    if name not in _kept:
        register_folders([name])
        with prefixed(f"{name!r}", OSError):
            records = DatasetCatalog.get(name)
            # Noted by the listing; the classes of shards would be all of them read again.
            classes = MetadataCatalog.get(name).get("classes") or image_folder_classes(name)
        _kept[name] = Listing(DatasetFromList(records, copy=False), classes)
    return _kept[name]


def listed_images(names: Sequence[str]) -> Any:
    """The images of data sets one after the other, as ``len`` and an index give them."""
    found = [listed(name).images for name in names]
    return found[0] if len(found) == 1 else ConcatDataset(found)


def count_listed() -> dict[str, int]:
    """How many images each data set has that was listed."""
    return {name: len(listing.images) for name, listing in _kept.items()}


def known_listings() -> Mapping[str, Listing]:
    """All that this process has listed, for ``take_listings``."""
    return _kept


def take_listings(listings: Mapping[str, Listing]) -> None:
    """Take what another process of this run has listed."""
    _kept.clear()
    _kept.update(listings)
