"""The built networks compute what the paper's sentences say: values, gradients, statistics."""

import oracle
import pytest
import torch
from helpers import (
    GRAPHS,
    NODE_OPS,
    PATHS,
    SEEDS,
    assert_same,
    assert_same_gradients,
    ba,
    draw_spec,
    er,
    images,
    leaves,
    randomise,
    ws,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from randwire_d2 import NetworkSpec, RandWire, RandWireClassifier
from randwire_d2.wiring import Dag, random_graph


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "node_op, path",
    [(op, "plain") for op in NODE_OPS] + [("sep_conv3x3", path) for path in ("fused", "recompute")],
)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_classifier_is_the_oracle(
    regime: str, graph: str, node_op: str, path: str, train: bool, device: torch.device
) -> None:
    """Else a node, a stage, the classifier or a gradient is not the paper's, on one of the paths:
    their gradients, in eval mode those of norms too, and running statistics."""
    spec = draw_spec(regime, graph, node_op, seed=len(node_op))
    model = RandWireClassifier(spec, 5, dropout=0.0, edge_drop_prob=0.0, **PATHS[path])
    randomise(model.double()).to(device).train(train)
    state = leaves(model)
    # Batch norms over a handful of pixels would blow up the rounding of both.
    x, x_oracle = (images(69, 77, device).requires_grad_() for _ in range(2))

    logits = model(x)
    expected = oracle.classifier(spec, state, x_oracle, train=train)
    assert_same(logits, expected.logits, "logits")

    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected.logits * weights).sum().backward()
    assert_same_gradients(model, x, state, x_oracle)

    after = model.state_dict()
    running = {name for name in after if "running" in name}
    assert set(expected.running) == (running if train else set())
    for name in running:
        assert_same(after[name], expected.running.get(name, state[name]), name)


@pytest.mark.parametrize("size", [(1, 1), (32, 64), (33, 31), (97, 131)])
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_every_feature_is_the_oracle(
    regime: str, size: tuple[int, int], device: torch.device
) -> None:
    """Else a feature is handed out before or after it should be, or a border is treated wrongly."""
    spec = draw_spec(regime, "WS", seed=2)
    names = ("stem", "res2", "res3", "res4", "res5")
    model = RandWire(spec, out_features=names, relu_features=False)
    randomise(model.double()).to(device).eval()
    x = images(*size, device)
    features = model(x)
    expected = oracle.backbone(spec, model.state_dict(), x, train=False).features
    assert list(features) == list(expected) == list(names)
    for name in names:
        assert_same(features[name], expected[name], name)


@pytest.mark.parametrize("freeze_at", [1, 3])
def test_frozen_parts_use_running_statistics(freeze_at: int) -> None:
    """Else a frozen stage still normalises by the batch, or a live one no longer does."""
    spec = draw_spec("regular", "BA")
    model = RandWire(spec, out_features=["res5"], relu_features=False)
    randomise(model.double()).freeze(freeze_at).train()
    state = leaves(model)
    frozen = ("stem", "res2", "res3", "res4", "res5")[:freeze_at]
    expected = oracle.backbone(spec, state, images(), train=True, frozen=frozen)
    assert_same(model(images())["res5"], expected.features["res5"], "res5")
    after = model.state_dict()
    for name in after:
        if "running" in name:
            assert_same(after[name], expected.running.get(name, state[name]), name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("edges", [(), ((1, 3),)], ids=["all isolated", "two isolated"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_isolated_nodes_are_input_and_output(
    edges: tuple[tuple[int, int], ...], train: bool, path: str, device: torch.device
) -> None:
    """Else a disconnected graph loses its isolated nodes, or fails to run."""
    spec = NetworkSpec("small", 4, "sep_conv3x3", (Dag(4, edges),) * 3)
    model = RandWire(spec, out_features=["res5"], relu_features=False, **PATHS[path])
    randomise(model.double()).to(device).train(train)
    state = leaves(model)
    x, x_oracle = (images(device=device).requires_grad_() for _ in range(2))
    out = model(x)["res5"]
    expected = oracle.backbone(spec, state, x_oracle, train=train).features["res5"]
    assert_same(out, expected, "res5")
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(model, x, state, x_oracle)


@settings(max_examples=40)
@given(
    st.one_of(er(16), er(16), ba(16), ws(16)),
    SEEDS,
    st.sampled_from([*((op, "plain") for op in NODE_OPS), ("sep_conv3x3", "fused")]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_graph_is_the_oracle(
    drawn: tuple, seed: int, node: tuple[str, str], size: tuple[int, int]
) -> None:
    """Else some wiring, disconnected ER graphs among them, or some image size does not run, or
    computes something else."""
    model_name, n, params = drawn
    dag = Dag.from_graph(random_graph(model_name, n, seed, **params))
    node_op, path = node
    spec = NetworkSpec("small", 4, node_op, (dag,) * 3)
    model = RandWire(spec, out_features=["res5"], relu_features=False, **PATHS[path])
    randomise(model.double()).eval()
    expected = oracle.backbone(spec, model.state_dict(), images(*size), train=False)
    with torch.no_grad():
        assert_same(model(images(*size))["res5"], expected.features["res5"], "res5")
