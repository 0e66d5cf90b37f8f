"""The memory layout that the operators' activations have."""

import torch
from torch import Tensor


def empty_image(like: Tensor, stride: int = 1) -> Tensor:
    """An empty channels_last tensor, ``stride`` times smaller."""
    n, c, h, w = like.shape
    size = (n, c, -(-h // stride), -(-w // stride))
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
