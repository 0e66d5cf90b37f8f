"""How many kernels an operator launches on CUDA."""

from collections.abc import Sequence
from typing import Any

# More inputs than these, and a thread has no registers left for all of them (counted in the code
# for sm_90, C=109, by tools/inspect_kernels.py): they are summed up first, or taken in groups. That
# also bounds the number of kernels that there are to compile.
MOST_INPUTS = 16
MOST_GRADS = 6


def launches(name: str, args: Sequence[Any]) -> int:
    """How many kernels an operator of that name launches on CUDA, with these arguments.

    What sums over pixels needs two: one adds up the sums of the other's programs.
    """
    if name == "batch_norm_backward":
        groups = -(-len(args[0]) // MOST_GRADS)
        return 3 if groups == 1 else 1 + 2 * groups + 3
    if name in ("aggregate", "aggregate_backward"):
        inputs = args[0] if name == "aggregate" else args[1]
        computed_again = name == "aggregate_backward" and args[-1][1]
        own = 1 if name == "aggregate" else 2
        return own + bool(computed_again) + (len(inputs) > MOST_INPUTS)
    return {"weighted_sum": 1, "weighted_sum_backward": 2, "batch_norm_statistics": 2}[name]
