"""The roofline: a device's peak rates, and the least time that a step could take on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.benchmark import Timer

from .counting import Count

# Pixels × input channels × output channels of typical 1×1 convolutions of these networks.
MATMULS = ((6272, 256, 256), (6272, 218, 218), (1568, 512, 512), (1568, 872, 872))
# Batch sizes; a GPU needs a larger one to be busy.
BATCHES = {"cuda": 32, "cpu": 1}
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes: more than any cache holds


@dataclass(frozen=True)
class Ceilings:
    """The highest rates measured on a device.

    Attributes:
        flops: operations per second of a matrix product; a multiply-add counts as two.
        bandwidth: bytes per second of a copy, reads and writes together.
    """

    flops: float
    bandwidth: float


def measure_ceilings(
    device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.5
) -> Ceilings:
    """Measure the rates of matrix products and copies.

    Args:
        dtype: the type of the matrices. float32 is measured, too, and the better rate counts: some
            CPUs only emulate other types.
        seconds: the approximate time of each of the two measurements.
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
    """The shortest time of a step, in seconds; PyTorch's timer synchronises with a GPU."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times)


@contextmanager
def _precision_of_convolutions(device: torch.device) -> Iterator[None]:
    """Let matrix products use TensorFloat-32 if convolutions do, as they do by default."""
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
    """The seconds that a step would take if every operation reached one of the ceilings.

    A step can be faster if tensors stay in a cache, or if oneDNN or cuDNN computes a dense 3×3
    convolution by Winograd's method with less than half of its multiply-adds (on a CPU it reached
    2.2 times the ceiling). For a custom operator without a FLOP formula, only its traffic counts.
    """
    return sum(
        max(operation.flops / ceilings.flops, operation.traffic / ceilings.bandwidth)
        for operation in count.operations
    )
