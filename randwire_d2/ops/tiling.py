"""How the Triton kernels divide an image among their programs: integers, without Triton."""

from collections.abc import Sequence
from typing import Any

# With 4 warps, 16 elements of each input per thread: enough loads in flight to hide the latency of
# the memory.
TILE = 2048
# Of a program that sums over rows. A thread has 8 elements, and as many sums of its own, in
# registers; threads add up theirs once, at the end. To do so for each tile takes ten times as long.
SUM_TILE = 1024
STATISTICS_TILE = 512  # likewise, of the statistics, which read one image alone
FLAT = 1024  # columns where channels don't matter, so that loads can be of 16 bytes for every C
PROGRAMS = 512  # that sum over rows, at most: about what a large GPU holds at once
MIN_ROWS = 8  # of such a program: its sums are to be few beside what it reads

# A convolution's program moves down a strip of the image. A thread has the columns one by one, in
# registers, so no sum over pixels crosses threads; as a dimension of a tile, Triton would spread
# them over threads wherever it can load several channels at once. Where rows are aligned for it,
# a thread loads two channels at once and has half the columns: as many registers, fewer loads.
STRIP_WIDTH = 8  # of one channel
STRIP_HEIGHT = 8  # at least: two more rows are read than the strip has
STRIPS = 4096  # where there would be more, they are longer
STRIPS_BACKWARD = 2048  # likewise: of each the weight's gradient is written, to be added up


# Triton's own cost 3 to 5 µs a call, and there are thousands in a training step.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    # No bit_length(): while torch.compile traces, sizes can be symbols.
    power = 1
    while power < n:
        power *= 2
    return power


def tile_shape(channels: int, size: int | None = None) -> dict[str, Any]:
    """All channels, so that a sum over channels is one program's. By default ``TILE`` elements."""
    width = next_power_of_2(channels)
    return {"ROWS": max((size or TILE) // width, 1), "CHANNELS": width}


def partition(rows: int, channels: int, size: int | None = None) -> tuple[int, int, dict[str, Any]]:
    """How many programs sum over rows, the rows of each, and the shape of their tiles.

    By default, a tile has ``SUM_TILE`` elements.
    """
    tile = tile_shape(channels, size or SUM_TILE)
    tile["num_warps"] = min(max(tile["CHANNELS"] // 256, 4), 16)
    each = max(cdiv(rows, PROGRAMS), MIN_ROWS)
    each = cdiv(each, tile["ROWS"]) * tile["ROWS"]
    return cdiv(rows, each), each, tile


def strips(
    size: Sequence[int], multiple: int, most: int
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """The grid of a convolution's programs, the height of their strips, the shape of their tiles.

    Args:
        size: N, C, height and width of an image.
        multiple: of it are width and height of a strip, unless it ends with the image.
        most: about how many programs there are to be at most.
    """
    n, c, h, w = size
    channels = min(next_power_of_2(c), 64 if 0 < c % 128 <= 64 else 128)
    vector = 1 if c % 2 else 2
    width = max(STRIP_WIDTH // vector, multiple)  # also of a narrower image: no kernel of its own
    across, blocks = n * cdiv(w, width), cdiv(c, channels)
    height = min(max(cdiv(across * blocks * h, most), STRIP_HEIGHT), h)
    height = cdiv(height, multiple) * multiple
    warps = max(channels // (32 * vector), 1)
    tile = {"COLUMNS": width, "CHANNELS": channels, "num_warps": warps}
    return (across * cdiv(h, height), blocks), height, tile


def weight_parts(size: Sequence[int], stride: int) -> int:
    """The parts of ``aggregate_backward``'s weight gradient, for inputs of that size."""
    return strips(size, stride, STRIPS_BACKWARD)[0][0]


def product_parts(size: Sequence[int]) -> int:
    """The parts of ``weighted_sum_backward``'s products, for images of that size."""
    n, c, h, w = size
    return partition(n * h * w, c)[0]
