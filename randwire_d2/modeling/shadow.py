"""A shadow step: a stage runs both ways on one input, for their difference and their times.

That shows what no test can: what the kernels do on this machine, with these images, in the middle
of this training.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .stage import RandWireStage

# The largest relative errors that rounding explains. In float32 convolutions may use TF32, whose
# mantissa has 10 bits; what gradients lose on the way grows with the depth of the graph.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 0.5}

# By ``training``.
MODES = {True: "training", False: "inference"}

Run = Callable[[RandWireStage, Tensor], Tensor]
RUNS: tuple[Run, Run] = (RandWireStage.run_fused, RandWireStage.run_nodes)


@dataclass(frozen=True)
class Shadow:
    """What a shadow step found.

    Attributes:
        errors: of the fused stage's output, of the gradient of its input and of those of its
            parameters, the Euclidean norm of the difference to the nodes', in units of the
            nodes'. What needs no gradient has none.
        limit: the largest error that rounding explains.
        seconds: by ``training``, those of the fused stage and of its nodes in channels_last.
    """

    errors: dict[str, float]
    limit: float
    seconds: dict[bool, tuple[float, float]]

    def check(self) -> None:
        """
        Raises:
            RuntimeError: an error is larger than rounding explains.
        """
        for what, error in self.errors.items():
            if not error <= self.limit:
                raise RuntimeError(
                    f"its {what} is off by {error:.2g} of what its nodes give one by one; rounding "
                    f"explains {self.limit:g}"
                )


def shadow(stage: RandWireStage, x: Tensor, rounds: int = 0) -> Shadow:
    """Run a stage fused and node by node; it stays as it is, and no random number is drawn.

    Args:
        stage: one without an ``obstacle`` to run fused. Where its norms are synchronised, it is run
            so in all processes, and each has its own images and errors.
        x: its input (N, in_channels, H, W). If gradients are on, those of the input, if it requires
            one, and of the parameters are compared, too.
        rounds: how often each of both is timed, in training if the stage is, and in inference.
    """
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
    with _kept(stage):
        fused, nodes = (_run(stage, run, x) for run in RUNS)
        errors = {
            what: _error(fused[what], nodes[what]) for what in nodes if _is_finite(nodes[what])
        }
        limit = LIMITS[nodes["output"][0].dtype]
        del fused, nodes
        seconds = {}
        if rounds:
            for training in sorted({stage.training, False}, reverse=True):
                seconds[training] = _times(stage.train(training), x, rounds)
    return Shadow(errors, limit, seconds)


@contextmanager
def _kept(stage: RandWireStage) -> Iterator[None]:
    """Leave buffers and modes as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    modes = [(module, module.training) for module in stage.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _run(stage: RandWireStage, run: Run, x: Tensor) -> dict[str, list[Tensor]]:
    output = run(stage, x)
    results = {"output": [output]}
    if output.requires_grad:
        parameters = [p for p in stage.parameters() if p.requires_grad]
        generator = torch.Generator(x.device).manual_seed(0)
        gradient = torch.randn(
            output.shape, generator=generator, device=x.device, dtype=torch.float32
        ).to(output.dtype)
        # Not backward(): no parameter gets a gradient, and DistributedDataParallel is not waiting.
        wanted = [*parameters, *([x] if x.requires_grad else [])]
        gradients = torch.autograd.grad(output, wanted, gradient)
        results["parameters' gradients"] = list(gradients[: len(parameters)])
        results["input's gradient"] = list(gradients[len(parameters) :])
    return {what: [t.detach() for t in tensors] for what, tensors in results.items() if tensors}


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])


def _is_finite(tensors: list[Tensor]) -> bool:
    """A training that diverges says nothing about the operators."""
    return all(bool(t.isfinite().all()) for t in tensors)


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    reference = _flat(expected)
    return float((_flat(actual) - reference).norm() / reference.norm().clamp_min(1e-30))


def _times(stage: RandWireStage, x: Tensor, rounds: int) -> tuple[float, float]:
    """The median seconds of both ways, which take turns."""
    times: dict[Run, list[float]] = {run: [] for run in RUNS}
    with torch.set_grad_enabled(stage.training and torch.is_grad_enabled()):
        for i in range(rounds + 1):
            for run in RUNS if i % 2 else RUNS[::-1]:
                _wait(x.device)
                start = time.perf_counter()
                _run(stage, run, x)
                _wait(x.device)
                times[run].append(time.perf_counter() - start)
    fused, nodes = (statistics.median(times[run][1:]) for run in RUNS)  # the first warms up
    return fused, nodes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
