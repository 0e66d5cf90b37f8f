"""RandWire as a Detectron2 backbone: features, norms, freezing, edge dropping, configs, memory."""

import copy
import inspect
import logging
import multiprocessing
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from helpers import (
    GOLDEN,
    NODE_OPS,
    PATHS,
    assert_same,
    assert_same_gradients,
    draw_spec,
    images,
    in_two_processes,
    leaves,
    randomise,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from randwire_d2 import (
    NetworkGenerator,
    NetworkSpec,
    RandWire,
    RandWireClassifier,
    add_randwire_config,
    complexity,
)
from randwire_d2.modeling import NODE_OP_REGISTRY, RandWireStage
from randwire_d2.wiring import Dag

NAMES = ("stem", "res2", "res3", "res4", "res5")
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def config(**keys: Any) -> CfgNode:
    """A config of a small network; ``keys`` are those of MODEL.RANDWIRE, ``WS_K`` being WS.K."""
    cfg = get_cfg()
    add_randwire_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_randwire_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small = {"REGIME": "small", "CHANNELS": 4, "NUM_NODES": 6, "NORM": "BN"}
    for key, value in {**small, **keys}.items():
        cfg.merge_from_list([f"MODEL.RANDWIRE.{key.replace('WS_', 'WS.')}", value])
    return cfg


def droppable(spec: NetworkSpec, frozen: Sequence[str] = ()) -> list[oracle.Edge]:
    """Every edge whose target has input degree > 1, outside of frozen stages."""
    edges = [(s.name, u, v) for s in spec.stages if s.name not in frozen for u, v in s.dag.edges]
    degrees = Counter((stage, v) for stage, _, v in edges)
    return [(stage, u, v) for stage, u, v in edges if degrees[stage, v] > 1]


def outputs_by_edge(
    spec: NetworkSpec,
    model: RandWire,
    x: Tensor,
    edges: Sequence[oracle.Edge],
    frozen: Sequence[str] = (),
) -> dict[oracle.Edge | None, Tensor]:
    """What the oracle computes with each edge removed, and with none."""
    state = model.state_dict()
    outputs = {
        edge: oracle.backbone(spec, state, x, train=True, dropped=edge, frozen=frozen).features[
            "res5"
        ]
        for edge in (None, *edges)
    }
    for a, b in combinations(outputs.values(), 2):
        assert (a - b).abs().max() > 1e-6, "the test can't tell two edges apart"
    return outputs


def which_edge(output: Tensor, outputs: dict[oracle.Edge | None, Tensor]) -> oracle.Edge | None:
    """The removed edge, told by the output."""
    (edge,) = [e for e, expected in outputs.items() if (output - expected).abs().max() < 1e-9]
    return edge


# ---------------------------------------------------------------- features and shapes


@pytest.mark.parametrize("size", [(97, 131), (64, 32), (1, 35)])
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_output_shape_is_the_shape_of_the_outputs(regime: str, size: tuple[int, int]) -> None:
    """Else an FPN on top is built for other channels or strides than it gets."""
    spec = draw_spec(regime, "WS")
    backbone = RandWire(spec, out_features=NAMES).eval()
    shapes = backbone.output_shape()
    assert list(shapes) == list(NAMES)
    assert [shapes[name].stride for name in NAMES] == [2, 4, 8, 16, 32]
    scales = (1, 2, 4) if regime == "small" else (1, 1, 2, 4, 8)
    wide = [5 * scale for scale in scales]
    assert [shapes[n].channels for n in NAMES] == (
        [2, 5, *wide] if len(wide) == 3 else [2, *wide[1:]]
    )
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, *size))
    for name, shape in shapes.items():
        expected = (2, shape.channels, *(-(-side // shape.stride) for side in size))
        assert tuple(features[name].shape) == expected, name


@pytest.mark.parametrize("node_op", NODE_OPS)
def test_output_shape_is_that_of_a_dilated_stage(node_op: str) -> None:
    """Wrong: a head on a dilated res5, as DeepLab has, is built for a stride that it lacks."""
    backbone = RandWire(draw_spec("regular", "WS", node_op)).eval()
    x = torch.randn(1, 3, 64, 96)
    for name, strides in (("res5", [4, 8, 16, 16]), ("res3", [4, 4, 8, 8])):
        for module in getattr(backbone, name).modules():
            if hasattr(module, "kernel_size") and module.kernel_size in (3, (3, 3)):
                module.stride = (1, 1)
        shapes = backbone.output_shape()
        assert [shape.stride for shape in shapes.values()] == strides
        for feature, y in backbone(x).items():
            assert y.shape[2:] == (64 // shapes[feature].stride, 96 // shapes[feature].stride)
    backbone.res3 = checkpoint_wrapper(backbone.res3)  # which has the stage's attributes
    assert backbone.output_shape() == shapes


class Deformable(nn.Module):
    """To output_shape as Detectron2's DeformConv, which needs compiled code: no Conv2d."""

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride


def test_output_shape_knows_convolutions_that_are_not_torchs() -> None:
    """Wrong: with deformable convolutions in res5, a head is built for half its stride."""
    backbone = RandWire(draw_spec("regular", "WS"))
    for node in backbone.res5.nodes:
        node.conv.depthwise = Deformable(node.conv.depthwise.stride)
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 16, 32]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_shapes_without_weights(path: str, train: bool) -> None:
    """Else a network can't tell its shapes on the device "meta", as Detectron2's ResNet can."""
    with torch.device("meta"):
        backbone = RandWire(draw_spec("regular", "WS"), edge_drop_prob=0.5, **PATHS[path])
        features = backbone.train(train)(torch.zeros(2, 3, 97, 131))
    assert [*features["res5"].shape] == [2, backbone.output_shape()["res5"].channels, 4, 5]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_subset_of_features(count: int) -> None:
    """Else some features can't be had without others, or stages that nobody reads are built."""
    spec = draw_spec("small", "BA")
    full = randomise(RandWire(spec, out_features=NAMES)).eval()
    x = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        expected = full(x)
        for names in combinations(NAMES, count):
            backbone = RandWire(spec, out_features=names[::-1]).eval()
            backbone.load_state_dict(full.state_dict(), strict=False)
            features = backbone(x)
            assert sorted(features) == sorted(names) == sorted(backbone.output_shape())
            assert all(torch.equal(features[name], expected[name]) for name in names)
            last = NAMES.index(names[-1])
            built = {name.split(".")[0] for name, _ in backbone.named_parameters()}
            assert built == set(NAMES[: last + 1])


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "GN", "LN", ""])
@pytest.mark.parametrize("channels", [6, 64])
def test_every_norm_of_detectron2(norm: str, channels: int) -> None:
    """Else a norm of Detectron2's can't be chosen, for channels that 32 divides or not."""
    spec = NetworkGenerator("small", channels, 4, "WS", {"k": 2, "p": 0.5})(1)
    backbone = RandWire(spec, norm=norm).eval()
    kinds = {type(m).__name__ for m in backbone.modules()} & {
        "BatchNorm2d",
        "SyncBatchNorm",
        "FrozenBatchNorm2d",
        "GroupNorm",
        "LayerNorm",
    }
    expected = {
        "BN": {"BatchNorm2d"},
        "SyncBN": {"SyncBatchNorm"},
        "FrozenBN": {"FrozenBatchNorm2d"},
        "GN": {"GroupNorm"},
        "LN": {"LayerNorm"},
        "": set(),
    }
    assert kinds == expected[norm]
    if norm == "GN" and channels == 64:
        groups = {m.num_groups for m in backbone.modules() if isinstance(m, nn.GroupNorm)}
        assert groups == {32}
    features = backbone(torch.randn(1, 3, 64, 64))
    assert all(torch.isfinite(feature).all() for feature in features.values())
    sum(feature.sum() for feature in features.values()).backward()


@pytest.mark.parametrize(
    "channels, groups",
    [
        (109, "stem 27, res2 1, res3 2, res4 4, res5 8"),
        (154, "stem 11, res2 22, res3 28, res4 28, res5 28"),
        (64, ""),
    ],
)
def test_few_groups_are_told(channels: int, groups: str, caplog: pytest.LogCaptureFixture) -> None:
    """Else nobody learns that a recipe's GN has not the groups of the recipe it comes from, or the
    docs tell of others."""
    caplog.set_level("INFO", "randwire_d2")
    with torch.device("meta"):
        RandWire(NetworkGenerator(channels=channels, num_nodes=10)(1), norm="GN")
    said = "GN has as many groups, up to 32, as divide the channels: "
    assert caplog.messages == ([said + groups] if groups else [])


def test_frozen_bn_is_bn_in_eval_mode() -> None:
    """Else weights trained with BN mean something else under FrozenBN."""
    spec = draw_spec("regular", "ER")
    model = randomise(RandWire(spec, norm="BN").double()).eval()
    frozen = RandWire(spec, norm="FrozenBN").double().train()
    missing, unexpected = frozen.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.endswith("num_batches_tracked") for name in unexpected)
    expected = model(images())
    for name, feature in frozen(images()).items():
        assert_same(feature, expected[name], name)


