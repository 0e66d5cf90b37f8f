"""A shadow step: a stage runs fused and node by node on one input, to compare results and times.

Unlike a test, it checks the kernels on this machine, with these images, during this training.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cuda_graphs
from .difference import LIMITS, error, exact_convolutions, random_gradient, unchanged
from .fused import uses_batch
from .fused_stage import RandWireStage
from .stage_graphs import FIRST_CALLS
from .weights import whole_image, wider_image, with_zeros, zeros_of

# Fewer values per channel are few. With 2 or 3, most errors of random weights were above the limits
# of 16 bits; with 4 or 5, some; with 6 or more, none of 696.
FEW = 16

# By ``training``.
MODES = {True: "training", False: "inference"}

Run = Callable[[RandWireStage, Tensor], Tensor]
RUNS: tuple[Run, Run] = (RandWireStage.run_fused, RandWireStage.run_nodes)
TIMED: tuple[Run, Run] = (RandWireStage.run_replayed, RandWireStage.run_nodes)


@dataclass(frozen=True)
class Shadow:
    """What a shadow step found.

    Attributes:
        errors: the relative errors of the fused stage's output and, as far as they are needed, of
            the gradients of its input and of its parameters: the Euclidean norm of the difference
            to the node-by-node result, divided by that of the latter. The padding of images is
            compared, too; it must be zeros. If an error is above the limit, the nodes were also run
            in PyTorch's default memory format, then both ways with the input upside down, and the
            smallest error counts. Empty if norms use the statistics of a batch that has ``FEW``
            values per channel, in 16 bits.
        limit: the largest error that rounding explains.
        seconds: for training (True) and inference (False), the times of the fused stage and of its
            nodes one by one, in channels_last.
    """

    errors: dict[str, float]
    limit: float
    seconds: dict[bool, tuple[float, float]]

    def check(self) -> None:
        """
        Raises:
            RuntimeError: an error is larger than rounding explains.
        """
        for what, off in self.errors.items():
            if not off <= self.limit:
                raise RuntimeError(
                    f"its {what} is off by {off:.2g} of what its nodes give one by one; rounding "
                    f"explains {self.limit:g}"
                )


def shadow(stage: RandWireStage, x: Tensor, rounds: int = 0) -> Shadow:
    """Run a stage fused and node by node, without changing it or drawing a random number.

    Args:
        stage: one that can run fused (its ``obstacle`` is empty). If its norms are synchronised,
            all processes must call this; each has its own images and errors.
        x: its input (N, in_channels, H, W). If gradients are on, those of the parameters and of the
            input (if it requires one) are compared, too.
        rounds: how often each way is timed, in inference and, if the stage is in training mode, in
            training.
    """
    # As the stage gets it, with its padding; the nodes get a copy without.
    own = with_zeros(Tensor.detach, x)
    if not zeros_of(own):
        own = own.contiguous(memory_format=torch.channels_last)
    x = own.requires_grad_(x.requires_grad)
    with _kept(stage):
        with exact_convolutions():
            errors, limit = _compare(stage, x)
            # What a ReLU gets may be zero but for rounding, positive in one way only. Where there
            # are few pixels, that is much of a gradient. A wrong kernel is wrong upside down, too.
            if not stage.synchronised and not _within(errors, limit):
                turned = with_zeros(lambda own: own.detach().flip(2, 3), x)
                other, _ = _compare(stage, turned.requires_grad_(x.requires_grad))
                errors = _smaller(errors, other)
        seconds = {}
        if rounds:
            for training in sorted({stage.training, False}, reverse=True):
                seconds[training] = _times(stage.train(training), x, rounds)
    return Shadow(errors, limit, seconds)


def _compare(stage: RandWireStage, x: Tensor) -> tuple[dict[str, float], float]:
    """``errors`` and ``limit`` of a ``Shadow``, of one input."""
    fused = _run(stage, RUNS[0], x)
    output = fused["output"][0]
    limit = LIMITS[output.dtype]
    errors = _errors(fused, _run(stage, RUNS[1], x))  # all processes run it, whatever follows
    # Such a norm divides by the small differences of a few values, which are mostly rounding.
    norm: Any = stage.nodes[0].norm
    if output.dtype.itemsize == 2 and output[:, 0].numel() < FEW and uses_batch(norm):
        return {}, limit
    # On a CPU, PyTorch's batch norm adds up all pixels in float32 in channels_last, and more
    # exactly in the other layout. A kernel that is wrong differs from both.
    if not stage.synchronised and not _within(errors, limit):
        contiguous = x.detach().contiguous().requires_grad_(x.requires_grad)
        errors = _smaller(errors, _errors(fused, _run(stage, RUNS[1], contiguous)))
    return errors, limit


def _within(errors: dict[str, float], limit: float) -> bool:
    return all(off <= limit for off in errors.values())


def _smaller(errors: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    return {what: min(off, others.get(what, off)) for what, off in errors.items()}


@contextmanager
def _kept(stage: RandWireStage) -> Iterator[None]:
    """Restore buffers and modes after the block."""
    modes = [(module, module.training) for module in stage.modules()]
    try:
        with unchanged(stage.buffers()):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _run(stage: RandWireStage, run: Run, x: Tensor) -> dict[str, list[Tensor]]:
    output = run(stage, x)
    results = {"output": [output]}
    if output.requires_grad:
        parameters = [p for p in stage.parameters() if p.requires_grad]
        # Not backward(): no parameter gets a gradient, and DistributedDataParallel is not waiting.
        wanted = [*parameters, *([x] if x.requires_grad else [])]
        gradients = torch.autograd.grad(output, wanted, random_gradient(output))
        results["parameters' gradients"] = list(gradients[: len(parameters)])
        results["input's gradient"] = list(gradients[len(parameters) :])
    return {
        what: [with_zeros(Tensor.detach, t) for t in tensors]
        for what, tensors in results.items()
        if tensors
    }


def _errors(fused: dict[str, list[Tensor]], nodes: dict[str, list[Tensor]]) -> dict[str, float]:
    return {
        what: error([*map(whole_image, fused[what])], [*map(_widened, nodes[what], fused[what])])
        for what in nodes
        # A training that diverges says nothing about the operators.
        if all(t.isfinite().all() for t in nodes[what])
    }


def _widened(x: Tensor, like: Tensor) -> Tensor:
    """x, padded with as many channels of zeros as ``like`` has."""
    zeros = zeros_of(like)
    return wider_image(x, zeros) if zeros else x


def _times(stage: RandWireStage, x: Tensor, rounds: int) -> tuple[float, float]:
    """The median seconds of both ways, which take turns.

    If CUDA graphs are on and possible, the fused way is the replay of a graph, which is recorded
    before the first timing, as it is in a training whose images have one size.
    """
    times: dict[Run, list[float]] = {run: [] for run in TIMED}
    with torch.set_grad_enabled(stage.training and torch.is_grad_enabled()):
        replayed = stage.cuda_graphs and cuda_graphs.recorder.place(x) is not None
        for _ in range(FIRST_CALLS if replayed else 0):
            _run(stage, TIMED[0], x)
        for i in range(rounds + 1):
            for run in TIMED if i % 2 else TIMED[::-1]:
                _wait(x.device)
                start = time.perf_counter()
                _run(stage, run, x)
                _wait(x.device)
                times[run].append(time.perf_counter() - start)
    stage.graphs.drop()  # a training may not see images of this size again
    fused, nodes = (statistics.median(times[run][1:]) for run in TIMED)  # the first warms up
    return fused, nodes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
