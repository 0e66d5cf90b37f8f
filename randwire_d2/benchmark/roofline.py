"""What the device can do at best, and the least time that a step could take on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.benchmark import Timer

from .counting import Count

# Pixels × input channels × output channels, as of the 1×1 convolutions of such networks.
MATMULS = ((6272, 256, 256), (6272, 218, 218), (1568, 512, 512), (1568, 872, 872))
# A GPU is only filled by larger batches than a CPU.
BATCHES = {"cuda": 32, "cpu": 1}
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes: more than any cache holds


@dataclass(frozen=True)
class Ceilings:
    """A device's best.

    Attributes:
        flops: of a matrix product, per second; a multiply-add is two.
        bandwidth: bytes read and written by a copy, per second.
    """

    flops: float
    bandwidth: float


def measure_ceilings(
    device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.5
) -> Ceilings:
    """Measure what a matrix product and a copy reach.

    Args:
        dtype: of the matrices; float32 too, which is faster where a CPU only emulates the other.
        seconds: how long each of the measurements takes, about.
    """
    flops = 0.0
    tried = [(shape, kind) for kind in {dtype, torch.float32} for shape in MATMULS]
    with _precision_of_convolutions(device):
        for (rows, inner, columns), kind in tried:
            rows *= BATCHES[device.type]
            a = torch.randn(rows, inner, device=device).to(kind)
            b = torch.randn(inner, columns, device=device).to(kind)
            best = _shortest(partial(torch.matmul, a, b), seconds / len(tried))
            flops = max(flops, 2 * rows * inner * columns / best)
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = _shortest(partial(target.copy_, source), seconds)
    return Ceilings(flops, 2 * source.numel() / best)


def _shortest(step: Callable[[], object], seconds: float) -> float:
    """The least seconds that a step took, by PyTorch's own timer, which knows GPUs."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times)


@contextmanager
def _precision_of_convolutions(device: torch.device) -> Iterator[None]:
    """Let matrix products use TensorFloat-32 where convolutions do, as they do by default."""
    if device.type != "cuda" or not torch.backends.cudnn.allow_tf32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def floor(count: Count, ceilings: Ceilings) -> float:
    """The least seconds for a step, were every operation at one of the ceilings.

    A step can still be faster: where tensors stay in a cache, or where a dense 3×3 convolution is
    done by Winograd's method, with less than half of its multiply-adds (oneDNN and cuDNN have it;
    seen on a CPU: 2.2 times the ceiling). A custom operator without FLOP formula is traffic alone.
    """
    return sum(
        max(operation.flops / ceilings.flops, operation.traffic / ceilings.bandwidth)
        for operation in count.operations
    )
