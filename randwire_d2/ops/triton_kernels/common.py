"""What all kernels share: how they are launched, and how they read a weighted sum."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Compile no kernels of their own for sizes of 1 and multiples of 16, but for the number of channels
# and of elements, which decide how wide loads can be.
jit = triton.jit(
    do_not_specialize=[
        *("count", "rows", "height", "width", "blocks", "columns", "node", "edge"),
        *("first_end", "first_product"),
    ],
    do_not_specialize_on_alignment=[  # slices
        *("coefficients", "parameters", "moments", "factors", "grad_parameters"),
    ],
)


def channels_last(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in tensors)


def workspace(like: Tensor, *size: int) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(size, dtype=wide, device=like.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    # Triton launches on the current device, which need not be the tensors', but mostly is.
    device = tensor.get_device()
    if device < 0 or device == torch.cuda.current_device():
        kernel.run(*args, grid=grid, warmup=False, **constants)
    else:
        with torch.cuda.device(device):
            kernel.run(*args, grid=grid, warmup=False, **constants)


@jit
def widen(x):
    """Whatever is computed is so in single precision at least."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@jit
def load(pointer, mask):
    return widen(tl.load(pointer, mask, other=0.0))


@jit
def load_vector(pointer, channel, channels):
    return load(pointer + channel, channel < channels)


@jit
def load_row(pointer, channel, channels):
    return load_vector(pointer, channel, channels)[None, :]


@jit
def sum_terms(inputs, coefficients, affines, channel, channels):
    """The factor of each input, and what is added to their sum."""
    factors, shift = (), 0.0
    for i in tl.static_range(len(inputs)):
        factor = 1.0
        if coefficients is not None:
            factor = widen(tl.load(coefficients + i))
        if len(affines) > 0:
            shift += factor * load_vector(affines[i] + channels, channel, channels)
            factor *= load_vector(affines[i], channel, channels)
        factors = factors + (factor,)
    return factors, shift


@jit
def load_sum(inputs, factors, shift, offset, mask):
    total = shift
    for i in tl.static_range(len(inputs)):
        total += factors[i] * load(inputs[i] + offset, mask)
    return total


@jit
def tile_place(first, channel, channels, size, ROWS: tl.constexpr):
    """Where a tile's elements are in a matrix of ``size`` elements, and which of them exist."""
    offset = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * channels + channel[None, :]
    return offset, (offset < size) & (channel < channels)[None, :]
