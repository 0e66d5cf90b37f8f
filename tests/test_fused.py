"""The fused operators, and what the fast path promises beside the oracle's results: counts, memory,
and that it steps aside where it would not do."""

import contextlib
import copy
import errno
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
import torch._dynamo.testing
from helpers import assert_same, draw_spec, images, in_two_processes, leaves, played, randomise
from torch import Tensor, nn
from torch.autograd import forward_ad

from randwire_d2 import (
    NetworkGenerator,
    NetworkSpec,
    RandWire,
    RandWireClassifier,
    ops,
)
from randwire_d2.benchmark.counting import count
from randwire_d2.benchmark.models import Case, build, forward
from randwire_d2.modeling import RandWireStage, fused, fused_stage, graph_state
from randwire_d2.modeling.node import Node, SepConv3x3
from randwire_d2.modeling.weights import MULTIPLES
from randwire_d2.ops import native, probe
from randwire_d2.ops.launches import MOST_GRADS, MOST_INPUTS, shared
from randwire_d2.wiring import Dag, random_graph
from randwire_d2.wiring.plan import Plan
from randwire_d2.wiring.schedule import schedule

MB = 1e6


@pytest.fixture
def runs() -> Iterator[mock.Mock]:
    """Counts how often a stage takes the fast path."""
    path = "randwire_d2.modeling.fused_stage.run_fused"
    with mock.patch(path, side_effect=fused.run_fused) as counted:
        yield counted


def image(channels: int = 5, height: int = 4, width: int = 3) -> Tensor:
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- operators


def operator_arguments(n: int, affine: bool) -> dict[str, tuple[Any, ...]]:
    inputs = [image() for _ in range(n)]
    coefficients = torch.rand(n, dtype=torch.float64)
    affines = [torch.randn(2, 5, dtype=torch.float64) for _ in range(n if affine else 0)]
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    parameters = torch.randn(2, 2, 5, dtype=torch.float64)
    both = [inputs[0], image()]
    moments = native.batch_norm_statistics(both, parameters, 1e-5)[1]
    read = (inputs + [image()], [n, 1], torch.rand(n + 1, dtype=torch.float64))
    more = [*affines, parameters[0]] if affine else []
    aggregated = (*read, more, [weight, torch.randn_like(weight)], 2)
    return {
        "weighted_sum": (inputs, coefficients, affines),
        "weighted_sum_backward": (*read, both, [*parameters.clone()]),
        "aggregate": aggregated,
        "aggregate_backward": ([image(5, 2, 2), image(5, 2, 2)], *aggregated, [True, n > 1]),
        "batch_norm_statistics": (both, parameters, 1e-5),
        "batch_norm_backward": (*read, both, parameters, moments, 1e-5),
    }


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", operator_arguments(1, False))
def test_operators_are_sound(name: str, n: int, affine: bool, device: torch.device) -> None:
    """Else an operator's schema or its fake is not what it does, and tracing, compiling or counting
    it goes wrong."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.randwire, name).default
    move = partial(torch.utils._pytree.tree_map_only, Tensor, lambda x: x.to(device))
    torch.library.opcheck(operator, move(operator_arguments(n, affine)[name]), test_utils=tests)


@pytest.mark.parametrize("want", itertools.product([True, False], repeat=2))
def test_what_is_not_wanted_is_not_there_and_nothing_shares_memory(want: tuple[bool, bool]) -> None:
    """Else an operator returns one tensor twice, which compilers take for two."""
    arguments = (*operator_arguments(2, True)["aggregate_backward"][:-1], list(want))
    operator = torch.ops.randwire.aggregate_backward.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    grad_sums, _, results = operator(*arguments)
    assert (len(grad_sums), len(results)) == (2 * want[0], 2 * want[1])
    assert len({x.data_ptr() for x in grad_sums + results}) == len(grad_sums) + len(results)


@pytest.mark.parametrize("weights", [(0.3,), (0.0,), (-0.5,), (0.2, 0.9, 0.4), (0.0, -0.7)])
def test_weighted_sums_with_any_coefficients(weights: tuple[float, ...]) -> None:
    """Else a dropped edge, a negative coefficient or a lone one is summed up wrongly."""
    inputs = [image() for _ in weights]
    kept = [x.clone() for x in inputs]
    coefficients = torch.tensor(weights, dtype=torch.float64)
    expected = sum(w * x for w, x in zip(weights, inputs, strict=True))
    assert isinstance(expected, Tensor)
    assert_same(native.weighted_sum(inputs, coefficients, []), expected, "sum")
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    convolved = nn.functional.conv2d(expected.relu(), weight, padding=1, groups=5)
    n = len(weights)
    (aggregated,) = native.aggregate(inputs, [n], coefficients, [], [weight], 1)
    assert_same(aggregated, convolved, "aggregate")
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True)), "an input changed"


# ---------------------------------------------------------------- gradients


@pytest.fixture(params=[1, 16], ids=["", "zeros"])
def multiple(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what channels are made a multiple, as they are in lower precision."""
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setitem(MULTIPLES, dtype, request.param)


