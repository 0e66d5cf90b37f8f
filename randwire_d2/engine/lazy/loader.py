"""The loaders of a LazyConfig; a ``TrainLoader`` replaces Detectron2's training loader.

The arguments of the loader are read from its LazyCall, which is not called.
"""

import copy
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import IterableDataset

from ...data.images.patience import PatientMapper
from ..processes.signals import guard_workers
from ..train_loader import TrainLoader, warn_of_first_images
from .in_yaml import target_of

# The arguments of Detectron2's loader that TrainLoader also has, except the sampler.
_ARGUMENTS = ("dataset", "mapper", "total_batch_size", "aspect_ratio_grouping", "num_workers")
# These samplers depend only on their arguments and, if they draw a seed, on the random state.
_SAMPLERS = (TrainingSampler, RandomSubsetTrainingSampler, RepeatFactorTrainingSampler)


def lazy_train_loader(call: DictConfig, seed: int) -> Any:
    """Build the loader of a LazyConfig's ``dataloader.train``.

    It is a ``TrainLoader`` with this seed, if the config calls Detectron2's
    ``build_detection_train_loader`` with only a map-style data set of dicts, a mapper, one of
    Detectron2's samplers, batch size, grouping and workers. Else it is the config's own loader, and
    the log says why a resumed training begins with its first images again.
    """
    if reason := _why_unrepeatable(call):
        warn_of_first_images(f"dataloader.train {reason}")
        return guard_workers(instantiate(call))
    given = {key: instantiate(call[key]) for key in _ARGUMENTS if key in call}
    records, chosen = given["dataset"], call.get("sampler")
    if isinstance(records, IterableDataset) or not isinstance(records[0], dict):
        warn_of_first_images("dataloader.train.dataset is not one of dicts by number")
        return guard_workers(build_detection_train_loader(**given, sampler=instantiate(chosen)))
    return TrainLoader(
        records,
        given["mapper"],
        lambda records: instantiate(chosen) if chosen else TrainingSampler(len(records)),
        seed,
        batch_size=given["total_batch_size"],
        grouped=given.get("aspect_ratio_grouping", True),
        num_workers=given.get("num_workers", 0),
    )


def _why_unrepeatable(call: DictConfig) -> str:
    """The reason why a LazyCall can't become a ``TrainLoader``; "" if it can."""
    if target_of(call) is not build_detection_train_loader:
        return "is not Detectron2's build_detection_train_loader"
    others = set(map(str, call)) - {"_target_", "sampler", *_ARGUMENTS}
    if set_others := sorted(key for key in others if call[key] is not None):
        return f"sets {', '.join(set_others)}"
    if call.get("mapper") is None:
        return "has no mapper"
    if call.get("sampler") is not None and target_of(call.sampler) not in _SAMPLERS:
        return "has a sampler that is not one of Detectron2's"
    return ""


def check_loss_images(cfg: DictConfig) -> None:
    """
    Raises:
        ValueError: a mapper is not Detectron2's, as ``lazy_loss_loader`` needs; one line.
    """
    for split in ("train", "test"):
        mapper = OmegaConf.select(cfg, f"dataloader.{split}.mapper")
        if target_of(mapper) not in (DatasetMapper, PatientMapper):
            raise ValueError(
                f"train.eval_loss needs Detectron2's DatasetMapper as dataloader.{split}.mapper: "
                "set train.eval_loss=False"
            )


def lazy_loss_loader(cfg: DictConfig) -> Any:
    """Build a loader of a LazyConfig's test images, with the augmentations of ``dataloader.test``,
    and the annotations that the mapper of ``dataloader.train`` reads."""
    loaders = copy.deepcopy(cfg).dataloader
    loaders.train.mapper.augmentations = loaders.test.mapper.augmentations
    loaders.test.mapper = loaders.train.mapper
    return guard_workers(instantiate(loaders.test))
