"""Channels of zeros for tensor cores: they change no result, no checkpoint, and cost little."""

import copy
import itertools
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_equal, assert_same, draw_spec, images, randomise
from recording import StandIn
from torch import Tensor

from randwire_d2 import NetworkGenerator, RandWire, RandWireClassifier, complexity
from randwire_d2.benchmark.counting import count
from randwire_d2.benchmark.models import Case, build, forward
from randwire_d2.modeling import (
    RandWireStage,
    cuda_graphs,
    fused_stage,
    graph_function,
    graph_gradients,
    graph_state,
    stage_graphs,
    weights,
)
from randwire_d2.modeling.weights import MULTIPLES, padding_of
from randwire_d2.ops.memory_format import empty_image

SPECS = draw_spec("small", "WS").stages[:2]  # 5 channels to 5, whose sizes are alike, and to 10


def results(stage: RandWireStage, fused: bool, gradients: bool) -> dict[str, Tensor]:
    """Everything that a pass gives, with an edge left out, and what it leaves in buffers."""
    kept = torch.arange(len(stage.plan.learned)) != 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, stage.in_channels, 9, 6, generator=generator, dtype=torch.float64) + 1
    with torch.set_grad_enabled(gradients):
        x.requires_grad_(gradients)
        y = stage.run_fused(x, kept) if fused else stage.run_nodes(x, kept)
    found = {"output": y.detach()}
    if gradients:
        y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
        assert x.grad is not None
        found["input's gradient"] = x.grad
        found |= {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return found | dict(stage.named_buffers())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("spec", SPECS, ids=["alike", "wider"])
def test_they_change_nothing(spec: Any, norm: str, recompute: bool) -> None:
    """Wrong: zeros get into a result, a gradient or a statistic, or change its size or layout."""
    stage = RandWireStage(spec, "sep_conv3x3", norm, recompute=recompute)
    randomise(stage.double())
    for training, gradients in ((True, True), (False, True), (False, False)):
        stage.train(training)
        expected = results(copy.deepcopy(stage), False, gradients)
        with mock.patch.dict(MULTIPLES, {torch.float64: 8}):
            found = results(copy.deepcopy(stage), True, gradients)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert_same(value, expected[name], name)
        assert found["output"].stride(1) == 1
        assert all(value.is_contiguous() for name, value in found.items() if "weight" in name)


def test_zeros_are_not_divided_by_their_variance() -> None:
    """Wrong: norms with an eps of 0, which PyTorch's own refuse to train, give NaN."""
    stage = RandWireStage(SPECS[0], "sep_conv3x3", "BN").eval()
    randomise(stage.double())
    for node in stage.nodes:
        node.norm.eps = 0.0
    x = torch.randn(2, stage.in_channels, 9, 6, dtype=torch.float64)
    with torch.no_grad(), mock.patch.dict(MULTIPLES, {torch.float64: 8}):
        assert stage(x).isfinite().all() and stage.plain_because == ""
        assert "the eps of the norms is 0" in stage.train().obstacle(x)


def test_they_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: an image is copied where one stage ends and the next begins, or its gradient is; or
    what is beside the channels is not zero."""
    copies = []

    def note(*args: Any, **options: Any) -> Tensor:
        copies.append(args)
        return empty_image(*args, **options)

    def wider_image(x: Tensor, padding: int) -> Tensor:
        whole = weights.wider_image(x, padding)
        assert not whole[:, x.shape[1] :].any()
        return whole

    monkeypatch.setattr(weights, "empty_image", note)
    for module in (graph_function, graph_gradients):
        monkeypatch.setattr(module, "wider_image", wider_image)
    classifier = randomise(RandWireClassifier(draw_spec("small", "WS"), num_classes=3)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = classifier(images().float()).square().sum()
    assert len(copies) == 1, "but for the first convolutions' result"
    loss.backward()
    assert len(copies) == 1 + 1, "but for the gradient of the last stage's result"


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("relu_features", [False, True])
def test_they_are_written_before_they_are_read(
    relu_features: bool, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: what memory held before is taken for zeros. In a new process it mostly is zeros."""
    monkeypatch.setattr(cuda_graphs, "recorder", StandIn())
    monkeypatch.setitem(MULTIPLES, torch.float32, 8)
    options: Any = {"relu_features": relu_features, "cuda_graphs": replayed, "fused": "on"}
    backbone = randomise(RandWire(draw_spec("small", "WS"), **options)).float().train()
    found = []
    for filled in (True, False):
        torch.use_deterministic_algorithms(filled)  # with NaN, by ``torch.utils.deterministic``
        try:
            own = copy.deepcopy(backbone)
            for _ in range(stage_graphs.FIRST_CALLS + 1):
                features = own(images().float())
                sum(feature.square().sum() for feature in features.values()).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert own.res4.graphs.replayed == replayed
        found.append([*features.values(), *(p.grad for p in own.parameters()), *own.buffers()])
    assert_equal(*found)


@pytest.mark.parametrize("relu_features", [False, True])
def test_nobody_else_sees_them(relu_features: bool) -> None:
    """Wrong: a feature's pixels lie further apart than others expect, it can't be written to, or
    that is not noticed by the stage that has read it."""
    backbone = RandWire(draw_spec("small", "WS"), relu_features=relu_features).train()
    stage = backbone.res3
    with mock.patch.dict(MULTIPLES, {torch.float32: 8}):
        features = backbone(images().float().to(memory_format=torch.channels_last))
        for x in features.values():
            assert x.is_contiguous(memory_format=torch.channels_last)
        sum(x.square().sum() for x in features.values()).backward()
        x = stage(torch.randn(2, 5, 8, 8))
        own = x.detach().clone()
        y = backbone.res4(x)
        x.mul_(2)
        assert torch.equal(x, 2 * own)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        copied = stage(torch.randn(2, 5, 8, 8)).relu_()
        expected = backbone.res4(copied.detach().clone())
        assert_equal(backbone.res4(copied), expected)


@pytest.mark.parametrize("replayed", [False, True])
def test_gradients_have_none_where_images_had_none(
    replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the norm before the first random graph gets a gradient whose pixels lie further apart,
    which SyncBatchNorm copies into the other layout, and torch's own batch norm of bfloat16 reads
    by kernels for any strides; or a stage gets one that it has to copy."""
    monkeypatch.setattr(cuda_graphs, "recorder", StandIn())
    first, second = (RandWireStage(spec, "sep_conv3x3", "BN", fused="on") for spec in SPECS)
    for stage in (first, second):
        stage.cuda_graphs = replayed
    with mock.patch.dict(MULTIPLES, {torch.float32: 8}):
        for i in range(stage_graphs.FIRST_CALLS + 1):
            x = torch.randn(2, 5, 8, 8, requires_grad=True)
            between = first(x)
            gradients = torch.autograd.grad(second(between).square().sum(), (x, between))
            assert gradients[0].is_contiguous(memory_format=torch.channels_last)
            assert [weights.zeros_of(image) for image in gradients] == [0, 3]
            assert first.graphs.replayed == (replayed and i + 1 >= stage_graphs.FIRST_CALLS)


@pytest.mark.parametrize("multiple", [1, 8])
def test_images_of_inference_mode_are_trained_with(multiple: int) -> None:
    """Wrong: a stage can't be trained behind one that ran in inference mode, as its nodes can."""
    below, fused = (RandWireStage(spec, "sep_conv3x3", "BN") for spec in SPECS)
    plain = copy.deepcopy(fused)
    plain.fused = "off"
    with mock.patch.dict(MULTIPLES, {torch.float64: multiple}):
        with torch.inference_mode():
            x = below.double()(torch.randn(2, 5, 8, 8, dtype=torch.float64))
        for stage in (fused, plain):
            stage.double()(x).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad, name)


def test_a_trace_does_not_depend_on_them() -> None:
    """Wrong: a stage that is traced with a stage's result can't be, or takes no other images."""
    first, second = (RandWireStage(spec, "sep_conv3x3", "FrozenBN").eval() for spec in SPECS)
    with mock.patch.dict(MULTIPLES, {torch.float32: 8}), torch.no_grad():
        x = first(torch.randn(2, 5, 8, 8))
        traced = torch.jit.trace(second, x)  # checks itself with a copy
        torch.testing.assert_close(traced(x), second(x))


@pytest.mark.parametrize("relu", [False, True])
def test_they_are_handed_on_by_graphs(
    relu: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: graphs that share memory, of inputs of several sizes, spoil each other's zeros; or
    there are others' values where a stage, or its gradient, is read without its zeros."""
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graphs, "recorder", StandIn())
    for name, value in {"LATER_CALLS": 2, "MOST_TRAINING": 3}.items():
        monkeypatch.setattr(stage_graphs, name, value)
    stages = [RandWireStage(spec, "sep_conv3x3", "BN", fused="on") for spec in SPECS]
    replayed = randomise(torch.nn.ModuleList(stages)).to(device)
    launched = copy.deepcopy(replayed)
    for stage in launched:
        stage.cuda_graphs = False
    with mock.patch.dict(MULTIPLES, {torch.float32: 8}):
        for i, (size, training) in enumerate(itertools.product((8, 16, 12) * 4, (True, False))):
            generator = torch.Generator().manual_seed(i)
            images = torch.randn(2, 5, size, size, generator=generator).to(device)
            results = []
            for first, second in (replayed, launched):
                x = images.clone().requires_grad_(training)
                with torch.set_grad_enabled(training):
                    y = first.train(training)(x)
                    y = second.train(training)(y.relu() if relu or i % 7 == 0 else y)
                    if training:
                        y.square().sum().backward()
                results.append([y.detach(), x.grad])
            assert_equal(*results)
            assert_equal(*([p.grad for p in both.parameters()] for both in (replayed, launched)))
    assert all(len(stage.graphs._graphs) == 6 for stage in replayed)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["", "res4"])