@pytest.mark.usefixtures("multiple")
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["BN", "BN eval", "FrozenBN"])
def test_gradients_are_the_derivatives(norm: str, recompute: bool, device: torch.device) -> None:
    """Else a gradient is not that of the function that was computed; the batch's statistics, which
    are part of it, included."""
    dag = Dag(5, ((0, 2), (1, 2), (1, 3), (2, 3), (2, 4)))
    spec = NetworkSpec("small", 3, "sep_conv3x3", (dag,) * 3)
    stage = RandWireStage(spec.stages[0], "sep_conv3x3", norm.split()[0], recompute=recompute)
    randomise(stage.double()).to(device).train("eval" not in norm)
    names, parameters = zip(*stage.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(stage, dict(zip(names, values, strict=True)), x)

    with mock.patch.object(fused, "_update_running_statistics"):  # a function has no memory
        x = image(3, 3, 3).to(device).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.usefixtures("multiple")
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_inference_as_on_a_gpu(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what a GPU infers, whose nodes run level by level, is not what the nodes do."""
    spec = NetworkGenerator("small", 5, 12, "WS", {"k": 4, "p": 0.75})(1)
    stage = randomise(RandWireStage(spec.stages[1], "sep_conv3x3", norm).double()).eval()
    there = {"together": True}
    monkeypatch.setattr(fused, "Run", lambda *args, **rest: graph_state.Run(*args, **rest | there))
    stage._plans, stage.edges = stage._plans[1:] * 2, stage.edges[1:] * 2
    x = image(5, 9, 7)
    with torch.no_grad(), mock.patch.object(ops, "aggregate", wraps=ops.aggregate) as aggregate:
        assert_same(stage.run_fused(x), stage.run_nodes(x), "result")
    plan = stage._plans[0]
    assert aggregate.call_count == len(plan.groups) < plan.num_nodes


@pytest.mark.usefixtures("multiple")
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("path", [{}, {"recompute": True}], ids=["fused", "recompute"])
def test_float32_is_the_oracle(path: dict[str, bool], norm: str, device: torch.device) -> None:
    """Else single precision loses more than single precision does: results and gradients are held
    against the oracle in double precision."""
    spec = NetworkGenerator("small", 8, 12, "WS", {"k": 4, "p": 0.75})(1)
    stage = RandWireStage(spec.stages[0], "sep_conv3x3", norm, **path)
    randomise(stage).to(device).train()
    state = {f"res3.{name}": value.double() for name, value in leaves(stage).items()}
    state = {name: value.detach().requires_grad_() for name, value in state.items()}
    x = torch.randn(4, 8, 40, 36).to(device).requires_grad_()
    x_oracle = x.detach().double().requires_grad_()
    result = oracle.Result()
    expected = oracle.graph(
        spec.stages[0], "sep_conv3x3", state, "res3", x_oracle, norm == "BN", None, result
    )
    out = stage(x)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()

    def close(actual: Tensor | None, wanted: Tensor | None, what: str) -> None:
        assert actual is not None and wanted is not None, what
        error = (actual.double() - wanted).norm() / wanted.norm()
        assert error < 1e-5, f"{what}: off by {error:.2g}"

    close(out, expected, "result")
    close(x.grad, x_oracle.grad, "gradient of the input")
    sums: list[tuple[Tensor, Tensor]] = []
    for name, parameter in stage.named_parameters():
        gradients = parameter.grad, state[f"res3.{name}"].grad
        if name.count(".") == 2:
            sums.append(gradients)  # type: ignore[arg-type]
        else:
            close(*gradients, f"gradient of {name}")
    # A norm undoes the scale of a sum, so that the gradients of a node's w cancel each other but
    # for a rest; they are held against those of all nodes.
    actual, wanted = (torch.cat(gradients) for gradients in zip(*sums, strict=True))
    close(actual, wanted, "gradients of weighted sums")
    after = stage.state_dict()
    for name, value in result.running.items():
        close(after[name.removeprefix("res3.")], value, name)
    if norm == "BN":
        assert all(v == 1 for name, v in after.items() if name.endswith("num_batches_tracked"))


def test_a_backward_pass_can_be_repeated(device: torch.device) -> None:
    """Else retain_graph changes the gradients."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN", recompute=True)
    x = torch.randn(2, 5, 16, 16).to(device).requires_grad_()
    out = stage.to(device)(x).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def penalty(stage: RandWireStage, x: Tensor) -> None:
    out = stage(x).sum()  # whose gradient is a constant
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    (out + grad.square().sum()).backward()


def two_steps(stage: RandWireStage, x: Tensor) -> None:
    weights = [*stage.parameters()]
    grads = torch.autograd.grad(stage(x).square().sum(), weights, create_graph=True)
    moved = [weight - grad for weight, grad in zip(weights, grads, strict=True)]
    torch.autograd.grad(sum(w.square().sum() for w in moved), weights, allow_unused=True)


def forward_derivative(stage: RandWireStage, x: Tensor) -> None:
    torch.autograd.functional.jvp(stage, x, torch.ones_like(x))


@pytest.mark.parametrize("differentiate", [penalty, two_steps, forward_derivative])
def test_gradients_are_not_differentiated(
    differentiate: Callable[[RandWireStage, Tensor], None], device: torch.device
) -> None:
    """Wrong: a loss is without its penalty on gradients, meta-learning is of first order, and a
    derivative is zero, all without a word."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN").to(device)
    x = torch.randn(2, 5, 16, 16).to(device).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated again.*; set MODEL.RANDWIRE.FUSED off"):
        differentiate(stage, x)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_detect_anomaly_finds_none(
    norm: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who looks for NaN is told of one where nobody has written."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", norm).to(device)
    # Else what nobody has written is what lay there before.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autograd.detect_anomaly():
            stage(torch.randn(2, 5, 16, 16).to(device)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_in_batches_are_refused(device: torch.device) -> None:
    """Wrong: the message is about a memory format, and names no way out."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN").to(device)
    x = torch.randn(2, 5, 16, 16).to(device).requires_grad_()
    out = stage(x).flatten()[:3]
    with pytest.raises(RuntimeError, match="batched.*; set MODEL.RANDWIRE.FUSED off"):
        torch.autograd.grad(out, x, torch.eye(3).to(device), is_grads_batched=True)