def test_a_stage_keeps_the_scale_of_its_signal() -> None:
    """Else the initialisation is wrong: a random network's features vanish or explode without
    the help of a norm's statistics."""
    op = NODE_OP_REGISTRY.get("sep_conv3x3")(64, 64, 1)
    y = op(torch.relu(torch.randn(4, 64, 32, 32)))
    # E[relu(x)²] = 1/2; He's 2/fan-in doubles it; the second convolution, without a ReLU before
    # it, doubles once more.
    assert 1 < y.var().item() < 4


def test_weighted_sums_start_at_one_half() -> None:
    """Else w does not start at 0, or a node of one input edge has a weight it does not need."""
    spec = draw_spec("regular", "WS")
    backbone = RandWire(spec)
    state = backbone.state_dict()
    for stage in spec.stages:
        for v, predecessors in enumerate(stage.dag.predecessors):
            name = f"{stage.name}.nodes.{v}.weight"
            if len(predecessors) > 1:
                assert torch.equal(state[name], torch.zeros(len(predecessors)))
            else:
                assert name not in state


@pytest.mark.parametrize("init", ["fan_in", "fan_out"])
def test_init_is_hes(init: str) -> None:
    """Wrong: a convolution, the head's among them, has another scale than He's rule of that mode
    gives it, or the mode is the wrong one. Fan-out is torch's and pycls's, which for a depthwise
    convolution counts the output channels of all its groups."""
    spec = NetworkGenerator("small", 64, 4, "WS", {"k": 2, "p": 0.5})(1)
    model = RandWireClassifier(spec, 4, init=init)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {"conv", "backbone.stem.conv", "backbone.res3.nodes.0.conv.depthwise"} < set(convs)
    for name, conv in convs.items():
        fan = conv.in_channels // conv.groups if init == "fan_in" else conv.out_channels
        expected = (2 / (fan * conv.kernel_size[0] ** 2)) ** 0.5
        # The standard deviation of n normal numbers is known to 1/√(2n).
        tolerance = 5 / (2 * conv.weight.numel()) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=tolerance), name


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("path", PATHS)
def test_a_relu_in_the_head_is_the_oracles(path: str, train: bool) -> None:
    """Wrong: HEAD_RELU's ReLU stands somewhere else than between norm and pool, or its gradient is
    lost on one of the paths."""
    spec = draw_spec("small", "WS")
    model = RandWireClassifier(spec, 5, head_relu=True, **PATHS[path])
    randomise(model.double()).train(train)
    state = leaves(model)
    x, x_oracle = images(69, 77).requires_grad_(), images(69, 77).requires_grad_()
    logits = model(x)
    expected = oracle.classifier(spec, state, x_oracle, train=train, head_relu=True).logits
    assert_same(logits, expected, "logits")
    literal = oracle.classifier(spec, state, x_oracle, train=train).logits
    assert (logits - literal).abs().max() > 1e-2, "the test can't tell the two heads apart"
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(model, x, state, x_oracle)


