"""Register data sets in Detectron2 by their paths."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ...garbage import uncollected
from ...text import named
from ..formats.keypoints import connection_rules, count_labelled
from ..formats.labels import LabelledImages
from ..formats.layouts import Reader, absolute, find_splits
from .inspection import clean

SPLITS = ("train", "val")
# The key of the draws of ``held_back``; it is part of the sets' names, as another key would change
# the sets.
_DRAWN_BY = "name"


def register_detection_data(
    path: str, path_val: str = "", hold_back: float = 0.0, seed: int = 0, *, needs_val: bool = True
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Register a data set by its path, for training and for validation.

    The names are the same in every process and run. DatasetCatalog gets the usable records (see
    ``inspection``) of a ``formats.labels.LabelledImages``. MetadataCatalog gets thing_classes,
    thing_dataset_id_to_contiguous_id and evaluator_type "coco"; json_file and image_root if all of
    a COCO file is used; and, if there are keypoints, keypoint_names, keypoint_flip_map and
    keypoint_connection_rules. Data sets that are registered already are not read again.

    Args:
        path: the data set; ``formats.layouts`` lists the possible paths.
        path_val: the validation split; it takes precedence over a split that ``path`` has.
        hold_back: the share of the training images that are held back for validation if there is
            no validation split; ``held_back`` chooses them.
        seed: the seed of this choice.
        needs_val: whether data without a validation split are refused.

    Returns:
        The names of the sets for training and for validation; the latter is empty without a split.

    Raises:
        ValueError: there is no such data set, it has no validation split, or the labels can't be
            used; one line.
    """
    path, path_val = absolute(path), absolute(path_val)
    names = {split: f"{_base(path, path_val, hold_back, seed)}_{split}" for split in SPLITS}
    if any(names[split] not in DatasetCatalog for split in (SPLITS if needs_val else SPLITS[:1])):
        read = partial(_read, path, path_val, hold_back, seed, needs_val)
        found = {split: _told.pop(name) for split, name in names.items() if name in _told}
        if "train" not in found:
            found = read(SPLITS)
        if "val" in found:
            _compare_classes(**found)
        for split, images in found.items():
            again = partial(lambda split: read((split,))[split], split)
            DatasetCatalog.register(names[split], _Lasting(images, again, keep=split == "val"))
    train, val = ((name,) if name in DatasetCatalog else () for name in names.values())
    for name in (*train, *val):
        _set_metadata(name, DatasetCatalog[name].about)
    return train, val


# The labels that another process has read, by the sets' names.
_told: dict[str, LabelledImages] = {}


def read_labels() -> dict[str, LabelledImages]:
    """The labels in memory of the sets registered by path, for ``take_labels``."""
    return {name: kept for name, r in _lasting().items() if (kept := r.kept) is not None}


def forget_labels() -> None:
    """Free the labels in memory of these sets; they are read again if they are needed."""
    for registered in _lasting().values():
        registered.kept = None


def _lasting() -> dict[str, "_Lasting"]:
    """The data sets that were registered by their path in this process."""
    return {name: r for name, r in DatasetCatalog.items() if isinstance(r, _Lasting)}


def take_labels(read: Mapping[str, LabelledImages]) -> None:
    """Take over labels that another process has read, for ``register_detection_data`` here."""
    _told.update((name, found) for name, found in read.items() if name not in DatasetCatalog)


def labelled_images(name: str) -> LabelledImages:
    """The usable images and boxes of a registered data set, and the faults of the others.

    Raises:
        ValueError: too little of the data set can be used; one line.
    """
    registered = DatasetCatalog[name]
    if isinstance(registered, _Lasting):
        return registered.peek()
    records = []
    for record in registered():
        annotations = [
            {**a, "bbox": BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS)}
            for a in record.get("annotations", ())
        ]
        records.append({**record, "annotations": annotations})
    metadata = MetadataCatalog.get(name)
    classes = tuple(metadata.get("thing_classes") or ())
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or range(len(classes))
    return clean(LabelledImages(name, records, classes, tuple(ids)))


def count_images(name: str, filter_empty: bool = True, min_keypoints: int = 0) -> int:
    """The number of images of a registered data set.

    Args:
        filter_empty: leave out images without a box or with crowds only, as Detectron2's training
            does with DATALOADER.FILTER_EMPTY_ANNOTATIONS.
        min_keypoints: the least number of labelled keypoints of an image that counts.
    """
    registered = DatasetCatalog[name]
    records = registered.peek().records if isinstance(registered, _Lasting) else registered()

    def trains(record: Mapping[str, Any]) -> bool:
        own = record.get("annotations")
        if filter_empty and own is not None and all(a.get("iscrowd", 0) for a in own):
            return False
        return not min_keypoints or count_labelled(own or ()) >= min_keypoints

    return sum(map(trains, records))