# ---------------------------------------------------------------- counts


def count_of(model: str, **case: Any) -> Any:
    case_ = Case(**case)
    return count(build(model, case_), case_.make_inputs, forward)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, traffic, launches, saved",
    [("randwire", 1300, 656, 130), ("randwire-recompute", 1600, 1109, 60)],
)
def test_a_training_step_of_c109(model: str, traffic: int, launches: int, saved: int) -> None:
    """Else a training step moves more than half of what other implementations do (2570 MB per image
    in 1630 operations), or saves more than ResNet-50 (86 MB) where memory is to be saved."""
    counted = count_of(model, batch=64)
    assert counted.traffic / 64 < traffic * MB
    assert counted.launches == launches
    assert counted.saved / 64 < saved * MB


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, traffic, saved", [("randwire", 17_700, 1520), ("randwire-recompute", 20_000, 600)]
)
def test_a_detectors_training_step(model: str, traffic: int, saved: int) -> None:
    """Else fine-tuning a detector moves more than half of the plain path's 42.5 GB per image, or
    saves more than a quarter of its 2.42 GB where memory is to be saved."""
    counted = count_of(model, batch=1, height=800, width=1344, detection=True)
    assert counted.traffic < traffic * MB
    assert counted.saved < saved * MB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "casts", "launches"),
    [
        ({"batch": 64}, 23, 700),
        ({"batch": 2, "height": 800, "width": 1344, "detection": True}, 38, 515),
    ],
)
def test_mixed_precision_casts_a_stages_weights_at_once(
    case: dict[str, Any], casts: int, launches: int
) -> None:
    """Else autocast launches a kernel for each of a network's weights, and another for each of
    their gradients: more than 400 a step."""
    case_ = Case(**case)
    half = partial(forward, amp=torch.float16)
    counted = count(build("randwire", case_), case_.make_inputs, half)
    names = [operation.name for operation in counted.operations]
    assert sum("_to_copy" in name or "_foreach_copy" in name for name in names) <= casts
    assert counted.launches <= launches


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_saved(recompute: bool) -> None:
    """Else the backward pass keeps tensors that it does not need: of each node its two results, or
    one of them, of fewer nodes; of an output node, with fixed statistics, only the inner one."""
    spec = NetworkGenerator("regular", 8, 16, "WS", {"k": 4, "p": 0.75})(1)
    stage_spec = spec.stages[1]
    plan = Plan(stage_spec.dag)
    inner = len(plan.order) - 0.75 * len(
        stage_spec.dag.input_nodes
    )  # an input node's: C/2 channels
    for norm in ("BN", "FrozenBN"):
        stage = RandWireStage(stage_spec, "sep_conv3x3", norm, recompute=recompute).train()
        counted = count(stage, lambda: [torch.randn(2, 8, 64, 64)], lambda stage, x: stage(x).sum())
        results = {v for v in plan.order if norm == "BN" or stage_spec.dag.successors[v]}
        if recompute:
            results -= plan.forgettable
        tensors = len(results) + (
            0 if recompute else inner + 0.25 * len(stage_spec.dag.input_nodes)
        )
        assert 4 * len(plan.forgettable) <= len(plan.order)
        one = 2 * 16 * 32 * 32 * 4
        assert tensors * one <= counted.saved <= (tensors + 2.6) * one


@pytest.mark.parametrize(
    "graph", [("WS", {"k": 4, "p": 0.75}), ("BA", {"m": 1}), ("ER", {"p": 0.2})]
)
def test_the_peak_of_inference_is_the_schedules(graph: tuple[str, dict[str, Any]]) -> None:
    """Else a stage holds more than the least that any order of its nodes would: the peak of what is
    alive, counted, is the schedule's to the tensor."""
    dag = Dag.from_graph(random_graph(graph[0], 32, 3, **graph[1]))
    spec = NetworkSpec("small", 64, "sep_conv3x3", (dag,) * 3)
    stage = RandWireStage(spec.stages[0], "sep_conv3x3", "FrozenBN").eval()

    def x() -> list[Tensor]:
        return [torch.randn(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)]

    nothing = count(stage, x, lambda stage, x: None, training=False)
    counted = count(stage, x, lambda stage, x: stage(x), training=False)
    one = 64 * 16 * 16 * 4
    least = played(dag, schedule(dag))
    held = (counted.peak - nothing.peak) / one
    assert least <= held < least + 1  # and small vectors
    assert least < played(dag, range(32))


def test_frozen_stages_save_nothing() -> None:
    """Else a detector pays for stages that it does not train."""
    backbone = RandWire(draw_spec("regular", "WS"), norm="FrozenBN", freeze_at=3).train()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        for name in ("stem", "res2", "res3"):
            assert not backbone.get_submodule(name)(
                torch.randn(1, backbone.get_submodule(name).in_channels, 16, 16)
            ).requires_grad
    assert not saved


