"""The losses of the test images, by the network as it is tested."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from ..data.images.patience import PatientMapper
from ..modeling import RandWire
from .processes.random_state import random_state_kept, seed_torch
from .processes.signals import guard_workers

# What behaves otherwise in training than in a test, or counts what it sees.
_AS_IN_TEST = (_BatchNorm, _DropoutNd, RandWire)


def detection_loss_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """A test set's images one by one, each as in a test, with its annotations."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = PatientMapper(cfg, is_train=True, augmentations=augmentations)
    return guard_workers(build_detection_test_loader(cfg, dataset_name, mapper=mapper))


def detection_losses(model: nn.Module) -> Callable[[Any], tuple[dict[str, Tensor], int]]:
    """What computes a detector's losses of a batch: their means over it, and its images.

    Norms and dropout are as in a test. The detector's own state, such as the normaliser of
    RetinaNet's loss, is copied and stays as it is; the copies see image by image.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, _AS_IN_TEST):
            module.eval()
    return lambda batch: (model(batch), len(batch))


def mean_losses(
    losses: Callable[[Any], tuple[Mapping[str, Tensor], int]], loader: Iterable[Any]
) -> dict[str, float]:
    """The means of the losses over all images of all processes: ``val_`` and their names in a
    training, and their sum, val_total_loss.

    Neither gradients nor a trace in the training's random numbers or records is left. What is drawn
    at random, such as a detector's anchors, is the same of a batch each time, whichever process has
    it.

    Args:
        losses: of a batch: the means of its images' losses, and how many they are.
        loader: the batches of this process.
    """
    sums: dict[str, float] = {}
    images = 0
    # The models write into the record that is open.
    with random_state_kept(), torch.no_grad(), EventStorage():
        for batch in loader:
            seed_torch(0)
            means, size = losses(batch)
            images += size
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + size * float(value)
    everywhere = comm.all_gather((sums, images))
    total = sum(count for _, count in everywhere)
    names = dict.fromkeys(name for found, _ in everywhere for name in found)
    mean = {n: sum(found.get(n, 0.0) for found, _ in everywhere) / total for n in names}
    return {"val_total_loss": sum(mean.values()), **{f"val_{n}": m for n, m in mean.items()}}
