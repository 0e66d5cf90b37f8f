"""The losses of the test images, with norms and dropout as in tests."""

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

# Modules that behave differently in training, or update a state.
_AS_IN_TEST = (_BatchNorm, _DropoutNd, RandWire)


def detection_loss_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """A loader of a test set's images, one by one, each resized as in a test, with annotations."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = PatientMapper(cfg, is_train=True, augmentations=augmentations)
    return guard_workers(build_detection_test_loader(cfg, dataset_name, mapper=mapper))


def detection_losses(model: nn.Module) -> Callable[[Any], tuple[dict[str, Tensor], int]]:
    """A function that returns a detector's mean losses over a batch, and the batch's size.

    Norms and dropout are in eval mode. The function uses a copy of the detector, so the detector's
    own state, such as the normaliser of RetinaNet's loss, does not change.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, _AS_IN_TEST):
            module.eval()
    return lambda batch: (model(batch), len(batch))


def mean_losses(
    losses: Callable[[Any], tuple[Mapping[str, Tensor], int]], loader: Iterable[Any]
) -> dict[str, float]:
    """The mean losses over all images of all processes. Their names are those in a training with
    the prefix ``val_``; val_total_loss is their sum.

    No gradients are computed, and the training's random numbers and EventStorage do not change.
    Random choices, such as a detector's sampled anchors, are the same for a batch each time, in any
    process.

    Args:
        losses: returns the mean losses over a batch's images, and the number of these.
        loader: the batches of this process.
    """
    sums: dict[str, float] = {}
    images = 0
    # Detectron2's models write into the current EventStorage.
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
