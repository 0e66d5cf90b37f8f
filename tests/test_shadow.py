"""A stage run both ways in the middle of a training, and what a training makes of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import draw_spec, images, in_two_processes, raises_one_line
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from randwire_d2 import NetworkGenerator, RandWire
from randwire_d2.engine.hooks import shadow_steps
from randwire_d2.engine.hooks.shadow_steps import ShadowSteps
from randwire_d2.modeling import RandWireStage, fused_stage, fusible
from randwire_d2.modeling import shadow as shadow_module
from randwire_d2.modeling.shadow import LIMITS, Shadow, shadow
from randwire_d2.modeling.shares import Shares
from randwire_d2.modeling.weights import MULTIPLES, whole_image, zeros_of
from randwire_d2.runs import RunFolder

EVERYTHING = {"output", "parameters' gradients", "input's gradient"}


def stage(norm: str = "BN", fused: Any = "auto") -> RandWireStage:
    torch.manual_seed(0)
    spec = draw_spec("small", "WS").stages[0]
    return RandWireStage(spec, "sep_conv3x3", norm, fused=fused).train()


def x(device: str | torch.device = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, 12, 12, generator=generator).to(device).requires_grad_()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_both_ways_agree_and_the_stage_stays_as_it_is(norm: str, device: torch.device) -> None:
    """Else a training is not the same with a shadow step as without: statistics moved on, random
    numbers were drawn, a gradient was left in a parameter, a mode was changed."""
    one = stage(norm).to(device)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    random = torch.get_rng_state()
    found = shadow(one, x(device), rounds=1)
    assert found.errors.keys() == EVERYTHING and max(found.errors.values()) < 1e-5
    assert found.seconds.keys() == {True, False}
    assert all(fused > 0 and nodes > 0 for fused, nodes in found.seconds.values())
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert all(p.grad is None for p in one.parameters()) and one.nodes[0].training
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert shadow(one, x(device)).errors.keys() == {"output"}


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_compared_in_float32(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a training on a GPU, whose convolutions use TF32 by default, is stopped by what TF32
    loses; or the rest of it is slower."""
    cudnn: Any = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", allowed)
    seen, run = [], RandWireStage.run_nodes

    def look(one: RandWireStage, x: Tensor) -> Tensor:
        seen.append(cudnn.conv.fp32_precision)
        return run(one, x)

    monkeypatch.setattr(shadow_module, "RUNS", (look, look))
    monkeypatch.setattr(shadow_module, "TIMED", (look, look))
    before = cudnn.conv.fp32_precision
    shadow(stage().eval(), x(), rounds=1)
    assert seen[:2] == ["ieee", "ieee"] and set(seen[2:]) == {before}
    assert cudnn.allow_tf32 is allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_stays_below_the_limit(dtype: torch.dtype, device: torch.device) -> None:
    """Else mixed precision stops a training that is right."""
    with torch.autocast(device.type, dtype):
        found = shadow(stage().to(device), x(device))
    assert found.limit == LIMITS[dtype] and 1e-4 < max(found.errors.values()) < found.limit / 2


def test_gradients_of_many_pixels_are_in_the_range_of_float16() -> None:
    """Wrong: gradients of weights are infinite in the node-by-node run of large images, so they are
    not compared, and there is no CUDA graph."""
    spec = NetworkGenerator("small", channels=8, num_nodes=8)(seed=1).stages[0]
    trained = RandWireStage(spec, "sep_conv3x3", "FrozenBN").half()
    for node in trained.nodes:
        node.norm.weight.fill_(4)
    found = shadow(trained, torch.randn(2, trained.in_channels, 256, 256).half())
    assert set(found.errors) == {"output", "parameters' gradients"}


def test_the_rounding_of_channels_last_on_a_cpu_is_no_fault_of_the_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a training of many large images is stopped, as if the kernels were wrong, though it
    is PyTorch's batch norm that adds up all pixels in float32."""
    monkeypatch.setitem(LIMITS, torch.float32, 1e-4)  # with more pixels the usual limit is passed
    spec = NetworkGenerator("small", channels=16, num_nodes=8)(seed=1).stages[1]
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(1)  # else each adds up a part of the pixels
    try:
        one = RandWireStage(spec, "sep_conv3x3", "BN").train()
        found = shadow(one, torch.randn(32, 16, 72, 120, generator=generator))
    finally:
        torch.set_num_threads(threads)
    found.check()


