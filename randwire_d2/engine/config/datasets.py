"""The data sets of a config, which may be given by path, and the number of their classes."""

import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ...data import Look, absolute, count_images, labelled_images, look, register_detection_data
from ...data.classification.listing import count_listed, known_listings, take_listings
from ...data.detection.by_path import read_labels, take_labels
from ...data.detection.classes import thing_classes
from ...data.formats.layouts import find_splits
from ...data.images.probing import known_files, take_files
from ...text import named
from ..processes.torchrun import made_once
from .keypoints import check_keypoints
from .keys import UNSET

HEADS = ("ROI_HEADS", "RETINANET")  # with a NUM_CLASSES of things
STUFF_HEAD = "SEM_SEG_HEAD"  # with one of stuff
# The heads that each meta-architecture of Detectron2 builds. Others may build any of them.
_HEADS_OF: dict[str, tuple[str, ...]] = {
    "GeneralizedRCNN": ("ROI_HEADS",),
    "PanopticFPN": ("ROI_HEADS",),
    "RetinaNet": ("RETINANET",),
    "ProposalNetwork": (),
    "SemanticSegmentor": (),
}
_SEGMENT_STUFF = {"PanopticFPN", "SemanticSegmentor"}

logger = logging.getLogger(__name__)


def register_data(cfg: CfgNode, needs_val: bool = True) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Register the data set of DATASETS.PATH, if there is one, in this process.

    Args:
        needs_val: whether a data set without a validation split is refused.

    Returns:
        The names for DATASETS.TRAIN and DATASETS.TEST.

    Raises:
        ValueError: the data set can't be used; one line.
    """
    node = cfg.DATASETS
    if not node.PATH:
        return tuple(node.TRAIN), tuple(node.TEST)
    return register_detection_data(
        node.PATH, node.PATH_VAL, node.HOLD_BACK, max(cfg.SEED, 0), needs_val=needs_val
    )


def take_data(cfg: CfgNode, needs_val: bool = True) -> None:
    """Register the data set of DATASETS.PATH, set TRAIN and TEST, and make the paths absolute.

    Args:
        needs_val: whether a data set without a validation split is refused.

    Raises:
        ValueError: the data set can't be used, or not for this model; one line.
    """
    node = cfg.DATASETS
    if node.PATH_VAL and not node.PATH:
        raise ValueError("DATASETS.PATH_VAL (--data-val) needs DATASETS.PATH (--data)")
    if node.PATH and cfg.MODEL.META_ARCHITECTURE in _SEGMENT_STUFF:
        raise ValueError(
            f"DATASETS.PATH (--data) has no labels of stuff, which a {cfg.MODEL.META_ARCHITECTURE} "
            "needs; register the data set by a name, or take a Mask R-CNN's config"
        )
    node.PATH, node.PATH_VAL = absolute(node.PATH), absolute(node.PATH_VAL)
    if node.PATH:
        made_once("labels", partial(_read_data, cfg, needs_val), take_known)
    elif node.HOLD_BACK:
        _warn_of_hold_back(cfg, "it is for DATASETS.PATH (--data)")
    node.TRAIN, node.TEST = register_data(cfg, needs_val)
    if node.PATH and cfg.MODEL.MASK_ON:
        for name in (*node.TRAIN, *node.TEST):
            _check_masks(name, cfg.INPUT.MASK_FORMAT if name in node.TRAIN else "bitmask")
    if node.PATH and cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg)


def _read_data(cfg: CfgNode, needs_val: bool) -> tuple[Any, ...]:
    register_data(cfg, needs_val)
    node = cfg.DATASETS
    if node.HOLD_BACK and "val" in find_splits(node.PATH, node.PATH_VAL):
        _warn_of_hold_back(cfg, "there is a validation split")
    return known()


def _warn_of_hold_back(cfg: CfgNode, why: str) -> None:
    logger.warning(f"DATASETS.HOLD_BACK {cfg.DATASETS.HOLD_BACK} holds no image back: {why}")


def known() -> tuple[Any, ...]:
    """The data that this process has read, for ``take_known`` in other processes of the run."""
    return known_files(), read_labels(), known_listings()


def take_known(told: tuple[Any, ...]) -> None:
    """Take over the data that another process has read (``known``)."""
    files, labels, listings = told
    take_files(files)
    take_labels(labels)
    take_listings(listings)


def check_same_data(cfg: CfgNode) -> None:
    """Compare the data of all processes, since one process of each machine has read it: the number
    of a classifier's images, and the images and boxes of DATASETS.PATH. All processes call this.

    Raises:
        ValueError: in all processes: the data differs; one line that names two processes.
    """
    if comm.get_world_size() == 1:
        return
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if cfg.DATASETS.PATH else []
    mine = [
        f"{len(found.records)} images, {found.num_boxes} boxes ({found.checksum()[:8]})"
        for found in map(labelled_images, names)
    ]
    mine += [f"{number} images of {name!r}" for name, number in count_listed().items()]
    first, *others = comm.all_gather((socket.gethostname(), mine))
    for rank, other in enumerate(others, start=1):
        if other[1] != first[1]:
            seen = (
                f"process {i} ({host}) sees {' and '.join(found)}"
                for i, (host, found) in ((0, first), (rank, other))
            )
            what = f"DATASETS.PATH {cfg.DATASETS.PATH!r}" if names else "a data set"
            raise ValueError(
                f"{what} is not the same for all processes: {' and '.join(seen)}; give all "
                "machines the same files"
            )


def _check_masks(name: str, mask_format: str) -> None:
    split = labelled_images(name)
    if mask_format == "polygon" and any(
        isinstance(a.get("segmentation"), dict) and not a["iscrowd"]
        for record in split.records
        for a in record["annotations"]
    ):
        raise ValueError(f"{split.source!r} has masks as RLE; set INPUT.MASK_FORMAT bitmask")
    bare = [
        r["file_name"] for r in split.records for a in r["annotations"] if "segmentation" not in a
    ]
    if bare:
        raise ValueError(
            f"{len(bare)} of {split.num_boxes} boxes of {split.source!r} have no polygon, the "
            f"first in {bare[0]}; train without masks, MODEL.MASK_ON False"
        )


def look_at_data(cfg: CfgNode) -> Look:
    """Inspect the registered data sets of a config.

    Raises:
        ValueError: too little of a data set can be used, or none is named; one line.
    """
    names = {"train": cfg.DATASETS.TRAIN, "val": cfg.DATASETS.TEST}
    splits = {
        split if len(of_split) == 1 else f"{split} {name}": labelled_images(name)
        for split, of_split in names.items()
        for name in of_split
    }
    if not splits:
        raise ValueError("no data set is named; give --data PATH, or DATASETS.TRAIN")
    return look(splits)


def log_data(cfg: CfgNode) -> None:
    """Log a summary of the data set of DATASETS.PATH, if there is one, in the first process.

    Data sets that the user has registered are not inspected; COCO, say, would take a minute.
    """
    if cfg.DATASETS.PATH and comm.is_main_process():
        found = look_at_data(cfg)
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS if cfg.MODEL.KEYPOINT_ON else []
        how = f"\n  evaluated with TEST.KEYPOINT_OKS_SIGMAS {sigmas}" if sigmas else ""
        logger.info(f"The data:\n{found.summary}{how}")
        for line in found.warnings:
            logger.warning(line)
        _warn_of_evaluations(cfg)


def count_training_images(cfg: CfgNode) -> int:
    """The number of images in an epoch of a detector's training, without those that it skips."""
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    node = cfg.MODEL.ROI_KEYPOINT_HEAD
    least = node.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    return sum(count_images(name, filter_empty, least) for name in cfg.DATASETS.TRAIN)


