"""Functions of all kernels: to launch them, and to read a weighted sum."""

# mypy: disable-error-code="assignment"
# (In kernels, tuples grow in loops, which Triton unrolls.)

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime._async_compile import active_mode

# Compile no kernels of their own for sizes of 1 and multiples of 16, but for the number of channels
# and of elements, which decide how wide loads can be.
jit = triton.jit(
    do_not_specialize=[
        *("count", "rows", "height", "width", "blocks", "columns", "numbers"),
        *("first_end", "first_edge", "first_node", "first_product"),
    ],
    do_not_specialize_on_alignment=[  # slices
        *("coefficients", "parameters", "moments", "factors", "grad_parameters"),
    ],
)


def channels_last(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in tensors)


def workspace(like: Tensor, *size: int) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(size, dtype=wide, device=like.device)


def padded(tensors: Sequence[Tensor], own: Sequence[slice]) -> tuple[Tensor, ...]:
    """The inputs of several nodes, each padded to the same number with copies of its first input.

    So one kernel fits nodes with fewer inputs, too; ``packed`` tells it the real numbers.
    """
    most = max(some.stop - some.start for some in own)
    return tuple(
        tensors[some.start + i if some.start + i < some.stop else some.start]
        for some in own
        for i in range(most)
    )


def packed(numbers: Sequence[int]) -> int:
    """Pack numbers below 128 into one, because Triton would specialise on each 1 in a tuple."""
    return sum(number << (8 * i) for i, number in enumerate(numbers))


# Whether this thread only compiles kernels; other threads may launch theirs meanwhile.
_ahead: ContextVar[bool] = ContextVar("ahead", default=False)


class _Compilers(ThreadPoolExecutor):
    """Threads, since most of a compilation does not hold Python's lock."""

    def submit(self, compile_one: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        return super().submit(self._with_launcher, compile_one)

    @staticmethod
    def _with_launcher(compile_one: Callable[[], Any]) -> Any:
        kernel = compile_one()
        # Up to Triton 3.6, what launches a kernel is C, a file for each signature, which takes a
        # quarter of a second to compile; the first launch finds it in Triton's cache.
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """In the block, operators only compile their kernels, on all cores at once, and return
    uninitialised results. All kernels are ready at the end of the block."""
    try:
        with _Compilers(len(os.sched_getaffinity(0))) as pool, triton.AsyncCompileMode(pool):
            before = _ahead.set(True)
            try:
                yield
            finally:
                _ahead.reset(before)
    finally:
        # Up to Triton 3.7, a compilation that fails would leave the mode on, with a closed pool.
        active_mode.set(None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    # Triton launches on the current device, which need not be the tensors', but mostly is.
    device = tensor.get_device()
    if device < 0 or device == torch.cuda.current_device():
        kernel.run(*args, grid=grid, warmup=_ahead.get(), **constants)
    else:
        with torch.cuda.device(device):
            kernel.run(*args, grid=grid, warmup=_ahead.get(), **constants)


@jit
def widen(x):
    """Whatever is computed is so in single precision at least."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@jit
def load(pointer, mask):
    return widen(tl.load(pointer, mask, other=0.0))


@jit
def load_vector(pointer, channel, channels):
    return load(pointer + channel, channel < channels)


@jit
def load_row(pointer, channel, channels):
    return load_vector(pointer, channel, channels)[None, :]


@jit
def pick(tensors, node, NODES: tl.constexpr):
    """One node's tensors, of those of all nodes that share a kernel, by a number known on the GPU.

    All nodes have equally many: see ``padded``.
    """
    EACH: tl.constexpr = len(tensors) // NODES
    own = ()
    for i in tl.static_range(EACH):
        picked = tensors[i]
        for other in tl.static_range(1, NODES):
            picked = tl.where(node == other, tensors[other * EACH + i], picked)
        own = own + (picked,)
    return own


@jit
def pick_one(tensors, node):
    return pick(tensors, node, len(tensors))[0]


@jit
def place(numbers, node, most, NODES: tl.constexpr):
    """How many inputs a node has, and where they are among all nodes'; see ``packed``."""
    number, first = most, 0
    if NODES > 1:
        number = ((numbers >> (8 * node)) & 255).to(tl.int32)
        for other in tl.static_range(NODES):
            first += tl.where(other < node, (numbers >> (8 * other)) & 255, 0).to(tl.int32)
    return number, first


@jit
def sum_terms(inputs, number, coefficients, affines, channel, channels):
    """The factor of each input, and what is added to their sum. Those past ``number`` have none."""
    factors, shift = (), 0.0
    for i in tl.static_range(len(inputs)):
        factor = 1.0
        if coefficients is not None:
            factor = widen(tl.load(coefficients + i, i < number, other=0.0))
        if len(affines) > 0:
            shift += factor * load_vector(affines[i] + channels, channel, channels)
            factor *= load_vector(affines[i], channel, channels)
        factors = factors + (factor,)
    return factors, shift


@jit
def load_sum(inputs, number, factors, shift, offset, mask):
    total = shift
    for i in tl.static_range(len(inputs)):
        total += factors[i] * load(inputs[i] + offset, mask & (i < number))
    return total


@jit
def elements(count, channels):
    """The size of an image of ``count`` pixels. As an argument it would double the number of
    kernels: Triton compiles others for multiples of 16, and for what needs 64 bits."""
    return count.to(tl.int64) * channels


@jit
def tile_place(first, channel, channels, size, ROWS: tl.constexpr):
    """Where a tile's elements are in a matrix of ``size`` elements, and which of them exist."""
    offset = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * channels + channel[None, :]
    return offset, (offset < size) & (channel < channels)[None, :]
