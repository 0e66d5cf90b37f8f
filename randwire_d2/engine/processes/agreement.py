"""Communication between the processes of a training in every iteration."""

import torch
from detectron2.utils import comm
from torch import distributed


def largest(number: int) -> int:
    """The largest of all processes' numbers; all processes call this.

    It takes one message of 8 bytes. Detectron2's ``all_gather``, which takes any object that can be
    pickled, first sends its length in another message.
    """
    if comm.get_world_size() == 1:
        return number
    found = torch.tensor(number, dtype=torch.int64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, comm._get_global_gloo_group())
    return int(found)
