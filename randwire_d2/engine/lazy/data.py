"""What a LazyConfig's data set, if it is given by its path, sets in the rest of it."""

from collections.abc import Sequence

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from ..config.datasets import register_data, thing_classes
from .in_yaml import finds_coco_metrics, yaml_config

# Where Detectron2's detectors have the number of their classes: ahead of others what those refer
# to, and last what has another number, 1, if one mask is for all classes.
_NUMBERS = (
    "model.roi_heads.num_classes",
    "model.num_classes",
    "model.head.num_classes",
    "model.roi_heads.box_predictor.num_classes",
    *(f"model.roi_heads.box_predictors.{stage}.num_classes" for stage in range(3)),
    "model.roi_heads.mask_head.num_classes",
)


def use_data(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Have a LazyConfig's loaders and evaluator read the data set of ``train.data``, if there is
    one, and its detector tell as many classes; and its evaluator read what is not COCO's. In each
    process, whose catalog is its own.

    Args:
        overrides: the command line's path.key=value; a number of classes there stays.

    Raises:
        ValueError: the data set can't be used, or the command line names another; one line.
    """
    if finds_coco_metrics(cfg):  # it writes that as COCO's: anew, as the labels may be
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
    for key in _NUMBERS:  # those that refer to one of the first are another number by now
        if OmegaConf.select(cfg, key) in before:
            OmegaConf.update(cfg, key, len(thing_classes(train)))
    LazyConfig.apply_overrides(cfg, [text for text in overrides if "num_classes=" in text])


def check_classes(cfg: DictConfig, name: str) -> None:
    """
    Raises:
        ValueError: a LazyConfig's detector has another number of classes than a data set; one line.
    """
    number = len(thing_classes(name))
    for key in _NUMBERS[:-1]:
        value = OmegaConf.select(cfg, key)
        if number and value not in (None, number):
            raise ValueError(f"{key} is {value}, but {name!r} has {number} classes: {key}={number}")
