"""Check masks, polygons or COCO's compressed RLE: pycocotools reads them in C, and an invalid mask
may end the process."""

from operator import sub
from typing import Any

import numpy as np

# The longest path from an image's corner along a polygon's points, in longer sides of the image:
# pycocotools needs 40 bytes for each pixel of the path, and crashes at a step of 10⁸ pixels.
LONGEST = 1000
_MOST_CHARACTERS = 7  # per number, five bits each; no number of pixels needs more


def is_short(polygon: Any, width: int, height: int) -> bool:
    """Whether pycocotools can rasterise a polygon [x0, y0, x1, y1, …] in an image of this size."""
    try:  # NaN and infinite numbers fail the comparison, too
        path = sum(map(abs, map(sub, polygon, (0, 0, *polygon))))
        return bool(path <= LONGEST * max(width, height))
    except (TypeError, OverflowError):
        return False


def rle_fault(rle: Any) -> str:
    """The reason why a value is not a mask in COCO's compressed RLE; "" if it is one."""
    counts = rle.get("counts") if isinstance(rle, dict) else None
    if not isinstance(counts, str | bytes):
        return "it is no compressed RLE with size and counts"
    size = rle.get("size")
    if not _is_size(size):
        return "its size is no height and width"
    runs = _runs(counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts)
    if runs is None or runs.min() < 0:
        return "its counts are no RLE"
    if (pixels := runs.sum()) != size[0] * size[1]:
        return f"its counts are of {pixels} pixels, and its size is {size[0]} × {size[1]}"
    return ""


def _is_size(size: Any) -> bool:
    integers = int, np.integer
    return (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, integers) and not isinstance(n, bool) and n > 0 for n in size)
    )


def _runs(counts: bytes) -> np.ndarray | None:
    """Decode the lengths of the runs, like pycocotools' rleFrString; None if that is impossible."""
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - ord("0")
    if not codes.size or codes.min() < 0 or codes.max() >= 64 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > _MOST_CHARACTERS:
        return None
    starts = ends - lengths + 1
    places = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * places, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)  # negative numbers
    # From the fourth on, each number is the difference from the run two places before.
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs
