"""Batch norms of several nodes: statistics, and gradients."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import tiling
from ..launches import MOST_GRADS, pieces, shared
from ..memory_format import empty_image
from . import common
from .common import (
    channels_last,
    elements,
    jit,
    load,
    load_row,
    packed,
    padded,
    pick,
    pick_one,
    place,
    sum_terms,
    tile_place,
    workspace,
)
from .sums import total_and_products, weighted_sum


def batch_norm_statistics(
    inputs: Sequence[Tensor], parameters: Tensor, eps: float
) -> tuple[list[Tensor], Tensor]:
    inputs, channels = channels_last(inputs), parameters.shape[2]
    count = inputs[0].numel() // channels
    programs, rows, tile = tiling.partition(count, channels, tiling.STATISTICS_TILE)
    # One by one, so that Triton finds their addresses aligned, as those of all that it allocates.
    affines = [parameters.new_empty(2, channels) for _ in inputs]
    moments = torch.empty_like(parameters)
    for some in _chunks(len(inputs)):
        images = inputs[some]
        partial = workspace(images[0], len(images), programs, 2 * channels)
        grid = (programs, len(images))
        common.launch(_statistics_kernel, grid, images, partial, count, channels, rows, **tile)
        (across,), combination = _combination(channels)
        operands = (images, partial, parameters, tuple(affines[some]), moments)
        common.launch(
            *(_statistics_combine_kernel, (across, len(images)), *operands),
            *(programs, rows, count, channels, some.start),
            **(combination | {"EPS": eps}),
        )
    return affines, moments


def batch_norm_backward(
    grads: Sequence[Tensor],
    readers: Sequence[int],
    coefficients: Tensor,
    inputs: Sequence[Tensor],
    parameters: Tensor,
    moments: Tensor,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    grads, inputs = channels_last(grads), channels_last(inputs)
    nodes, channels = len(inputs), parameters.shape[2]
    count = inputs[0].numel() // channels
    programs, rows, tile = tiling.partition(count, channels)
    # Of each program those of the parameters, then those of the coefficients.
    first_product = 2 * channels * nodes
    partial = workspace(inputs[0], programs, first_product + len(grads))
    factors = workspace(inputs[0], nodes)
    sizes = (count, channels, rows, partial.shape[1])

    def add_up(some: slice, own: Any, number: int, weights: Any, sums: Any, edge: int) -> None:
        operands = (own, number, weights, inputs[some], parameters, moments)
        common.launch(
            *(_norm_sums_kernel, (programs, some.stop - some.start), *operands, sums, partial),
            *(factors, *sizes, some.start, edge, first_product),
            **(tile | {"EPS": eps}),
        )

    results, totals, places = [empty_image(x) for x in inputs], [], pieces(readers)
    for some in shared(readers, MOST_GRADS):
        own = places[some]
        first, last = own[0].start, own[-1].stop
        if readers[some.start] > MOST_GRADS:
            for edge in range(first, last, MOST_GRADS):
                few = slice(edge, min(edge + MOST_GRADS, last))
                add_up(some, grads[few], few.stop - edge, coefficients, None, edge)
            total = weighted_sum(grads[first:last], coefficients[first:last], [])
            add_up(some, (total,), 1, None, None, 0)
            totals.append(total)
        else:
            # To write the sum of two gradients is no more than to read them again.
            sums = tuple(results[some]) if max(readers[some]) > 1 else None
            add_up(some, padded(grads, own), packed(readers[some]), coefficients, sums, first)
            totals += [
                grads[edges.start] if edges.stop - edges.start == 1 else result
                for edges, result in zip(own, results[some], strict=True)
            ]
    grad_parameters, products = torch.empty_like(parameters), torch.empty_like(coefficients)
    _combine(partial, grad_parameters, products)
    tile = tiling.tile_shape(channels)
    for some in _chunks(nodes):
        operands = (tuple(totals[some]), factors, inputs[some], parameters, moments)
        grid = (tiling.cdiv(count, tile["ROWS"]), len(totals[some]))
        common.launch(
            *(_norm_backward_kernel, grid, *operands, grad_parameters),
            *(tuple(results[some]), count, channels, some.start),
            **(tile | {"EPS": eps}),
        )
    return results, products, grad_parameters


def _chunks(nodes: int) -> list[slice]:
    return shared([1] * nodes, 1)


def _combination(columns: int) -> tuple[tuple[int], dict[str, Any]]:
    """Many narrow programs, whose rows are sectors of memory, read many at a time."""
    return (tiling.cdiv(columns, 8),), {"ROWS": 256, "COLUMNS": 8}


def _combine(partial: Tensor, first: Tensor, second: Tensor) -> None:
    """Add up the columns of a matrix of partial sums; they fill one tensor, then another."""
    grid, tile = _combination(partial.shape[1])
    sizes = (*partial.shape, first.numel())
    common.launch(_combine_kernel, grid, partial, first, second, *sizes, **tile)


@jit
def _statistics_kernel(
    inputs, partial, count, channels: tl.constexpr, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    program, node, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, CHANNELS)
    x = pick_one(inputs, node)
    # Of the differences from the first pixel: a mean of many standard deviations would round them.
    pivot = load_row(x, channel, channels)
    start, last = program * rows, min((program + 1) * rows, count)
    # Welford's means and squares, each of every ROWS-th row.
    means = tl.zeros([ROWS, CHANNELS], partial.dtype.element_ty)
    squares = tl.zeros([ROWS, CHANNELS], partial.dtype.element_ty)
    for first in range(start, last, ROWS):
        offset, mask = tile_place(first, channel, channels, elements(count, channels), ROWS)
        value = load(x + offset, mask) - pivot
        delta = tl.where(mask, value - means, 0.0)
        means += delta * (1 / ((first - start) // ROWS + 1).to(means.dtype))
        squares += delta * (value - means)
    numbers = tl.maximum(tl.cdiv(last - start - tl.arange(0, ROWS), ROWS), 0)[:, None]
    mean = tl.sum(means * numbers, 0) / (last - start)
    delta = means - mean[None, :]
    squares = tl.sum(squares + delta * delta * numbers, 0)
    place = (node * tl.num_programs(0) + program).to(tl.int64) * 2 * channels + channel
    tl.store(partial + place, mean, channel < channels)
    tl.store(partial + place + channels, squares, channel < channels)


@jit
def _statistics_combine_kernel(
    inputs, partial, parameters, affines, moments, blocks, rows, count,
    channels: tl.constexpr, first_node,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(1)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    partial += node.to(tl.int64) * blocks * 2 * channels
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    squares = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    for first in range(0, blocks, ROWS):
        block = (first + tl.arange(0, ROWS))[:, None]
        mask = (block < blocks) & exists[None, :]
        number = tl.minimum(rows, count - block * rows)
        place = block.to(tl.int64) * 2 * channels + channel[None, :]
        total += tl.load(partial + place, mask, other=0.0) * number
    mean = tl.sum(total, 0) / count
    for first in range(0, blocks, ROWS):
        block = (first + tl.arange(0, ROWS))[:, None]
        mask = (block < blocks) & exists[None, :]
        number = tl.minimum(rows, count - block * rows)
        place = block.to(tl.int64) * 2 * channels + channel[None, :]
        delta = tl.load(partial + place, mask, other=0.0) - mean[None, :]
        within = tl.load(partial + place + channels, mask, other=0.0)
        squares += tl.where(mask, within + delta * delta * number, 0.0)
    var = tl.sum(squares, 0) / count
    mean += load(pick_one(inputs, node) + channel, exists)
    parameters += (first_node + node) * 2 * channels
    scale = load(parameters + channel, exists) * tl.rsqrt(var + EPS)
    shift = load(parameters + channels + channel, exists) - mean * scale
    affine = pick_one(affines, node)
    tl.store(affine + channel, scale, exists)
    tl.store(affine + channels + channel, shift, exists)
    moments += (first_node + node) * 2 * channels
    tl.store(moments + channel, mean, exists)
    tl.store(moments + channels + channel, var, exists)


@jit
def _mean_and_invstd(moments, channel, channels, EPS: tl.constexpr):
    mean = load_row(moments, channel, channels)
    return mean, tl.rsqrt(load_row(moments + channels, channel, channels) + EPS)


@jit
def _norm_sums_kernel(
    grads, numbers, coefficients, inputs, parameters, moments, totals, partial, factors,
    count, channels: tl.constexpr, rows, columns, first_node, first_edge, first_product,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, node, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, CHANNELS)
    NODES: tl.constexpr = len(inputs)
    MOST: tl.constexpr = len(grads) // NODES
    own, x = pick(grads, node, NODES), pick_one(inputs, node)
    number, edge = place(numbers, node, MOST, NODES)
    edge += first_edge
    if coefficients is not None:
        coefficients += edge
    weights, _ = sum_terms(own, number, coefficients, (), channel, channels)
    # What is read again is a sum that has been written, or a single gradient.
    factor = weights[0]
    if totals is not None:
        total, several = pick_one(totals, node), number > 1
        factor = tl.where(several, 1.0, factor)
    node += first_node
    tl.store(factors + node, factor, program == 0)
    parameters += node * 2 * channels
    moments += node * 2 * channels
    # Not in the loop, where they would be loaded again after each store: it may have changed them.
    mean, invstd = _mean_and_invstd(moments, channel, channels, EPS)
    scale = load_row(parameters, channel, channels) * invstd
    shift = load_row(parameters + channels, channel, channels)
    sum_grad = tl.zeros([ROWS, CHANNELS], partial.dtype.element_ty)
    sum_grad_x = tl.zeros([ROWS, CHANNELS], partial.dtype.element_ty)
    products = (tl.zeros([ROWS, CHANNELS], partial.dtype.element_ty),) * MOST
    for first in range(program * rows, (program + 1) * rows, ROWS):
        offset, mask = tile_place(first, channel, channels, elements(count, channels), ROWS)
        centred = load(x + offset, mask) - mean  # where there is nothing, gradients are 0
        y = centred * scale + shift
        grad, products = total_and_products(own, number, weights, offset, mask, y, products)
        if totals is not None:
            tl.store(total + offset, grad, mask & several)
        sum_grad += grad
        sum_grad_x += grad * centred
    partial += program.to(tl.int64) * columns
    own_columns = node * 2 * channels + channel
    tl.store(partial + own_columns, tl.sum(sum_grad_x * invstd, 0), channel < channels)
    tl.store(partial + own_columns + channels, tl.sum(sum_grad, 0), channel < channels)
    if coefficients is not None:
        for i in tl.static_range(MOST):
            tl.store(partial + first_product + edge + i, tl.sum(products[i]), i < number)


@jit
def _norm_backward_kernel(
    totals, factors, inputs, parameters, moments, grad_parameters, results,
    count, channels: tl.constexpr, first_node,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    node, channel = tl.program_id(1), tl.arange(0, CHANNELS)
    total, x, result = pick_one(totals, node), pick_one(inputs, node), pick_one(results, node)
    size = elements(count, channels)
    offset, mask = tile_place(tl.program_id(0) * ROWS, channel, channels, size, ROWS)
    grad, value = load(total + offset, mask), load(x + offset, mask)
    node += first_node
    own = node * 2 * channels
    mean, invstd = _mean_and_invstd(moments + own, channel, channels, EPS)
    gain = load_row(parameters + own, channel, channels) * invstd
    sum_grad_x = load_row(grad_parameters + own, channel, channels)
    sum_grad = load_row(grad_parameters + own + channels, channel, channels)
    # Of each channel: what the gradient is multiplied by, x - mean, and what is added.
    of_grad = gain * tl.load(factors + node)
    of_x = -gain * invstd * sum_grad_x / count
    constant = -gain * sum_grad / count
    tl.store(result + offset, of_grad * grad + (of_x * (value - mean) + constant), mask)


@jit
def _combine_kernel(
    partial, first, second, blocks, columns, first_end, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    for start in range(0, blocks, ROWS):
        block = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        place = block * columns + column[None, :]
        total += tl.load(partial + place, (block < blocks) & exists[None, :], other=0.0)
    sums = tl.sum(total, 0)
    tl.store(first + column, sums, exists & (column < first_end))
    tl.store(second + column - first_end, sums, exists & (column >= first_end))
