"""Which nodes share a kernel on CUDA, and how many kernels an operator launches there."""

from collections.abc import Iterable, Sequence
from typing import Any

# With more inputs or gradients, a thread runs out of registers (counted by
# tools/inspect_kernels.py for sm_90, C=109): inputs are then summed up first, and gradients
# computed in groups. This also limits the number of kernels to compile.
MOST_INPUTS = 16
MOST_GRADS = 6
MOST_NODES = 8  # in one kernel


def pieces(numbers: Iterable[int]) -> list[slice]:
    """The slice of each node in a list that has so many entries for each node in turn."""
    slices, start = [], 0
    for number in numbers:
        slices.append(slice(start, start + number))
        start += number
    return slices


def shared(numbers: Sequence[int], most: int) -> list[slice]:
    """The nodes that share a kernel; a node with more than ``most`` inputs has its own.

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
        # A sum over pixels takes two kernels: the second adds up the sums of the first's programs.
        return 2 * _groups(len(args[0]), MOST_NODES)
    if name == "batch_norm_backward":
        _, readers, _, inputs, *_ = args
        # The sums over pixels, one kernel that adds up all programs' sums, and the gradients.
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
