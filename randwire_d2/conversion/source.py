"""The form that every layout is read into: weights under our names, and the original network."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import PREPROCESSING_KEY, Preprocessing
from ..text import one_line
from ..wiring import NetworkSpec
from .formats import Checkpoint

EPS = 1e-5  # every batch norm's eps: PyTorch's default, in all layouts
STAGES = ("res2", "res3", "res4", "res5")

Features = dict[str, Tensor]

IMAGENET_RGB = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
COUNTERS = {"num_batches_tracked, which only training reads": r".*\.num_batches_tracked"}


@dataclass(frozen=True)
class ResNetArch:
    """A ResNe(X)t, described by Detectron2's keys of MODEL.RESNETS."""

    DEPTH: int
    NUM_GROUPS: int
    WIDTH_PER_GROUP: int
    STEM_OUT_CHANNELS: int
    RES2_OUT_CHANNELS: int
    STRIDE_IN_1X1: bool


@dataclass(frozen=True)
class Head:
    """The classifier behind res5.

    Attributes:
        weights: float32, with the names and shapes of ``RandWireClassifier`` without its backbone.
        relu: whether there is a ReLU between its norm and its pool.
        logits: a function from res5 (N, C, H, W) to logits (N, classes): the original network with
            the file's own weights.
        class_names: the class names in the file, in the order of the logits; empty if they are
            unknown.
    """

    weights: dict[str, Tensor]
    relu: bool
    logits: Callable[[Tensor], Tensor]
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.weights["fc.bias"])


@dataclass(frozen=True)
class Source:
    """A checkpoint of any layout, after reading.

    Attributes:
        layout: its name, such as ``"torchvision"``.
        network: the spec or the architecture.
        weights: float32, with the names and shapes of ``RandWire(spec)`` or Detectron2's ResNet,
            both with ``norm="FrozenBN"``.
        used: the number of the file's keys that were used.
        unused: the number of the keys that were not, by reason.
        preprocessing: that of the images that the network was trained on.
        features: a function from prepared images (N, 3, H, W) to res2 … res5: the original network
            with the file's own weights, independent of ``weights``.
        notes: messages for the user.
        head: the classifier, if it is converted, too.
    """

    layout: str
    network: NetworkSpec | ResNetArch
    weights: dict[str, Tensor]
    used: int
    unused: dict[str, int]
    preprocessing: Preprocessing
    features: Callable[[Tensor], Features]
    notes: list[str] = field(default_factory=list)
    head: Head | None = None

    def prepare(self, image: np.ndarray) -> Tensor:
        """Prepare an image (H, W, 3), uint8, RGB, for the original network: (1, 3, H, W)."""
        if self.preprocessing.input_format == "BGR":
            image = image[:, :, ::-1]
        mean, std = (
            torch.tensor(v) for v in (self.preprocessing.pixel_mean, self.preprocessing.pixel_std)
        )
        x = (torch.from_numpy(image.astype(np.float32)) - mean) / std
        return x.permute(2, 0, 1)[None]


class Keys:
    """A state dict that remembers which of its keys were read: the others must be explained."""

    def __init__(self, checkpoint: Checkpoint, layout: str) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.state = checkpoint.state
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def __call__(self, name: str) -> Tensor:
        """The tensor of a key, in float64, so that folding biases loses no precision."""
        if name not in self.state:
            raise self.error(f"the key {name!r} is missing")
        self.used.add(name)
        return self.state[name].double()

    def get(self, name: str) -> Tensor | None:
        """The tensor of a key, in float64; None if there is no such key."""
        return self(name) if name in self else None

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.checkpoint.path!r} (layout {self.layout}): {message}")

    def indices(self, pattern: str) -> int:
        """The number of indices that ``pattern``'s group matches; they must count from 0.

        Raises:
            ValueError: if an index is left out.
        """
        matches = (re.match(pattern, key) for key in self.state)
        found = {int(match[1]) for match in matches if match}
        if found != set(range(len(found))):
            raise self.error(f"of {pattern} there are only the numbers {sorted(found)}")
        return len(found)

    def unused(self, reasons: Mapping[str, str]) -> dict[str, int]:
        """Count the keys that were not read, by reason.

        Args:
            reasons: for each reason, the regular expression of its keys.

        Raises:
            ValueError: if a key has no reason; the message lists such keys.
        """
        counts = dict.fromkeys(reasons, 0)
        unexplained = []
        for key in sorted(self.state.keys() - self.used):
            reason = next((r for r, p in reasons.items() if re.fullmatch(p, key)), None)
            if reason is None:
                unexplained.append(key)
            else:
                counts[reason] += 1
        if unexplained:
            raise self.error(
                f"{len(unexplained)} keys belong to no such network: {some(unexplained)}"
            )
        return {reason: count for reason, count in counts.items() if count}


