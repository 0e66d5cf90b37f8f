"""Graphs, DAGs, symbolic networks: what the paper says of them, and what a wrong value gets."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, asdict, replace
from itertools import combinations
from statistics import mean
from typing import Any

import networkx as nx
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from helpers import GOLDEN, ROOT, SEEDS, ba, er, output_of, raises_one_line, ws
from hypothesis import assume, given
from hypothesis import strategies as st

from randwire_d2 import NetworkGenerator, NetworkSpec, RandWire, add_randwire_config, complexity
from randwire_d2.config import detector_config, merge_text
from randwire_d2.engine import argument_parser, read_config
from randwire_d2.wiring import GRAPH_REGISTRY, Dag, graph_label, parse_graph, random_graph

# Imports randwire_d2.wiring alone: the package's own __init__ needs torch and Detectron2.
WIRING_ALONE = f"""
import sys, types
package = types.ModuleType("randwire_d2")
package.__path__ = [{str(ROOT / "randwire_d2")!r}]
sys.modules["randwire_d2"] = package
from randwire_d2.wiring import NetworkGenerator
"""


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    """Symbolic networks from so small a space that two of them are often equal."""
    regime, num_dags = draw(st.sampled_from([("small", 3), ("regular", 4)]))
    dags = st.sampled_from([Dag(1, ()), Dag(2, ()), Dag(2, ((0, 1),))])
    return NetworkSpec(
        regime,
        draw(st.integers(2, 3)),
        draw(st.sampled_from(["sep_conv3x3", "conv3x3"])),
        tuple(draw(dags) for _ in range(num_dags)),
    )


def reachable(starts: list[int], edges: set[tuple[int, int]]) -> set[int]:
    seen, waiting = set(starts), list(starts)
    while waiting:
        node = waiting.pop()
        new = {v for u, v in edges if u == node} - seen
        seen |= new
        waiting += new
    return seen


@contextmanager
def registered(registry: Registry, *functions: Callable[..., Any]) -> Iterator[None]:
    """Register functions, and forget them afterwards."""
    for function in functions:
        registry.register()(function)
    try:
        yield
    finally:
        for function in functions:
            del registry._obj_map[function.__name__]


# ---------------------------------------------------------------- the three graph models


@given(ba(), SEEDS)
def test_ba_has_exactly_m_times_n_minus_m_edges(drawn: tuple, seed: int) -> None:
    """Else BA is not §3.3's: "exactly M·(N−M) edges"."""
    model, n, params = drawn
    assert random_graph(model, n, seed, **params).number_of_edges() == params["m"] * (
        n - params["m"]
    )


@given(ba(), SEEDS)
def test_ba_is_indexed_in_the_order_of_adding(drawn: tuple, seed: int) -> None:
    """Else nodes are not indexed as in the appendix: the initial M, without edges among them, then
    the others in the order of adding, each of which brings M edges to nodes that exist already."""
    model, n, params = drawn
    m = params["m"]
    dag = Dag.from_graph(random_graph(model, n, seed, **params))
    assert dag.input_nodes == tuple(range(m)), "initial nodes have edges among them"
    assert dag.predecessors[m] == tuple(range(m)), "the first added node needs all M initial ones"
    assert all(len(dag.predecessors[v]) == m for v in range(m, n)), "a node adds M new edges"


def test_ba_prefers_nodes_of_high_degree() -> None:
    """Else new nodes don't join "with probability proportional to v's degree": node 3 of BA(1)
    joins node 0 or 1, whichever node 2 joined or not, with degrees that differ by the draw."""
    to_hub = []
    for seed in range(600):
        graph = random_graph("BA", 4, seed, m=1)
        (target,) = (u for u in graph[3])
        degrees = {node: graph.degree[node] - (node == target) for node in range(3)}
        to_hub.append(degrees[target] == max(degrees.values()))
    assert 0.45 < mean(to_hub) < 0.55  # degrees are 2, 1, 1; without preference a third


