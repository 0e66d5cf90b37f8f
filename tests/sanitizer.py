"""What a GPU's sanitizer looks for, in Triton's interpreter: wrong accesses to memory.

Each element that a kernel reads or writes must be one of the tensors it was given (memcheck). A
GPU's programs run in any order, so none may write what another one reads or writes in the same
launch; nor may one write an element twice, or read what it has written: another of its threads may
do that, which it does not wait for (racecheck).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

# Who has read an element: the number of a program, or one of these.
NOBODY, SEVERAL = -1, -2


class Memory:
    """Tensors that overlap, of one type, and what has been done to their elements in a launch."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.start = min(x.data_ptr() for x in tensors)
        self.itemsize = tensors[0].element_size()
        length = (max(_end(x) for x in tensors) - self.start) // self.itemsize
        self.given = torch.zeros(length, dtype=torch.bool)
        for x in tensors:
            first = (x.data_ptr() - self.start) // self.itemsize
            self.given.as_strided(x.shape, x.stride(), first).fill_(True)
        self.reader = np.full(length, NOBODY)
        self.writer = np.full(length, NOBODY)

    def read(self, places: np.ndarray, program: int) -> str:
        if (self.writer[places] == program).any():
            return "reads what it has written"
        if (self.writer[places] != NOBODY).any():
            return "reads what another program has written"
        before = self.reader[places]
        alone = (before == NOBODY) | (before == program)
        self.reader[places] = np.where(alone, program, SEVERAL)
        return ""

    def write(self, places: np.ndarray, program: int) -> str:
        if len(np.unique(places)) < len(places) or (self.writer[places] == program).any():
            return "writes an element twice"
        if (self.writer[places] != NOBODY).any():
            return "writes what another program has written"
        if not np.isin(self.reader[places], (NOBODY, program)).all():
            return "writes what another program has read"
        self.writer[places] = program
        return ""


def _end(x: Tensor) -> int:
    """The address behind its last element."""
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + extent * x.element_size()


class Launch:
    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        self.memories: list[Memory] = []
        overlapping: list[Tensor] = []
        for x in sorted((x for x in tensors if x.numel()), key=Tensor.data_ptr):
            if overlapping and x.data_ptr() >= max(map(_end, overlapping)):
                self.memories.append(Memory(overlapping))
                overlapping = []
            overlapping.append(x)
        self.memories.append(Memory(overlapping))
        self.starts = np.array([memory.start for memory in self.memories], np.uint64)

    def access(self, what: str, program: int, addresses: np.ndarray, itemsize: int) -> None:
        """Raise an ``AssertionError`` if something is wrong with it."""
        owners = np.searchsorted(self.starts, addresses, "right") - 1
        assert (owners >= 0).all(), f"{self.kernel} {what}s ahead of all tensors"
        for owner in np.unique(owners):
            memory = self.memories[owner]
            offsets = (addresses[owners == owner] - np.uint64(memory.start)).astype(np.int64)
            places, rest = np.divmod(offsets, memory.itemsize)
            assert itemsize == memory.itemsize and not rest.any(), f"{self.kernel}: other elements"
            inside = places < len(memory.given)
            inside[inside] = memory.given.numpy()[places[inside]]
            assert inside.all(), f"{self.kernel} {what}s what is in no tensor"
            problem = getattr(memory, what)(places, program)
            assert not problem, f"{self.kernel}: program {program} {problem}"


@contextmanager
def sanitized() -> Iterator[None]:
    """In the block, a kernel that accesses memory wrongly ends with an ``AssertionError``."""
    running: list[Launch] = []
    prepare = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def begin(executor: Any, *arguments: Any) -> Any:
        on_host = prepare(executor, *arguments)
        tensors = [x for x in tree_leaves(on_host) if isinstance(x, Tensor)]
        running[:] = [Launch(executor.fn.__name__, tensors)]
        return on_host

    def check(builder: Any, what: str, pointers: Any, mask: Any) -> None:
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        running[0].access(what, program, addresses, itemsize)

    def checked_load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        check(builder, "read", pointers, mask)
        return load(builder, pointers, mask, *others)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(builder, "write", pointers, mask)
        return store(builder, pointers, value, mask, *others)

    def unknown(*_: Any) -> None:
        raise AssertionError("this access is not checked")

    replacements = {"create_masked_load": checked_load, "create_masked_store": checked_store}
    for name in ("atomic_cas", "atomic_rmw", "descriptor_load", "descriptor_store"):
        replacements[f"create_{name}"] = unknown
    with (
        mock.patch.object(GridExecutor, "_init_args_hst", begin),
        mock.patch.multiple(InterpreterBuilder, **replacements),
    ):
        yield