@pytest.mark.parametrize("path", PATHS)
def test_features_after_a_relu(path: str) -> None:
    """Wrong: RELU_FEATURES changes what a stage computes from its predecessor, or a gradient, or
    leaves out a feature."""
    spec = draw_spec("regular", "BA")
    model = RandWire(spec, out_features=NAMES, relu_features=True, **PATHS[path])
    randomise(model.double()).train()
    state = leaves(model)
    x, x_oracle = images(69, 77).requires_grad_(), images(69, 77).requires_grad_()
    features = model(x)
    expected = oracle.backbone(spec, state, x_oracle, train=True).features
    assert list(features) == list(NAMES)
    for name in NAMES:
        assert (expected[name] < 0).any(), "the test can't tell the two apart"
        assert_same(features[name], F.relu(expected[name]), name)
    sum(feature.square().sum() for feature in features.values()).backward()
    sum(F.relu(feature).square().sum() for feature in expected.values()).backward()
    assert_same_gradients(model, x, state, x_oracle)


def test_dropout_is_the_papers() -> None:
    """Else the classifier's dropout or edge dropping is not that of its regime."""
    for regime, dropout, edge_drop in [("small", 0.0, 0.0), ("regular", 0.2, 0.1)]:
        model = RandWireClassifier(draw_spec(regime, "WS"), 4)
        assert model.dropout.p == dropout
        assert model.backbone.edge_drop_prob == edge_drop
    model = RandWireClassifier(draw_spec("small", "WS"), 4, dropout=0.5, edge_drop_prob=0.3)
    assert (model.dropout.p, model.backbone.edge_drop_prob) == (0.5, 0.3)
    model.dropout.register_forward_hook(lambda *_: torch.zeros(1, 1280))
    assert torch.equal(model.eval()(torch.randn(1, 3, 8, 8)), torch.zeros(1, 4)), "not before fc"


@pytest.mark.parametrize(
    "options, says",
    [
        ({"out_features": ["res6"]}, ["out_features", "res6", "res5"]),
        ({"out_features": []}, ["out_features", "[]"]),
        ({"init": "fan"}, ["init", "'fan'", "fan_in or fan_out"]),
        ({"edge_drop_scope": "gpu"}, ["edge_drop_scope", "'gpu'", "process or batch"]),
        ({"freeze_at": "2"}, ["freeze_at", "integer", "'2'"]),
        ({"edge_drop_prob": 1.5}, ["edge_drop_prob", "0 … 1", "1.5"]),
        ({"edge_drop_prob": -0.1}, ["edge_drop_prob", "0 … 1", "-0.1"]),
        ({"norm": "BatchNorm"}, ["norm", "'BatchNorm'", "FrozenBN"]),
    ],
)
def test_backbone_refuses(options: dict[str, Any], says: list[str]) -> None:
    """Else a wrong argument is accepted, or its error hides the value or what is possible."""
    with pytest.raises(ValueError) as error:
        RandWire(draw_spec("small", "WS"), **options)
    assert all(words in str(error.value) for words in says), error.value


