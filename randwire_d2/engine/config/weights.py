"""Checks of the weights that a config names: they must be readable, and fit its network."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from ...checkpoint import Classes, check_wiring, load_checkpoint
from ...files import without_options
from ...runs import RunFolder
from ...text import one_line, prefixed
from .continuation import NAMED


def check_weights(
    key: str,
    weights: str,
    model: nn.Module,
    scratch: str = "",
    tested: Sequence[str] | None = None,
    renamed: Sequence[Sequence[str]] = (),
) -> None:
    """
    Args:
        key: the config key that names the weights.
        weights: a path or URL; "" for none. A URL is checked only for evaluations and hf://.
        model: the network.
        scratch: the options with which a training needs no weights, for the message; "" for none.
        tested: for an evaluation, the data's classes; all weights must then fit.
        renamed: see ``check_resumed``.

    Raises:
        ValueError: the weights can't be read, or belong to another network; one line.
    """
    # A file on the Hub is downloaded here, so that later processes find it in the cache.
    is_url = "://" in weights
    if not weights or (is_url and not weights.startswith("hf://") and tested is None):
        return
    path = without_options(weights)
    if not is_url and not os.path.exists(path):
        raise ValueError(f"{key} {weights!r} does not exist" + _ways_to(path, scratch))
    checkpoint = read_weights(key, weights)
    with prefixed(f"{key} {weights!r}"):
        check_wiring(model, checkpoint)
        if tested is not None:
            _check_same(model, checkpoint, tested, renamed)


def check_resumed(
    run: RunFolder, model: nn.Module, classes: Sequence[str], renamed: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    """Compare a network, and its data's classes, with the checkpoint that a run is resumed from.

    Args:
        renamed: pairs (checkpoint's name, data's name) of the same class.

    Returns:
        The checkpoint, whose tensors are memory-mapped.

    Raises:
        ValueError: they differ, or there is no undamaged checkpoint; one line.
    """
    file: dict[str, Any] = torch.load(
        run.last_checkpoint, map_location="cpu", weights_only=True, mmap=True
    )
    check_wiring(model, file)
    with prefixed("--resume"):
        _check_same(model, file, classes, renamed)
    return file


def _check_same(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    classes: Sequence[str],
    renamed: Sequence[Sequence[str]],
) -> None:
    """Refuse a checkpoint with weights of other shapes, other norms, or other classes. Missing
    weights are allowed; Detectron2 warns of them."""
    own, weights = model.state_dict(), checkpoint["model"]
    _check_norms(own, weights)
    for name, value in own.items():
        if (saved := weights.get(name, value)).shape != value.shape:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}, and in the checkpoint "
                f"{tuple(saved.shape)}: the training began with another network, images of other "
                "channels, or data with another number of classes (--data); give the same"
            )
    check_class_names(Classes.of(checkpoint).names, classes, renamed)


def _check_norms(own: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Norms of different kinds have parameters of the same names, but not the same statistics."""
    for name in own:
        layer = name.removesuffix(".weight")
        for part, *kinds in (
            ("running_mean", "a batch norm", "a norm without batch statistics, such as GN"),
            ("norm.weight", "a layer with a norm", "a layer without"),  # Detectron2's Conv2d
        ):
            has, had = (f"{layer}.{part}" in names for names in (own, weights))
            if layer == name or name not in weights or has == had:
                continue
            ours, theirs = kinds if has else kinds[::-1]
            raise ValueError(
                f"{layer} is {ours}, and in the checkpoint {theirs}: its weights mean nothing "
                "there. Give the norm that they were trained with (MODEL.RANDWIRE.NORM or "
                "MODEL.FPN.NORM, say, or a LazyConfig's norm)"
            )


def check_class_names(
    before: Sequence[str], classes: Sequence[str], renamed: Sequence[Sequence[str]]
) -> None:
    """
    Args:
        before: the checkpoint's classes, in the order of its outputs.
        classes: the data's classes, in their order.
        renamed: see ``check_resumed``.

    Raises:
        ValueError: a class differs and was not renamed; one line.
    """
    classes = list(map(str, classes))
    differ = [[own, now] for own, now in zip(before, classes) if own != now]
    moved = any(own in classes or now in before for own, now in differ)
    if not moved:  # if a name is at another index, the classes were reordered, not renamed
        differ = [pair for pair in differ if pair not in renamed]
    if not differ:
        return
    own, now = differ[0]
    options = " ".join(f"--renamed-class {shlex.join(pair)}" for pair in differ[:NAMED])
    way = "" if moved else f"; or, if only names were corrected, add {one_line(options, 1000)}"
    raise ValueError(
        f"class {before.index(own)} is {one_line(own)!r} in the checkpoint, and {one_line(now)!r} "
        "in the data: the training began with other classes, or with another order; "
        f"give data with the checkpoint's classes{way}"
    )


def read_weights(key: str, path: str) -> dict[str, Any]:
    """Read a file of weights, which may be downloaded first.

    Raises:
        ValueError: the file can't be read; one line that begins with ``key``.
    """
    if os.path.isdir(path):
        raise ValueError(f"{key} {path!r} is a folder; name the file in it")
    with prefixed(key, (OSError, ValueError, RuntimeError)):
        return load_checkpoint(PathManager.get_local_path(without_options(path)))


def _ways_to(weights: str, scratch: str) -> str:
    """How to get, or do without, a backbone.pth of pretrain_imagenet.py; "" for other files."""
    run = RunFolder(os.path.dirname(weights))
    if run.backbone.name != os.path.basename(weights) or not scratch:
        return ""
    return (
        ": pretrain it (python tools/pretrain_imagenet.py --config-file "
        f"configs/imagenet/{run.path.name}.yaml), or convert a checkpoint that you have (python "
        f"tools/convert_checkpoint.py CHECKPOINT {weights}), or train from scratch ({scratch})"
    )
