"""The operators as Triton kernels: what runs on CUDA.

To these kernels a batch of images is a matrix, with a row for each pixel and a column for each
channel (channels_last). They are bound by memory, so they read and write as few tensors as the
dependencies allow. Sums over pixels are deterministic: every program writes sums of its own, and a
second kernel adds them up in a fixed order.
"""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import MOST_GRADS, MOST_INPUTS
from .memory_format import empty_image

# With 4 warps, 16 elements of each input per thread: enough loads in flight to hide the latency of
# the memory. And with C > 64 all warps lie along the channels: no sum over rows crosses threads.
TILE = 2048
FLAT = 1024  # columns where channels don't matter, so that loads can be of 16 bytes for every C
PROGRAMS = 512  # that sum over rows, at most: about what a large GPU holds at once
MIN_ROWS = 8  # of such a program: its sums are to be few beside what it reads

# A convolution's program moves down a strip of the image, a thread for each channel. A thread has
# the columns one by one, in registers, so no sum over pixels crosses threads; as a dimension of a
# tile, Triton would spread them over threads wherever it can load several channels at once.
STRIP_WIDTH = 8
STRIP_HEIGHT = 8  # at least: two more rows are read than the strip has
STRIPS = 2048  # where there would be more, they are longer

# Compile no kernels of their own for sizes of 1 and multiples of 16, but for the number of channels
# and of elements, which decide how wide loads can be.
_jit = triton.jit(
    do_not_specialize=["count", "rows", "height", "width", "blocks", "first_end", "second_end"],
    do_not_specialize_on_alignment=["coefficients"],  # slices
)


