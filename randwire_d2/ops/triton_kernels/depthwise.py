"""The weighted sum with ReLU and depthwise convolution, and its gradients."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..launches import MOST_INPUTS
from ..memory_format import empty_image
from ..tiling import strips
from . import common
from .common import channels_last, jit, load, load_sum, sum_terms, workspace
from .sums import weighted_sum


def aggregate(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weight: Tensor,
    stride: int,
) -> Tensor:
    inputs, coefficients, affines = _few(channels_last(inputs), coefficients, affines)
    result = empty_image(inputs[0], stride)
    grid, rows, tile = strips(result.shape, 1)
    operands = (tuple(inputs), coefficients, tuple(affines), weight.contiguous(), result)
    sizes = (*inputs[0].shape[2:], result.shape[1], rows)
    wide = tl.float64 if result.dtype == torch.float64 else tl.float32
    common.launch(_aggregate_kernel, grid, *operands, *sizes, STRIDE=stride, WIDE=wide, **tile)
    return result


def aggregate_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weight: Tensor,
    stride: int,
    want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad, *inputs = channels_last([grad, *inputs])
    inputs, coefficients, affines = _few(inputs, coefficients, affines)
    grad_data = empty_image(inputs[0]) if want[0] else None
    grid, rows, tile = strips(inputs[0].shape, stride)
    parts = workspace(grad, grid[0], 9, len(weight))
    operands = (grad, tuple(inputs), coefficients, tuple(affines), weight.contiguous())
    sizes = (*inputs[0].shape[2:], grad.shape[1], rows)
    common.launch(
        _aggregate_backward_kernel,
        *(grid, *operands, grad_data, parts, *sizes),
        **(tile | {"STRIDE": stride}),
    )
    result = (
        aggregate(inputs, coefficients, affines, weight, stride) if want[1] else grad.new_empty(0)
    )
    return grad.new_empty(0) if grad_data is None else grad_data, parts, result


def _few(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]:
    """Operands of the same weighted sum that a convolution's kernel has registers for."""
    if len(inputs) <= MOST_INPUTS:
        return inputs, coefficients, affines
    return [weighted_sum(inputs, coefficients, affines)], coefficients.new_ones(1), []


@jit
def _relu(x, mask):
    """A NaN stays one, so that a training that diverges is seen to; what isn't there is 0."""
    return tl.where(mask & ~(x <= 0), x, 0.0)


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
    inputs, factors, shift, image, y, x, channel, height, width, channels, COUNT: tl.constexpr
):
    """The weighted sum at ``COUNT`` columns of a row, from x on, and where they are inside."""
    base = (image * height + y).to(tl.int64) * width * channels
    end = tl.where((y >= 0) & (y < height), width, 0)
    values, masks = (), ()
    for j in tl.static_range(COUNT):
        mask = (x + j >= 0) & (x + j < end) & (channel < channels)
        offset = base + (x + j) * channels + channel
        values = values + (load_sum(inputs, factors, shift, offset, mask),)
        masks = masks + (mask,)
    return values, masks


@jit
def _activations(values, masks):
    activations = ()
    for j in tl.static_range(len(values)):
        activations = activations + (_relu(values[j], masks[j]),)
    return activations


