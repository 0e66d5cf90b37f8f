"""One comparison: every model built, counted, timed and set against the roofline."""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from .counting import Count, count
from .models import MODELS, REFERENCE, STEPS, Case, build, forward
from .roofline import Ceilings, floor, measure_ceilings
from .timing import Clock, Ratio, Step, clock_of, paired, ratio

DEVICES = ("cpu", "cuda")
WARMUP = {"cpu": 1, "cuda": 3}  # on a GPU, kernels are chosen or compiled and the allocator fills
MEMORY_FORMATS = {
    "default": torch.preserve_format,
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How it is compared.

    Attributes:
        device: "cpu" or "cuda"; counts are the same on both.
        rounds: of the timing; 0 takes no times.
        amp: "float16" or "bfloat16" for automatic mixed precision; else float32.
        memory_format: of images and weights: "default" leaves what the models are built with.
        models: names of ``MODELS``, in the order of the table.
        steps: "inference" (eval mode, without gradients), "training" (forward, loss, backward,
            without the optimizer), or both.
    """

    device: str = "cpu"
    rounds: int = 5
    amp: str | None = None
    memory_format: str = "default"
    models: tuple[str, ...] = ("randwire", "randwire-plain", "resnet50", "resnext50")
    steps: tuple[str, ...] = STEPS

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"the rounds must be at least 0; got {self.rounds}")
        if not self.models or not self.steps:
            raise ValueError("there must be at least one model and one step")
        for name, value, known in (
            ("device", (self.device,), DEVICES),
            ("model", self.models, MODELS),
            ("step", self.steps, STEPS),
            ("memory format", (self.memory_format,), MEMORY_FORMATS),
            ("precision", (self.amp,) if self.amp else (), PRECISIONS),
        ):
            for given in value:
                if given not in known:
                    raise ValueError(f"unknown {name} {given!r}; known are {', '.join(known)}")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"a model is named twice: {', '.join(self.models)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no GPU that PyTorch can use: choose the device cpu")

    def __str__(self) -> str:
        precision = f"float32 and {self.amp}, mixed" if self.amp else "float32"
        return f"{precision}; memory format: {self.memory_format}"


@dataclass(frozen=True)
class Row:
    """A model's step.

    Attributes:
        model: a name of ``MODELS``.
        step: ``"inference"`` or ``"training"``.
        count: bytes, kernels and memory, counted.
        times: seconds of the whole batch, one for each round; empty where none were taken.
        versus: the time as a multiple of ResNet-50's, within each round.
        floor: the least seconds that the roofline allows for the whole batch.
        gpu_peak: bytes that the step held at most, by the allocator of the GPU.
    """

    model: str
    step: str
    count: Count
    times: tuple[float, ...] = ()
    versus: Ratio | None = None
    floor: float | None = None
    gpu_peak: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A comparison's outcome."""

    case: Case
    settings: Settings
    rows: tuple[Row, ...]
    ceilings: Ceilings | None = None
    machine: dict[str, str | int] = field(default_factory=dict)


def run(
    case: Case,
    settings: Settings,
    *,
    ceilings: bool = True,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Benchmark:
    """Compare models.

    Args:
        ceilings: measure the roofline too, where times are taken.
        clock: measures a step instead of the device's clock.
        progress: told what is being done.

    Raises:
        ValueError: for models that can't be built or steps that they can't run, such as batch norm
            over a single value.
    """
    device = torch.device(settings.device)
    amp = PRECISIONS.get(settings.amp or "")
    memory_format = MEMORY_FORMATS[settings.memory_format]
    models = {name: build(name, case).to(memory_format=memory_format) for name in settings.models}
    make_inputs = partial(case.make_inputs, memory_format=memory_format)
    counts = {}
    for step in settings.steps:
        for name, model in models.items():
            progress(f"counting {MODELS[name]}, {step}")
            counts[step, name] = count(
                model, make_inputs, partial(forward, amp=amp), step == "training"
            )
    if not settings.rounds:
        rows = tuple(Row(name, step, counts[step, name]) for step, name in counts)
        return Benchmark(case, settings, rows, machine=describe_machine(device))

    for model in models.values():
        model.to(device)
    images, labels = make_inputs(device)
    best = None
    if ceilings:
        progress("measuring the ceilings")
        best = measure_ceilings(device, amp or torch.float32)
    timed: list[Row] = []
    for step in settings.steps:
        progress(f"timing {step}, {settings.rounds} rounds")
        steps = {
            name: partial(_STEPS[step], model, images, labels, amp)
            for name, model in models.items()
        }
        for model in models.values():
            model.train(step == "training")
        times = paired(
            steps,
            clock or clock_of(device),
            settings.rounds,
            warmup=WARMUP[device.type],
            before=lambda name: models[name].zero_grad(set_to_none=True),
        )
        for name, model in models.items():
            timed.append(
                Row(
                    name,
                    step,
                    counts[step, name],
                    tuple(times[name]),
                    ratio(times[name], times[REFERENCE]) if REFERENCE in times else None,
                    None if best is None else floor(counts[step, name], best),
                    gpu_peak(steps[name], model, (images, labels))
                    if device.type == "cuda"
                    else None,
                )
            )
    return Benchmark(case, settings, tuple(timed), best, describe_machine(device))


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: torch.dtype | None
) -> None:
    """Forward, loss and backward, of a model in training mode."""
    loss = forward(model, images, labels, amp)
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def infer(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: torch.dtype | None
) -> None:
    """Forward without gradients, of a model in eval mode."""
    with torch.no_grad():
        forward(model, images, labels, amp)


_STEPS = {"training": train, "inference": infer}


def gpu_peak(step: Step, model: nn.Module, inputs: Iterable[torch.Tensor]) -> int:
    """Bytes that a step holds at most, its model and inputs included and all others left out."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    own = sum(t.untyped_storage().nbytes() for t in (*_tensors(model), *inputs))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + own


def _tensors(model: nn.Module) -> Sequence[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What a figure depends on beside the case: device, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count() or 1,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), platform.processor() or platform.machine())
