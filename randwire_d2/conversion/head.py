"""The classifier head of a RandWire in any layout: its weights, and its logits."""

import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Classes
from ..wiring.network import HEAD_CHANNELS
from .source import Head, Keys, batch_norm, finish, run_conv, run_norm


def read_head(keys: Keys, channels: int, *, conv: str, norm: str, fc: str, relu: bool) -> Head:
    """Read the classifier head.

    Args:
        keys: the state dict.
        channels: the number of channels of res5.
        conv, norm, fc: the layout's names for the 1×1 convolution to 1280 channels, its batch norm
            and the fc layer.
        relu: whether the layout's network has a ReLU between norm and pool.

    Raises:
        ValueError: if there is no head, or its shapes are not those of the paper's Table 1.
    """
    if f"{fc}.weight" not in keys:
        raise keys.error(
            f"it holds no classifier, whose fc layer would be {fc!r}: --to classifier needs one"
        )
    bias = keys.get(f"{conv}.bias")
    weights = {
        "conv.weight": keys(f"{conv}.weight"),
        **{f"norm.{part}": value for part, value in batch_norm(keys, norm, bias).items()},
        **{f"fc.{part}": keys(f"{fc}.{part}") for part in ("weight", "bias")},
    }
    classes = len(weights["fc.bias"])
    shapes = {
        "conv.weight": (HEAD_CHANNELS, channels, 1, 1),
        **{name: (HEAD_CHANNELS,) for name in weights if name.startswith("norm.")},
        "fc.weight": (classes, HEAD_CHANNELS),
        "fc.bias": (classes,),
    }
    state = keys.state

    def logits(res5: Tensor) -> Tensor:
        x = run_norm(state, norm, run_conv(state, conv, F.relu(res5)))
        x = (F.relu(x) if relu else x).mean(dim=(2, 3))
        return F.linear(x, state[f"{fc}.weight"].float(), state[f"{fc}.bias"].float())

    try:
        names = Classes.of(keys.checkpoint.rest).names
    except ValueError as e:
        raise keys.error(str(e)) from e
    named = names if len(names) == classes else []
    return Head(finish(keys, weights, shapes), relu, logits, named)
