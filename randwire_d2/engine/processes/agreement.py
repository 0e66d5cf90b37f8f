"""What the processes of a training ask each other in every iteration."""

import torch
from detectron2.utils import comm
from torch import distributed


def largest(number: int) -> int:
    """The largest of all processes' numbers; each of them calls it.

    It is one message of 8 bytes. Detectron2's ``all_gather``, for whatever can be pickled, sends
    how long it is ahead of it.
    """
    if comm.get_world_size() == 1:
        return number
    found = torch.tensor(number, dtype=torch.int64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, comm._get_global_gloo_group())
    return int(found)
