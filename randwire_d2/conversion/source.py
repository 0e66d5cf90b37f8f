"""What every layout is read into: a network's weights under our names, and the network itself."""

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

EPS = 1e-5  # of every batch norm: PyTorch's default, which all the layouts keep
STAGES = ("res2", "res3", "res4", "res5")

Features = dict[str, Tensor]

IMAGENET_RGB = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
COUNTERS = {"num_batches_tracked, which only training reads": r".*\.num_batches_tracked"}


@dataclass(frozen=True)
class ResNetArch:
    """A ResNe(X)t, as the keys of MODEL.RESNETS describe it to Detectron2."""

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
        weights: float32, every name and shape that ``RandWireClassifier`` has beside its backbone.
        relu: whether a ReLU lies between its norm and its pool.
        logits: res5 (N, C, H, W) to logits (N, classes), computed by the original network from the
            file's own weights.
        class_names: those that the file holds, in the order of the logits; none if they are
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
    """A checkpoint that was read, whatever its layout.

    Attributes:
        layout: its name, such as ``"torchvision"``.
        network: what it describes.
        weights: float32, every name and shape that ``RandWire(spec)`` or Detectron2's ResNet has
            with ``norm="FrozenBN"``.
        used: the number of the file's keys that went into ``weights``.
        unused: why the other keys did not, and how many they are.
        preprocessing: of the images it was trained on.
        features: prepared images (N, 3, H, W) to res2 … res5, computed by the original network
            from the file's own weights: nothing in it knows ``weights``.
        notes: what the user should know.
        head: its classifier, if that is converted too.
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
        """An image (H, W, 3), uint8, RGB, as the original network wants it: (1, 3, H, W)."""
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
        """A tensor in float64, in which biases are folded without loss."""
        if name not in self.state:
            raise self.error(f"the key {name!r} is missing")
        self.used.add(name)
        return self.state[name].double()

    def get(self, name: str) -> Tensor | None:
        """The same; None where there is none."""
        return self(name) if name in self else None

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.checkpoint.path!r} (layout {self.layout}): {message}")

    def indices(self, pattern: str) -> int:
        """How many there are of what ``pattern`` numbers, from 0 on.

        Raises:
            ValueError: if one is left out.
        """
        matches = (re.match(pattern, key) for key in self.state)
        found = {int(match[1]) for match in matches if match}
        if found != set(range(len(found))):
            raise self.error(f"of {pattern} there are only the numbers {sorted(found)}")
        return len(found)

    def unused(self, reasons: Mapping[str, str]) -> dict[str, int]:
        """Count the keys that were not read, by their reason.

        Args:
            reasons: reason to the regular expression of its keys.

        Raises:
            ValueError: if a key has none; it lists them.
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
    """The first few of many names, which a file gives its keys."""
    return ", ".join(one_line(name, 100) for name in names[:4]) + (", …" if len(names) > 4 else "")


def finish(
    keys: Keys, weights: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Weights in float32, once they are what a network needs, each in its shape.

    Args:
        weights: by the network's own names.
        shapes: of all that it needs.

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
    """The preprocessing that a file states; else what the user says; else its layout's.

    Raises:
        ValueError: if nobody knows it, or user and file contradict each other.
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
    """A batch norm's four tensors, a preceding bias folded in: BN subtracts it with the mean."""
    norm = {
        part: keys(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    }
    if bias is not None:
        norm["running_mean"] = norm["running_mean"] - bias
    return norm


def run_conv(state: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution of an original network, computed from the file's own weights."""
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
    """A batch norm of an original network, with the statistics of the file."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"].float()
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=EPS)