def some(names: list[str]) -> str:
    """The first four of a file's keys, shortened, for an error message."""
    return ", ".join(one_line(name, 100) for name in names[:4]) + (", …" if len(names) > 4 else "")


def finish(
    keys: Keys, weights: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Check that weights have the names and shapes that a network needs, and make them float32.

    Args:
        weights: by the network's own names.
        shapes: the shapes of all its weights.

    Raises:
        ValueError: if one is missing, superfluous, of another shape, or not finite.
    """
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise keys.error(f"{len(missing)} weights of the network are missing: {some(missing)}")
    superfluous = [name for name in weights if name not in shapes]
    if superfluous:
        raise keys.error(f"{len(superfluous)} weights have no place in it: {some(superfluous)}")
    for name, shape in shapes.items():
        if weights[name].shape != torch.Size(shape):
            raise keys.error(
                f"{name} has the shape {tuple(weights[name].shape)} where the network needs "
                f"{tuple(shape)}: wrong channels or wrong wiring"
            )
        if not weights[name].isfinite().all():
            raise keys.error(f"{name} holds values that are not finite")
    return {name: weights[name].float() for name in shapes}


def preprocessing_of(
    keys: Keys, given: Preprocessing | None, default: Preprocessing | None
) -> Preprocessing:
    """The preprocessing that the file states; else ``given``, the user's; else the default.

    Raises:
        ValueError: if it is unknown or invalid, or user and file contradict each other.
    """
    chosen = given or default
    entry = keys.checkpoint.rest.get(PREPROCESSING_KEY)
    if entry is not None:
        try:
            chosen = Preprocessing.from_dict(entry)
        except ValueError as e:
            raise keys.error(str(e)) from e
        if given is not None and given != chosen:
            raise keys.error(
                f"it says that it was trained with {' '.join(chosen.options)}; the command line "
                f"says {' '.join(given.options)}"
            )
    if chosen is None:
        raise keys.error(
            "it does not say how its images were prepared; say so with --input-format, "
            "--pixel-mean and --pixel-std (of values 0 … 255)"
        )
    lengths = len(chosen.pixel_mean), len(chosen.pixel_std)
    if chosen.input_format not in ("RGB", "BGR") or lengths != (3, 3) or 0 in chosen.pixel_std:
        raise keys.error(
            f"its preprocessing must be RGB or BGR with three means and three standard deviations "
            f"other than 0; got {' '.join(chosen.options)}"
        )
    return chosen


def batch_norm(keys: Keys, name: str, bias: Tensor | None) -> dict[str, Tensor]:
    """A batch norm's four tensors, the bias of the convolution before it folded into the mean."""
    norm = {
        part: keys(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    }
    if bias is not None:
        norm["running_mean"] = norm["running_mean"] - bias
    return norm


def run_conv(state: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Compute a convolution of an original network with the file's own weights."""
    weight, bias = state[f"{name}.weight"].float(), state.get(f"{name}.bias")
    return F.conv2d(
        x,
        weight,
        None if bias is None else bias.float(),
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=x.shape[1] // weight.shape[1],
    )


def run_norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Compute a batch norm of an original network with the file's own statistics."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"].float()
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=EPS)