def broken(change: Callable[[Tensor], Tensor]) -> Any:
    """``run_fused`` with another result."""
    original = fused_stage.run_fused
    return mock.patch.object(
        fused_stage, "run_fused", lambda *arguments: change(original(*arguments))
    )


def test_a_wrong_result_is_seen() -> None:
    """Else a kernel that computes something else goes unnoticed, by its values or gradients."""
    with broken(lambda y: 1.1 * y):
        errors = shadow(stage(), x()).errors
    assert all(errors[what] == pytest.approx(0.1, rel=1e-3) for what in EVERYTHING)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * grad

    with broken(Twice.apply):
        errors = shadow(stage(), x()).errors
    assert errors["output"] < 1e-6
    assert errors["parameters' gradients"] == pytest.approx(1, rel=1e-3)


def test_a_relu_of_nearly_zero_is_no_fault_of_the_operators() -> None:
    """Wrong: a training of few small images is stopped, because rounding alone puts what one ReLU
    gets on the other side of zero. That is much of a gradient, but of this one input's."""
    of_inputs = iter([2, 1])  # the second one is upside down
    with broken(lambda y: next(of_inputs) * y):
        shadow(stage(), x()).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_of_a_few_values_in_16_bits_is_no_fault_of_the_operators(dtype: torch.dtype) -> None:
    """Wrong: a training whose processes get two images of 32 pixels is stopped: both values of a
    channel are almost the same, and their norm is 1 and -1, or the other way round."""
    torch.manual_seed(3)
    spec = NetworkGenerator("small", channels=8)(seed=1).stages[-1]
    last = RandWireStage(spec, "sep_conv3x3", "BN")
    two = torch.randn(2, last.in_channels, 2, 2).relu().requires_grad_()
    with torch.autocast("cpu", dtype):
        shadow(last.train(), two).check()
        assert shadow(last.eval(), two).errors.keys() == EVERYTHING
    assert shadow(last.train(), two).errors.keys() == EVERYTHING


@pytest.mark.parametrize("spoiled", ["input", "output"])
def test_what_lies_beside_the_channels_is_looked_at(spoiled: str) -> None:
    """Else nothing notices that a GPU has left other values there than zeros: a shadow step has a
    copy of the image, which nodes read as well."""
    graph, spec = stage(), draw_spec("small", "WS").stages[0]
    before = RandWireStage(spec, "sep_conv3x3", "BN").train()

    def spoil(image: Tensor) -> Tensor:
        whole_image(image)[:, -1] = float("nan") if spoiled == "input" else 1e3
        return image

    with mock.patch.dict(MULTIPLES, {torch.float32: 8}):
        image = before(torch.randn(4, 5, 24, 24))
        found = shadow(graph, image, rounds=1)
        assert found.errors.keys() == EVERYTHING and max(found.errors.values()) < 1e-5
        with broken(spoil) if spoiled == "output" else nullcontext(spoil(image)):
            errors = shadow(graph, image).errors
    assert not errors["output"] <= LIMITS[torch.float32]


def test_a_training_that_diverges_is_no_fault_of_the_operators() -> None:
    """Else NaN in the images stops the training with a wrong explanation."""
    diverged = x().detach()
    diverged[0, 0, 0, 0] = torch.nan
    assert shadow(stage("FrozenBN"), diverged).errors == {}


# -------------------------------------------------------------------------------------------------
# In a training
# -------------------------------------------------------------------------------------------------


IMAGES = images()


