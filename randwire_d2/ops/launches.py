"""How many kernels an operator launches on CUDA."""

from collections.abc import Sequence
from typing import Any

# More inputs than these, and a thread has no registers left for all of them (counted in the code
# for sm_90, C=109, by tools/inspect_kernels.py): they are summed up first, or taken in groups. That
# also bounds the number of kernels that there are to compile.
MOST_INPUTS = 16
MOST_GRADS = 6
MOST_NODES = 8  # whose norms one kernel knows


def launches(name: str, args: Sequence[Any]) -> int:
    """How many kernels an operator of that name launches on CUDA, with these arguments."""
    if name == "batch_norm_statistics":
        # What sums over pixels needs two: one adds up the sums of the other's programs.
        return 2 * _groups(len(args[0]), MOST_NODES)
    if name == "batch_norm_backward":
        _, readers, _, inputs, *_ = args
        # Those of each node, a sum of all programs' sums, and what needs that.
        sums = (1 if n <= MOST_GRADS else _groups(n, MOST_GRADS) + 2 for n in readers)
        return sum(sums) + 1 + _groups(len(inputs), MOST_NODES)
    if name in ("aggregate", "aggregate_backward"):
        inputs = args[0] if name == "aggregate" else args[1]
        computed_again = name == "aggregate_backward" and args[-1][1]
        return 1 + bool(computed_again) + (len(inputs) > MOST_INPUTS)
    return 1


def _groups(number: int, most: int) -> int:
    return -(-number // most)
