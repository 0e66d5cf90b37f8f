"""Communication between the processes of a training in every iteration."""

from collections.abc import Iterable

import torch
from detectron2.utils import comm
from torch import distributed


def largest(number: int) -> int:
    """The largest of all processes' numbers; all processes call this.

    It takes one message of 8 bytes. Detectron2's ``all_gather``, which takes any object that can be
    pickled, first sends its length in another message.
    """
    return _reduced(number, distributed.ReduceOp.MAX)


def summed(number: int) -> int:
    """The sum of all processes' numbers; all processes call this. It takes one message, too."""
    return _reduced(number, distributed.ReduceOp.SUM)


def _reduced(number: int, operation: distributed.ReduceOp.RedOpType) -> int:
    if comm.get_world_size() == 1:
        return number
    found = torch.tensor(number, dtype=torch.int64)
    distributed.all_reduce(found, operation, comm._get_global_gloo_group())
    return int(found)


def means(numbers: Iterable[float]) -> list[float]:
    """The mean of all processes for each number; all processes call this with as many numbers."""
    found = torch.tensor([*numbers], dtype=torch.float64)
    size = comm.get_world_size()
    if size > 1 and len(found):
        distributed.all_reduce(found, group=comm._get_global_gloo_group())
    return (found / size).tolist()