@given(ws(), SEEDS)
def test_ws_has_exactly_half_n_times_k_edges(drawn: tuple, seed: int) -> None:
    """Else rewiring loses, doubles or adds edges."""
    model, n, params = drawn
    graph = random_graph(model, n, seed, **params)
    assert graph.number_of_edges() == n * params["k"] // 2
    assert nx.number_of_selfloops(graph) == 0


@given(ws(), SEEDS)
def test_ws_without_rewiring_is_the_ring_in_clockwise_order(drawn: tuple, seed: int) -> None:
    """Else WS is not indexed "sequentially in the clockwise order", or P=0 rewires."""
    _, n, params = drawn
    dag = Dag.from_graph(random_graph("WS", n, seed, k=params["k"], p=0))
    ring = {
        tuple(sorted((v, (v + i) % n))) for v in range(n) for i in range(1, params["k"] // 2 + 1)
    }
    assert set(dag.edges) == ring


def test_ws_rewires_each_edge_with_probability_p() -> None:
    """Else P is not the probability of rewiring: of 2N edges, P·2N leave the ring (a rewired edge
    seldom lands on the ring again)."""
    ring = {tuple(sorted((v, (v + i) % 32))) for v in range(32) for i in (1, 2)}
    for p in (0.25, 0.75):
        left = [
            len(set(Dag.from_graph(random_graph("WS", 32, seed, k=4, p=p)).edges) - ring) / 64
            for seed in range(60)
        ]
        assert 0.85 * p < mean(left) < 1.05 * p


def test_er_draws_each_edge_with_probability_p() -> None:
    """Else P is not the probability of an edge, or 0 and 1 are not never and always."""
    assert random_graph("ER", 9, 1, p=0).number_of_edges() == 0
    assert random_graph("ER", 9, 1, p=1).number_of_edges() == 36
    counts = [random_graph("ER", 32, seed, p=0.2).number_of_edges() for seed in range(60)]
    assert 0.19 < mean(counts) / 496 < 0.21


@given(st.one_of(er(), ba(), ws()), SEEDS)
def test_every_node_lies_on_a_path_from_input_to_output(drawn: tuple, seed: int) -> None:
    """Else a node computes something that is lost, or reads nothing; and Dag's views disagree."""
    model, n, params = drawn
    dag = Dag.from_graph(random_graph(model, n, seed, **params))
    edges = set(dag.edges)
    inputs = [v for v in range(n) if not any(target == v for _, target in edges)]
    outputs = [u for u in range(n) if not any(source == u for source, _ in edges)]
    assert reachable(inputs, edges) == set(range(n))
    assert reachable(outputs, {(v, u) for u, v in edges}) == set(range(n))
    assert dag.input_nodes == tuple(inputs)
    assert dag.output_nodes == tuple(outputs)
    assert {(u, v) for v in range(n) for u in dag.predecessors[v]} == edges
    assert {(u, v) for u in range(n) for v in dag.successors[u]} == edges
    assert dag.edges == tuple(sorted(edges))
    assert all(list(nodes) == sorted(nodes) for nodes in (*dag.predecessors, *dag.successors))


@given(st.one_of(er(), ba(), ws()), SEEDS)
def test_a_graph_is_a_function_of_its_seed(drawn: tuple, seed: int) -> None:
    """Else a seed names no network."""
    model, n, params = drawn
    first, second = (Dag.from_graph(random_graph(model, n, seed, **params)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("model, params", [("ER", {"p": 0.3}), ("BA", {"m": 3})])
def test_seeds_differ(model: str, params: dict[str, Any]) -> None:
    """Else the seed is ignored."""
    drawn = {Dag.from_graph(random_graph(model, 20, seed, **params)) for seed in range(10)}
    assert len(drawn) == 10


# ---------------------------------------------------------------- Dag


def test_dag_sorts_its_edges_and_is_a_frozen_value() -> None:
    """Else equal wirings compare unequal, or a wiring changes under a network built from it."""
    dag = Dag(4, ((1, 3), (0, 2), (0, 1)))
    assert dag.edges == ((0, 1), (0, 2), (1, 3))
    assert dag == Dag(4, ((0, 1), (1, 3), (0, 2)))
    assert hash(dag) == hash(Dag(4, ((0, 1), (1, 3), (0, 2))))
    with pytest.raises(FrozenInstanceError):
        dag.num_nodes = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "num_nodes, edges, says",
    [
        (0, (), ["num_nodes must be at least 1; got 0"]),
        (-3, (), ["num_nodes must be at least 1; got -3"]),
        (3, ((1, 1),), ["(1, 1)", "smaller index to a larger"]),
        (3, ((2, 1),), ["(2, 1)", "smaller index to a larger"]),
        (3, ((0, 3),), ["(0, 3)", "0 … 2"]),
        (3, ((-1, 2),), ["(-1, 2)", "0 … 2"]),
        (3, ((0, 1), (1, 2), (0, 1)), ["(0, 1)", "twice"]),
        (3, ((0, 1, 2),), ["(0, 1, 2)", "pair"]),
        (3, ((0,),), ["(0,)", "pair"]),
        (3, (7,), ["7", "pair"]),
        (3, ((0, "x"),), ["(0, 'x')", "pair"]),
        (3, ((0, 1.5),), ["(0, 1.5)", "pair"]),
        (2.5, (), ["num_nodes", "integer", "2.5"]),
        (257, tuple(combinations(range(257), 2)), ["edges", "at most 32,768", "got 32,896"]),
    ],
)
def test_dag_refuses(num_nodes: Any, edges: Any, says: list[str]) -> None:
    """Else a wiring that is none gets built, or its author isn't told what is wrong with it."""
    with pytest.raises(ValueError) as error:
        Dag(num_nodes, edges)
    assert all(words in str(error.value) for words in says), error.value


# ---------------------------------------------------------------- NetworkGenerator, NetworkSpec


def test_the_five_networks_of_the_paper_are_pinned() -> None:
    """Else WS(4, 0.75) of seeds 1 … 5 are no longer the networks that weights were trained for."""
    assert sorted(GOLDEN) == ["1", "2", "3", "4", "5"]
    for seed, golden in GOLDEN.items():
        dags = {
            n: Dag(int(n), tuple((u, v) for u, v in edges)) for n, edges in golden["edges"].items()
        }
        for n, dag in dags.items():
            assert Dag.from_graph(random_graph("WS", int(n), int(seed), k=4, p=0.75)) == dag
        for name, fingerprint in golden["fingerprints"].items():
            regime, channels = name.split(" C=")
            spec = NetworkGenerator(regime, int(channels))(int(seed))
            wiring = (dags["32"],) * 3 if regime == "small" else (dags["16"],) + (dags["32"],) * 3
            assert spec.dags == wiring, "a stage was not drawn with the network's own seed"
            assert spec.fingerprint == fingerprint, "the canonical JSON changed"


@pytest.mark.parametrize(
    "graph, params, fingerprint",
    [
        ("ER", {"p": 0.2}, "8e445bdb4c7e184d7de999fcd7a2072308072d8571a72a5e6b7ca4324cf35fd5"),
        ("BA", {"m": 5}, "251cd0b5fd8fd8e11bc91e2f13d0a1d09cb40efcd2750c1d9d91e38102277261"),
    ],
)
def test_other_generators_are_pinned_too(
    graph: str, params: dict[str, Any], fingerprint: str
) -> None:
    """Else a seed of ER(0.2) or BA(5) names another network than before (C=78, small, seed 1)."""
    assert NetworkGenerator("small", 78, 32, graph, params)(1).fingerprint == fingerprint


@pytest.mark.parametrize(
    "regime, convs, stages",
    [
        (
            "small",
            [("stem", 3, 7), ("res2", 7, 15)],
            [("res3", 15, 15, 12), ("res4", 15, 30, 12), ("res5", 30, 60, 12)],
        ),
        (
            "regular",
            [("stem", 3, 7)],
            [("res2", 7, 15, 6), ("res3", 15, 30, 12), ("res4", 30, 60, 12), ("res5", 60, 120, 12)],
        ),
    ],
)
def test_stages_are_those_of_table_1(regime: str, convs: list, stages: list) -> None:
    """Else a stage has not the channels or nodes of Table 1 (C=15, N=12; C/2 rounded down)."""
    spec = NetworkGenerator(regime, 15, 12)(3)
    assert [(c.name, c.in_channels, c.channels) for c in spec.convs] == convs
    assert [(s.name, s.in_channels, s.channels, s.dag.num_nodes) for s in spec.stages] == stages


def test_a_generator_is_a_frozen_value() -> None:
    """Else it draws other networks than before once somebody changes a dictionary, or can't be a
    key, a copy or a message to another process."""
    params: dict[str, Any] = {"k": 4, "p": 0.75}
    generator = NetworkGenerator("small", graph_params=params)
    params["p"] = 0.0
    changes: list[Callable[[Any], Any]] = [
        lambda p: p.update(p=0.0),
        lambda p: p.__setitem__("p", 0.0),
        lambda p: p.__delitem__("p"),
        lambda p: p.setdefault("m", 1),
        lambda p: p.__ior__({"p": 0.0}),
        lambda p: p.pop("p"),
        lambda p: p.popitem(),
        lambda p: p.clear(),
    ]
    for change in changes:
        with pytest.raises(TypeError, match=r"can't be changed; dataclasses\.replace"):
            change(generator.graph_params)
    same = [
        NetworkGenerator("small"),
        NetworkGenerator("small", graph_params={"p": 0.75, "k": 4.0}),
        copy.copy(generator),
        copy.deepcopy(generator),
        pickle.loads(pickle.dumps(generator)),
        replace(generator),
        NetworkGenerator(**asdict(generator)),
        NetworkGenerator(**json.loads(json.dumps(asdict(generator)))),
    ]
    for other in same:
        assert other == generator and hash(other) == hash(generator)
        with pytest.raises(TypeError, match="can't be changed"):
            other.graph_params["p"] = 0.0  # type: ignore[index]
    other = replace(generator, graph_params={"k": 4, "p": 0.5})
    assert len({*same, generator, other}) == 2
    assert generator.graph_params == {"k": 4, "p": 0.75}


def test_half_of_an_odd_n_is_rounded_down() -> None:
    """Else conv2 of the regular regime has (N+1)/2 nodes where N is odd."""
    assert [dag.num_nodes for dag in NetworkGenerator("regular", 4, 13)(1).dags] == [6, 13, 13, 13]


def test_one_node_networks_exist() -> None:
    """Else N=1 fails in the regular regime, where conv2 has N/2 nodes."""
    spec = NetworkGenerator("regular", 2, 1, "ER", {"p": 0.5})(0)
    assert [dag.num_nodes for dag in spec.dags] == [1, 1, 1, 1]


@given(specs())
def test_json_gives_the_spec_back(spec: NetworkSpec) -> None:
    """Else a checkpoint's spec is not the one that was saved, or its text is not canonical."""
    again = NetworkSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert again.fingerprint == spec.fingerprint
    assert hash(again) == hash(spec)


@given(st.one_of(er(), ba(), ws()), SEEDS, st.sampled_from(["small", "regular"]))
def test_json_gives_drawn_networks_back(drawn: tuple, seed: int, regime: str) -> None:
    """Else what networkx draws does not survive JSON: another integer type, another order."""
    model, n, params = drawn
    generator = NetworkGenerator(regime, 6, n, model, params)
    try:
        spec = generator(seed)
    except ValueError:
        assume(False)  # conv2's N/2 nodes may be too few for K or M
    assert NetworkSpec.from_json(spec.to_json()) == spec
    assert NetworkSpec.from_json(json.dumps(json.loads(spec.to_json()), indent=1)) == spec


@given(specs(), specs())
def test_fingerprints_are_equal_exactly_if_specs_are(a: NetworkSpec, b: NetworkSpec) -> None:
    """Else weights of one wiring load into another, or into their own they don't."""
    assert (a.fingerprint == b.fingerprint) == (a == b)
    assert len(a.fingerprint) == 64


def test_fingerprint_sees_every_field_and_only_the_network() -> None:
    """Else two networks share a fingerprint, or one has two because of the way it was drawn."""
    theta = {"regime": "regular", "channels": 8, "num_nodes": 12, "node_op": "sep_conv3x3"}
    base = NetworkGenerator(**theta)(1)
    others = [
        NetworkGenerator(**{**theta, "channels": 9})(1),
        NetworkGenerator(**{**theta, "regime": "small"})(1),
        NetworkGenerator(**{**theta, "node_op": "conv3x3"})(1),
        NetworkGenerator(**{**theta, "num_nodes": 13})(1),
        NetworkGenerator(**theta)(2),
    ]
    assert len({spec.fingerprint for spec in [base, *others]}) == 6
    shuffled = tuple(Dag(dag.num_nodes, dag.edges[::-1]) for dag in base.dags)
    same = NetworkSpec("regular", 8, "sep_conv3x3", shuffled)
    assert same.fingerprint == base.fingerprint


def test_a_fresh_process_draws_the_same_networks_without_torch() -> None:
    """Else a network depends on the process that drew it (hash order, global random state), or the
    wiring needs torch or Detectron2."""
    script = (
        WIRING_ALONE
        + """
for graph, params in [("ER", {"p": 0.2}), ("BA", {"m": 5}), ("WS", {"k": 4, "p": 0.75})]:
    for regime in ("small", "regular"):
        print(NetworkGenerator(regime, 16, 32, graph, params)(7).fingerprint)
heavy = {"torch", "torchvision", "detectron2"} & set(sys.modules)
assert not heavy, f"randwire_d2.wiring imports {heavy}"
"""
    )
    here = [
        NetworkGenerator(regime, 16, 32, graph, params)(7).fingerprint
        for graph, params in [("ER", {"p": 0.2}), ("BA", {"m": 5}), ("WS", {"k": 4, "p": 0.75})]
        for regime in ("small", "regular")
    ]
    for hash_seed in ("0", "1234"):
        assert output_of(script, PYTHONHASHSEED=hash_seed).split() == here


GENERATOR = {"regime": "regular", "channels": 8, "num_nodes": 16}


@pytest.mark.parametrize(
    "theta, says",
    [
        ({"graph_params": 4}, ["graph_params", "mapping", "4"]),
        ({"graph_params": {"k": 3, "p": 0.5}}, ["WS", "even", "K=3"]),
        ({"graph_params": {"k": 0, "p": 0.5}}, ["0 < K", "K=0"]),
        ({"graph_params": {"k": 4.0, "p": 0.5}}, ["WS's K must be an integer; got 4.0"]),
        ({"graph": "BA", "graph_params": {"m": "2"}}, ["BA's M must be an integer; got '2'"]),
        ({"graph_params": {"k": -2, "p": 0.5}}, ["0 < K", "K=-2"]),
        (
            {"graph_params": {"k": 8, "p": 0.5}},
            ["K < N", "N=8", "res2", "half of num_nodes 16"],
        ),
        ({"graph_params": {"k": 16, "p": 0.5}, "regime": "small"}, ["K < N", "K=16", "N=16"]),
        ({"graph_params": {"k": 4, "p": 1.01}}, ["0 <= P <= 1", "P=1.01"]),
        ({"graph_params": {"k": 4, "p": -0.1}}, ["0 <= P <= 1", "P=-0.1"]),
        ({"graph_params": {"k": 4, "p": float("nan")}}, ["0 <= P <= 1", "P=nan"]),
        ({"graph": "ER", "graph_params": {"p": 1.5}}, ["ER", "0 <= P <= 1", "P=1.5"]),
        ({"graph": "ER", "graph_params": {"p": -1}}, ["0 <= P <= 1", "P=-1"]),
        ({"graph": "BA", "graph_params": {"m": 0}}, ["BA", "1 <= M < N", "M=0"]),
        ({"graph": "BA", "graph_params": {"m": 8}}, ["1 <= M < N", "M=8", "N=8", "res2"]),
        ({"graph": "BA", "graph_params": {"m": -1}}, ["1 <= M < N", "M=-1"]),
        ({"graph_params": {"k": 4}}, ["WS", "['k', 'p']", "{'k': 4}"]),
        ({"graph_params": {"k": 4, "p": 0.5, "m": 2}}, ["['k', 'p']", "'m': 2"]),
        ({"graph": "BA", "graph_params": {"p": 0.5}}, ["BA", "['m']", "{'p': 0.5}"]),
        ({"graph": "XX"}, ["'XX'", "'BA', 'ER', 'NAS', 'WS'"]),
        ({"regime": "huge"}, ["'huge'", "regular", "small"]),
        ({"regime": ["small"]}, ["['small']", "regular"]),
        ({"channels": 1}, ["channels (C)", "at least 2", "got 1"]),
        ({"channels": 0}, ["channels (C)", "at least 2", "got 0"]),
        ({"channels": 8.5}, ["channels (C)", "integer", "got 8.5"]),
        ({"num_nodes": 0}, ["num_nodes (N)", "at least 1", "got 0"]),
        ({"num_nodes": -4}, ["num_nodes (N)", "at least 1", "got -4"]),
        ({"num_nodes": 16.5}, ["num_nodes (N)", "integer", "got 16.5"]),
    ],
)
def test_generator_refuses(theta: dict[str, Any], says: list[str]) -> None:
    """Else a wrong parameter draws some other network, or its error hides the value or limit."""
    with pytest.raises(ValueError) as error:
        NetworkGenerator(**{**GENERATOR, **theta})(1)
    assert all(words in str(error.value) for words in says), error.value
    assert ("half of num_nodes" in str(error.value)) == ("res2 of" in str(error.value))


@pytest.mark.parametrize("graph", ["XX", ["WS"], None])
def test_a_generator_of_an_unknown_graph_is_not_made(graph: Any) -> None:
    """Else the misprint is told where the generator is called, in another place of a program."""
    with pytest.raises(ValueError, match=r"unknown graph model .*; registered are \['BA', 'ER'"):
        NetworkGenerator(graph=graph)


@pytest.mark.parametrize("seed", [None, 1.5, "1"])
def test_a_seed_is_an_integer(seed: Any) -> None:
    """Else a seed names no network: None draws another one each time."""
    with pytest.raises(ValueError, match=rf"seed \(s\) must be an integer; got {seed!r}"):
        NetworkGenerator()(seed)


def test_a_seed_is_not_negative() -> None:
    """Else -1, which Detectron2's SEED takes for a random one, silently draws seed 1's network."""
    with raises_one_line(ValueError, match=r"^seed \(s\) must be at least 0; got -1, .* seed 1$"):
        NetworkGenerator()(-1)


@pytest.mark.parametrize(
    "num_nodes, says",
    [(0, "must be at least 1; got 0"), (1025, "at most 1,024; got 1,025")],
)
def test_random_graph_refuses_no_nodes_and_too_many(num_nodes: int, says: str) -> None:
    """Else a graph without nodes is drawn, or one that takes hours, by draw_wiring.py."""
    with pytest.raises(ValueError, match=says):
        random_graph("ER", num_nodes, 1, p=0.5)


@pytest.mark.parametrize("node_op", ["conv5x5", ""])
def test_an_unknown_node_op_is_refused(node_op: str) -> None:
    """Else a misspelt node operation is found late, without the names that exist."""
    spec = NetworkGenerator(**GENERATOR, node_op=node_op)(1)
    for use in (lambda: RandWire(spec), lambda: complexity(spec)):
        with pytest.raises(ValueError, match="sep_conv3x3") as error:
            use()
        assert repr(node_op) in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.update(regime="huge"), ["'huge'", "regular"]),
        (lambda s: s.update(channels=1), ["at least 2", "got 1"]),
        (lambda s: s.update(channels="8"), ["integer", "'8'"]),
        (lambda s: s.update(channels=8.0), ["integer", "8.0"]),
        (lambda s: s.update(format=99), ["99", "known is 1"]),
        (lambda s: s.pop("format"), ["'format'", "missing"]),
        (lambda s: s.pop("node_op"), ["'node_op'", "missing"]),
        (lambda s: s["stages"].pop(), ["3", "res3, res4, res5", "got 2"]),
        (lambda s: s["stages"][0].pop("num_nodes"), ["'num_nodes'", "missing"]),
        (lambda s: s["stages"][0]["edges"].append([0, 1]), ["(0, 1)", "twice"]),
        (lambda s: s["stages"][0]["edges"].append([0, 12]), ["(0, 12)", "0 … 11"]),
        (lambda s: s["stages"][0]["edges"].append([3]), ["[3]", "pair"]),
        (lambda s: s["stages"][0]["edges"].append(None), ["None", "pair"]),
        (lambda s: s["stages"][0].update(num_nodes=0), ["num_nodes", "got 0"]),
        (lambda s: s["stages"][0].update(num_nodes="12"), ["num_nodes", "integer", "'12'"]),
        (lambda s: s.update(stages=None), ["NetworkSpec"]),
        (lambda s: s.update(num_nodes=32), ["'num_nodes' is unknown", "known are format, regime"]),
        (lambda s: s["stages"][0].update(channels=9), ["'channels' is unknown; known are num_nod"]),
    ],
)
def test_json_of_no_network_is_refused(change: Callable[[dict], Any], says: list[str]) -> None:
    """Else a damaged file becomes another network, or an error that doesn't say what is wrong."""
    spec = json.loads(NetworkGenerator("small", 8, 12)(1).to_json())
    spec["stages"][0]["edges"] = [[0, 1]]
    change(spec)
    with pytest.raises(ValueError, match="not the JSON of a NetworkSpec") as error:
        NetworkSpec.from_json(json.dumps(spec))
    assert all(words in str(error.value) for words in says), error.value


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"format": 1}', "MODEL: {}"])
def test_text_that_is_no_spec_is_refused(text: str) -> None:
    """Else an empty or truncated file fails with an error that names no cause."""
    with pytest.raises(ValueError, match="not the JSON of a NetworkSpec"):
        NetworkSpec.from_json(text)


