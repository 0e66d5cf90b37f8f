"""Batch norms of several nodes: statistics, and gradients."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..launches import MOST_GRADS, MOST_NODES
from ..memory_format import empty_image
from ..tiling import cdiv, partition, tile_shape
from . import common
from .common import channels_last, jit, load, load_row, sum_terms, tile_place, workspace
from .sums import total_and_products, weighted_sum


def batch_norm_statistics(
    inputs: Sequence[Tensor], parameters: Tensor, eps: float
) -> tuple[list[Tensor], Tensor]:
    inputs, channels = channels_last(inputs), parameters.shape[2]
    count = inputs[0].numel() // channels
    programs, rows, tile = partition(count, channels)
    # One by one, so that Triton finds their addresses aligned, as those of all that it allocates.
    affines = [parameters.new_empty(2, channels) for _ in inputs]
    moments = torch.empty_like(parameters)
    for some in _chunks(len(inputs)):
        images = inputs[some]
        partial = workspace(images[0], len(images), programs, 2 * channels)
        sizes = (count * channels, channels, rows)
        grid = (programs, len(images))
        common.launch(_statistics_kernel, grid, images, partial, *sizes, **tile)
        (across,), combination = _combination(channels)
        operands = (images, partial, parameters[some], tuple(affines[some]), moments[some])
        common.launch(
            *(_statistics_combine_kernel, (across, len(images)), *operands),
            *(programs, rows, count, channels),
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
    programs, rows, tile = partition(count, channels)
    # Of each program those of the parameters, those of the coefficients, and one that nobody wants.
    columns = 2 * channels * nodes + len(grads)
    partial = workspace(inputs[0], programs, columns + 1)
    factors = workspace(inputs[0], nodes)
    sizes = (count * channels, channels, rows, columns + 1, 2 * channels * nodes)

    def add_up(node: int, some: Sequence[Tensor], own: Any, total: Any, edge: int) -> None:
        operands = (some, own, inputs[node], parameters, moments, total, partial, factors)
        common.launch(
            *(_norm_sums_kernel, (programs,), *operands, *sizes, node, edge),
            **(tile | {"EPS": eps}),
        )

    results, totals, first = [empty_image(x) for x in inputs], [], 0
    for node, n in enumerate(readers):
        own = slice(first, first + n)
        total = grads[first] if n == 1 else results[node]
        if n > MOST_GRADS:
            for edge in range(first, first + n, MOST_GRADS):
                some = slice(edge, min(edge + MOST_GRADS, first + n))
                add_up(node, grads[some], coefficients[some], None, edge)
            total = weighted_sum(grads[own], coefficients[own], [])
            add_up(node, (total,), None, None, len(grads))
        else:
            # To write the sum of two gradients is no more than to read them again.
            add_up(node, grads[own], coefficients[own], total if n > 1 else None, first)
        totals.append(total)
        first += n
    grad_parameters, products = torch.empty_like(parameters), torch.empty_like(coefficients)
    _combine(partial, columns, grad_parameters, products)
    tile = tile_shape(channels)
    for some in _chunks(nodes):
        operands = (tuple(totals[some]), factors[some], inputs[some], parameters[some])
        grid = (cdiv(count, tile["ROWS"]), len(totals[some]))
        common.launch(
            *(_norm_backward_kernel, grid, *operands, moments[some], grad_parameters[some]),
            *(tuple(results[some]), count * channels, channels),
            **(tile | {"EPS": eps}),
        )
    return results, products, grad_parameters


def _chunks(nodes: int) -> list[slice]:
    return [slice(first, first + MOST_NODES) for first in range(0, nodes, MOST_NODES)]


def _combination(columns: int) -> tuple[tuple[int], dict[str, Any]]:
    """Many narrow programs, whose rows are sectors of memory, read many at a time."""
    return (cdiv(columns, 8),), {"ROWS": 256, "COLUMNS": 8}


def _combine(partial: Tensor, columns: int, first: Tensor, second: Tensor) -> None:
    """Add up the first columns of a matrix of partial sums; they fill one tensor, then another."""
    grid, tile = _combination(columns)
    sizes = (*partial.shape, columns, first.numel())
    common.launch(_combine_kernel, grid, partial, first, second, *sizes, **tile)


@jit
def _pick(tensors, number):
    """One of several tensors, by a number that is known on the GPU."""
    picked = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        picked = tl.where(number == i, tensors[i], picked)
    return picked


@jit
def _statistics_kernel(
    inputs, partial, size, channels, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    program, node, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, CHANNELS)
    x = _pick(inputs, node)
    # Of the differences from the first pixel: a mean of many standard deviations would round them.
    pivot = load_row(x, channel, channels)
    mean = tl.zeros([CHANNELS], partial.dtype.element_ty)
    squares = tl.zeros([CHANNELS], partial.dtype.element_ty)
    last = min((program + 1) * rows, (size // channels).to(tl.int32))
    for first in range(program * rows, last, ROWS):
        offset, mask = tile_place(first, channel, channels, size, ROWS)
        value = tl.where(mask, load(x + offset, mask) - pivot, 0.0)
        number = min(ROWS, last - first)
        tile_mean = tl.sum(value, 0) / number
        centred = tl.where(mask, value - tile_mean[None, :], 0.0)
        # Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances".
        before = first - program * rows
        share = number / (before + number).to(mean.dtype)
        delta = tile_mean - mean
        mean += delta * share
        squares += tl.sum(centred * centred, 0) + delta * delta * share * before
    place = (node * tl.num_programs(0) + program).to(tl.int64) * 2 * channels + channel
    tl.store(partial + place, mean, channel < channels)
    tl.store(partial + place + channels, squares, channel < channels)


@jit
def _statistics_combine_kernel(
    inputs, partial, parameters, affines, moments, blocks, rows, count, channels,
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
    mean += load(_pick(inputs, node) + channel, exists)
    parameters += node * 2 * channels
    scale = load(parameters + channel, exists) * tl.rsqrt(var + EPS)
    shift = load(parameters + channels + channel, exists) - mean * scale
    affine = _pick(affines, node)
    tl.store(affine + channel, scale, exists)
    tl.store(affine + channels + channel, shift, exists)
    moments += node * 2 * channels
    tl.store(moments + channel, mean, exists)
    tl.store(moments + channels + channel, var, exists)


@jit
def _normalised(x, moments, channel, channels, offset, mask, EPS: tl.constexpr):
    mean = load_row(moments, channel, channels)
    invstd = tl.rsqrt(load_row(moments + channels, channel, channels) + EPS)
    return tl.where(mask, (load(x + offset, mask) - mean) * invstd, 0.0), invstd


@jit
def _norm_sums_kernel(
    grads, coefficients, x, parameters, moments, total, partial, factors,
    size, channels, rows, columns, first_product, node, edge,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    own, _ = sum_terms(grads, coefficients, (), channel, channels)
    # What is read again is a sum that has been written, or a single gradient.
    tl.store(factors + node, own[0] if total is None else 1.0, program == 0)
    parameters += node * 2 * channels
    moments += node * 2 * channels
    scale = load_row(parameters, channel, channels)
    shift = load_row(parameters + channels, channel, channels)
    sum_grad = tl.zeros([CHANNELS], partial.dtype.element_ty)
    sum_grad_x = tl.zeros([CHANNELS], partial.dtype.element_ty)
    products = (tl.zeros([CHANNELS], partial.dtype.element_ty),) * len(grads)
    for first in range(program * rows, (program + 1) * rows, ROWS):
        offset, mask = tile_place(first, channel, channels, size, ROWS)
        normal, _invstd = _normalised(x, moments, channel, channels, offset, mask, EPS)
        y = normal * scale + shift
        grad, products = total_and_products(grads, own, offset, mask, y, products)
        if total is not None:
            tl.store(total + offset, grad, mask)
        sum_grad += tl.sum(grad, 0)
        sum_grad_x += tl.sum(grad * normal, 0)
    partial += program.to(tl.int64) * columns
    place = node * 2 * channels + channel
    tl.store(partial + place, sum_grad_x, channel < channels)
    tl.store(partial + place + channels, sum_grad, channel < channels)
    for i in tl.static_range(len(grads)):
        tl.store(partial + first_product + edge + i, tl.sum(products[i], 0))


@jit
def _norm_backward_kernel(
    totals, factors, inputs, parameters, moments, grad_parameters, results, size, channels,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    node, channel = tl.program_id(1), tl.arange(0, CHANNELS)
    offset, mask = tile_place(tl.program_id(0) * ROWS, channel, channels, size, ROWS)
    grad = load(_pick(totals, node) + offset, mask) * tl.load(factors + node)
    own = node * 2 * channels
    normal, invstd = _normalised(
        _pick(inputs, node), moments + own, channel, channels, offset, mask, EPS
    )
    sum_grad_x = load_row(grad_parameters + own, channel, channels)
    sum_grad = load_row(grad_parameters + own + channels, channel, channels)
    grad -= (sum_grad + normal * sum_grad_x) / (size // channels)
    scale = load_row(parameters + own, channel, channels)
    tl.store(_pick(results, node) + offset, scale * invstd * grad, mask)


@jit
def _combine_kernel(
    partial, first, second, blocks, columns, count, first_end,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < count
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    for start in range(0, blocks, ROWS):
        block = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        place = block * columns + column[None, :]
        total += tl.load(partial + place, (block < blocks) & exists[None, :], other=0.0)
    sums = tl.sum(total, 0)
    tl.store(first + column, sums, exists & (column < first_end))
    tl.store(second + column - first_end, sums, exists & (column >= first_end))
