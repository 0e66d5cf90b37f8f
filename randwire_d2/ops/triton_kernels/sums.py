"""The weighted sum, and its gradients where affine functions are known."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from ..memory_format import empty_image
from ..tiling import FLAT, cdiv, partition, tile_shape
from . import common
from .common import (
    channels_last,
    jit,
    load,
    load_row,
    load_sum,
    sum_terms,
    tile_place,
    workspace,
)


def weighted_sum(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> Tensor:
    inputs = channels_last(inputs)
    result, size = empty_image(inputs[0]), inputs[0].numel()
    channels = result.shape[1] if affines else FLAT
    tile = tile_shape(channels)
    grid = (cdiv(size, channels * tile["ROWS"]),)
    operands = (inputs, coefficients, tuple(affines), result)
    common.launch(_weighted_sum_kernel, grid, *operands, size, channels, **tile)
    return result


def weighted_sum_backward(
    grads: Sequence[Tensor], coefficients: Tensor, x: Tensor, affine: Tensor
) -> tuple[Tensor, Tensor]:
    *grads, x = channels_last([*grads, x])
    result, size, channels = empty_image(x), x.numel(), x.shape[1]
    programs, rows, tile = partition(size // channels, channels)
    products = workspace(x, programs, len(grads))
    operands = (tuple(grads), coefficients, x, affine, result, products)
    sizes = (size, channels, rows)
    common.launch(_weighted_sum_backward_kernel, (programs,), *operands, *sizes, **tile)
    return result, products


@jit
def _weighted_sum_kernel(
    inputs, coefficients, affines, result, size, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    factors, shift = sum_terms(inputs, coefficients, affines, channel, channels)
    offset, mask = tile_place(tl.program_id(0) * ROWS, channel, channels, size, ROWS)
    tl.store(result + offset, load_sum(inputs, factors, shift, offset, mask), mask)


@jit
def total_and_products(grads, factors, offset, mask, y, products):
    """The weighted sum, and ``products`` with those of y and each gradient added."""
    total, sums = 0.0, ()
    for i in tl.static_range(len(grads)):
        grad = load(grads[i] + offset, mask)
        total += factors[i] * grad
        sums = sums + (products[i] + tl.sum(grad * y, 0),)
    return total, sums


@jit
def _weighted_sum_backward_kernel(
    grads, coefficients, x, affine, result, partial, size, channels, rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    factors, _ = sum_terms(grads, coefficients, (), channel, channels)
    scale = load_row(affine, channel, channels)
    shift = load_row(affine + channels, channel, channels)
    products = (tl.zeros([CHANNELS], partial.dtype.element_ty),) * len(grads)
    for first in range(program * rows, (program + 1) * rows, ROWS):
        offset, mask = tile_place(first, channel, channels, size, ROWS)
        y = load(x + offset, mask) * scale + shift
        total, products = total_and_products(grads, factors, offset, mask, y, products)
        tl.store(result + offset, total * scale, mask)
    for i in tl.static_range(len(grads)):
        tl.store(partial + program * len(grads) + i, tl.sum(products[i], 0))