class _Lasting:
    """A data set's function in DatasetCatalog, which keeps the labels until they are requested.

    So a process reads the files once before its training, and a large set is not in memory twice.

    Args:
        found: the labels that were read.
        read: reads them again if they are no longer kept.
        keep: whether to keep them for good: every evaluation requests them.
    """

    def __init__(self, found: LabelledImages, read: Reader, keep: bool) -> None:
        self.kept: LabelledImages | None = found
        self._read, self._keep = read, keep
        self.about = replace(found, records=[])

    def peek(self) -> LabelledImages:
        if self.kept is None:
            self.kept = self._read()
        return self.kept

    def __call__(self) -> list[dict]:
        records = self.peek().records
        if self._keep:
            # Detectron2 changes keypoints in place when it writes them for an evaluation.
            return copy.deepcopy(records) if self.about.keypoints.names else list(records)
        self.kept = None
        return records


def _base(path: str, path_val: str, hold_back: float, seed: int) -> str:
    """The common part of the sets' names, safe in file names: a hash of all they depend on."""
    decisive = [path, path_val, *([hold_back, seed, _DRAWN_BY] if hold_back else [])]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    place = path.split(":")[0]
    folder = place if os.path.isdir(place) else os.path.dirname(place)
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', os.path.basename(folder)).strip('_')}_{digest[:8]}"


def _readers(path: str, path_val: str, hold_back: float, needs_val: bool) -> dict[str, Reader]:
    if not 0 <= hold_back < 1:
        raise ValueError(
            f"DATASETS.HOLD_BACK is a share of the training images, at least 0 and less than 1; "
            f"got {hold_back}"
        )
    readers = find_splits(path, path_val)
    if "val" not in readers and not hold_back and needs_val:
        readers["train"]()  # faults of the labels are reported first
        raise ValueError(
            f"{path!r} has no validation split; name one with --data-val (DATASETS.PATH_VAL), or "
            "hold back a tenth of the training images with DATASETS.HOLD_BACK 0.1"
        )
    return readers


@uncollected()
def _read(
    path: str, path_val: str, share: float, seed: int, needs_val: bool, splits: Sequence[str]
) -> dict[str, LabelledImages]:
    """Read those of the splits that exist, without images and boxes that can't be used."""
    readers = _readers(path, path_val, share, needs_val)
    if "val" in readers or not share:
        found = {split: clean(readers[split]()) for split in splits if split in readers}
    else:
        whole = readers["train"]()
        held = held_back(whole, share, seed)
        whole = clean(whole)
        found = {split: _part(whole, held, split, share) for split in splits}
    if "val" in found:
        _ignore_difficult(found["val"])
    return found


def _ignore_difficult(val: LabelledImages) -> None:
    """Make COCO's evaluation ignore Pascal VOC's difficult objects, as VOC's own evaluation does.

    Training uses them, as with Detectron2's reader of VOC.
    """
    for record in val.records:
        for annotation in record["annotations"]:
            if annotation.get("difficult"):
                annotation["iscrowd"] = 1


def _part(whole: LabelledImages, held: set[str], split: str, share: float) -> LabelledImages:
    records = [r for r in whole.records if (r["file_name"] in held) == (split == "val")]
    part = replace(whole, records=records, json_file=None)
    if not part.num_boxes:
        raise ValueError(
            f"{whole.source!r}: with DATASETS.HOLD_BACK {share} the {len(records)} images for "
            f"{split} have no box; choose another share, or another SEED"
        )
    return part


def held_back(whole: LabelledImages, share: float, seed: int) -> set[str]:
    """The file_name of each image that is held back for validation.

    The draw of an image depends only on the seed and its name in the data set. So a training that
    is resumed after images were added, removed or damaged does not validate on images that it was
    trained on. The number of images is the share in expectation only: an exact number would move
    other images when one is added or removed. If there are several images, at least one is held
    back, and at least one is not.
    """
    draws = {record["file_name"]: 0.0 for record in whole.records}
    for name in draws:
        drawn = f"{seed} {whole.inside(name)}".encode(errors="surrogatepass")
        digest = hashlib.sha256(drawn).digest()
        draws[name] = int.from_bytes(digest[:8], "big") / 2**64
    held = {name for name, draw in draws.items() if draw < share}
    if not held:
        return set(sorted(draws, key=draws.__getitem__)[:1])
    if len(held) == len(draws) > 1:
        held.remove(max(draws, key=draws.__getitem__))
    return held


def _compare_classes(train: LabelledImages, val: LabelledImages) -> None:
    if train.classes == val.classes:
        return
    only = {
        split.source: [c for c in split.classes if c not in other.classes]
        for split, other in ((train, val), (val, train))
    }
    differences = [f"only in {s!r}: {named(names, most=80)}" for s, names in only.items() if names]
    raise ValueError(
        f"training and validation have different classes "
        f"({'; '.join(differences) or 'the same names in another order'}); give both the same"
    )


def _set_metadata(name: str, about: LabelledImages) -> None:
    if name in MetadataCatalog.list():  # COCOEvaluator may have noted a run's file as json_file
        MetadataCatalog.remove(name)
    coco = {"json_file": about.json_file, "image_root": about.image_root}
    points = about.keypoints
    keypoints = {
        "keypoint_names": list(points.names),
        "keypoint_flip_map": list(points.flips or ()),
        "keypoint_connection_rules": connection_rules(points.connections),
    }
    MetadataCatalog.get(name).set(
        thing_classes=list(about.classes),
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(about.category_ids)},
        evaluator_type="coco",
        **(coco if about.json_file else {}),
        **(keypoints if points.names else {}),
    )