def test_wrong_input_is_refused() -> None:
    """Else a single image without batch dimension fails deep inside a convolution."""
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\); got \(3, 8, 8\)"):
        RandWire(draw_spec("small", "WS"))(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        RandWireClassifier(draw_spec("small", "WS"), 0)


# ---------------------------------------------------------------- freezing


@pytest.mark.parametrize("freeze_at", [-1, *range(6), 9])
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_freeze_at(regime: str, freeze_at: int) -> None:
    """Else FREEZE_AT has another meaning than for Detectron2's ResNet."""
    backbone = RandWire(draw_spec(regime, "WS"), norm="BN", freeze_at=freeze_at)
    for i, name in enumerate(NAMES):
        stage = backbone.get_submodule(name)
        frozen = i < freeze_at
        assert all(p.requires_grad != frozen for p in stage.parameters()), name
        assert any(isinstance(m, FrozenBatchNorm2d) for m in stage.modules()) == frozen, name
        assert any(isinstance(m, BATCH_NORMS) for m in stage.modules()) != frozen, name
    if freeze_at < 5:
        sum(
            f.square().mean() for f in backbone.train()(torch.randn(2, 3, 64, 64)).values()
        ).backward()
        assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


def test_freeze_at_comes_from_the_config() -> None:
    """Else MODEL.BACKBONE.FREEZE_AT is ignored."""
    cfg = config()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    backbone = build_backbone(cfg)
    trainable = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"res3", "res4", "res5"}


def test_freeze_returns_the_backbone_and_never_thaws() -> None:
    """Else freeze() can't be chained as ResNet's, or freeze(0) drops edges of frozen stages."""
    spec = draw_spec("regular", "WS")
    backbone = RandWire(spec, out_features=["res5"], edge_drop_prob=1.0).double()
    assert backbone.freeze(5) is backbone
    before = backbone.freeze(0).train()(images())["res5"]
    assert torch.equal(before, backbone.eval()(images())["res5"]), "an edge was dropped"
    assert not any(p.requires_grad for p in backbone.parameters())


# ---------------------------------------------------------------- edge dropping


def test_edges_drop_with_their_probability() -> None:
    """Else edges drop too often or too seldom, some never, or some that are a node's only one."""
    spec = NetworkGenerator("small", 4, 5, "WS", {"k": 2, "p": 0.5})(3)
    model = RandWire(spec, out_features=["res5"], edge_drop_prob=0.4, relu_features=False).double()
    randomise(model).train()
    x = images(35, 35)
    edges = droppable(spec)
    assert 0 < len(edges) < sum(len(dag.edges) for dag in spec.dags)
    outputs = outputs_by_edge(spec, model, x, edges)
    torch.manual_seed(0)
    with torch.no_grad():
        seen = Counter(which_edge(model(x)["res5"], outputs) for _ in range(400))
    assert 0.33 < 1 - seen[None] / 400 < 0.47  # 0.4 ± 3 standard deviations
    assert set(seen) == {None, *edges}
    mean = (400 - seen[None]) / len(edges)
    assert all(0.4 * mean < seen[edge] < 1.8 * mean for edge in edges), "not uniform"


def test_no_edge_drops_in_eval_mode() -> None:
    """Else evaluation is random."""
    spec = draw_spec("regular", "WS")
    model = RandWire(spec, out_features=["res5"], edge_drop_prob=1.0, relu_features=False).double()
    randomise(model).eval()
    expected = oracle.backbone(spec, model.state_dict(), images(), train=False).features["res5"]
    for _ in range(5):
        assert_same(model(images())["res5"], expected, "res5")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("frozen", [2, 4, 5])
def test_no_edge_drops_in_frozen_stages(frozen: int, at_once: bool) -> None:
    """Else a frozen stage changes from batch to batch, or one that was frozen by itself does."""
    spec = NetworkGenerator("regular", 4, 8, "WS", {"k": 2, "p": 0.5})(1)
    model = RandWire(spec, out_features=["res5"], edge_drop_prob=1.0, relu_features=False)
    randomise(model.double()).train()
    if at_once:
        model.freeze(frozen)
    else:
        for name in NAMES[:frozen]:
            model.get_submodule(name).freeze()
    edges = droppable(spec, NAMES[:frozen])
    assert droppable(spec, NAMES[2:]), "the test needs edges in res2 that could drop"
    outputs = outputs_by_edge(spec, model, images(35, 35), edges, NAMES[:frozen])
    seen = {which_edge(model(images(35, 35))["res5"], outputs) for _ in range(60)}
    assert seen <= set(edges) if edges else seen == {None}