# ---------------------------------------------------------------- the registry


def LINE(num_nodes: int, seed: int, step: int) -> nx.Graph:
    """A user's own model: chains in steps of ``step``, and one more edge for odd seeds."""
    graph = nx.empty_graph(num_nodes)
    graph.add_edges_from((i, i + step) for i in range(num_nodes - step))
    if seed % 2:
        graph.add_edge(num_nodes - 1, 0)
    return graph


def ONE_SHORT(num_nodes: int, seed: int) -> nx.Graph:
    return nx.empty_graph(num_nodes - 1)


def DIRECTED(num_nodes: int, seed: int) -> nx.Graph:
    return nx.gn_graph(num_nodes, seed=seed)


def NOTHING(num_nodes: int, seed: int) -> Any:
    nx.empty_graph(num_nodes)


def test_a_users_graph_model_is_reachable_from_a_config() -> None:
    """Else a project can't use its own generator without changing this one."""
    with registered(GRAPH_REGISTRY, LINE):
        expected = NetworkGenerator("small", 4, 5, "LINE", {"step": 2})(1)
        assert expected.dags[0].edges == ((0, 2), (0, 4), (1, 3), (2, 4))

        cfg = get_cfg()
        add_randwire_config(cfg)
        cfg.MODEL.RANDWIRE.LINE = CfgNode({"STEP": 1})
        options = {"REGIME": "small", "CHANNELS": 4, "NUM_NODES": 5, "GRAPH": "LINE"}
        for key, value in {**options, "LINE.STEP": 2}.items():
            cfg.merge_from_list([f"MODEL.RANDWIRE.{key}", value])
        assert RandWire(cfg, ShapeSpec(channels=3)).spec == expected
        with pytest.raises(ValueError, match=r"LINE takes the parameters \['step'\]"):
            random_graph("LINE", 5, 1, stride=2)
    assert "LINE" not in GRAPH_REGISTRY