def weighted_sum(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> Tensor:
    inputs = _channels_last(inputs)
    result, size = empty_image(inputs[0]), inputs[0].numel()
    channels = result.shape[1] if affines else FLAT
    tile = _tile_shape(channels)
    grid = (_cdiv(size, channels * tile["ROWS"]),)
    operands = (inputs, coefficients, tuple(affines), result)
    _launch(_weighted_sum_kernel, grid, *operands, size, channels, **tile)
    return result


def weighted_sum_backward(
    grads: Sequence[Tensor], coefficients: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    *grads, output = _channels_last([*grads, output])
    result, size, n = empty_image(output), output.numel(), len(grads)
    programs, rows, tile = _partition(_cdiv(size, FLAT), FLAT)
    partial = _workspace(output, programs * n)
    operands = (tuple(grads), coefficients, output, result, partial)
    _launch(_weighted_sum_backward_kernel, (programs,), *operands, size, FLAT, rows, **tile)
    products = torch.empty_like(coefficients)
    _combine(partial, programs, n, products)
    return result, products


def aggregate(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    affines: Sequence[Tensor],
    weight: Tensor,
    stride: int,
) -> Tensor:
    inputs, coefficients, affines = _few(_channels_last(inputs), coefficients, affines)
    result = empty_image(inputs[0], stride)
    grid, rows, tile = _strips(result, 1)
    operands = (tuple(inputs), coefficients, tuple(affines), weight.contiguous(), result)
    sizes = (*inputs[0].shape[2:], result.shape[1], rows)
    wide = tl.float64 if result.dtype == torch.float64 else tl.float32
    _launch(_aggregate_kernel, grid, *operands, *sizes, STRIDE=stride, WIDE=wide, **tile)
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
    grad, *inputs = _channels_last([grad, *inputs])
    inputs, coefficients, affines = _few(inputs, coefficients, affines)
    grad_data = empty_image(inputs[0]) if want[0] else None
    grid, rows, tile = _strips(inputs[0], stride)
    partial = _workspace(grad, grid[0] * weight.numel())
    operands = (grad, tuple(inputs), coefficients, tuple(affines), weight.contiguous())
    sizes = (*inputs[0].shape[2:], grad.shape[1], rows)
    _launch(
        _aggregate_backward_kernel,
        *(grid, *operands, grad_data, partial, *sizes),
        **(tile | {"STRIDE": stride}),
    )
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _combine(partial, grid[0], weight.numel(), grad_weight, period=len(weight))
    result = (
        aggregate(inputs, coefficients, affines, weight, stride) if want[1] else grad.new_empty(0)
    )
    return grad.new_empty(0) if grad_data is None else grad_data, grad_weight, result


def batch_norm_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    (x,) = _channels_last([x])
    size, channels = x.numel(), x.shape[1]
    programs, rows, tile = _partition(size // channels, channels)
    partial = _workspace(x, programs * 2 * channels)
    _launch(_statistics_kernel, (programs,), x, partial, size, channels, rows, **tile)
    affine, moments = weight.new_empty(2, channels), weight.new_empty(2, channels)
    grid, tile = _combination(channels)
    sizes = (programs, rows, size // channels, channels)
    operands = (x, partial, weight, bias, affine, moments)
    _launch(_statistics_combine_kernel, grid, *operands, *sizes, EPS=eps, **tile)
    return affine, moments


def batch_norm_backward(
    grads: Sequence[Tensor],
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *grads, x = _channels_last([*grads, x])
    size, channels, n = x.numel(), x.shape[1], len(grads)
    norm, products = (x, weight, bias, moments, eps), []
    if n > MOST_GRADS:
        for first in range(0, n, MOST_GRADS):
            group = slice(first, first + MOST_GRADS)
            products.append(_norm_sums(grads[group], coefficients[group], *norm, None)[2])
        grads, coefficients = [weighted_sum(grads, coefficients, [])], coefficients.new_ones(1)
    grad_x = empty_image(x)
    # To write the sum of more than two gradients is less than to read them again.
    total = grad_x if len(grads) > 2 else None
    grad_bias, grad_weight, product = _norm_sums(grads, coefficients, *norm, total)
    read = (tuple(grads), coefficients) if total is None else ((total,), None)
    tile = _tile_shape(channels)
    grid = (_cdiv(size // channels, tile["ROWS"]),)
    operands = (*read, x, weight, moments, grad_weight, grad_bias, grad_x)
    _launch(_norm_backward_kernel, grid, *operands, size, channels, **(tile | {"EPS": eps}))
    return grad_x, torch.cat(products) if products else product, grad_weight, grad_bias


def _norm_sums(
    grads: Sequence[Tensor],
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    eps: float,
    total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a norm's bias and weight, and the products of each gradient with its output.

    With a ``total``, the weighted sum of the gradients is written to it.
    """
    size, channels, n = x.numel(), x.shape[1], len(grads)
    programs, rows, tile = _partition(size // channels, channels)
    columns = 2 * channels + n
    partial = _workspace(x, programs * columns)
    operands = (tuple(grads), coefficients, x, weight, bias, moments, total, partial)
    _launch(
        _norm_sums_kernel, (programs,), *operands, size, channels, rows, **(tile | {"EPS": eps})
    )
    sums = torch.empty_like(bias), torch.empty_like(weight), coefficients.new_empty(n)
    _combine(partial, programs, columns, *sums)
    return sums


def _few(
    inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]:
    """Operands of the same weighted sum that a convolution's kernel has registers for."""
    if len(inputs) <= MOST_INPUTS:
        return inputs, coefficients, affines
    return [weighted_sum(inputs, coefficients, affines)], coefficients.new_ones(1), []


def _channels_last(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in tensors)


def _workspace(like: Tensor, size: int) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(size, dtype=wide, device=like.device)


# Triton's own cost 3 to 5 µs a call, and there are thousands in a training step.
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile_shape(channels: int) -> dict[str, Any]:
    """All channels, so that a sum over channels is one program's."""
    width = _next_power_of_2(channels)
    return {"ROWS": max(TILE // width, 1), "CHANNELS": width}


def _partition(rows: int, channels: int) -> tuple[int, int, dict[str, Any]]:
    """How many programs, the rows of each, and the shape of their tiles."""
    tile = _tile_shape(channels)
    each = max(_cdiv(rows, PROGRAMS), MIN_ROWS)
    each = _cdiv(each, tile["ROWS"]) * tile["ROWS"]
    return _cdiv(rows, each), each, tile


def _strips(x: Tensor, multiple: int) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """The grid of a convolution's programs, the height of their strips, the shape of their tiles.

    Width and height of a strip are multiples of ``multiple``, unless it ends with the image.
    """
    n, c, h, w = x.shape
    channels = min(_next_power_of_2(c), 64 if 0 < c % 128 <= 64 else 128)
    width = max(min(_next_power_of_2(w), STRIP_WIDTH), multiple)
    across, blocks = n * _cdiv(w, width), _cdiv(c, channels)
    height = min(max(_cdiv(across * blocks * h, STRIPS), STRIP_HEIGHT), h)
    height = _cdiv(height, multiple) * multiple
    tile = {"COLUMNS": width, "CHANNELS": channels, "num_warps": max(channels // 32, 1)}
    return (across * _cdiv(h, height), blocks), height, tile


def _combination(columns: int) -> tuple[tuple[int], dict[str, Any]]:
    """Many narrow programs, whose rows are sectors of memory, read many at a time."""
    return (_cdiv(columns, 8),), {"ROWS": 256, "COLUMNS": 8}


def _combine(
    partial: Tensor, blocks: int, columns: int, *sums: Tensor, period: int | None = None
) -> None:
    """Add up the rows of a matrix of partial sums, into up to three tensors, one after the other.

    With a ``period``, what is written is the transpose of the (columns / period, period) sums.
    """
    first, second, third = (*sums, sums[-1], sums[-1])[:3]
    first_end = first.numel()
    second_end = first_end + (second.numel() if len(sums) > 1 else 0)
    grid, tile = _combination(columns)
    sizes = (blocks, columns, first_end, second_end, period or columns)
    _launch(_combine_kernel, grid, partial, first, second, third, *sizes, **tile)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, **constants)


@_jit
def _wide(x):
    """Whatever is computed is so in single precision at least."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@_jit
def _load(pointer, mask):
    return _wide(tl.load(pointer, mask, other=0.0))


@_jit
def _vector(pointer, channel, channels):
    return _load(pointer + channel, channel < channels)


@_jit
def _row(pointer, channel, channels):
    return _vector(pointer, channel, channels)[None, :]


@_jit
def _terms(inputs, coefficients, affines, channel, channels):
    """The factor of each input, and what is added to their sum."""
    factors, shift = (), 0.0
    for i in tl.static_range(len(inputs)):
        factor = 1.0
        if coefficients is not None:
            factor = _wide(tl.load(coefficients + i))
        if len(affines) > 0:
            shift += factor * _vector(affines[i] + channels, channel, channels)
            factor *= _vector(affines[i], channel, channels)
        factors = factors + (factor,)
    return factors, shift


@_jit
def _total(inputs, factors, shift, offset, mask):
    total = shift
    for i in tl.static_range(len(inputs)):
        total += factors[i] * _load(inputs[i] + offset, mask)
    return total


@_jit
def _relu(x, mask):
    """A NaN stays one, so that a training that diverges is seen to; what isn't there is 0."""
    return tl.where(mask & ~(x <= 0), x, 0.0)


@_jit
def _place(first, channel, channels, size, ROWS: tl.constexpr):
    """Where a tile's elements are in a matrix of ``size`` elements, and which of them exist."""
    offset = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * channels + channel[None, :]
    return offset, (offset < size) & (channel < channels)[None, :]


@_jit
def _weighted_sum_kernel(
    inputs, coefficients, affines, result, size, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    factors, shift = _terms(inputs, coefficients, affines, channel, channels)
    offset, mask = _place(tl.program_id(0) * ROWS, channel, channels, size, ROWS)
    tl.store(result + offset, _total(inputs, factors, shift, offset, mask), mask)


@_jit
def _total_and_products(grads, factors, offset, mask, y, products):
    """The weighted sum, and ``products`` with those of y and each gradient added."""
    total, sums = 0.0, ()
    for i in tl.static_range(len(grads)):
        grad = _load(grads[i] + offset, mask)
        total += factors[i] * grad
        sums = sums + (products[i] + tl.sum(grad * y, 0),)
    return total, sums


@_jit
def _weighted_sum_backward_kernel(
    grads, coefficients, output, result, partial, size, channels, rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    factors, _ = _terms(grads, coefficients, (), channel, channels)
    products = (tl.zeros([CHANNELS], partial.dtype.element_ty),) * len(grads)
    for first in range(program * rows, (program + 1) * rows, ROWS):
        offset, mask = _place(first, channel, channels, size, ROWS)
        y = _load(output + offset, mask)
        total, products = _total_and_products(grads, factors, offset, mask, y, products)
        tl.store(result + offset, total, mask)
    for i in tl.static_range(len(grads)):
        tl.store(partial + program * len(grads) + i, tl.sum(products[i], 0))


@_jit
def _strip(height, width, rows, COLUMNS: tl.constexpr):
    """The image, first row and first column of this program's strip."""
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, rows)
    program = tl.program_id(0)
    strip = program // across
    return strip // down, strip % down * rows, program % across * COLUMNS


@_jit
def _weights(weight, channel, channels):
    weights = ()
    for k in tl.static_range(9):
        weights = weights + (_load(weight + channel * 9 + k, channel < channels),)
    return weights


@_jit
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
        values = values + (_total(inputs, factors, shift, offset, mask),)
        masks = masks + (mask,)
    return values, masks


@_jit
def _activations(values, masks):
    activations = ()
    for j in tl.static_range(len(values)):
        activations = activations + (_relu(values[j], masks[j]),)
    return activations


@_jit
def _dots(row, weights, k: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """The share of kernel row k in the convolution at each column."""
    dots = ()
    for j in tl.static_range(COLUMNS):
        at = row[STRIDE * j] * weights[3 * k] + row[STRIDE * j + 1] * weights[3 * k + 1]
        dots = dots + (at + row[STRIDE * j + 2] * weights[3 * k + 2],)
    return dots


@_jit
def _sums(first, second):
    sums = ()
    for j in tl.static_range(len(first)):
        sums = sums + (first[j] + second[j],)
    return sums


@_jit
def _terms_and_weights(inputs, coefficients, affines, weight, channels, CHANNELS: tl.constexpr):
    """This program's channels, and what it needs of each: the weighted sum's terms, the weights."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    factors, shift = _terms(inputs, coefficients, affines, channel, channels)
    return channel, factors, shift, _weights(weight, channel, channels)


@_jit
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


@_jit
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


@_jit
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


@_jit
def _statistics_kernel(
    x, partial, size, channels, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    program, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    # Of the differences from the first pixel: a mean of many standard deviations would round them.
    pivot = _row(x, channel, channels)
    mean = tl.zeros([CHANNELS], partial.dtype.element_ty)
    squares = tl.zeros([CHANNELS], partial.dtype.element_ty)
    last = min((program + 1) * rows, (size // channels).to(tl.int32))
    for first in range(program * rows, last, ROWS):
        offset, mask = _place(first, channel, channels, size, ROWS)
        value = tl.where(mask, _load(x + offset, mask) - pivot, 0.0)
        number = min(ROWS, last - first)
        tile_mean = tl.sum(value, 0) / number
        centred = tl.where(mask, value - tile_mean[None, :], 0.0)
        # Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances".
        before = first - program * rows
        share = number / (before + number).to(mean.dtype)
        delta = tile_mean - mean
        mean += delta * share
        squares += tl.sum(centred * centred, 0) + delta * delta * share * before
    place = program.to(tl.int64) * 2 * channels + channel
    tl.store(partial + place, mean, channel < channels)
    tl.store(partial + place + channels, squares, channel < channels)


@_jit
def _statistics_combine_kernel(
    x, partial, weight, bias, affine, moments, blocks, rows, count, channels,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
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
    mean += _load(x + channel, exists)
    scale = _load(weight + channel, exists) * tl.rsqrt(var + EPS)
    tl.store(affine + channel, scale, exists)
    tl.store(affine + channels + channel, _load(bias + channel, exists) - mean * scale, exists)
    tl.store(moments + channel, mean, exists)
    tl.store(moments + channels + channel, var, exists)


@_jit
def _normalised(x, moments, channel, channels, offset, mask, EPS: tl.constexpr):
    mean = _row(moments, channel, channels)
    invstd = tl.rsqrt(_row(moments + channels, channel, channels) + EPS)
    return tl.where(mask, (_load(x + offset, mask) - mean) * invstd, 0.0), invstd


@_jit
def _norm_sums_kernel(
    grads, coefficients, x, weight, bias, moments, total, partial, size, channels, rows,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    factors, _ = _terms(grads, coefficients, (), channel, channels)
    scale, shift = _row(weight, channel, channels), _row(bias, channel, channels)
    sum_grad = tl.zeros([CHANNELS], partial.dtype.element_ty)
    sum_grad_x = tl.zeros([CHANNELS], partial.dtype.element_ty)
    products = (tl.zeros([CHANNELS], partial.dtype.element_ty),) * len(grads)
    for first in range(program * rows, (program + 1) * rows, ROWS):
        offset, mask = _place(first, channel, channels, size, ROWS)
        normal, _invstd = _normalised(x, moments, channel, channels, offset, mask, EPS)
        y = normal * scale + shift
        grad, products = _total_and_products(grads, factors, offset, mask, y, products)
        if total is not None:
            tl.store(total + offset, grad, mask)
        sum_grad += tl.sum(grad, 0)
        sum_grad_x += tl.sum(grad * normal, 0)
    partial += program.to(tl.int64) * (2 * channels + len(grads))
    tl.store(partial + channel, sum_grad, channel < channels)
    tl.store(partial + channels + channel, sum_grad_x, channel < channels)
    for i in tl.static_range(len(grads)):
        tl.store(partial + 2 * channels + i, tl.sum(products[i], 0))


@_jit
def _norm_backward_kernel(
    grads, coefficients, x, weight, moments, grad_weight, grad_bias, grad_x, size, channels,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    factors, shift = _terms(grads, coefficients, (), channel, channels)
    offset, mask = _place(tl.program_id(0) * ROWS, channel, channels, size, ROWS)
    grad = _total(grads, factors, shift, offset, mask)
    normal, invstd = _normalised(x, moments, channel, channels, offset, mask, EPS)
    sum_grad = _row(grad_bias, channel, channels)
    sum_grad_x = _row(grad_weight, channel, channels)
    grad -= (sum_grad + normal * sum_grad_x) / (size // channels)
    tl.store(grad_x + offset, _row(weight, channel, channels) * invstd * grad, mask)


@_jit
def _combine_kernel(
    partial, first, second, third, blocks, columns, first_end, second_end, period,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    for start in range(0, blocks, ROWS):
        block = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        place = block * columns + column[None, :]
        total += tl.load(partial + place, (block < blocks) & exists[None, :], other=0.0)
    sums = tl.sum(total, 0)
    place = column % period * (columns // period) + column // period
    tl.store(first + place, sums, exists & (place < first_end))
    tl.store(second + place - first_end, sums, exists & (place >= first_end) & (place < second_end))
    tl.store(third + place - second_end, sums, exists & (place >= second_end))