@pytest.mark.parametrize(
    "wrap",
    [
        checkpoint_wrapper,
        pytest.param(partial(torch.compile, backend="eager"), marks=pytest.mark.slow),
    ],
)
def test_edges_drop_in_stages_that_were_wrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Wrong: nobody tells that a stage with activation checkpoints, say, loses no edge any more."""
    model = RandWire(draw_spec("small", "WS"), edge_drop_prob=1.0).double().train()
    found = []
    for wrapped in (False, True):
        model.res4 = wrap(model.res4) if wrapped else model.res4
        torch.manual_seed(0)
        found.append([model(images())["res5"] for _ in range(10)])
    assert_same(torch.stack(found[1]), torch.stack(found[0]), "features")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("graph", ["ER", "BA", "WS"])
def test_a_dropped_edge_is_the_oracle_without_it(
    graph: str, path: str, device: torch.device
) -> None:
    """Else the sum keeps a part of the edge, or a parameter gets a wrong gradient or none: None
    for the dropped edge's weight stalls DistributedDataParallel."""
    spec = draw_spec("regular", graph)
    model = RandWire(
        spec, out_features=["res5"], edge_drop_prob=1.0, relu_features=False, **PATHS[path]
    )
    randomise(model.double()).to(device).train()
    outputs = outputs_by_edge(spec, model, images(35, 35, device), droppable(spec))
    for seed in range(4):
        torch.manual_seed(seed)
        state = leaves(model)
        x, x_oracle = (images(35, 35, device).requires_grad_() for _ in range(2))
        model.zero_grad(set_to_none=True)
        out = model(x)["res5"]
        edge = which_edge(out, outputs)
        assert edge is not None, "no edge was dropped with probability 1"
        result = oracle.backbone(spec, state, x_oracle, train=True, dropped=edge)
        weights = torch.randn_like(out)
        (out * weights).sum().backward()
        (result.features["res5"] * weights).sum().backward()
        assert_same(x.grad, x_oracle.grad, "gradient of the images")
        for name, parameter in model.named_parameters():
            # A node whose only output edge was dropped has no gradient in the oracle.
            gradient = state[name].grad
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            assert_same(parameter.grad, expected, f"gradient of {name}")
        stage, u, v = edge
        index = next(s for s in spec.stages if s.name == stage).dag.predecessors[v].index(u)
        gradient = model.get_parameter(f"{stage}.nodes.{v}.weight").grad
        assert gradient is not None
        assert gradient[index] == 0
        assert gradient.count_nonzero() == len(gradient) - 1


@pytest.mark.parametrize("node_op", ["sep_conv3x3", "max_pool3x3"])
def test_a_stage_leaves_out_the_edge_it_is_told(node_op: str) -> None:
    """Else ``kept`` removes another edge than the one it names."""
    spec = draw_spec("small", "BA", node_op)
    model = randomise(RandWire(spec, out_features=["res5"]).double()).eval()
    stage = model.get_submodule("res4")
    x = torch.randn(2, 5, 9, 12, dtype=torch.float64)
    edges = [(u, v) for name, u, v in droppable(spec) if name == "res4"]
    for edge in edges:
        expected = oracle.graph(
            spec.stages[1], node_op, model.state_dict(), "res4", x, False, edge, oracle.Result()
        )
        kept = torch.tensor([other != edge for other in stage.plan.learned])
        assert_same(stage(x, kept), expected, f"res4 without {edge}")
    assert len(edges) > 3


def test_edge_dropping_follows_torchs_seed() -> None:
    """Else a run can't be repeated, or resumed as it would have gone on."""
    spec = draw_spec("regular", "WS")
    model = RandWire(spec, out_features=["res5"], edge_drop_prob=0.5).double().train()

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        return [model(images())["res5"].detach() for _ in range(8)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, first[0]) for a in first[1:]), "nothing was dropped"


def test_edges_are_drawn_on_the_cpu() -> None:
    """Wrong: torch.set_default_device moves the draw to another generator, which a checkpoint does
    not restore, or to a device that has none."""
    model = RandWire(draw_spec("small", "WS"), edge_drop_prob=0.5).train()
    x = torch.randn(2, 3, 64, 64)
    with torch.device("meta"):
        assert model(x)["res5"].device.type == "cpu"


def _drop_edges_with_others(rank: int, scope: str) -> tuple[list[list], list[float]]:
    """In one of two processes, whose seeds differ: a network's outputs, and the next numbers."""
    torch.manual_seed(0)
    spec = draw_spec("small", "WS")
    model = RandWire(spec, out_features=["res5"], edge_drop_prob=0.5, edge_drop_scope=scope)
    randomise(model.double()).train()
    torch.manual_seed(1 + rank)
    with torch.no_grad():
        outputs = [model(images(35, 35))["res5"].tolist() for _ in range(12)]
    return outputs, torch.rand(2).tolist()