# ---------------------------------------------------------------- where it steps aside


DEPTHWISE, POINTWISE = "nodes.1.conv.depthwise", "nodes.1.conv.pointwise"


def change_nothing(stage: RandWireStage) -> None:
    pass


def hook_a_node(stage: RandWireStage) -> None:
    stage.nodes[1].register_forward_hook(lambda *_: None)


def hook_a_convolution(stage: RandWireStage) -> None:
    stage.get_submodule("nodes.2.conv.depthwise").register_forward_pre_hook(lambda *_: None)


def mix_norms(stage: RandWireStage) -> None:
    stage.get_submodule("nodes.3.norm").eval()


def cumulative_statistics(stage: RandWireStage) -> None:
    for norm in stage.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None


def replace_a_norm(stage: RandWireStage) -> None:
    stage.nodes[0].norm = nn.GroupNorm(1, 5)


def change(name: str, **values: Any) -> Callable[[RandWireStage], None]:
    """Of one module of a stage, some attributes."""

    def change_it(stage: RandWireStage) -> None:
        for attribute, value in values.items():
            setattr(stage.get_submodule(name), attribute, value)

    return change_it


def dilate(stage: RandWireStage) -> None:
    for node in stage.nodes:
        node.conv.depthwise.dilation = node.conv.depthwise.padding = (2, 2)


def stop_striding(stage: RandWireStage) -> None:
    for node in stage.nodes:
        node.conv.depthwise.stride = (1, 1)


def replace_a_forward(stage: RandWireStage) -> None:
    conv = stage.get_submodule("nodes.1.conv.pointwise")
    conv.forward = conv.forward  # as accelerate's hooks do


def add_a_module(stage: RandWireStage) -> None:
    stage.get_submodule("nodes.1.conv").add_module("activation", nn.SiLU())


def replace_a_sum(stage: RandWireStage) -> None:
    stage.nodes[1].aggregate = lambda inputs, kept=None: sum(inputs)


def weigh_channels(stage: RandWireStage) -> None:
    for node in stage.nodes:
        if node.weight is not None:
            node.weight = nn.Parameter(torch.randn(len(node.weight), 5, 1, 1))


def forget_weights(stage: RandWireStage) -> None:
    for node in stage.nodes:
        node.weight = None  # the first input alone


def turn_convolutions(stage: RandWireStage) -> None:
    both = stage.get_submodule("nodes.1.conv")
    depthwise = both.depthwise
    del both.depthwise
    both.depthwise = depthwise


def forget_statistics(stage: RandWireStage) -> None:
    for norm in stage.modules():  # as adaptation to test data does
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = norm.running_var = None


def keep_weights_elsewhere(stage: RandWireStage) -> None:
    for module in stage.modules():  # as FSDP does, and DataParallel in its replicas
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, weight * 1)


def parametrize(stage: RandWireStage) -> None:
    nn.utils.parametrizations.weight_norm(stage.get_submodule("nodes.1.conv.pointwise"))


@pytest.mark.parametrize(
    "change, why",
    [
        (change_nothing, ""),
        (parametrize, "somebody changed a convolution"),
        (keep_weights_elsewhere, "a weight is no parameter of its convolution"),
        (dilate, "somebody changed a convolution"),
        (stop_striding, "somebody changed a convolution"),
        (change(DEPTHWISE, padding_mode="reflect"), "somebody changed a convolution"),
        (change(POINTWISE, activation=nn.functional.silu), "somebody changed a convolution"),
        (change(POINTWISE, norm=nn.BatchNorm2d(5)), "somebody changed a convolution"),
        (add_a_module, "somebody changed a convolution"),
        (replace_a_forward, "somebody replaced the forward of a Conv2d"),
        (replace_a_sum, "somebody replaced the weighted sum of a Node"),
        (weigh_channels, "somebody replaced the weights of a Node's sum"),
        (forget_weights, "somebody replaced the weights of a Node's sum"),
        (turn_convolutions, "somebody changed a convolution"),
        (forget_statistics, "is without weights, running statistics or momentum"),
        (hook_a_node, "a Node has a hook"),
        (hook_a_convolution, "a Conv2d has a hook"),
        (mix_norms, "some of the norms are in another mode"),
        (cumulative_statistics, "without weights, running statistics or momentum"),
        (change("nodes.3.norm", eps=1e-3), "or have another momentum or eps"),
        (change("nodes.3", norm=nn.BatchNorm2d(5, affine=False)), "is without weights"),
        (replace_a_norm, "the norm is GroupNorm, not BN, SyncBN or FrozenBN"),
    ],
)
def test_what_it_does_not_know_it_leaves_to_the_nodes(
    change: Callable[[RandWireStage], None], why: str, runs: mock.Mock
) -> None:
    """Else a hook is not called, a module that somebody changed is not run, or nobody learns why
    the fast path isn't taken."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN").train()
    change(stage)
    x = torch.randn(2, 5, 8, 8)
    assert bool(stage.obstacle(x)) == bool(why) and why in stage.obstacle(x)
    stage(x).sum().backward()
    assert runs.called == (not why) and stage.plain_because == stage.obstacle(x)
    stage.fused = "on"
    if why:
        with pytest.raises(ValueError, match=f"FUSED is on, but .*{why}.*; with auto, nodes run"):
            stage(x)


def test_hooks_of_all_modules_are_called(runs: mock.Mock) -> None:
    """Wrong: what a hook of every batch norm returns is left out, without a word."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN").eval()
    x = torch.randn(2, 5, 8, 8)

    def double(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return 2 * output if isinstance(module, nn.BatchNorm2d) else None

    hook = nn.modules.module.register_module_forward_hook(double)
    try:
        hooked, expected = stage(x), stage.run_nodes(x)
    finally:
        hook.remove()
    assert torch.equal(hooked, expected) and not runs.called
    assert not torch.allclose(hooked, stage(x)) and runs.called


@pytest.mark.parametrize(
    "kind, name",
    [(Node, "aggregate"), (Node, "forward"), (SepConv3x3, "forward"), (nn.BatchNorm2d, "forward")],
)
def test_what_replaces_a_method_of_a_class_is_called(
    kind: Any, name: str, runs: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who replaces the weighted sum of all nodes, as a study of it may, gets the old one."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN").eval()
    x, own = torch.randn(2, 5, 8, 8), getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args: 2 * own(*args))
    replaced, expected = stage(x), stage.run_nodes(x)
    assert torch.equal(replaced, expected) and not runs.called
    assert stage.plain_because == f"somebody replaced the {name} of {kind.__name__}"