def test_a_run_names_its_own_generator_alone() -> None:
    """Else no tool reads the run of a script that registers two, even if it drew from WS."""
    with registered(GRAPH_REGISTRY, LINE, ONE_SHORT):
        cfg = detector_config()
        cfg.MODEL.RANDWIRE.update({"LINE": CfgNode({"STEP": 2}), "ONE_SHORT": CfgNode()})
        cfg = read_config(argument_parser().parse_args(["MODEL.RANDWIRE.GRAPH", "LINE"]), cfg)
    text = cfg.dump()
    merge_text(cfg := detector_config(), text, "config.yaml")
    assert cfg.MODEL.RANDWIRE.LINE.STEP == 2


@pytest.mark.parametrize("model", [ONE_SHORT, DIRECTED, NOTHING])
def test_a_users_graph_of_another_kind_is_refused(model: Callable[..., Any]) -> None:
    """Wrong: a model that forgets a node gives a network with fewer nodes than N, and one of arrows
    has some of them turned, silently."""
    name = model.__name__
    refusal = f"{name} must return an undirected networkx.Graph whose nodes are 0 … 4"
    with registered(GRAPH_REGISTRY, model), pytest.raises(ValueError, match=refusal):
        random_graph(name, 5, 1)


def test_a_multigraph_has_the_edges_that_it_has() -> None:
    """Wrong: the keys of its edges are taken for nodes, so that all begin at node 0."""
    graph = nx.MultiGraph([(0, 1), (3, 1), (3, 2)])
    assert Dag.from_graph(graph).edges == ((0, 1), (1, 3), (2, 3))
    graph.add_edge(1, 3)
    with pytest.raises(ValueError, match=r"edge \(1, 3\) occurs twice"):
        Dag.from_graph(graph)


