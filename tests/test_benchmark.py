"""The benchmark: counts that can be done by hand, pairing under a fake clock, the command line."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_tool
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from randwire_d2 import NetworkGenerator
from randwire_d2.benchmark import (
    AXES,
    Case,
    Settings,
    comparison,
    grow,
    markdown,
    plot_growth,
    run,
    to_json,
    to_markdown,
)
from randwire_d2.benchmark.counting import Count, Operation, count
from randwire_d2.benchmark.models import build, forward
from randwire_d2.benchmark.roofline import Ceilings, floor, measure_ceilings
from randwire_d2.benchmark.timing import paired, ratio
from randwire_d2.cli import benchmark as tool
from randwire_d2.cli import measure_host
from randwire_d2.modeling import RandWireStage

TINY = Case(
    batch=2, height=32, width=64, generator=NetworkGenerator("small", channels=4, num_nodes=5)
)
FLOAT = 4  # bytes


class Apply(nn.Module):
    """A function as a module, with modules that it uses."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*self.inner, *inputs)


def counted(
    function: Callable[..., Tensor],
    *modules: nn.Module,
    inputs: tuple[tuple[int, ...], ...] = ((2, 3),),
    training: bool = False,
) -> Count:
    """The count of a function of tensors of these shapes; in training its result is the loss."""
    return count(
        Apply(function, *modules),
        lambda: [torch.empty(shape) for shape in inputs],
        lambda model, *tensors: model(*tensors),
        training,
    )


def operations(result: Count) -> list[tuple[str, int]]:
    return [(operation.name, operation.traffic) for operation in result.operations]


# -------------------------------------------------------------------------------------------------
# Counting
# -------------------------------------------------------------------------------------------------


def test_convolution() -> None:
    """Else a convolution's operands, or its groups, are counted wrong, forward or backward."""
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    images, results, weights = (2 * 4 * 5 * 5, 2 * 6 * 5 * 5, 6 * 2 * 9)
    result = counted(lambda conv, x: conv(x).sum(), conv, inputs=((2, 4, 5, 5),), training=True)
    multiply_adds = results * 2 * 9
    assert [tuple(operation) for operation in result.operations] == [
        ("aten.convolution.default", FLOAT * (images + weights + results), 2 * multiply_adds, 1),
        ("aten.sum.default", FLOAT * (results + 1), 0, 1),
        ("aten.ones_like.default", FLOAT, 0, 1),  # the gradient of the loss; nothing is read
        # The gradient of the sum is one number, broadcast: read once. The images need none.
        (
            "aten.convolution_backward.default",
            FLOAT * (1 + images + weights + weights),
            2 * multiply_adds,
            1,
        ),
    ]
    assert result.saved == FLOAT * images  # the weights are there anyway
    # Images, weights, results, loss, at the end of the forward pass.
    assert result.peak == FLOAT * (images + weights + results + 1)


def test_addmm() -> None:
    """Else a fully connected layer's bias or its transposed view is counted wrong."""
    result = counted(lambda linear, x: linear(x), nn.Linear(3, 5))
    traffic = FLOAT * (5 + 2 * 3 + 3 * 5 + 2 * 5)
    assert result.operations == (Operation("aten.addmm.default", traffic, 2 * 2 * 3 * 5),)
    assert (result.traffic, result.launches, result.flops) == (traffic, 1, 60)
    assert result.saved == 0
    assert result.peak == FLOAT * (2 * 3 + 3 * 5 + 5 + 2 * 5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.relu_(), [("aten.relu_.default", 2 * 24)]),
        (lambda x: x.add_(x.relu()), [("aten.relu.default", 2 * 24), ("aten.add_.Tensor", 3 * 24)]),
        (lambda x: x.zero_(), [("aten.zero_.default", 24)]),
        (lambda x: x.copy_(x.abs()), [("aten.abs.default", 48), ("aten.copy_.default", 48)]),
        (lambda x: torch.exp(x, out=x.new_empty(2, 3)), [("aten.exp.out", 48)]),
        (lambda x: torch._foreach_add_([x, x.clone()], 1)[0],
         [("aten.clone.default", 48), ("aten._foreach_add_.Scalar", 96)]),
        (lambda x: torch.zeros_like(x), [("aten.zeros_like.default", 24)]),
        (lambda x: torch.empty_like(x), []),
        (lambda x: x.t().reshape(6, 1)[1:].detach().unsqueeze_(0), [("aten.clone.default", 48)]),
        (lambda x: x.view(6).expand(4, 6), []),
        (lambda x: x[:1].expand(5, 3).exp(), [("aten.exp.default", 12 + 60)]),
        (lambda x: torch.cat([x, x[:1]]), [("aten.cat.default", 24 + 12 + 36)]),
        (lambda x: x.double(), [("aten._to_copy.default", 24 + 48)]),
    ],
)  # fmt: skip
def test_traffic_of_one_operation(
    function: Callable[[Tensor], Tensor], expected: list[tuple[str, int]]
) -> None:
    """Else an in-place operation, a view, an allocation, a broadcast or a list is misjudged."""
    assert operations(counted(function)) == expected