def _warn_of_evaluations(cfg: CfgNode) -> None:
    """Warn if evaluations would take most of the time, as with more data than usual."""
    test = sum(len(labelled_images(name).records) for name in cfg.DATASETS.TEST)
    period, batch = cfg.TEST.EVAL_PERIOD, cfg.SOLVER.IMS_PER_BATCH
    if 0 < period * batch < test and period < cfg.SOLVER.MAX_ITER:
        train = count_training_images(cfg)
        # With few training images, an epoch can be even shorter than the period.
        longer = "an epoch is" if train >= test else "as many images are"
        logger.warning(
            f"the {test} validation images are evaluated every {period} iterations, which see "
            f"{period * batch} images: most of the training's time may go into evaluations; "
            f"{longer} {-(-max(train, test) // batch)} iterations of {batch} (TEST.EVAL_PERIOD, or "
            "a LazyConfig's train.eval_period)"
        )


def check_evaluator(name: str) -> None:
    """
    Raises:
        ValueError: the evaluation of the registered data set needs a package that is not installed,
            or an id that a class of stuff doesn't have; one line.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
    for index, stuff in enumerate(stuff_classes(name) if ids else ()):
        if index not in ids.values():
            raise ValueError(
                f"{name!r} has no id in stuff_dataset_id_to_contiguous_id for {stuff!r}, index "
                f"{index} of its stuff_classes: add it to its metadata (for all things, 0: 0)"
            )
    if kind == "coco_panoptic_seg" and find_spec("panopticapi") is None:
        raise ValueError(
            f"the evaluation of {name!r} needs panopticapi: pip install "
            "git+https://github.com/cocodataset/panopticapi.git, or train without an evaluation, "
            'DATASETS.TEST "()"'
        )


def forget_classes(cfg: CfgNode) -> dict[str, int]:
    """Mark each head's NUM_CLASSES as not set; return the earlier numbers."""
    defaults = {head: cfg.MODEL[head].NUM_CLASSES for head in (*HEADS, STUFF_HEAD)}
    for head in defaults:
        cfg.MODEL[head].NUM_CLASSES = UNSET
    return defaults