@pytest.mark.parametrize(
    "label, model, params",
    [
        ("WS(4, 0.75)", "WS", {"k": 4, "p": 0.75}),
        ("WS(2, 0)", "WS", {"k": 2, "p": 0}),
        ("BA(5)", "BA", {"m": 5}),
        ("ER(0.2)", "ER", {"p": 0.2}),
        ("ER(0.12345678)", "ER", {"p": 0.12345678}),
        ("BA(1234567)", "BA", {"m": 1234567}),
    ],
)
def test_a_generators_label_says_what_it_is(label: str, model: str, params: dict) -> None:
    """Else a figure's column is of another generator than its name."""
    assert parse_graph(label) == (model, params) == parse_graph(label.replace(" ", ""))
    assert graph_label(model, params) == label


def test_a_label_has_parameters_of_any_kind() -> None:
    """Else tables and pictures of a user's own generator end in an error of its formatting."""
    with registered(GRAPH_REGISTRY, LINE):
        assert graph_label("LINE", {"step": "wide"}) == "LINE('wide')"


@pytest.mark.parametrize(
    "label, says",
    [
        ("XY(3)", "unknown graph model 'XY'; registered are"),
        ("WS(4)", r"WS is written WS\(K, P\); got 'WS\(4\)'"),
        ("WS(4, x)", r"WS is written WS\(K, P\)"),
        ("BA", r"BA is written BA\(M\); got 'BA'"),
        ("BA(x)", r"BA is written BA\(M\)"),
        ("BA(1e18)", r"BA is written BA\(M\)"),
        ("WS(4, 0.75", r"a generator is written like WS\(4, 0.75\)"),
    ],
)
def test_a_wrong_label_says_how_it_is_written(label: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_graph(label)
    with pytest.raises(ValueError, match="WS takes the parameters"):
        graph_label("WS", {"k": 4})
