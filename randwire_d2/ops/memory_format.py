"""The memory layout that the operators' activations have."""

import torch
from torch import Tensor


def empty_image(like: Tensor, stride: int = 1, channels: int | None = None) -> Tensor:
    """An empty channels_last tensor, ``stride`` times smaller, with other channels if need be."""
    n, c, h, w = like.shape
    size = (n, channels or c, -(-h // stride), -(-w // stride))
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