def test_what_asks_for_each_operations_derivative(runs: mock.Mock) -> None:
    """Wrong: torch.func and forward-mode differentiation fail, though the nodes can do it."""
    spec = draw_spec("small", "WS").stages[0]
    stage = randomise(RandWireStage(spec, "sep_conv3x3", "BN").double()).eval()
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    ones = torch.ones_like(x)
    expected = torch.autograd.functional.jvp(stage.run_nodes, x, ones)[1]
    gradient = torch.autograd.functional.vjp(lambda x: stage.run_nodes(x).sum(), x)[1]
    assert_same(torch.func.jvp(stage, (x,), (ones,))[1], expected, "jvp")
    assert_same(torch.func.grad(lambda x: stage(x).sum())(x), gradient, "grad")
    assert_same(torch.func.vmap(lambda x: stage(x[None])[0])(x), stage.run_nodes(x), "vmap")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(stage(forward_ad.make_dual(x, ones))).tangent
    assert_same(tangent, expected, "tangent")
    assert not runs.called


def wide_stage() -> RandWireStage:
    """One whose channels fill a CPU's vectors."""
    spec = NetworkGenerator("small", 40, 4, "WS", {"k": 2, "p": 0.75})(1).stages[0]
    return RandWireStage(spec, "sep_conv3x3", "BN")


@pytest.mark.parametrize(
    "size, says", [((2, 64, 8, 8), "to have 40 channels"), ((40, 8, 8), "expected 4D input")]
)
def test_what_is_no_input_of_a_stage_is_torchs_to_refuse(size: tuple[int, ...], says: str) -> None:
    """Wrong: kernels, which know addresses alone, take some of the channels for other pixels, and
    their gradients are written over other tensors."""
    with pytest.raises((RuntimeError, ValueError), match=says):
        wide_stage()(torch.randn(size))


def fewer_channels(stage: RandWireStage) -> None:
    conv = stage.get_submodule("nodes.1.conv.pointwise")
    conv.weight = nn.Parameter(conv.weight[:20].detach().clone())


def norms_of_fewer_channels(stage: RandWireStage) -> None:
    for node in stage.nodes:
        node.norm = nn.BatchNorm2d(20)


def norms_of_fewer_weights(stage: RandWireStage) -> None:
    for node in stage.nodes:
        node.norm.weight, node.norm.bias = (nn.Parameter(torch.ones(20)) for _ in range(2))


@pytest.mark.parametrize(
    "change", [fewer_channels, norms_of_fewer_channels, norms_of_fewer_weights]
)
def test_weights_of_other_sizes_are_torchs_to_refuse(
    change: Callable[[RandWireStage], None], runs: mock.Mock
) -> None:
    """Wrong: kernels read what lies behind a weight's end."""
    stage = wide_stage()
    change(stage)
    with pytest.raises((RuntimeError, ValueError)):
        stage(torch.randn(2, 40, 8, 8))
    assert not runs.called


@pytest.mark.parametrize("part", ["", "nodes.1.conv.depthwise"])
def test_weights_without_values_are_refused(part: str) -> None:
    """Wrong: what was left on "meta" when weights were loaded is computed with as if it were
    there: features of whatever lay in memory."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN").eval()
    stage.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match="input is on cpu, and not all of its weights are"):
        stage(torch.randn(2, 5, 8, 8))


def test_a_batch_without_images(runs: mock.Mock) -> None:
    """Wrong: an error, where the nodes, as torch's own modules, give a batch without images."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN")
    out = stage(torch.randn(0, 5, 8, 8))
    out.sum().backward()
    assert out.shape == (0, 5, 4, 4) and not runs.called
    assert all(p.grad is not None for p in stage.parameters())


