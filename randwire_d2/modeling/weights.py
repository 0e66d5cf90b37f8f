"""A stage's weights and images as it computes with them: in a lower type, padded with zeros.

A GPU loads 16 bytes at once, but 109 channels of two bytes are no multiple of 16 bytes: without
padding, 71% of the multiply-adds of the C = 109 network would be in 1×1 convolutions with such
rows. Padding changes no result, because padded channels only meet zeros in weights and norms; their
gradients are dropped. An image keeps its padding in memory, between its pixels, so that the next
stage can use it without a copy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..ops.memory_format import empty_image

Padding = tuple[int, ...]  # of a tensor's first dimensions

_ZEROS = "_randwire_zeros"  # an attribute of images

# The number of channels is padded to a multiple of these.
MULTIPLES = {torch.float16: 8, torch.bfloat16: 8}
MULTIPLES_ON_CUDA = {torch.float32: 4}  # for a CPU, zeros are work


def padding_of(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many channels of zeros are added to an image with so many channels."""
    more = MULTIPLES_ON_CUDA if device.type == "cuda" else {}
    return -channels % (MULTIPLES | more).get(dtype, 1)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """In the block, images on a CPU are padded as on CUDA."""
    before = MULTIPLES.copy()
    MULTIPLES.update(MULTIPLES_ON_CUDA)
    try:
        yield
    finally:
        MULTIPLES.clear()
        MULTIPLES.update(before)


def wider_image(x: Tensor, padding: int) -> Tensor:
    """(N, C, H, W) to (N, C + padding, H, W), in channels_last; no copy if x is padded already."""
    if not padding:
        return x.contiguous(memory_format=torch.channels_last)
    if zeros_of(x) == padding:
        return whole_image(x)
    channels = x.shape[1]
    wide = empty_image(x, channels=channels + padding)
    wide[:, channels:].zero_()
    wide[:, :channels].copy_(x)
    return wide


def narrower_image(x: Tensor, padding: int) -> Tensor:
    """The inverse of ``wider_image``, as a view: the padding stays in memory for the next stage."""
    if not padding or torch.compiler.is_compiling():
        x = x[:, :-padding] if padding else x
        return x.contiguous(memory_format=torch.channels_last)
    own = x[:, :-padding].detach()  # torch lets nobody write to a view that a function returns
    setattr(own, _ZEROS, padding)
    return own


def dense_image(x: Tensor) -> Tensor:
    """The image without padding in memory: a copy if it has some, else itself."""
    return x.contiguous(memory_format=torch.channels_last) if zeros_of(x) else x


def zeros_of(x: Tensor) -> int:
    """How many channels of padding an image has in memory; a copy or a view of it has none."""

    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # for inputs without, too
    found: int = 0 if tracing else getattr(x, _ZEROS, 0)
    return found if found and x.stride(3) == x.shape[1] + found else 0  # x.data may be replaced


def whole_image(x: Tensor) -> Tensor:
    """An image with its padding, detached, in the same memory; itself if it has no padding."""
    zeros = zeros_of(x)
    if not zeros:
        return x
    n, channels, h, w = x.shape
    return x.detach().as_strided((n, channels + zeros, h, w), x.stride())


def with_zeros(copy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A copy of an image, with its padding."""
    return narrower_image(copy(whole_image(x)), zeros_of(x)) if zeros_of(x) else copy(x)


def wider_weights(
    weights: Sequence[Tensor], paddings: Sequence[Padding], dtype: torch.dtype
) -> list[Tensor]:
    """Weights in another type, padded, in a few launches.

    Args:
        paddings: for each weight, by how much its first dimensions grow.
    """
    found = _cast_those_that_stay(weights, paddings, dtype)
    alike = _alike(weights, paddings)
    flat = torch.cat([weights[i].flatten() for group in alike.values() for i in group])
    own = [(len(group), *shape) for (_, shape), group in alike.items()]
    wide = [
        tuple(map(sum, zip_longest((len(group), *shape), (0, *padding), fillvalue=0)))
        for (padding, shape), group in alike.items()
    ]
    lengths = [math.prod(size) for size in wide]
    # In one buffer; each weight begins at a multiple of 16 bytes.
    zeros = flat.new_zeros(sum(lengths), dtype=dtype).split(lengths)
    values = flat.split([math.prod(size) for size in own])
    for i, group in enumerate(alike.values()):
        whole = zeros[i].view(wide[i])
        whole[tuple(map(slice, own[i]))].copy_(values[i].view(own[i]))
        for place, weight in zip(group, whole.unbind(), strict=True):
            found[place] = weight
    return found


def narrower_weights(
    weights: Sequence[Any], paddings: Sequence[Padding], dtype: torch.dtype
) -> Sequence[Tensor]:
    """The inverse of ``wider_weights``: weights without padding, in another type."""
    found = _cast_those_that_stay(weights, paddings, dtype)
    for (padding, shape), group in _alike(weights, paddings).items():
        own = slice(None), *(slice(n - more) for n, more in zip(shape, padding, strict=False))
        whole = torch.stack([weights[i] for i in group])[own]
        for i, weight in zip(group, whole.to(dtype).contiguous().unbind(), strict=True):
            found[i] = weight
    return found


def _cast_those_that_stay(
    weights: Sequence[Any], paddings: Sequence[Padding], dtype: torch.dtype
) -> list[Tensor]:
    """All weights; those without padding are cast to the type."""
    found = [*weights]
    same = [i for i, padding in enumerate(paddings) if not any(padding)]
    for i, weight in zip(same, cast([weights[i] for i in same], dtype), strict=True):
        found[i] = weight
    return found


def _alike(
    weights: Sequence[Tensor], paddings: Sequence[Padding]
) -> dict[tuple[Padding, torch.Size], list[int]]:
    """The places of the weights that are padded, grouped by padding and shape."""
    groups: dict[tuple[Padding, torch.Size], list[int]] = {}
    for i, (weight, padding) in enumerate(zip(weights, paddings, strict=True)):
        if any(padding):
            groups.setdefault((padding, weight.shape), []).append(i)
    return groups


def cast(tensors: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
    """Tensors in another type, in one launch."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, list(tensors))
    return results