def test_compiled_stages_make_their_own(compiled: str) -> None:
    """Wrong: torch.compile fails or breaks the graph at an image with zeros, or takes others'
    values for them."""
    backbone = randomise(RandWire(draw_spec("small", "WS"))).train().double()
    twin = copy.deepcopy(backbone)
    torch._dynamo.reset()
    twin.get_submodule(compiled).compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with mock.patch.dict(MULTIPLES, {torch.float64: 8}):
        for model in (backbone, twin):
            sum(feature.square().mean() for feature in model(x).values()).backward()
    for (name, ours), theirs in zip(backbone.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=name)


@pytest.mark.parametrize("grad", [True, False])
def test_rows_are_what_tensor_cores_load(grad: bool) -> None:
    """Wrong: a 1×1 convolution of 16 bits has rows that are no multiple of 16 bytes."""
    stage = RandWireStage(SPECS[1], "sep_conv3x3", "FrozenBN")
    shapes = []

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        assert weight.data_ptr() % 16 == 0
        shapes.append(tuple(weight.shape[:2]))
        return torch.nn.functional.conv2d(x, weight, bias)

    functional = mock.Mock(wraps=torch.nn.functional, conv2d=note)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.set_grad_enabled(grad),
        mock.patch.object(graph_state, "F", functional),
    ):
        assert stage(torch.randn(2, 5, 8, 8)).shape == (2, 10, 4, 4)
    inputs = len(SPECS[1].dag.input_nodes)
    others = SPECS[1].dag.num_nodes - inputs
    assert sorted(shapes) == [(16, 8)] * inputs + [(16, 16)] * others