@pytest.mark.parametrize("surgery, stride, dilation", [(dilate, None, 2), (stop_striding, 1, 1)])
def test_a_stage_does_what_its_convolutions_were_changed_to(
    surgery: Callable[[RandWireStage], None],
    stride: int | None,
    dilation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a detector with a dilated res5, as Detectron2's DC5 has, silently gets features of
    another network."""
    spec = draw_spec("small", "WS").stages[0]
    stage = randomise(RandWireStage(spec, "sep_conv3x3", "BN").double()).train()
    x = torch.randn(2, 5, 9, 12, dtype=torch.float64)
    stage(x)
    surgery(stage)
    state = {f"res3.{name}": value.clone() for name, value in stage.state_dict().items()}
    windows = oracle.windows

    def changed(x: Tensor, kernel: int, own_stride: int, fill: float) -> Any:
        wide = windows(x, dilation * (kernel - 1) + 1, stride or own_stride, fill)
        return [
            ((i // dilation, j // dilation), window)
            for (i, j), window in wide
            if i % dilation == j % dilation == 0
        ]

    monkeypatch.setattr(oracle, "windows", changed)
    expected = oracle.graph(spec, "sep_conv3x3", state, "res3", x, True, None, oracle.Result())
    assert_same(stage(x), expected, "result")


def test_the_log_says_once_how_stages_run(caplog: pytest.LogCaptureFixture) -> None:
    """Else a network silently takes the slow path, or the log fills with what it says."""
    backbone = RandWire(draw_spec("small", "WS")).double().train()
    caplog.set_level("INFO", "randwire_d2")
    for _ in range(2):
        backbone(images())
    backbone.get_submodule("res4.nodes.0").norm = nn.GroupNorm(1, 10).double()
    for _ in range(2):
        backbone(images())
    assert caplog.messages == [
        "RandWire runs res3, res4, res5 fused",
        "RandWire runs res3, res5 fused; res4 node by node, because the norm is GroupNorm, not "
        "BN, SyncBN or FrozenBN",
    ]


# ---------------------------------------------------------------- operators that do not work


def fail(*_: Any) -> Any:
    raise OSError("no C compiler")


def read_only(*_: Any) -> Any:
    raise OSError(errno.EROFS, "Read-only file system")


def off_by_a_little(*arguments: Any) -> Any:
    grads, *others = native.aggregate_backward(*arguments)
    return [grad * (1 + 1e-8) for grad in grads], *others


@pytest.mark.parametrize(
    "operator, broken, why",
    [
        ("aggregate", fail, "OSError: no C compiler"),
        ("aggregate", read_only, "Read-only file system; set TRITON_CACHE_DIR to a folder"),
        ("aggregate_backward", off_by_a_little, "Mismatch: aggregate_backward, result 0"),
    ],
)
def test_operators_that_do_not_work_are_not_used(
    operator: str,
    broken: Any,
    why: str,
    runs: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else the first step of a training dies in a compiler, or the training is wrong."""
    monkeypatch.setattr("randwire_d2.modeling.fused_stage.needs_probe", lambda device: True)
    monkeypatch.setattr(torch.ops.randwire, operator, broken)
    probe.failure.cache_clear()
    try:
        backbone = RandWire(draw_spec("small", "WS")).double().train()
        twin = RandWire(draw_spec("small", "WS"), fused="off").double().train()
        twin.load_state_dict(backbone.state_dict())
        x = images()
        for _ in range(2):
            for name, feature in backbone(x).items():
                assert torch.equal(feature, twin(x)[name])
        assert not runs.called
        (warning,) = (r for r in caplog.records if r.levelname == "WARNING")
        assert "node by node, because the operators fail on cpu in torch.float64" in warning.message
        assert why in warning.message and "fused" not in warning.message
        with pytest.raises(ValueError, match=f"FUSED is on, but the operators fail.*{why}"):
            RandWire(draw_spec("small", "WS"), fused="on").double()(x)
    finally:
        probe.failure.cache_clear()


def test_what_is_unfrozen_later_is_tried_again(
    runs: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a stage trains with backward operators that were not looked at while it was frozen."""
    monkeypatch.setattr("randwire_d2.modeling.fused_stage.needs_probe", lambda device: True)
    monkeypatch.setattr(torch.ops.randwire, "aggregate_backward", fail)
    probe.failure.cache_clear()
    try:
        backbone = RandWire(draw_spec("small", "WS")).double().requires_grad_(False)
        backbone(images())
        assert runs.call_count == 3
        backbone.requires_grad_(True)(images())
        assert runs.call_count == 3
    finally:
        probe.failure.cache_clear()


def test_operators_that_work_are_used(runs: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the probe refuses what is right: here it looks at what it compares with."""
    monkeypatch.setattr("randwire_d2.modeling.fused_stage.needs_probe", lambda device: True)
    for norm, mode in (("BN", True), ("BN", False), ("FrozenBN", True)):
        backbone = RandWire(draw_spec("small", "WS"), norm=norm).double().train(mode)
        backbone(images())
    assert runs.call_count == 9


def test_the_probe_sees_all_that_a_stage_asks_for() -> None:
    """Else a stage's first pass compiles a kernel that nothing was held against."""
    spec = NetworkGenerator("small", 6, 12, "ER", {"p": 0.7})(1)
    stage = RandWireStage(spec.stages[0], "sep_conv3x3", "BN").train()

    def asked(run: Callable[[], Any]) -> set[tuple[Any, ...]]:
        """Of each call: what Triton compiles kernels for."""
        calls: set[tuple[Any, ...]] = set()
        for name in probe.OPERATORS:
            original = getattr(torch.ops.randwire, name)

            def note(*arguments: Any, name: str = name, original: Any = original) -> Any:
                lists: list[Any] = [a for a in arguments if isinstance(a, list) and a]
                read = next((a for a in lists if isinstance(a[0], int)), [len(lists[0])])
                others: tuple[Any, ...] = ()
                if name.startswith("agg"):
                    *_, affines, weights, stride = arguments[: -1 if "back" in name else None]
                    others = bool(affines), stride, len(weights[0])
                most = MOST_INPUTS if others else MOST_GRADS
                for some in shared(read, most):
                    calls.add((name, max(read[some]), len(read[some]), *others))
                if "norm_backward" in name:
                    calls.add((name, "nodes", len(read)))
                return original(*arguments)

            patches.enter_context(mock.patch.object(ops, name, note))
            patches.enter_context(mock.patch.object(torch.ops.randwire, name, note))
        run()
        patches.close()
        return calls

    patches = contextlib.ExitStack()
    x = torch.randn(2, 6, 9, 7, requires_grad=True)
    needed = asked(lambda: stage(x).sum().backward())
    variants = probe.Variants(6, 6, *stage._sizes, batch=True, backward=True)
    probe.failure.cache_clear()
    device = torch.device("cpu")
    seen = asked(lambda: probe.failure(device, torch.float32, variants))
    probe.failure.cache_clear()
    assert needed and needed <= seen


def test_the_probe_leaves_the_cores_to_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else threads that share tiny operations wait for cores that compilers and other processes
    have, minutes in all; or PyTorch has one thread for ever after."""
    threads: list[int] = []

    def compare(*_: Any) -> float:
        threads.append(torch.get_num_threads())
        return 0.0

    monkeypatch.setattr(probe, "compare", compare)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        variants = probe.Variants(2, 2, (), (), (), 1, 1, batch=False, backward=False)
        assert probe.failure.__wrapped__(torch.device("cpu"), torch.float32, variants) == ""
        assert {*threads} == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_probe_computes_where_it_is_told_to() -> None:
    """Wrong: with torch.set_default_device("cuda"), operators that work are found not to."""
    variants = probe.Variants(2, 2, (), (), (), 1, 1, batch=False, backward=False)
    (case,) = itertools.islice(probe.cases(torch.float64, variants), 1)
    with torch.device("meta"):
        probe.compare(case, "aggregate", native.aggregate, "cpu")


def test_one_checkpoint_for_every_path() -> None:
    """Else weights trained on one path don't load on another, or mean something else there."""
    spec = draw_spec("regular", "WS")
    models = [RandWireClassifier(spec, 4, fused=on).double().eval() for on in ("on", "off")]
    randomise(models[0])
    models[1].load_state_dict(models[0].state_dict())
    assert_same(models[1](images()), models[0](images()), "logits")
    assert not any("by_" in name for name in models[0].state_dict())


def test_too_few_values_for_a_batch_norm_are_refused() -> None:
    """Else a batch of one pixel divides by zero."""
    backbone = RandWire(draw_spec("small", "WS")).train()
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 10, 2, 2\)"):
        backbone(torch.randn(1, 3, 32, 32))
    backbone(torch.randn(2, 3, 32, 32))


# ---------------------------------------------------------------- what users do with it


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_torch_compile(norm: str) -> None:
    """Else a user's torch.compile fails or breaks the graph in each stage, or computes something
    else; the operators stay as they are in it. In float64: the two sum in another order where
    autograd of PyTorch 2.7 does, which float32 shows in the small elements of large gradients."""
    backbone = randomise(RandWire(draw_spec("small", "WS"), norm=norm)).train().double()
    twin = copy.deepcopy(backbone)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for model in (backbone, compiled):
        sum(feature.square().mean() for feature in model(x).values()).backward()
    for (name, ours), theirs in zip(backbone.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=name)
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["on", "off"])
def test_torch_compile_drops_edges_without_compiling_again(fused: Any) -> None:
    """Else the edge is part of what is compiled: every other one takes minutes, until torch.compile
    gives up."""
    options: Any = {"out_features": ["res4"], "relu_features": False, "fused": fused}
    backbone = RandWire(draw_spec("small", "WS"), edge_drop_prob=0.9, **options)
    randomise(backbone.double()).train()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(backbone, backend=counter, fullgraph=True)
    results = []
    for model in (backbone, compiled):
        torch.manual_seed(1)
        results.append([model(images(35, 35))["res4"] for _ in range(6)])
    for eager, same in zip(*results, strict=True):
        assert_same(same, eager, "res4")
    assert len({y[0, 0, 0, 0].item() for y in results[0]}) > 3, "the draws do not differ"
    results[1][-1].sum().backward()
    assert counter.frame_count == 1