def test_edges_drop_in_one_process_or_in_all() -> None:
    """Wrong: with EDGE_DROP_SCOPE batch, one process trains without an edge that another keeps, or
    no edge drops; with process, all drop the same; or the key changes the random numbers of
    whatever draws next, such as dropout."""
    (own, numbers), (others, other_numbers) = in_two_processes(_drop_edges_with_others, "process")
    assert own != others, "both processes drew the same edges"
    found = in_two_processes(_drop_edges_with_others, "batch")
    (shared, shared_numbers), (same, same_numbers) = found
    assert shared == same == own, "not the first process's edges in both"
    assert len({str(output) for output in own}) > 3, "the draws do not differ"
    assert (numbers, other_numbers) == (shared_numbers, same_numbers)


def test_networks_without_droppable_edges_train() -> None:
    """Else a network whose nodes all have one input edge fails where an edge should drop."""
    chain = Dag(3, ((0, 1), (1, 2)))
    spec = NetworkSpec("small", 4, "conv3x3", (chain,) * 3)
    features = RandWire(spec, edge_drop_prob=1.0, out_features=["res5"]).train()(
        torch.randn(2, 3, 64, 64)
    )
    assert torch.isfinite(features["res5"]).all()


@pytest.mark.parametrize("init", ["fan_in", "fan_out"])
def test_initialisation_follows_torchs_seed(init: str) -> None:
    """Else a run can't be repeated from its seed."""
    spec = draw_spec("regular", "WS")
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(RandWire(spec, init=init).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["stem.conv.weight"], states[2]["stem.conv.weight"])


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "dag",
    [
        Dag(6, ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))),  # a chain
        Dag(6, ((0, 2), (0, 5), (1, 2), (2, 3), (3, 5))),  # 4 isolated, 0 needed to the end
        Dag(6, ((0, 1), (0, 2), (0, 3), (0, 4), (4, 5))),  # output nodes 1, 2, 3 in the middle
    ],
    ids=["chain", "long edge", "early outputs"],
)
def test_results_are_freed_after_their_last_reader(dag: Dag) -> None:
    """Else memory grows with the number of nodes: when a node starts, only those results may be
    alive that it or a later node reads, and one sum of the output nodes so far."""
    spec = NetworkSpec("small", 4, "sep_conv3x3", (dag,) * 3)
    backbone = RandWire(spec, out_features=["res5"]).eval()
    nodes = backbone.get_submodule("res4").nodes
    order = backbone.get_submodule("res4").plan.order
    results: dict[int, weakref.ref] = {}
    alive: dict[int, set[int]] = {}

    def before(v: int) -> None:
        alive[v] = {u for u, result in results.items() if result() is not None}

    def after(v: int, result: Tensor) -> None:
        results[v] = weakref.ref(result)

    for v, node in enumerate(nodes):
        node.register_forward_pre_hook(lambda module, args, v=v: before(v))
        node.register_forward_hook(lambda module, args, result, v=v: after(v, result))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 64, 64))
    assert len(results) == len(alive) == 6
    for i, v in enumerate(order):
        needed = {u for u in order[:i] if not set(dag.successors[u]) <= set(order[:i])}
        # The first output node's result is the sum as long as it is the only one.
        outputs_so_far = [u for u in dag.output_nodes if u in order[:i]]
        may = needed | set(outputs_so_far if len(outputs_so_far) == 1 else ())
        assert needed <= alive[v] <= may, f"before node {v}"


# ---------------------------------------------------------------- configs and builders


