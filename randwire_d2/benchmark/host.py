"""What a training step costs the host, with a stand-in for the GPU.

Images are so small that nothing is computed to speak of. The operators run the Python that they run
on CUDA, and Triton finds each kernel in its cache, as in any step but the first; the kernel then
does nothing. So two things differ from a GPU: PyTorch's own operators are dispatched to the CPU,
where a small tensor takes them about as long as a launch takes CUDA; and the last few microseconds
of a Triton kernel's launch, in the driver, are missing.
"""

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .. import ops
from ..ops import probe
from ..wiring import NetworkGenerator
from .models import Case, build, forward
from .timing import Step, paired

MODELS = ("randwire", "randwire-plain")


class Host(NamedTuple):
    """What was measured.

    Attributes:
        seconds: by model, of the processor, one for each round.
        launches: of Triton kernels in the fused step.
    """

    seconds: dict[str, list[float]]
    launches: int


class _Kernel:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None
    launches = 0

    def launch_metadata(self, *_: Any) -> None:
        pass

    def run(self, *_: Any) -> None:
        _Kernel.launches += 1


def pretend_to_have_a_gpu() -> None:
    """From now on, in this process, operators on the CPU do what they do on CUDA, for nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from ..ops import triton_kernels

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction._do_compile = lambda self, key, *_, **__: self.device_caches[0][0].setdefault(
        key, _Kernel()
    )
    ops.joins = lambda *_: False
    for name in probe.OPERATORS:
        _LIBRARY.impl(name, getattr(triton_kernels, name), "CPU", allow_override=True)


_LIBRARY = torch.library.Library("randwire", "IMPL")


def measure_host(generator: NetworkGenerator, detection: bool, rounds: int) -> Host:
    """Time the step of a network, fused and node by node, in turn.

    Args:
        generator: what draws the network; it should have few channels.
        detection: see ``Case``.
        rounds: how often each is timed.
    """
    # With a thousand classes, the last layer's weights alone would take a tenth of the time.
    case = Case(2, 32, 32, detection, generator, classes=2)
    steps = {name: _step(name, case) for name in MODELS}
    steps["randwire"]()
    before = _Kernel.launches
    steps["randwire"]()
    launches = _Kernel.launches - before
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
    start = time.process_time()  # what other processes take does not count
    step()
    return time.process_time() - start
