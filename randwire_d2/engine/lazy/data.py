"""Adapt a LazyConfig's model, loaders and evaluator to a data set that is given by its path."""

from collections.abc import Sequence

from detectron2.config import LazyConfig
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.modeling.meta_arch import FCOS, RetinaNet
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from omegaconf import DictConfig, OmegaConf

from ...data.detection.classes import thing_classes
from ..config.datasets import register_data
from ..config.keypoints import default_sigmas, keypoint_names
from .in_yaml import KEYPOINTS, finds_coco_metrics, mask_key, target_of, yaml_config

# The keys of Detectron2's detectors for the number of classes. Others may refer to the first two.
# The last one has another value, 1, if one mask is for all classes.
_NUMBERS = (
    "model.roi_heads.num_classes",
    "model.num_classes",
    "model.head.num_classes",
    "model.roi_heads.box_predictor.num_classes",
    *(f"model.roi_heads.box_predictors.{stage}.num_classes" for stage in range(3)),
    "model.roi_heads.mask_head.num_classes",
)
_NUM_KEYPOINTS = "model.roi_heads.keypoint_head.num_keypoints"
_MASKS = "dataloader.train.mapper.use_instance_mask"
# These detectors use masks only if their ``mask_key`` is set.
_DETECTORS = (CascadeROIHeads, FCOS, Res5ROIHeads, RetinaNet, StandardROIHeads)


def use_data(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Set a LazyConfig's loaders, evaluator and number of classes for the data set of
    ``train.data``, if there is one; make COCOEvaluator convert other formats. Each process calls
    this, since each has its own catalog.

    Args:
        overrides: the command line's path.key=value; a number of classes there is kept.

    Raises:
        ValueError: the data set can't be used, or the command line names another; one line.
    """
    if finds_coco_metrics(cfg):  # no cached conversion, since the labels may have changed
        cfg.dataloader.evaluator.setdefault("output_dir", "${train.output_dir}/inference")
        cfg.dataloader.evaluator.setdefault("allow_cached_coco", False)
    if not cfg.train.data:
        return
    if named := [text for text in overrides if ".dataset.names=" in text]:
        raise ValueError(f"{named[0]} is given beside --data (train.data), which sets it")
    (train,), (test,) = register_data(yaml_config(cfg))
    OmegaConf.update(cfg, "dataloader.train.dataset.names", train)
    OmegaConf.update(cfg, "dataloader.test.dataset.names", test)
    if OmegaConf.select(cfg, "dataloader.evaluator.dataset_name"):
        cfg.dataloader.evaluator.dataset_name = test
    before = {OmegaConf.select(cfg, key) for key in _NUMBERS[:2]} - {None}
    for key in _NUMBERS:  # keys that refer to one of the first already have the new number
        if OmegaConf.select(cfg, key) in before:
            OmegaConf.update(cfg, key, len(thing_classes(train)))
    if OmegaConf.select(cfg, KEYPOINTS) is not None:
        _use_keypoints(cfg, train)
    _leave_out_masks(cfg)
    given = [t for t in overrides if "num_classes=" in t or "num_keypoints=" in t]
    LazyConfig.apply_overrides(cfg, given)


def _use_keypoints(cfg: DictConfig, train: str) -> None:
    """Set the keypoints of a keypoint head, of its training loader, and COCOEvaluator's sigmas."""
    names = keypoint_names(train)
    OmegaConf.update(cfg, _NUM_KEYPOINTS, len(names))
    indices = create_keypoint_hflip_indices(train)
    cfg.dataloader.train.mapper.update(use_keypoint=True, keypoint_hflip_indices=indices)
    if "min_keypoints" not in cfg.dataloader.train.dataset:
        cfg.dataloader.train.dataset.min_keypoints = 1
    if finds_coco_metrics(cfg):
        cfg.dataloader.evaluator.setdefault("kpt_oks_sigmas", default_sigmas(names))


def _leave_out_masks(cfg: DictConfig) -> None:
    """Make the training mapper read no masks for a detector without masks. Detectron2's configs do
    read them, but its mapper fails with RLE in place of polygons, or if objects lack a mask."""
    detector = target_of(OmegaConf.select(cfg, "model.roi_heads", default=cfg.model))
    of_boxes = OmegaConf.select(cfg, "dataloader.train.mapper.recompute_boxes")
    if (
        detector in _DETECTORS
        and OmegaConf.select(cfg, mask_key(cfg)) is None
        and OmegaConf.select(cfg, _MASKS)
        and not of_boxes
    ):
        OmegaConf.update(cfg, _MASKS, False)


def check_classes(cfg: DictConfig, name: str) -> None:
    """
    Raises:
        ValueError: a LazyConfig's detector has another number of classes, or keypoints, than a data
            set; one line.
    """
    numbers = {key: (len(thing_classes(name)), "classes") for key in _NUMBERS[:-1]}
    numbers[_NUM_KEYPOINTS] = len(keypoint_names(name)), "keypoints"
    for key, (number, what) in numbers.items():
        value = OmegaConf.select(cfg, key)
        if number and value not in (None, number):
            raise ValueError(f"{key} is {value}, but {name!r} has {number} {what}: {key}={number}")
