"""The weighted sum with ReLU and depthwise convolution, and its gradients."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import tiling
from ..launches import MOST_INPUTS, pieces, shared
from ..memory_format import empty_image
from . import common
from .common import (
    channels_last,
    jit,
    load,
    load_sum,
    packed,
    padded,
    pick,
    pick_one,
    place,
    sum_terms,
    workspace,
)
from .sums import weighted_sum


def aggregate(
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
    stride: int,
) -> list[Tensor]:
    inputs = channels_last(inputs)
    launched = _shared(inputs, degrees, coefficients, affines, weights)
    return _convolve(launched, inputs[0], len(weights), stride)


def _convolve(
    launched: Iterable[tuple[slice, tuple[Any, ...]]], x: Tensor, nodes: int, stride: int
) -> list[Tensor]:
    results = [empty_image(x, stride) for _ in range(nodes)]
    grid, rows, tile = tiling.strips(results[0].shape, 1, tiling.STRIPS)
    tile |= {"STRIDE": stride, "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}
    for some, operands in launched:
        outputs = tuple(results[some])
        common.launch(
            *(_aggregate_kernel, (*grid, len(outputs)), *operands, outputs),
            *(*x.shape[2:], x.shape[1], rows),
            **tile,
        )
    return results


def aggregate_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
    stride: int,
    want: Sequence[bool],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    grads, inputs = channels_last(grads), channels_last(inputs)
    x = inputs[0]
    grad_sums = [empty_image(x) for _ in weights] if want[0] else []
    grid, rows, tile = tiling.strips(x.shape, stride, tiling.STRIPS_BACKWARD)
    parts = workspace(x, len(weights), grid[0], 9, x.shape[1])
    launched = [*_shared(inputs, degrees, coefficients, affines, weights)]
    for some, operands in launched:
        common.launch(
            *(_aggregate_backward_kernel, (*grid, len(grads[some])), grads[some], *operands),
            *(tuple(grad_sums[some]) or None, parts[some]),
            *(*x.shape[2:], x.shape[1], rows),
            **(tile | {"STRIDE": stride}),
        )
    return grad_sums, parts, _convolve(launched, x, len(weights), stride) if want[1] else []


def _shared(
    inputs: Sequence[Tensor],
    degrees: Sequence[int],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """The nodes that share a kernel, and the kernel's operands."""
    places = pieces(degrees)
    for some in shared(degrees, MOST_INPUTS):
        own = places[some]
        first, last = own[0].start, own[-1].stop
        kernels = tuple(weight.contiguous() for weight in weights[some])
        factors = coefficients[first:last]
        if degrees[some.start] > MOST_INPUTS:  # for these a kernel has no registers
            whole = weighted_sum(inputs[first:last], factors, affines[first:last])
            yield some, ((whole,), 1, None, (), kernels)
        else:
            numbers, own_affines = packed(degrees[some]), padded(affines, own) if affines else ()
            yield some, (padded(inputs, own), numbers, factors, own_affines, kernels)


@jit
def _relu(x, inside):
    """A NaN stays one, so that a training that diverges is seen to; what isn't there is 0."""
    return tl.where(inside, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)


@jit
def _strip(height, width, rows, COLUMNS: tl.constexpr):
    """The image, first row and first column of this program's strip."""
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, rows)
    program = tl.program_id(0)
    strip = program // across
    return strip // down, strip % down * rows, program % across * COLUMNS


@jit
def _weights(weight, channel, channels):
    weights = ()
    for k in tl.static_range(9):
        weights = weights + (load(weight + channel * 9 + k, channel < channels),)
    return weights