class Training:
    """A backbone with the hook, and steps in place of a trainer's."""

    def __init__(
        self,
        folder: Path,
        fused: Any = "auto",
        period: int = 0,
        start: int = 0,
        norm: str = "BN",
        images: Tensor = IMAGES,
    ) -> None:
        torch.manual_seed(0)
        spec = draw_spec("small", "WS")
        self.backbone = RandWire(spec, norm=norm, fused=fused).double().train()
        self.images = images
        self.hook = ShadowSteps(self.backbone, RunFolder(folder), period)
        self.hook.trainer = SimpleNamespace(iter=start, start_iter=start)  # type: ignore[assignment]
        self.hook.before_train()

    def step(self) -> None:
        self.hook.before_step()
        self.backbone(self.images)
        self.hook.after_step()
        self.hook.trainer.iter += 1

    def because(self, training: bool) -> list[str | None]:
        self.backbone.train(training)(self.images)
        return [getattr(self.backbone, name).plain_because for name in ("res3", "res4", "res5")]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The channels of each stage that was looked at, and the rounds; res4 is slower fused."""
    calls: list[tuple[int, int]] = []

    def look(one: RandWireStage, x: Tensor, rounds: int) -> Shadow:
        calls.append((one.out_channels, rounds))
        nodes = 0.5 if one.out_channels == 10 else 0.99
        seconds = {True: (1.0, nodes), False: (1.0, 2.0)} if rounds else {}
        return Shadow({"output": 1e-12}, 1e-8, seconds)

    monkeypatch.setattr(shadow_steps, "shadow", look)
    yield calls


@pytest.mark.parametrize("synchronised", [False, True])
def test_stages_are_looked_at_with_the_images_that_they_get(
    synchronised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what a training hands on between its stages is not what a shadow step looks at."""
    seen = []

    def look(one: RandWireStage, x: Tensor, rounds: int) -> Shadow:
        seen.append((len(x), zeros_of(x), x.requires_grad))
        return Shadow({}, 1e-8, {})

    monkeypatch.setattr(shadow_steps, "shadow", look)
    monkeypatch.setattr(RandWireStage, "synchronised", synchronised)
    monkeypatch.setitem(MULTIPLES, torch.float64, 8)
    Training(tmp_path, images=images().repeat(3, 1, 1, 1)).step()
    assert seen == [(2 if synchronised else 6, zeros, True) for zeros in (0, 3, 6)]


def test_a_training_keeps_the_faster_way_and_a_resumed_one_what_it_kept(
    tmp_path: Path, looked: list[tuple[int, int]]
) -> None:
    """Else "auto" trains the slow way, or a resumed run computes other last bits than before."""
    training = Training(tmp_path)
    training.step()
    assert looked == [(c, shadow_steps.ROUNDS) for c in (5, 10, 20)]
    slow = "that takes 0.50 of the time in training"
    assert training.because(True) == ["", slow, ""]
    assert training.because(False) == ["", "", ""]
    training.step()
    assert len(looked) == 3, "it looks again"
    assert json.loads((tmp_path / "stages.json").read_text())["res4"] == {"training": slow}

    resumed = Training(tmp_path, start=2)
    assert resumed.because(True) == ["", slow, ""]
    resumed.step()
    assert looked[3:] == [(c, 0) for c in (5, 10, 20)], "it is timed again"


def test_switches_are_not_overruled(tmp_path: Path, looked: list[tuple[int, int]]) -> None:
    """Else "on" is slower than promised, or "off" runs what somebody wanted not to run."""
    on = Training(tmp_path, fused="on")
    on.step()
    assert looked == [(c, 0) for c in (5, 10, 20)] and on.because(True) == ["", "", ""]
    Training(tmp_path, fused="off").step()
    assert len(looked) == 3


def test_every_so_often_one_stage_is_looked_at(
    tmp_path: Path, looked: list[tuple[int, int]]
) -> None:
    """Else SOLVER.SHADOW_PERIOD looks at everything, at nothing, or always at the same stage."""
    training = Training(tmp_path, period=2)
    for _ in range(8):
        training.step()
    assert looked[3:] == [(10, 0), (20, 0), (5, 0)]
    assert not any(module._forward_pre_hooks for module in training.backbone.modules()), (
        "a hook is left, which would end the fast path"
    )


