"""A comparison of models: each is built, counted, timed and compared with the roofline."""

import itertools
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..modeling import RandWireStage
from ..modeling.stage_graphs import LATER_CALLS
from .counting import Count, count
from .models import COMPILED, MODELS, REFERENCE, STEPS, Case, build, forward
from .roofline import Ceilings, floor, measure_ceilings
from .timing import Clock, Ratio, Step, clock_of, host_clock, paired, ratio

DEVICES = ("cpu", "cuda")
# Steps before the timing: the first ones on a GPU choose or compile kernels and fill the allocator.
WARMUP = {"cpu": 1, "cuda": 3}
MEMORY_FORMATS = {
    "default": torch.preserve_format,
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``, for the times; counts are the same on both.
        rounds: how often each step is timed; with 0, nothing is timed.
        amp: ``"float16"`` or ``"bfloat16"`` for automatic mixed precision, None for float32.
        memory_format: a name of ``MEMORY_FORMATS``, for images and weights; ``"default"`` keeps
            that of the models as they are built.
        models: names of ``MODELS``, in the order of the table.
        steps: ``"inference"`` (forward in eval mode, without gradients), ``"training"`` (forward,
            loss and backward, without the optimizer), or both.

    Raises:
        ValueError: a name occurs twice, or the device is "cuda" and there is no GPU.
    """

    device: str = "cpu"
    rounds: int = 5
    amp: str | None = None
    memory_format: str = "default"
    models: tuple[str, ...] = ("randwire", "randwire-plain", "resnet50", "resnext50")
    steps: tuple[str, ...] = STEPS

    def __post_init__(self) -> None:
        for name, names in (("model", self.models), ("step", self.steps)):
            if len(set(names)) < len(names):
                raise ValueError(f"a {name} is named twice: {', '.join(names)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no GPU that PyTorch can use: choose the device cpu")

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.amp] if self.amp else None

    def __str__(self) -> str:
        precision = f"float32 and {self.amp}, mixed" if self.amp else "float32"
        return f"{precision}; memory format: {self.memory_format}"


@dataclass(frozen=True)
class Row:
    """The cost of one step of a model.

    Attributes:
        model: a name of ``MODELS``.
        step: ``"inference"`` or ``"training"``.
        count: the bytes, launches and memory that were counted.
        times: the seconds for the whole batch, one for each round; empty if nothing was timed.
        versus: the time as a multiple of ResNet-50's in the same round.
        floor: the least seconds that the roofline allows for the whole batch.
        gpu_peak: the peak memory of the step in bytes, counted by the GPU's allocator.
        host: on a GPU, the seconds until the host had launched the whole step, in each round: if
            they are not less than ``times``, the GPU waits for the host.
        gpu_kernels: the number of kernels on the GPU, counted by the profiler.
    """

    model: str
    step: str
    count: Count
    times: tuple[float, ...] = ()
    versus: Ratio | None = None
    floor: float | None = None
    gpu_peak: int | None = None
    host: tuple[float, ...] = ()
    gpu_kernels: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """The result of a comparison: a row for each step and model, and the machine's description."""

    case: Case
    settings: Settings
    rows: tuple[Row, ...]
    ceilings: Ceilings | None
    machine: dict[str, str | int]


def run(
    case: Case,
    settings: Settings,
    *,
    ceilings: bool = True,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Benchmark:
    """Build, count and time the models of ``settings``.

    Args:
        case: the work of a step, and the RandWire.
        settings: the models, steps and device.
        ceilings: measure the roofline, too, if steps are timed.
        clock: a function that returns the seconds of a step; by default the device's own clock.
        progress: called with a line of text before each part of the work.

    Raises:
        ValueError: a model can't be built, or can't run a step, such as batch norm over a single
            value.
    """
    device = torch.device(settings.device)
    memory_format = MEMORY_FORMATS[settings.memory_format]
    models = {name: build(name, case).to(memory_format=memory_format) for name in settings.models}
    make_inputs = partial(case.make_inputs, memory_format=memory_format)
    step_forward = partial(forward, amp=settings.amp_dtype)
    rows = []
    for step in settings.steps:
        for name, model in models.items():
            progress(f"counting {MODELS[name]}, {step}")
            counted = count(model, make_inputs, step_forward, step == "training")
            rows.append(Row(name, step, counted))
    best, machine = None, describe_machine(device)
    if settings.rounds:
        for name, model in models.items():
            model.to(device)
            if name in COMPILED:
                models[name] = torch.compile(model)  # type: ignore[assignment]
        inputs = [make_inputs(device, narrower=i) for i in range(case.sizes)]
        if ceilings:
            progress("measuring the ceilings")
            best = measure_ceilings(device, settings.amp_dtype or torch.float32)
            rows = [replace(row, floor=floor(row.count, best)) for row in rows]
        timed: list[Row] = []
        with cudnn_benchmark(case, settings):
            for step in settings.steps:
                progress(f"timing {step}, {settings.rounds} rounds")
                of_step = [row for row in rows if row.step == step]
                timed += _timed(of_step, models, inputs, settings, clock or clock_of(device))
            rows, machine = timed, describe_machine(device)
    return Benchmark(case, settings, tuple(rows), best, machine)


@contextmanager
def cudnn_benchmark(case: Case, settings: Settings) -> Iterator[None]:
    """Let cuDNN choose its algorithms by timing them, if all images on a GPU have one size.

    The trainings of configs/imagenet do this, too (CUDNN_BENCHMARK). With a detector's images of
    many sizes, cuDNN would choose again for each size.
    """
    before = torch.backends.cudnn.benchmark
    if settings.device == "cuda" and case.sizes == 1:
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _timed(
    rows: Sequence[Row],
    models: Mapping[str, nn.Module],
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    settings: Settings,
    clock: Clock,
) -> list[Row]:
    """Add the times to the rows of one step and, on a GPU, the allocator's peak memory."""
    training = rows[0].step == "training"
    for model in models.values():
        model.train(training)
    steps = {
        name: _in_turn(train if training else infer, model, inputs, settings.amp_dtype)
        for name, model in models.items()
    }
    warmup = WARMUP[settings.device]
    if len(inputs) > 1 and settings.device == "cuda":
        warmup = (warmup + LATER_CALLS) * len(inputs)  # until each size has its CUDA graph

    def clear(name: str) -> None:
        models[name].zero_grad(set_to_none=True)

    times = paired(steps, clock, settings.rounds, warmup=warmup, before=clear)
    timed = []
    for row in rows:
        own = times[row.model]
        versus = ratio(own, times[REFERENCE]) if REFERENCE in times else None
        timed.append(replace(row, times=tuple(own), versus=versus))
    if settings.device == "cuda":
        host = paired(steps, host_clock, settings.rounds, warmup=0, before=clear)
        timed = [
            replace(
                row,
                gpu_peak=gpu_peak(steps[row.model], models[row.model], inputs[0]),
                host=tuple(host[row.model]),
                gpu_kernels=gpu_kernels(steps[row.model]),
            )
            for row in timed
        ]
    return timed


def _in_turn(
    run_step: Callable[..., None],
    model: nn.Module,
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    amp: torch.dtype | None,
) -> Step:
    turns = itertools.cycle(inputs)
    return lambda: run_step(model, *next(turns), amp)


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: torch.dtype | None
) -> None:
    """Run forward, loss and backward of a model in training mode."""
    loss = forward(model, images, labels, amp)
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def infer(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: torch.dtype | None
) -> None:
    """Run forward of a model in eval mode, without gradients."""
    with torch.no_grad():
        forward(model, images, labels, amp)


def gpu_peak(step: Step, model: nn.Module, inputs: Iterable[torch.Tensor]) -> int:
    """The peak memory of a step in bytes, with its own model and inputs, but without other models'.

    CUDA graphs are disabled: the allocator does not see the memory in use during a replay.
    """
    stages = [s for s in model.modules() if isinstance(s, RandWireStage) and s.cuda_graphs]
    for stage in stages:
        stage.cuda_graphs = False
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    own = sum(
        t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers(), *inputs)
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    for stage in stages:
        stage.cuda_graphs = True
    return torch.cuda.max_memory_allocated() - before + own


def gpu_kernels(step: Step) -> int:
    """The number of kernels, copies and fills that a GPU runs in a step."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ()
    )


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Describe what times depend on, except the case: device, threads, PyTorch's version, and on a
    GPU whether cuDNN chooses its algorithms by timing them."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count() or 1,
        "torch": torch.__version__,
        **({"cudnn_benchmark": torch.backends.cudnn.benchmark} if on_gpu else {}),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), platform.processor() or platform.machine())