@jit
def _pixels(
    inputs, number, factors, shift, image, y, x, channel, height, width,
    channels: tl.constexpr, LEFT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The weighted sum at ``COUNT`` columns of a row, and which of them are in the image.

    The first is ``LEFT`` to the left of x, which is inside or to the right of the image.
    """
    # What differs between the columns is a number in the instruction that loads.
    base = ((image * height + y).to(tl.int64) * width + x) * channels
    end = tl.where((y >= 0) & (y < height), width, 0)
    rows = ()
    for i in tl.static_range(len(inputs)):
        rows = rows + (inputs[i] + base,)
    values, insides = (), ()
    for j in tl.static_range(COUNT):
        inside = x + (j - LEFT) < end
        if j < LEFT:
            inside &= x >= LEFT - j
        offset = channel + (j - LEFT) * channels
        mask = inside & (channel < channels)
        values = values + (load_sum(rows, number, factors, shift, offset, mask),)
        insides = insides + (inside,)
    return values, insides


@jit
def _activations(values, insides):
    activations = ()
    for j in tl.static_range(len(values)):
        activations = activations + (_relu(values[j], insides[j]),)
    return activations


@jit
def _dots(row, weights, k: tl.constexpr, STRIDE: tl.constexpr, totals):
    """``totals``, one for each column, with the share of kernel row k in the convolution added."""
    dots = ()
    for j in tl.static_range(len(totals)):
        total = totals[j]  # first, so that each product is added by the instruction that makes it
        for i in tl.static_range(3):
            total += row[STRIDE * j + i] * weights[3 * k + i]
        dots = dots + (total,)
    return dots


@jit
def _operands(
    inputs, numbers, coefficients, affines, weights, channel, channels, NODES: tl.constexpr
):
    """Those of this program's node: its inputs, how many, the weighted sum's terms, the weights."""
    node = tl.program_id(2)
    own = pick(inputs, node, NODES)
    number, first = place(numbers, node, len(own), NODES)
    if coefficients is not None:
        coefficients += first
    factors, shift = sum_terms(
        own, number, coefficients, pick(affines, node, NODES), channel, channels
    )
    return own, number, factors, shift, _weights(pick_one(weights, node), channel, channels)


@jit
def _aggregate_kernel(
    inputs, numbers, coefficients, affines, weights, results, height, width,
    channels: tl.constexpr, rows,
    STRIDE: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    out_height, out_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    image, first, column = _strip(out_height, out_width, rows, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own, number, factors, shift, kernel = _operands(
        inputs, numbers, coefficients, affines, weights, channel, channels, len(weights)
    )
    result = pick_one(results, tl.program_id(2))
    # Every row of the input is computed once, and added to the rows of the output that it is in.
    # The first rows of the input are above the strip: their own outputs are not stored.
    nothing = (tl.zeros([CHANNELS], WIDE),) * COLUMNS
    current, following = nothing, nothing
    for y in range(first - 3 + STRIDE, min(first + rows, out_height)):
        # As many rows of the input come in as there are to a row of the output; the last of them
        # meets the kernel's last row.
        row = ()
        for i in tl.static_range(STRIDE):
            values, insides = _pixels(
                own, number, factors, shift, image, STRIDE * y + (2 - STRIDE + i),
                STRIDE * column, channel, height, width,
                channels, 1, STRIDE * (COLUMNS - 1) + 3,
            )  # fmt: skip
            row = _activations(values, insides)
            current = _dots(row, kernel, 3 - STRIDE + i, STRIDE, current)
        base = ((image * out_height + y).to(tl.int64) * out_width + column) * channels
        end = tl.where(y >= first, out_width, 0)
        for j in tl.static_range(COLUMNS):
            mask = (column + j < end) & (channel < channels)
            tl.store(result + base + (channel + j * channels), current[j], mask)
        if STRIDE == 2:
            current = _dots(row, kernel, 0, STRIDE, nothing)
        else:
            current = _dots(row, kernel, 1, STRIDE, following)
            following = _dots(row, kernel, 0, STRIDE, nothing)


@jit
def _aggregate_backward_kernel(
    grads, inputs, numbers, coefficients, affines, weights, grad_sums, partial,
    height, width, channels: tl.constexpr, rows,
    STRIDE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    out_height, out_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    image, first, column = _strip(height, width, rows, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own, number, factors, shift, kernel = _operands(
        inputs, numbers, coefficients, affines, weights, channel, channels, len(weights)
    )
    node = tl.program_id(2)
    grad = pick(grads, node, len(grads))
    if grad_sums is not None:
        grad_sum = pick_one(grad_sums, node)
    sums = (tl.zeros([CHANNELS], partial.dtype.element_ty),) * 9
    # Rows of the gradient are read once. With a stride of 1, a pixel of the input is in outputs of
    # three rows and columns, the first of which is to the left; with 2 in one or two.
    LEFT: tl.constexpr = 2 - STRIDE
    COUNT: tl.constexpr = COLUMNS // STRIDE + 1 + LEFT
    x = column // STRIDE
    y = first // STRIDE
    above, _ = _pixels(
        grad, 1, (1.0,), 0.0, image, y - 1, x, channel, out_height, out_width,
        channels, LEFT, COUNT,
    )  # fmt: skip
    here, _ = _pixels(
        grad, 1, (1.0,), 0.0, image, y, x, channel, out_height, out_width,
        channels, LEFT, COUNT,
    )  # fmt: skip
    for y in range(first // STRIDE, tl.cdiv(min(first + rows, height), STRIDE)):
        below, _ = _pixels(
            grad, 1, (1.0,), 0.0, image, y + 1, x, channel, out_height, out_width,
            channels, LEFT, COUNT,
        )  # fmt: skip
        for i in tl.static_range(STRIDE):
            values, insides = _pixels(
                own, number, factors, shift, image, STRIDE * y + i, column,
                channel, height, width, channels, 0, COLUMNS,
            )  # fmt: skip
            data = _activations(values, insides)
            base = ((image * height + STRIDE * y + i).to(tl.int64) * width + column) * channels
            totals, sums = _spread(
                (above, here, below), data, kernel, sums, i, STRIDE, LEFT, COLUMNS
            )
            if grad_sums is not None:
                for j in tl.static_range(COLUMNS):
                    total = tl.where(data[j] == 0, 0.0, totals[j])
                    mask = insides[j] & (channel < channels)
                    tl.store(grad_sum + base + (channel + j * channels), total, mask)
        above, here = here, below
    program = node.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    partial += program * 9 * channels + channel
    for k in tl.static_range(9):
        tl.store(partial + k * channels, sums[k], channel < channels)


@jit
def _spread(
    grads, data, weights, sums, i: tl.constexpr,
    STRIDE: tl.constexpr, LEFT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient at each column of a row of the input, and the weight's, with this row's added.

    ``i`` is the row's number among those of one row of the output; ``grads`` has three rows.
    """
    totals, products = (), sums
    for j in tl.static_range(COLUMNS):
        total = tl.zeros_like(data[j])
        new = ()
        for k in tl.static_range(9):
            product = products[k]
            # The pixel of the output that reads this one with the kernel's element k, if any does.
            if ((i + 1 - k // 3) % STRIDE == 0) and ((j + 1 - k % 3) % STRIDE == 0):
                value = grads[(i + 1 - k // 3) // STRIDE + 1][(j + 1 - k % 3) // STRIDE + LEFT]
                total += value * weights[k]
                product += data[j] * value
            new = new + (product,)
        totals, products = totals + (total,), new
    return totals, products