@jit
def _dots(row, weights, k: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """The share of kernel row k in the convolution at each column."""
    dots = ()
    for j in tl.static_range(COLUMNS):
        at = row[STRIDE * j] * weights[3 * k] + row[STRIDE * j + 1] * weights[3 * k + 1]
        dots = dots + (at + row[STRIDE * j + 2] * weights[3 * k + 2],)
    return dots


@jit
def _sums(first, second):
    sums = ()
    for j in tl.static_range(len(first)):
        sums = sums + (first[j] + second[j],)
    return sums


@jit
def _terms_and_weights(inputs, coefficients, affines, weight, channels, CHANNELS: tl.constexpr):
    """This program's channels, and what it needs of each: the weighted sum's terms, the weights."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    factors, shift = sum_terms(inputs, coefficients, affines, channel, channels)
    return channel, factors, shift, _weights(weight, channel, channels)


@jit
def _aggregate_kernel(
    inputs, coefficients, affines, weight, result, height, width, channels, rows,
    STRIDE: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    out_height, out_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    image, first, column = _strip(out_height, out_width, rows, COLUMNS)
    channel, factors, shift, weights = _terms_and_weights(
        inputs, coefficients, affines, weight, channels, CHANNELS
    )
    # Every row of the input is computed once, and added to the rows of the output that it is in.
    # The first rows of the input are above the strip: their own outputs are not stored.
    current = (tl.zeros([CHANNELS], WIDE),) * COLUMNS
    following = (tl.zeros([CHANNELS], WIDE),) * COLUMNS
    for y in range(first - 3 + STRIDE, min(first + rows, out_height)):
        # As many rows of the input come in as there are to a row of the output; the last of them
        # meets the kernel's last row.
        row = ()
        for i in tl.static_range(STRIDE):
            values, masks = _pixels(
                inputs, factors, shift, image, STRIDE * y + (2 - STRIDE + i), STRIDE * column - 1,
                channel, height, width, channels, STRIDE * (COLUMNS - 1) + 3,
            )  # fmt: skip
            row = _activations(values, masks)
            current = _sums(current, _dots(row, weights, 3 - STRIDE + i, STRIDE, COLUMNS))
        base = (image * out_height + y).to(tl.int64) * out_width * channels
        end = tl.where(y >= first, out_width, 0)
        for j in tl.static_range(COLUMNS):
            mask = (column + j < end) & (channel < channels)
            tl.store(result + base + (column + j) * channels + channel, current[j], mask)
        if STRIDE == 2:
            current = _dots(row, weights, 0, STRIDE, COLUMNS)
        else:
            current = _sums(following, _dots(row, weights, 1, STRIDE, COLUMNS))
            following = _dots(row, weights, 0, STRIDE, COLUMNS)


@jit
def _aggregate_backward_kernel(
    grad, inputs, coefficients, affines, weight, grad_data, partial,
    height, width, channels, rows,
    STRIDE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    out_height, out_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    image, first, column = _strip(height, width, rows, COLUMNS)
    channel, factors, shift, weights = _terms_and_weights(
        inputs, coefficients, affines, weight, channels, CHANNELS
    )
    place = tl.program_id(0).to(tl.int64) * 9 * channels + channel
    exists = channel < channels
    sums = (tl.zeros([CHANNELS], partial.dtype.element_ty),) * 9
    # Rows of the gradient are read once. With a stride of 1, a pixel of the input is in outputs of
    # three rows and columns, the first of which is to the left; with 2 in one or two.
    LEFT: tl.constexpr = 2 - STRIDE
    COUNT: tl.constexpr = COLUMNS // STRIDE + 1 + LEFT
    x = column // STRIDE - LEFT
    y = first // STRIDE
    above, _ = _pixels(
        (grad,), (1.0,), 0.0, image, y - 1, x, channel, out_height, out_width, channels, COUNT
    )
    here, _ = _pixels(
        (grad,), (1.0,), 0.0, image, y, x, channel, out_height, out_width, channels, COUNT
    )
    for y in range(first // STRIDE, tl.cdiv(min(first + rows, height), STRIDE)):
        below, _ = _pixels(
            (grad,), (1.0,), 0.0, image, y + 1, x, channel, out_height, out_width, channels, COUNT
        )
        for i in tl.static_range(STRIDE):
            values, masks = _pixels(
                inputs, factors, shift, image, STRIDE * y + i, column,
                channel, height, width, channels, COLUMNS,
            )  # fmt: skip
            data = _activations(values, masks)
            base = (image * height + STRIDE * y + i).to(tl.int64) * width * channels
            totals, sums = _spread(
                (above, here, below), data, weights, sums, i, STRIDE, LEFT, COLUMNS
            )
            if grad_data is not None:
                for j in tl.static_range(COLUMNS):
                    total = tl.where(data[j] == 0, 0.0, totals[j])
                    offset = base + (column + j) * channels + channel
                    tl.store(grad_data + offset, total, masks[j])
        above, here = here, below
    for k in tl.static_range(9):
        tl.store(partial + place + k * channels, sums[k], exists)


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