def test_builders_are_registered() -> None:
    """Else a config can't name the backbone, or an FPN hands out other levels than the heads
    expect."""
    cfg = config()
    plain = build_backbone(cfg)
    assert type(plain) is RandWire
    assert {n: s.stride for n, s in plain.output_shape().items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 32,
    }
    assert plain.size_divisibility in (0, 1), "any image size will do"

    cases = [
        ("build_randwire_fpn_backbone", ["res2", "res3", "res4", "res5"], range(2, 7)),
        ("build_randwire_retinanet_fpn_backbone", ["res3", "res4", "res5"], range(3, 8)),
    ]
    for name, in_features, levels in cases:
        cfg.MODEL.BACKBONE.NAME = name
        cfg.MODEL.FPN.IN_FEATURES = in_features
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.FUSE_TYPE = 8, "avg"
        fpn = build_backbone(cfg).eval()
        assert fpn._fuse_type == "avg"
        expected = {f"p{level}": 2**level for level in levels}
        assert {n: s.stride for n, s in fpn.output_shape().items()} == expected
        assert fpn.size_divisibility == 32
        with torch.no_grad():
            features = fpn(torch.zeros(1, 3, 64, 96))
        for level, stride in expected.items():
            assert tuple(features[level].shape) == (1, 8, -(-64 // stride), -(-96 // stride))


def test_the_default_config_is_the_papers_network() -> None:
    """Else a config without options is not C=109, WS(4, 0.75), seed 1, regular."""
    cfg = get_cfg()
    add_randwire_config(cfg)
    cfg.MODEL.RANDWIRE.OUT_FEATURES = ["stem"]  # the spec is whole; the rest need not be built
    cfg.MODEL.BACKBONE.NAME = "build_randwire_backbone"
    cfg.MODEL.DEVICE = "cpu"
    backbone = build_backbone(cfg)
    assert backbone.spec.fingerprint == GOLDEN["1"]["fingerprints"]["regular C=109"]
    assert backbone.edge_drop_prob == 0
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())


def test_python_and_configs_have_the_same_defaults() -> None:
    """Wrong: ``RandWire(spec)``, or a LazyConfig, trains another network than the same words in a
    config. A config's is for pretrained weights."""
    parameters = inspect.signature(RandWire.__init__).parameters.values()
    python = {p.name: p.default for p in parameters if p.default is not p.empty}
    config = RandWire.from_config(get_cfg(), ShapeSpec(channels=3))
    python["out_features"] = list(python["out_features"])
    assert config | {"norm": "BN", "freeze_at": 0} == python | {"spec": config["spec"]}


def test_every_key_reaches_the_network() -> None:
    """Else a config key is ignored."""
    keys = {
        "SEED": 3,
        "WS_K": 2,
        "WS_P": 0.5,
        "NODE_OP": "conv3x3",
        "INIT": "fan_out",
        "EDGE_DROP_PROB": 0.25,
        "EDGE_DROP_SCOPE": "batch",
        "RELU_FEATURES": False,
        "FUSED": "off",
        "RECOMPUTE": True,
        "CUDA_GRAPHS": False,
    }
    backbone = build_backbone(config(**keys, OUT_FEATURES=["res3", "res2"]))
    expected = NetworkGenerator("small", 4, 6, "WS", {"k": 2, "p": 0.5}, "conv3x3")(3)
    assert backbone.spec == expected
    assert (backbone.edge_drop_prob, backbone.edge_drop_scope) == (0.25, "batch")
    assert not backbone.relu_features
    how = {"fused": "off", "recompute": True, "cuda_graphs": False}
    for model in (backbone, RandWireClassifier(expected, 2, **how)):
        stages = [vars(m) for m in model.modules() if isinstance(m, RandWireStage)]
        assert stages and all(how.items() <= stage.items() for stage in stages)
    std = backbone.res3.nodes[0].conv.weight.std().item()
    assert std == pytest.approx((2 / (9 * backbone.output_shape()["res3"].channels)) ** 0.5, 0.3)
    assert list(backbone.output_shape()) == ["res2", "res3"]
    for graph, params in [("ER", {"p": 0.9}), ("BA", {"m": 3})]:
        ((key, value),) = params.items()
        cfg = config(GRAPH=graph, **{f"{graph}.{key.upper()}": value})
        assert build_backbone(cfg).spec == NetworkGenerator("small", 4, 6, graph, params)(1)


def test_spec_file_is_the_network(tmp_path: Path) -> None:
    """Else a network that was drawn elsewhere can't be used, or other keys still change it."""
    spec = draw_spec("regular", "BA", "avg_pool3x3", seed=9)
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json())
    backbone = build_backbone(config(SPEC_FILE=str(path), CHANNELS=1, GRAPH="none", SEED=5))
    assert backbone.spec == spec
    built = sum(p.numel() for p in backbone.parameters())
    stages = complexity(spec).stages
    assert built == sum(stages[name].params for name in NAMES)


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"REGIME": "huge"}, ["MODEL.RANDWIRE", "regime", "'huge'", "small"]),
        ({"CHANNELS": 1}, ["MODEL.RANDWIRE", "channels", "at least 2", "1"]),
        ({"NUM_NODES": 0}, ["MODEL.RANDWIRE", "num_nodes", "at least 1", "0"]),
        ({"GRAPH": "XX"}, ["MODEL.RANDWIRE", "graph", "'XX'", "'WS'"]),
        ({"WS_K": 3}, ["MODEL.RANDWIRE", "WS", "K=3", "even"]),
        ({"WS_P": 1.5}, ["MODEL.RANDWIRE", "WS", "P=1.5", "0 <= P <= 1"]),
        ({"NODE_OP": "conv5x5"}, ["node_op", "'conv5x5'", "sep_conv3x3"]),
        ({"NORM": "XN"}, ["norm", "'XN'", "FrozenBN"]),
        ({"OUT_FEATURES": ["res9"]}, ["out_features", "res9", "res5"]),
        ({"EDGE_DROP_PROB": 2.0}, ["edge_drop_prob", "0 … 1", "2.0"]),
        ({"SPEC_FILE": "/no/such/file"}, ["MODEL.RANDWIRE.SPEC_FILE", "/no/such/file"]),
        ({"SPEC_FILE": __file__}, ["MODEL.RANDWIRE.SPEC_FILE", __file__, "NetworkSpec"]),
    ],
)
def test_bad_configs_name_the_key(keys: dict[str, Any], says: list[str]) -> None:
    """Else the author of a config must guess which key is wrong, and what it may be."""
    with pytest.raises(ValueError) as error:
        build_backbone(config(**keys))
    message = str(error.value)
    assert all(words.lower() in message.lower() for words in says), message


