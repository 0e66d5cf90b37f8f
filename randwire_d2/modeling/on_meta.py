"""Networks that are built to be looked at, without memory or time."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from ..text import one_line

logger = logging.getLogger(__name__)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` returns, on the device "meta".

    On the CPU, if a part computes with its tensors while it is built, as Detectron2's ViT and Swin
    do: on "meta" they have no values.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError) as e:
        if "meta" not in str(e).lower():
            raise
        logger.info(f"A part of the network computes while it is built: {one_line(e)}")
    with torch.device("cpu"):
        return build()