def test_operators_are_tried_at_the_size_that_they_will_have(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: other kernels are held against their definition than run; or the log does not say that
    a stage has more channels than its spec."""
    tried = []
    monkeypatch.setattr(fused_stage, "needs_probe", lambda device: True)
    monkeypatch.setattr(fused_stage, "failure", lambda *args: tried.append(args[2]) or "")
    caplog.set_level("INFO", "randwire_d2")
    backbone = RandWire(draw_spec("small", "WS")).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        backbone(images().float())
    assert [(v.in_channels, v.channels) for v in tried] == [(8, 8), (8, 16), (16, 24)]
    assert caplog.messages == [
        "RandWire runs res3, res4, res5 fused; beside their own, res3, res4, res5 have 3, 6, 4 "
        "channels of zeros, for tensor cores"
    ]


def test_single_precision_has_none() -> None:
    """Wrong: a stage in float32 takes more memory and time on a CPU for nothing, or none on a GPU,
    which loads 16 bytes at once."""
    cpu, cuda = map(torch.device, ("cpu", "cuda"))
    assert padding_of(109, torch.float32, cpu) == 0 and padding_of(109, torch.float16, cpu) == 3
    assert padding_of(218, torch.float32, cuda) == 2 and padding_of(218, torch.float16, cuda) == 6


def test_what_they_are_for() -> None:
    """Wrong: tensor cores could load the rows of C=109 as they are, or still can't."""
    spec = NetworkGenerator(channels=109)(1)
    total = complexity(spec, height=224, width=224).flops

    def share(dtype: torch.dtype) -> float:
        """Of multiply-adds, those in nodes' 1×1 convolutions that have odd rows."""
        odd, side = 0, 56
        for stage in spec.stages:
            for predecessors in stage.dag.predecessors:
                own = stage.channels if predecessors else stage.in_channels
                both = (
                    c + padding_of(c, dtype, torch.device("cpu")) for c in (own, stage.channels)
                )
                if any(channels % 8 for channels in both):
                    odd += own * stage.channels * side**2
            side //= 2
        return odd / total

    assert share(torch.float32) == pytest.approx(0.71, abs=0.005)
    assert share(torch.float16) == 0


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("detection", [False, True])
def test_they_cost_little(training: bool, detection: bool) -> None:
    """Wrong: they take more memory traffic than they can be worth."""
    case = Case(2, 800, 1344, True) if detection else Case(64)
    model = build("randwire", case)
    half = partial(forward, amp=torch.float16)
    step = partial(count, model, case.make_inputs, half, training)
    with mock.patch.dict(MULTIPLES, {torch.float16: 1}):
        without = step()
    most = 1.028 if training or not detection else 1.05
    assert without.traffic < step().traffic < most * without.traffic
