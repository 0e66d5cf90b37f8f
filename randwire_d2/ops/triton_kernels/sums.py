"""The weighted sum, and its gradients where affine functions are known."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from ..launches import MOST_GRADS, pieces, shared
from ..memory_format import empty_image
from ..tiling import FLAT, cdiv, partition, tile_shape
from . import common
from .common import (
    channels_last,
    elements,
    jit,
    load,
    load_row,
    load_sum,
    packed,
    padded,
    pick,
    pick_one,
    place,
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
    grads: Sequence[Tensor],
    readers: Sequence[int],
    coefficients: Tensor,
    inputs: Sequence[Tensor],
    affines: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    grads, inputs = channels_last(grads), channels_last(inputs)
    results, channels = [empty_image(x) for x in inputs], inputs[0].shape[1]
    count = inputs[0].numel() // channels
    programs, rows, tile = partition(count, channels)
    products = workspace(inputs[0], programs, len(grads))
    places = pieces(readers)
    for some in shared(readers, MOST_GRADS):
        own = places[some]
        operands = (padded(grads, own), packed(readers[some]), coefficients)
        common.launch(
            *(_weighted_sum_backward_kernel, (programs, len(own)), *operands, inputs[some]),
            *(tuple(affines[some]), tuple(results[some]), products),
            *(count, channels, rows, len(grads), places[some.start].start),
            **tile,
        )
    return results, products


@jit
def _weighted_sum_kernel(
    inputs, coefficients, affines, result, size, channels: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    number: tl.constexpr = len(inputs)
    factors, shift = sum_terms(inputs, number, coefficients, affines, channel, channels)
    offset, mask = tile_place(tl.program_id(0) * ROWS, channel, channels, size, ROWS)
    tl.store(result + offset, load_sum(inputs, number, factors, shift, offset, mask), mask)


@jit
def total_and_products(grads, number, factors, offset, mask, y, products):
    """The weighted sum, and ``products`` with those of y and each gradient added."""
    total, sums = 0.0, ()
    for i in tl.static_range(len(grads)):
        grad = load(grads[i] + offset, mask & (i < number))
        total += factors[i] * grad
        sums = sums + (products[i] + grad * y,)
    return total, sums


@jit
def _weighted_sum_backward_kernel(
    grads, numbers, coefficients, inputs, affines, results, partial, count,
    channels: tl.constexpr, rows, columns, first_edge, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, node, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, CHANNELS)
    NODES: tl.constexpr = len(inputs)
    MOST: tl.constexpr = len(grads) // NODES
    own = pick(grads, node, NODES)
    number, edge = place(numbers, node, MOST, NODES)
    edge += first_edge
    factors, _ = sum_terms(own, number, coefficients + edge, (), channel, channels)
    x, affine, result = pick_one(inputs, node), pick_one(affines, node), pick_one(results, node)
    scale = load_row(affine, channel, channels)
    shift = load_row(affine + channels, channel, channels)
    products = (tl.zeros([ROWS, CHANNELS], partial.dtype.element_ty),) * MOST
    for first in range(program * rows, (program + 1) * rows, ROWS):
        offset, mask = tile_place(first, channel, channels, elements(count, channels), ROWS)
        y = load(x + offset, mask) * scale + shift
        total, products = total_and_products(own, number, factors, offset, mask, y, products)
        tl.store(result + offset, total * scale, mask)
    partial += program * columns + edge
    for i in tl.static_range(MOST):
        tl.store(partial + i, tl.sum(products[i]), i < number)
