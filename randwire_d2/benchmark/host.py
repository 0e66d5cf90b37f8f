"""The host's time for a training step, measured without a GPU.

Images are so small that computing takes almost no time. The operators run the same Python code as
on CUDA, and Triton finds each kernel in its cache, as in any step but the first; but kernels and
replays of CUDA graphs do nothing. So two things differ from a GPU: PyTorch's own operators run on
the CPU, where a small tensor takes about as long as a launch on CUDA; and the last few microseconds
of launching a Triton kernel or a graph, in the driver, are missing.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..modeling import cuda_graphs, weights
from ..modeling.graph_recorder import Function, Recording
from ..modeling.stage_graphs import FIRST_CALLS
from ..ops import probe
from ..wiring import NetworkGenerator
from .models import Case, build, forward
from .timing import Step, paired

MODELS = ("randwire", "randwire-launched", "randwire-plain")


class Host(NamedTuple):
    """The result of ``measure_host``.

    Attributes:
        seconds: for each model, the CPU time of a step in each round.
        launches: for each model, the number of Triton kernels launched in a step.
    """

    seconds: dict[str, list[float]]
    launches: dict[str, int]


class _Recorder:
    """A graph recorder that records nothing: its replays leave the first results in place."""

    def place(self, x: Tensor) -> str:
        return "here"

    def aside(self, x: Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, x: Tensor, functions: Sequence[Function], pool: object) -> list[Recording]:
        return [Recording(function(), lambda: None) for function in functions]


class _Kernel:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None
    launches = 0

    def launch_metadata(self, *_: Any) -> None:
        pass

    def run(self, *_: Any) -> None:
        _Kernel.launches += 1


def pretend_to_have_a_gpu() -> None:
    """Make the operators run their CUDA code on the CPU, without kernels; for the whole process."""
    from triton.runtime.jit import JITFunction

    from ..ops import triton_kernels
    from ..ops.compiled import replace_driver

    replace_driver(90)
    JITFunction._do_compile = lambda self, key, *_, **__: self.device_caches[0][0].setdefault(
        key, _Kernel()
    )
    ops.joins = lambda *_: False
    weights.MULTIPLES.update(weights.MULTIPLES_ON_CUDA)
    cuda_graphs.recorder = _Recorder()
    cuda_graphs.Graph._check = lambda *_: None  # type: ignore[method-assign]
    for name in probe.OPERATORS:
        _LIBRARY.impl(name, getattr(triton_kernels, name), "CPU", allow_override=True)


_LIBRARY = torch.library.Library("randwire", "IMPL")


def measure_host(generator: NetworkGenerator, detection: bool, rounds: int) -> Host:
    """Time a network's step with CUDA graphs, with fused launches, and node by node, in turn.

    Args:
        generator: the generator of the network; it should have few channels.
        detection: see ``Case``.
        rounds: how often each variant is timed.
    """
    # With a thousand classes, the last layer's weights alone would take a tenth of the time.
    case = Case(2, 32, 32, detection, generator, classes=2)
    steps, launches = {name: _step(name, case) for name in MODELS}, {}
    for name, step in steps.items():
        for _ in range(FIRST_CALLS + 1):
            before = _Kernel.launches
            step()
        launches[name] = _Kernel.launches - before
    return Host(paired(steps, _processor_clock, rounds, warmup=2), launches)


def _step(name: str, case: Case) -> Step:
    model = build(name, case).train()
    loss: Callable[[], Any] = partial(forward, model, *case.make_inputs())
    parameters = [*model.parameters()]

    def step() -> None:
        loss().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def _processor_clock(step: Step) -> float:
    start = time.process_time()  # CPU time of this process: others do not count
    step()
    return time.process_time() - start