@pytest.mark.parametrize(
    "name, out_features",
    [
        ("build_randwire_fpn_backbone", ["res3", "res4", "res5"]),
        ("build_randwire_retinanet_fpn_backbone", ["res2", "res3"]),
    ],
)
def test_an_fpn_without_its_features_is_refused(name: str, out_features: list[str]) -> None:
    """Else an FPN that reads features which are not handed out fails with a bare KeyError."""
    cfg = config(OUT_FEATURES=out_features)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.IN_FEATURES.*MODEL\.RANDWIRE\.OUT_FEATURES"):
        build_backbone(cfg)


def test_a_config_that_was_made_before_the_import_is_refused() -> None:
    """Else a script that imports randwire_d2 after get_cfg() ends in "AttributeError: RANDWIRE"."""
    cfg = config()
    del cfg.MODEL["RANDWIRE"]
    with pytest.raises(ValueError, match=r"import randwire_d2 before get_cfg\(\)"):
        build_backbone(cfg)


def test_a_frozen_norm_without_weights_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Else a project with a trainer of its own sees its loss diverge, and no word of why."""
    cfg = config()
    with mock.patch.object(logging.getLogger("randwire_d2"), "propagate", True):
        for norm, weights in [("BN", ""), ("FrozenBN", "backbone.pth")]:
            cfg.MODEL.RANDWIRE.NORM, cfg.MODEL.WEIGHTS = norm, weights
            build_backbone(cfg)
        assert not caplog.records
        cfg.MODEL.WEIGHTS = ""
        build_backbone(cfg)
    assert "FrozenBN" in caplog.text


# ---------------------------------------------------------------- what users do with modules


def test_trace_agrees() -> None:
    """Else the backbone can't be exported, or the trace holds for the size it was made with."""
    backbone = randomise(RandWire(draw_spec("regular", "WS"), out_features=NAMES)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(backbone, torch.randn(1, 3, 64, 64), strict=False)
        for size in [(64, 64), (97, 131)]:
            x = torch.randn(2, 3, *size)
            expected = backbone(x)
            features = traced(x)
            for name in NAMES:  # the trace is of torch's own operators
                torch.testing.assert_close(features[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("node_op", NODE_OPS)
def test_autocast(node_op: str) -> None:
    """Else mixed precision fails, or weighted sums run in another precision than convolutions."""
    backbone = randomise(RandWire(draw_spec("small", "WS", node_op), out_features=["res5"]))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        backbone.eval()  # a batch norm of so few pixels would blow up the rounding
        expected = backbone(x)["res5"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = backbone(x)["res5"]
    assert ((out - expected).norm() / expected.norm()).item() < 0.1
    backbone.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = backbone(x)["res5"]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_deepcopy_is_independent() -> None:
    """Else a copy, such as an averaged model, shares weights with the original or differs."""
    model = randomise(RandWireClassifier(draw_spec("regular", "WS"), 4)).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 40, 40)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert copy.deepcopy(model.backbone.spec) == model.backbone.spec


@pytest.mark.parametrize("assign", [False, True])
def test_weights_for_a_network_built_on_meta(assign: bool) -> None:
    """Else what is built without memory, and given its weights afterwards, has no edges."""
    spec = draw_spec("regular", "WS")
    model = randomise(RandWireClassifier(spec, 4)).eval()
    with torch.device("meta"):
        late = RandWireClassifier(spec, 4).eval()
    if not assign:
        late.to_empty(device="cpu")
    late.load_state_dict(model.state_dict(), assign=assign)
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(late(x), model(x))


def _load_and_run(pickled: bytes) -> tuple[str, list]:
    """In another process: load a model, check that its spec is whole, run it."""
    model, x = pickle.loads(pickled)
    with torch.no_grad():
        return model.backbone.spec.fingerprint, model(x).tolist()


@pytest.mark.slow
def test_models_travel_to_other_processes() -> None:
    """Else a model or its spec can't be handed to a spawned process, as launch and loaders do."""
    model = randomise(RandWireClassifier(draw_spec("small", "BA"), 4)).eval()
    x = torch.randn(1, 3, 40, 40)
    spec = pickle.loads(pickle.dumps(model.backbone.spec))
    assert spec == model.backbone.spec
    assert spec.fingerprint == model.backbone.spec.fingerprint
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        fingerprint, logits = pool.apply(_load_and_run, (pickle.dumps((model, x)),))
    assert fingerprint == spec.fingerprint
    torch.testing.assert_close(torch.tensor(logits), model(x), rtol=1e-4, atol=1e-5)