@torch.library.custom_op("benchmark_test::mix", mutates_args={"total"})
def mix(inputs: list[Tensor], weight: Tensor, total: Tensor) -> Tensor:
    raise AssertionError("nothing may be computed")


@mix.register_fake
def _(inputs: list[Tensor], weight: Tensor, total: Tensor) -> Tensor:
    return (inputs[0] * 2).new_empty(7)  # nothing of this is the operator's traffic


def test_custom_operator() -> None:
    """Else a fused kernel's inside is counted, or its arguments, results and changes are not."""
    result = counted(lambda x, y: mix([x, x[:1]], y, y), inputs=((2, 3), (5,)))
    # The list, the weight, what is read and written, the result.
    traffic = FLOAT * (6 + 3 + 5 + 2 * 5 + 7)
    assert operations(result) == [("benchmark_test.mix.default", traffic)]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        square = x * x
        ctx.save_for_backward(x, square[1:])
        return square * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        x, _ = ctx.saved_tensors
        return grad * 3 * x * x


def test_autograd_function() -> None:
    """Else what a function of our own saves is missed, or counted by what of it is seen."""
    linear = nn.Linear(3, 5, bias=False)
    result = counted(lambda linear, x: Cube.apply(linear(x)).sum(), linear, training=True)
    # Input of the linear layer, its result, and the whole storage of the square.
    assert result.saved == FLOAT * (6 + 10 + 10)
    names = Counter(operation.name for operation in result.operations)
    assert names["aten.mul.Tensor"] == 5


