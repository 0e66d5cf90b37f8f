"""The weights that a config names: whether they can be read, and are of its network."""

import os
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from ...checkpoint import check_wiring, load_checkpoint
from ...files import without_options
from ...runs import RunFolder


def check_weights(key: str, weights: str, model: nn.Module, scratch: str = "") -> None:
    """
    Args:
        key: of the config that names them.
        weights: "" for none. A URL is not worth its download yet.
        scratch: what a command line gets for a training without them, if there can be one.

    Raises:
        ValueError: they can't be read, or belong to another wiring than the model's; one line.
    """
    # What lies on a hub, too, before there are processes, which then find it in the cache.
    if not weights or ("://" in weights and not weights.startswith("hf://")):
        return
    path = without_options(weights)
    if "://" not in weights and not os.path.exists(path):
        raise ValueError(f"{key} {weights!r} does not exist" + _ways_to(path, scratch))
    checkpoint = read_weights(key, weights)
    try:
        check_wiring(model, checkpoint)
    except ValueError as e:
        raise ValueError(f"{key} {weights!r}: {e}") from e


def check_resumed(run: RunFolder, model: nn.Module) -> dict[str, Any]:
    """Compare a network with the checkpoint that a run is resumed from.

    Returns:
        The checkpoint; its tensors are left on disk.

    Raises:
        ValueError: they differ, or no checkpoint is whole; one line.
    """
    file: dict[str, Any] = torch.load(
        run.last_checkpoint, map_location="cpu", weights_only=True, mmap=True
    )
    check_wiring(model, file)
    for name, value in model.state_dict().items():
        if (saved := file["model"].get(name, value)).shape != value.shape:
            raise ValueError(
                f"--resume: {name} has the shape {tuple(value.shape)}, and in the checkpoint "
                f"{tuple(saved.shape)}: the training began with another network, or data with "
                "another number of classes (--data); give the same"
            )
    return file


def read_weights(key: str, path: str) -> dict[str, Any]:
    """What they hold.

    Raises:
        ValueError: they can't be read; one line.
    """
    if os.path.isdir(path):
        raise ValueError(f"{key} {path!r} is a folder; name the file in it")
    try:
        return load_checkpoint(PathManager.get_local_path(without_options(path)))
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"{key}: {e}") from e


def _ways_to(weights: str, scratch: str) -> str:
    """How to get a backbone that pretrain_imagenet.py leaves, or do without; "" of other files."""
    run = RunFolder(os.path.dirname(weights))
    if run.backbone.name != os.path.basename(weights) or not scratch:
        return ""
    return (
        ": pretrain it (python tools/pretrain_imagenet.py --config-file "
        f"configs/imagenet/{run.path.name}.yaml), or convert a checkpoint that you have (python "
        f"tools/convert_checkpoint.py CHECKPOINT {weights}), or train from scratch ({scratch})"
    )
