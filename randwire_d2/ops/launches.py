"""Which nodes share a kernel on CUDA, and how many kernels an operator launches there."""

from collections.abc import Iterable, Sequence
from typing import Any

# More inputs than these, and a thread has no registers left for all of them (counted in the code
# for sm_90, C=109, by tools/inspect_kernels.py): they are summed up first, or taken in groups. That
# also bounds the number of kernels that there are to compile.
MOST_INPUTS = 16
MOST_GRADS = 6
MOST_NODES = 8  # that one kernel knows


def pieces(numbers: Iterable[int]) -> list[slice]:
    """Where each node's are in a list that has so many of each node, one after the other."""
    slices, start = [], 0
    for number in numbers:
        slices.append(slice(start, start + number))
        start += number
    return slices


def shared(numbers: Sequence[int], most: int) -> list[slice]:
    """The nodes that share a kernel, one with more inputs than ``most`` being alone.

    Args:
        numbers: how many inputs each node has.
    """
    slices: list[slice] = []
    room = 0
    for node, number in enumerate(numbers):
        if number > most or not room:
            slices.append(slice(node, node + 1))
            room = 0 if number > most else MOST_NODES - 1
        else:
            slices[-1] = slice(slices[-1].start, node + 1)
            room -= 1
    return slices


def launches(name: str, args: Sequence[Any]) -> int:
    """How many kernels an operator of that name launches on CUDA, with these arguments."""
    if name == "batch_norm_statistics":
        # What sums over pixels needs two: one adds up the sums of the other's programs.
        return 2 * _groups(len(args[0]), MOST_NODES)
    if name == "batch_norm_backward":
        _, readers, _, inputs, *_ = args
        # Those of all nodes, a sum of all programs' sums, and what needs that.
        sums = len(shared(readers, MOST_GRADS))
        summed_first = sum(_groups(n, MOST_GRADS) + 1 for n in readers if n > MOST_GRADS)
        return sums + summed_first + 1 + _groups(len(inputs), MOST_NODES)
    if name == "weighted_sum_backward":
        return len(shared(args[1], MOST_GRADS))
    if name in ("aggregate", "aggregate_backward"):
        degrees = args[1] if name == "aggregate" else args[2]
        computed_again = name == "aggregate_backward" and args[-1][1]
        summed_first = sum(n > MOST_INPUTS for n in degrees)
        return len(shared(degrees, MOST_INPUTS)) * (1 + bool(computed_again)) + summed_first
    return 1


def _groups(number: int, most: int) -> int:
    return -(-number // most)