def test_saved_once() -> None:
    """Else a tensor that two operations keep is counted twice, or one recomputed is counted."""
    layers = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    result = counted(
        lambda a, b, x: (a(x) + b(x)).square().sum(), *layers, inputs=((4, 3),), training=True
    )
    assert result.saved == FLOAT * (12 + 12)  # x, and the square's argument

    def checkpointed(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(lambda x: b(a(x)).square(), x, use_reentrant=False)
        return y.sum()

    assert counted(checkpointed, *layers, inputs=((4, 3),), training=True).saved == FLOAT * 12


def test_peak_follows_lifetimes() -> None:
    """Else memory that was freed still counts, or memory that is held does not."""

    def chain(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x.exp()
        return x

    assert counted(chain).peak == FLOAT * 3 * 6  # the input, which the caller holds, and two more
    assert counted(lambda x: torch.stack([x.exp() for _ in range(10)])).peak == FLOAT * 21 * 6


def test_running_nothing_and_leaving_the_model() -> None:
    """Else counting computes, needs the memory it counts, or changes a model or random state."""
    model = build("randwire", TINY).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    huge = replace(TINY, batch=1 << 20, height=512, width=512)  # 3 TB of images
    result = count(model, huge.make_inputs, forward)
    assert result.peak > 3e12
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in model.parameters())


def test_a_network_on_another_device_counts_as_much() -> None:
    """Else a stage's edges, which are no buffers, are real where the rest is fake: what is copied
    or saved of them is counted as well."""
    model = build("randwire", TINY)
    here = count(model, TINY.make_inputs, forward)
    for stage in (m for m in model.modules() if isinstance(m, RandWireStage)):
        stage.edges = tuple(edges.to("meta") for edges in stage.edges)
    assert count(model, TINY.make_inputs, forward) == here


@pytest.mark.parametrize(
    ("name", "traffic", "launches", "saved"),
    [("resnet50", 785, 408, 86), ("resnext50", 982, 408, 112), ("randwire-plain", 2660, 2475, 242)],
)
def test_known_classifiers(name: str, traffic: int, launches: int, saved: int) -> None:
    """Else the figures are no longer those that the project's goals were set by (MB per image)."""
    case = Case(batch=64)
    result = count(build(name, case), case.make_inputs, forward)
    assert round(result.traffic / 64 / 1e6) == traffic
    assert round(result.saved / 64 / 1e6) == saved
    assert result.launches == launches


def test_known_detector_backbones() -> None:
    """The same for detection: else frozen layers are counted as if they were trained (GB)."""
    case = Case(batch=1, height=800, width=1344, detection=True)
    msra = count(build("resnet50-msra", case), case.make_inputs, forward)
    assert (round(msra.traffic / 1e9, 1), round(msra.saved / 1e9, 2)) == (12.5, 0.47)
    # With the stride in the 3×3 convolution, the 1×1 before it works at the higher resolution.
    other = count(build("resnet50", case), case.make_inputs, forward)
    assert (round(other.traffic / 1e9, 1), round(other.saved / 1e9, 2)) == (13.2, 0.51)
    assert other.launches == msra.launches


@pytest.mark.parametrize(
    ("name", "row"), [("randwire", "RandWire"), ("randwire-recompute", "RandWire, `RECOMPUTE`")]
)
def test_counts_of_a_detectors_backbone_are_in_experiments(name: str, row: str) -> None:
    """Wrong: EXPERIMENTS.md has counts that the command above its table does not print."""
    case = Case(batch=1, height=800, width=1344, detection=True)
    counted = count(build(name, case), case.make_inputs, forward)
    figures = f"{counted.traffic / 1e9:.1f} | {counted.saved / 1e9:.2f} | {counted.launches}"
    assert f"| {row} | {figures} |" in (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")


def test_multiply_adds() -> None:
    """Else the roofline's floors rest on wrong work: ResNet-50 has 4.09 billion multiply-adds."""
    case = Case(batch=1)
    model = build("resnet50", case)
    inference = count(model, case.make_inputs, forward, training=False)
    assert round(inference.flops / 2e9, 2) == 4.09
    # Forward, and each of two gradients; but the images need none.
    stem = 64 * 112 * 112 * 3 * 49
    assert count(model, case.make_inputs, forward).flops == 3 * inference.flops - 2 * stem


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_mixed_precision_moves_fewer_bytes(memory_format: str) -> None:
    """Else --amp or --memory-format never reaches the models that are counted."""
    settings = Settings(
        rounds=0, models=("resnet50",), steps=("training",), memory_format=memory_format
    )
    full, mixed = (
        run(replace(TINY, height=128, width=128, batch=8), s).rows[-1].count
        for s in (settings, replace(settings, amp="bfloat16"))
    )
    assert mixed.saved < 0.75 * full.saved  # not a half: the weights' casts are saved too
    assert mixed.traffic < full.traffic


# -------------------------------------------------------------------------------------------------
# Times and the roofline
# -------------------------------------------------------------------------------------------------


class FakeClock:
    """A machine on which every step takes its own time, and everything slows down steadily."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.slowness = itertools.count(1)

    def __call__(self, step: Callable[[], object]) -> float:
        self.ran.append(str(step()))
        return {"fast": 1.0, "slow": 3.0}[self.ran[-1]] * next(self.slowness)


def test_pairing() -> None:
    """Else the order is always the same, so that the later model pays for a machine that slows."""
    clock = FakeClock()
    called: list[str] = []
    prepared: list[str] = []
    steps = {name: lambda name=name: called.append(name) or name for name in ("fast", "slow")}
    times = paired(steps, clock, 4, warmup=2, before=prepared.append)
    assert called[:4] == ["fast", "fast", "slow", "slow"]
    assert clock.ran == ["fast", "slow", "slow", "fast"] * 2
    assert prepared == called
    assert times == {"fast": [1.0, 4.0, 5.0, 8.0], "slow": [6.0, 9.0, 18.0, 21.0]}
    # 6, 2.25, 3.6, 2.625: the true ratio is 3.
    assert ratio(times["slow"], times["fast"]) == pytest.approx((3.1125, 2.53125, 4.2))


def test_ratio_of_one_round() -> None:
    """Else one round, which has no quartiles, ends in a traceback."""
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_floor() -> None:
    """Else an operation is held to the wrong ceiling, or work and bytes are added up."""
    count = Count((Operation("a", traffic=100, flops=10), Operation("b", 10, 400)), 0, 0)
    assert floor(count, Ceilings(flops=100, bandwidth=50)) == 100 / 50 + 400 / 100


def test_ceilings() -> None:
    """Else a ceiling is off by orders of magnitude, as with a wrong unit."""
    before = torch.get_num_threads()
    ceilings = measure_ceilings(torch.device("cpu"), seconds=0.01)
    assert 1e8 < ceilings.flops < 1e14
    assert 1e8 < ceilings.bandwidth < 1e13
    assert torch.get_num_threads() == before


def test_run_with_a_fake_clock() -> None:
    """Else a row's ratio is not to ResNet-50's time of the same round, or steps are mixed up."""
    seconds = itertools.cycle([1.0, 2.0, 4.0, 2.0])  # alternating: the models' times are 1 2, 2 4

    def clock(step: Callable[[], object]) -> float:
        step()
        return next(seconds)

    settings = Settings(rounds=2, models=("randwire", "resnet50"))
    result = run(replace(TINY, height=64), settings, ceilings=False, clock=clock)
    assert [(row.model, row.step) for row in result.rows] == [
        (model, step) for step in ("inference", "training") for model in settings.models
    ]
    for randwire, resnet in zip(result.rows[::2], result.rows[1::2]):
        assert randwire.times == (1.0, 2.0)
        assert resnet.times == (2.0, 4.0)
        assert randwire.versus is not None
        assert resnet.versus is not None
        assert (randwire.versus.median, resnet.versus.median) == (0.5, 1.0)
        assert randwire.floor is None
        assert randwire.gpu_peak is None
    inference, training = result.rows[::2]
    assert inference.count.saved == 0 < training.count.saved
    assert inference.count.launches < training.count.launches


def test_sizes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a detector's times are of one size, or models are compared at different ones."""
    timed: list[tuple[str, int]] = []

    def record(model: nn.Module, images: Tensor, *_: Any, **__: Any) -> Tensor:
        if not isinstance(images, FakeTensor):
            timed.append((type(model).__name__, images.shape[-1]))
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(comparison, "forward", record)
    settings = Settings(rounds=3, models=("randwire", "resnet50"), steps=("training",))
    case = replace(TINY, width=96, sizes=2)
    assert str(case).endswith("×96 and 1 narrower sizes in turn")
    run(case, settings, ceilings=False)
    turns = {name: [size for own, size in timed if own == name] for name, _ in timed}
    assert [*turns.values()] == [[96, 64, 96, 64]] * 2


@pytest.mark.parametrize(
    ("device", "sizes", "chosen"), [("cuda", 1, True), ("cuda", 2, False), ("cpu", 1, False)]
)
def test_cudnn_chooses_as_in_a_training(
    monkeypatch: pytest.MonkeyPatch, device: str, sizes: int, chosen: bool
) -> None:
    """Else ResNet-50's times on a GPU are of convolutions that no training would run, nobody learns
    which they were, or other code of the process gets them, too."""
    seen: list[bool] = []

    def time(*_: Any) -> list[comparison.Row]:
        seen.append(torch.backends.cudnn.benchmark)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return []

    # As far as a machine without a GPU goes.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(Case, "make_inputs", lambda *_, **__: ())
    monkeypatch.setattr(comparison, "clock_of", lambda device: None)
    monkeypatch.setattr(comparison, "count", lambda *_: None)
    monkeypatch.setattr(comparison, "_timed", time)
    for table in ("_counts", "_times"):  # tabulate 0.9 takes none without rows
        monkeypatch.setattr(markdown, table, lambda *_: "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    case = replace(TINY, sizes=sizes, width=96)
    settings = Settings(device, models=("resnet50",), steps=("training",))
    result = run(case, settings, ceilings=False)
    assert result.machine.get("cudnn_benchmark") == (chosen if device == "cuda" else None)
    assert (f"cudnn.benchmark {chosen}" in to_markdown(result, "")) == (device == "cuda")
    with pytest.raises(KeyboardInterrupt):
        run(case, settings, ceilings=False)
    assert seen == [chosen] * 2 and not torch.backends.cudnn.benchmark


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_run_on_cuda() -> None:
    """Else the same command does not give a GPU's times and memory, or changes the counts."""
    case, models = replace(TINY, height=64), ("randwire", "resnet50")
    on_gpu = run(case, Settings(device="cuda", rounds=2, models=models))
    counted = run(case, Settings(rounds=0, models=models))
    assert [row.count for row in on_gpu.rows] == [row.count for row in counted.rows]
    for row in on_gpu.rows:
        assert len(row.times) == 2
        assert row.gpu_peak is not None
        # Blocks of the allocator, workspaces of cuDNN.
        assert 0.8 * row.count.peak < row.gpu_peak < 3 * row.count.peak + 5e8
    assert to_markdown(on_gpu, "command").count("measured peak (MB)") == 1


# -------------------------------------------------------------------------------------------------
# Output
# -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_growth_measures_what_it_draws() -> None:
    """Else a line goes through points that nobody measured, or a point has another's figures."""
    settings = Settings(rounds=1, models=("randwire", "randwire-plain"))
    values = {"batch": (2, 4), "size": (32, 64), "nodes": (5, 7), "channels": (4, 8)}
    ran = itertools.count(1)
    clock: Callable[[Callable[[], object]], float] = lambda step: float(next(ran))  # noqa: E731
    points = grow(TINY, settings, values, clock=clock)
    assert [(p.axis, p.value, p.model) for p in points] == [
        (axis, value, model)
        for axis in values
        for value in values[axis]
        for model in settings.models
    ]
    assert next(ran) == 11  # five cases of two models: the case itself, once, and four others
    doubled = count(build("randwire", TINY), replace(TINY, batch=4).make_inputs, forward)
    grown = next(p for p in points if (p.axis, p.value, p.model) == ("batch", 4, "randwire"))
    assert (grown.saved, grown.peak) == (doubled.saved, doubled.peak)
    figure = plot_growth(points)
    axes = figure.get_axes()
    assert len(axes) == 2 * len(AXES)
    drawn = [[list(line.get_xdata()) for line in ax.get_lines()] for ax in axes]
    assert drawn[:4] == [[list(values[axis])] * 2 for axis in values]  # time: a line per model
    assert drawn[4:] == [[list(values[axis])] * 4 for axis in values]  # peak and saved
    untimed = plot_growth([replace(p, time=None) for p in points])
    assert not any(ax.get_lines() for ax in untimed.get_axes()[:4])


def test_a_model_of_detectors_alone() -> None:
    """Else it ends in a traceback."""
    with pytest.raises(ValueError, match="no model 'resnet50-msra' for classification"):
        build("resnet50-msra", TINY)


SMALL = ["--batch", "2", "--size", "64", "--regime", "small", "--channels", "4", "--nodes", "5"]


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the one command no longer writes the tables, the JSON and the figure."""
    outputs = tmp_path / "new" / "benchmark.json", tmp_path / "new" / "growth.svg"
    growth = ["--growth-batch", "2", "--growth-size", "--growth-nodes"]
    growth += ["--growth-channels", "4", "6"]
    argv = [*SMALL, "--rounds", "2", "--models", "randwire", "resnet50"]
    tool.main([*argv, "--json", str(outputs[0]), "--growth", str(outputs[1]), *growth])
    table = capsys.readouterr().out
    assert table.startswith(f"`python tools/benchmark.py {' '.join(argv)} ")
    for text in ("C=4, N=5, WS(4, 0.75)", "batch 2, 64×64", "float32", "GFLOP/s", "1.00 (1.00 … 1"):
        assert text in table
    assert "1 threads on" in table
    assert torch.__version__ in table
    assert len([line for line in table.splitlines() if line.startswith("| ResNet-50")]) == 4

    written = json.loads(outputs[0].read_text())
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["case"]["generator"]["channels"] == 4
    assert [row["model"] for row in written["rows"]] == ["randwire", "resnet50"] * 2
    assert all(len(row["times"]) == 2 and row["floor"] > 0 for row in written["rows"])
    assert {(p["axis"], p["value"]) for p in written["growth"]} == {
        ("batch", 2),
        ("channels", 4),
        ("channels", 6),
    }
    assert outputs[1].read_text().startswith("<?xml")
    assert sorted(path.name for path in outputs[0].parent.iterdir()) == [
        "benchmark.json",
        "growth.svg",
    ]


def test_counts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Else --no-time takes times all the same, or the detection case can't be counted."""
    tool.main(["--detection", "--no-time", "--steps", "training", *SMALL[4:]])
    out, err = capsys.readouterr()
    assert "FrozenBN, FREEZE_AT 2" in out
    assert "batch 1, 800×1344" in out
    assert "no times were taken" in out
    assert "timing" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "1", "2", "3"], "error: --size takes one or two numbers; got 3"),
        (["--sizes", "8"], "error: 8 sizes, each 32 pixels narrower, need images"),
        (["--sizes", "2", "--growth", "a.png"], "error: --sizes goes with neither --runtimes nor"),
        (
            ["--nodes", "4", "--no-time"],
            "with half of num_nodes 4 (§3.2): WS needs an even K",
        ),
        (["--rounds", "0"], "error: --rounds must be at least 1, or use --no-time; got 0"),
        (
            ["--runtimes", "onnx", "--amp", "bfloat16"],
            "error: --runtimes does not go with --amp: it compares the inference",
        ),
        (["--runtimes", "plain", "--steps", "training"], "--runtimes does not go with --steps"),
        (["--growth", "growth.jpg"], "error: --growth must end in one of .png, .svg, .pdf"),
        (["--models", "resnet50", "resnet50"], "error: a model is named twice"),
        (["--steps", "training", "training"], "error: a step is named twice"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a mistake ends in a traceback, or after minutes of measuring."""
    with pytest.raises(SystemExit) as stop:
        tool.main(argv)
    told = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a GPU is asked for where there is none, and the error is CUDA's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU that PyTorch can use"):
        Settings(device="cuda")


def test_report_without_reference() -> None:
    """Else a comparison without ResNet-50, or without times, can't be printed."""
    settings = Settings(rounds=1, models=("randwire",), steps=("inference",))
    result = run(TINY, settings, ceilings=False, clock=lambda step: 1.5)
    table = to_markdown(result, "command")
    assert "750.00" in table  # milliseconds per image
    assert json.loads(to_json(result, "command"))["rows"][0]["versus_resnet50"] is None


def test_loss_of_a_backbone() -> None:
    """Else the loss of a detection backbone leaves features out."""
    features = {"a": torch.ones(2, 3), "b": torch.full((4,), 2.0)}
    model = Apply(lambda x: features)
    assert forward(model.train(), torch.empty(1), torch.empty(1)) == torch.tensor(14.0)
    classifier = Apply(lambda x: x).train()
    logits, labels = torch.randn(2, 5), torch.tensor([1, 4])
    assert torch.equal(forward(classifier, logits, labels), F.cross_entropy(logits, labels))


# -------------------------------------------------------------------------------------------------
# The host
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detection", [False, True])
def test_the_host_launches_what_is_counted(tmp_path: Path, detection: bool) -> None:
    """Else the counts, or the measured step, are of other kernels than a GPU's."""
    pytest.importorskip("triton", reason="Triton, which comes with torch for CUDA, is missing")
    arguments = ["--rounds", 1, *(["--detection"] if detection else [])]
    found = run_tool("measure_host.py", *arguments, log=tmp_path / "log").splitlines()[-3:]
    case = Case(2, 32, 32, detection, NetworkGenerator(channels=measure_host.CHANNELS))
    counted = count(build("randwire", case), case.make_inputs, forward)
    assert counted.launches == (458 if detection else 656), "not those of C=109"
    own = sum(o.launches for o in counted.operations if o.name.startswith("randwire."))
    assert [line.split("|")[-2].strip() for line in found] == ["0", str(own), "0"]