def test_the_memory_of_both_ways_is_no_steps(
    tmp_path: Path, looked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: CUDA graphs must leave as much memory as nodes took one by one, and find none."""
    reset = mock.Mock()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    training = Training(tmp_path, period=2)
    for number in (1, 1, 2, 2):
        training.step()
        assert reset.call_count == number


def test_a_stage_that_differs_stops_the_training(tmp_path: Path) -> None:
    """Else wrong gradients train on for days."""
    training = Training(tmp_path)
    with broken(lambda y: y * (1 + 1e-7)), raises_one_line(RuntimeError) as e:
        training.step()
    assert "res3 runs fused, and its output is off by 1e-07" in str(e.value)
    assert "FUSED off" in str(e.value)
    assert not (tmp_path / "stages.json").exists()


def test_what_can_not_run_fused_is_left_alone(tmp_path: Path) -> None:
    """Else a network with other norms can't be trained."""
    training = Training(tmp_path)
    training.backbone.get_submodule("res3.nodes.0").norm = nn.GroupNorm(1, 5).double()
    training.step()
    assert set(json.loads((tmp_path / "stages.json").read_text())) == {"res3", "res4", "res5"}


# -------------------------------------------------------------------------------------------------
# In two processes
# -------------------------------------------------------------------------------------------------


def synchronised(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """What torch's does on GPUs alone."""
    if not norm.training:
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var)
    count, *sums = all_reduce(torch.cat((x.new_tensor([x[:, 0].numel()]), x.sum((0, 2, 3)))))
    centred = x - (torch.stack(sums) / count)[:, None, None]
    var = all_reduce((centred**2).sum((0, 2, 3))) / count
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return centred * scale[:, None, None] + norm.bias[:, None, None]


def one_of_two(rank: int, folder: Path) -> tuple[list[str], list[Shadow], dict[str, Any]]:
    """How each of three trainings ends, what the first one's shadow steps find, what it keeps."""
    found: list[Shadow] = []

    def looking(*arguments: Any) -> Shadow:
        found.append(shadow(*arguments))
        return found[-1]

    def wrong(name: str) -> Any:
        if name == "output" and rank:  # in one process alone
            return broken(lambda y: y * (1 + 1e-7))
        # Those of one process's images: what a norm that is not synchronised has.
        alone = {"gradients": lambda self, sums, *_: sums.new_zeros(len(sums), 2, sums.shape[1])}
        return mock.patch.object(Shares, "correct", alone.get(name, Shares.correct))

    ends = []
    own = images()[: (2, 1)[rank]] + rank
    for name in ("", "output", "gradients"):
        training = Training(folder / name, norm="SyncBN", images=own)
        with (
            mock.patch.object(nn.SyncBatchNorm, "forward", synchronised),
            mock.patch.object(fusible, "_METHODS", ()),  # else stages would see that, and use it
            mock.patch.object(shadow_steps, "shadow", shadow if name else looking),
            wrong(name),
        ):
            try:
                training.step()
                ends.append("")
            except RuntimeError as e:
                ends.append(str(e))
    return ends, found, json.loads((folder / "stages.json").read_text()) if not rank else {}


def test_synchronised_norms_are_looked_at_by_all_processes(tmp_path: Path) -> None:
    """Wrong: processes wait for each other's messages for ever; what is wrong in one process, or in
    what they tell each other, trains on, or ends one of them alone."""
    for name in ("", "output", "gradients"):
        (tmp_path / name).mkdir(exist_ok=True)
    parts = in_two_processes(one_of_two, tmp_path)
    (ends, _, kept), (others, _, _) = parts
    assert ends == others and kept == {"res3": {}, "res4": {}, "res5": {}}
    right, output, gradients = ends
    assert right == ""
    assert "res3 runs fused, and its output is off by 1e-07" in output and "\n" not in output
    assert "res3 runs fused, and its parameters' gradients is off" in gradients
    for _, found, _ in parts:
        assert len(found) == 3 and not any(one.seconds for one in found)
        for one in found:
            assert one.errors.keys() == EVERYTHING and max(one.errors.values()) < 1e-10


def resumed_in_one_of_two(rank: int, folder: Path) -> list[str | None]:
    """How a process of a resumed training runs its stages; each has another folder."""
    return Training(folder / str(rank), start=1).because(True)


def test_what_the_first_process_kept_is_for_all(tmp_path: Path) -> None:
    """Wrong: a machine with a copy of the checkpoint alone runs other kernels than the first one,
    or all fail where some have timed their stages and some have not."""
    first = RunFolder(tmp_path / "0")
    first.path.mkdir()
    first.write_slower_stages({"res3": {}, "res4": {"training": "it was slow"}, "res5": {}})
    assert in_two_processes(resumed_in_one_of_two, tmp_path) == [["", "it was slow", ""]] * 2