def settle_classes(cfg: CfgNode, defaults: dict[str, int], names: Sequence[str]) -> list[str]:
    """Set each head's NUM_CLASSES to the number of the data's classes (of stuff for SEM_SEG_HEAD),
    unless the user has set it.

    Args:
        defaults: the return value of ``forget_classes``, for data sets without class names.
        names: the names of the registered data sets, at least one.

    Returns:
        The classes of things that the network distinguishes; none if the data sets name none.

    Raises:
        ValueError: a head's number was set to another, or the data sets differ; one line.
    """
    built = heads_of(cfg.MODEL.META_ARCHITECTURE)
    things = _common_classes(names, thing_classes)
    for head in HEADS:
        _settle_head(cfg, head, defaults, *things, is_built=head in built)
    stuff = names[0], list[str]()
    if cfg.MODEL.META_ARCHITECTURE in _SEGMENT_STUFF:
        stuff = _common_classes(names, stuff_classes)
    _settle_head(cfg, STUFF_HEAD, defaults, *stuff)
    return things[1] if built else []


def _common_classes(
    names: Sequence[str], classes_of: Callable[[str], list[str]]
) -> tuple[str, list[str]]:
    """The first data set that names its classes, and these, which are those of all others, too."""
    found = [(name, classes) for name in names if (classes := classes_of(name))]
    first, *others = found or [(names[0], [])]
    for name, classes in others:
        if classes != first[1]:
            raise ValueError(
                f"{first[0]!r} and {name!r} have different classes: {_short(first[1])}, and "
                f"{_short(classes)}"
            )
    return first


def _settle_head(
    cfg: CfgNode,
    head: str,
    defaults: dict[str, int],
    name: str,
    classes: list[str],
    is_built: bool = True,
) -> None:
    node, number = cfg.MODEL[head], len(classes)
    if node.NUM_CLASSES == UNSET:
        node.NUM_CLASSES = number or defaults[head]
    elif number and is_built and number != node.NUM_CLASSES:
        raise ValueError(
            f"MODEL.{head}.NUM_CLASSES is {node.NUM_CLASSES}, but {name!r} has {_short(classes)}; "
            f"set it to {number}, or leave the key out, and it follows from the data"
        )


def heads_of(architecture: str) -> tuple[str, ...]:
    """The heads of a meta-architecture that distinguish classes."""
    return _HEADS_OF.get(architecture, HEADS)


def stuff_classes(name: str) -> list[str]:
    """The stuff classes of a registered data set; none if it names none."""
    return list(MetadataCatalog.get(name).get("stuff_classes") or [])


def _short(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({named(classes)})"