def test_exports_have_torchs_own_operators() -> None:
    """Else an exported model needs this package, or ONNX can't be made of it."""
    backbone = randomise(RandWire(draw_spec("small", "WS"), norm="FrozenBN")).eval()
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(backbone, (x,))
    assert not any("randwire" in str(node.target) for node in program.graph.nodes)
    expected = backbone(x)
    for name, feature in program.module()(x).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_agrees_with_the_nodes(
    recompute: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Else mixed precision is another network, trains in another precision, or returns gradients
    of another type than the weights'."""
    spec = NetworkGenerator("small", 8, 6, "WS", {"k": 2, "p": 0.5})(1)
    models = [
        RandWire(spec, out_features=["res3"], fused=on, recompute=recompute).to(device)
        for on in ("on", "off")
    ]
    models[0].load_state_dict(randomise(copy.deepcopy(models[0]).cpu()).state_dict())
    models[1].load_state_dict(models[0].state_dict())
    gradients, results = [], []
    for model in models:
        torch.manual_seed(1)
        with torch.autocast(device.type, dtype):
            out = model.train()(torch.randn(4, 3, 64, 64).to(device))["res3"]
        assert out.dtype == dtype
        results.append(out.float())
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for a, b in (results, gradients):
        assert ((a - b).norm() / b.norm()) < 0.05


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    """Wrong: in a block with autocast, what a user wants in double precision has three digits."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", "BN", fused="on")
    randomise(stage.double()).to(device)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(stage(x), stage.run_nodes(x), "result")


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_pass_in_autocast_is_the_one_outside(
    recompute: bool, enabled: bool, device: torch.device
) -> None:
    """Wrong: who calls backward() in a block with autocast gets other gradients, or an error."""
    spec = draw_spec("small", "WS").stages[0]
    stage = randomise(RandWireStage(spec, "sep_conv3x3", "BN", fused="on", recompute=recompute))
    stage.to(device)
    x = torch.randn(2, 5, 8, 8).to(device)
    found = []
    for inside in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            y = stage(x).float().square().sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(y, [*stage.parameters()]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_model_that_was_cast_loses_no_more_than_its_nodes(
    norm: str, device: torch.device
) -> None:
    """Else means, variances and affines are of half precision too: a mean that is large beside the
    deviation then leaves few digits of the difference."""
    stage = RandWireStage(draw_spec("small", "WS").stages[0], "sep_conv3x3", norm).train()
    stage.to(device, torch.bfloat16)
    exact = copy.deepcopy(stage).double()
    x = (torch.randn(4, 5, 24, 24) + 20).to(device, torch.bfloat16)
    expected = exact.run_nodes(x.double())
    kept = copy.deepcopy(stage.state_dict())
    errors, wide, aggregate = {}, set(), ops.aggregate

    def note(inputs: Any, degrees: Any, coefficients: Tensor, affines: Any, *others: Any) -> Any:
        wide.update(tensor.dtype for tensor in (coefficients, *affines))
        return aggregate(inputs, degrees, coefficients, affines, *others)

    for run in (RandWireStage.run_fused, RandWireStage.run_nodes):
        stage.load_state_dict(kept)
        with mock.patch.object(ops, "aggregate", note):
            y = run(stage, x.requires_grad_())
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        error = (y.detach().double() - expected).norm() / expected.norm()
        errors[run.__name__] = error.item()
        for name, value in stage.state_dict().items():
            torch.testing.assert_close(
                value, exact.state_dict()[name].to(value), atol=0.1, rtol=0.1
            )
    assert wide == {torch.float32}
    assert errors["run_fused"] < 1.1 * errors["run_nodes"], errors


@pytest.mark.parametrize(
    ("rank", "local_rank", "is_first"),
    [(0, 0, True), (1, 1, False), (8, 0, True), (9, 1, False), (0, None, True), (8, None, False)],
)
def test_one_process_of_each_machine_compiles(
    rank: int, local_rank: int | None, is_first: bool
) -> None:
    """Wrong: all processes of a second machine compile the same kernels at once; or stages do not
    train in processes that have no local rank, since another program has started them."""
    done: list[str] = []

    def find() -> str:
        done.append("find")
        return ""

    group = None if local_rank is None else mock.Mock()
    with (
        mock.patch.multiple(
            fused_stage.comm, get_world_size=lambda: 16, get_rank=lambda: rank,
            all_gather=lambda found: [found], synchronize=lambda: done.append("synchronize"),
            _LOCAL_PROCESS_GROUP=group,
        ),
        mock.patch.object(torch.distributed, "is_initialized", lambda: True),
        mock.patch.object(torch.distributed, "get_rank", lambda group: local_rank),
    ):  # fmt: skip
        assert not fused_stage._in_all_processes(find, together=True)
    assert done == [*["find"] * is_first, "synchronize", "find"]


def no_triton(device: torch.device) -> str:
    return "Triton is not installed"


def runs_in_one_of_two(rank: int, operators: str, name: str, broken: Any) -> list[str | None]:
    """How a process runs its stages, of which the second's operators do not work."""
    with (
        mock.patch.object(fused_stage, "needs_probe", lambda device: True),
        mock.patch(f"{operators}.{name}", broken) if rank else contextlib.nullcontext(),
    ):
        backbone = RandWire(draw_spec("small", "WS")).double().train()
        backbone(images())
    return [backbone.get_submodule(name).plain_because for name in ("res3", "res4", "res5")]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("operators", "name", "broken", "why"),
    [
        ("torch.ops.randwire", "aggregate", fail, "OSError: no C compiler"),
        ("randwire_d2.ops.probe", "unavailable", no_triton, "Triton is not installed"),
    ],
)
def test_what_fails_in_one_process_is_used_in_none(
    operators: str, name: str, broken: Any, why: str
) -> None:
    """Wrong: one process runs other kernels than the rest, or they wait for each other."""
    own, others = in_two_processes(runs_in_one_of_two, operators, name, broken)
    assert own == others and all(why in str(reason) for reason in own)
