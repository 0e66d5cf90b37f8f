"""NAS-style cells: the rules of §3.1, and that nothing but the rules decides."""

from collections import Counter
from math import prod

import pytest
import torch
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from randwire_d2 import NetworkGenerator, RandWire, add_randwire_config, complexity
from randwire_d2.config import spec_from_config
from randwire_d2.wiring import Dag, parse_graph, random_graph

sizes = st.integers(3, 60)
seeds = st.integers(0, 10**6)
cells = st.integers(1, 7)


def draw(num_nodes: int, seed: int, cell_nodes: int = 5) -> Dag:
    return Dag.from_graph(random_graph("NAS", num_nodes, seed, cell_nodes=cell_nodes))


@given(sizes, seeds, cells)
def test_the_rules_of_section_3_1(num_nodes: int, seed: int, cell_nodes: int) -> None:
    """Wrong: a node that merges another number of nodes, or some from beyond the two cells."""
    dag = draw(num_nodes, seed, cell_nodes)
    assert dag.input_nodes == (0, 1)
    outputs = [0, 1]  # of the cells
    for v in range(2, num_nodes):
        cell, place = divmod(v - 2, cell_nodes + 1)
        inside = range(v - place, v)
        if place < cell_nodes:
            assert len(dag.predecessors[v]) == 2
            assert set(dag.predecessors[v]) <= {*outputs[-2:], *inside}
        else:  # "all nodes that have no output in a cell", and nothing else
            loose = {u for u in inside if not set(dag.successors[u]) & set(inside)}
            assert set(dag.predecessors[v]) == loose
            outputs.append(v)
    if (num_nodes - 2) % (cell_nodes + 1) == 0:
        assert dag.output_nodes == (num_nodes - 1,)
    else:  # a cell that is cut short ends in its loose ends
        assert all((u - 2) // (cell_nodes + 1) == cell for u in dag.output_nodes)


@given(seeds)
def test_one_cell_is_repeated_in_every_stage(seed: int) -> None:
    """Wrong: each cell is drawn anew, which is another and larger space."""
    network = NetworkGenerator("regular", 8, 32, "NAS", {"cell_nodes": 5})(seed)
    shifted = set()
    for stage in network.stages:
        for start in range(2, stage.dag.num_nodes - 5, 6):
            inside = range(start, start + 6)
            shifted.add(
                tuple(
                    tuple(u - start for u in stage.dag.predecessors[v] if u in inside)
                    for v in inside
                )
            )
    assert len(shifted) == 1


def test_the_papers_n_is_five_whole_cells() -> None:
    dag = draw(32, 1)
    assert dag.output_nodes == (31,)
    assert sum(len(dag.predecessors[v]) == 2 for v in range(32)) >= 25


def test_every_cell_is_equally_likely() -> None:
    """Wrong: a bias of this generator's own on top of the paper's rules, or a cell never drawn."""
    count = prod(n * (n - 1) // 2 for n in (2, 3, 4))  # 18
    draws = 100 * count
    found = Counter(draw(5, seed, 3).edges for seed in range(draws))
    assert len(found) == count
    chi_square = sum((n - 100) ** 2 / 100 for n in found.values())
    assert chi_square < 41  # 99.9% of the distribution with 17 degrees of freedom


def test_the_space_has_2700_cells() -> None:
    assert len({draw(7, seed).edges for seed in range(30_000)}) == 2700


def test_seed_1_is_pinned() -> None:
    """Wrong: another version of Python draws another network for the same seed."""
    assert draw(8, 1).edges == PINNED


PINNED = (
    (0, 2),
    (0, 4),
    (0, 6),
    (1, 2),
    (1, 3),
    (1, 4),
    (1, 5),
    (2, 3),
    (2, 5),
    (2, 6),
    (3, 7),
    (4, 7),
    (5, 7),
    (6, 7),
)


@pytest.mark.parametrize("regime", ["small", "regular"])
def test_it_becomes_a_network(regime: str) -> None:
    cfg = get_cfg()
    add_randwire_config(cfg)
    cfg.merge_from_list(["MODEL.RANDWIRE.GRAPH", "NAS", "MODEL.RANDWIRE.REGIME", regime])
    cfg.merge_from_list(["MODEL.RANDWIRE.CHANNELS", 8])
    graph, params = parse_graph("NAS(5)")
    spec = NetworkGenerator(regime, 8, 32, graph, params)(1)
    assert spec_from_config(cfg) == spec
    backbone = RandWire(spec, out_features=["res5"]).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 64))["res5"]
    assert features.shape == (1, spec.stages[-1].channels, 2, 2)
    counted = complexity(spec).stages
    built = sum(p.numel() for p in backbone.parameters())
    assert built == sum(counted[name].params for name in counted if name != "head")


@pytest.mark.parametrize(
    "num_nodes, cell_nodes, says", [(2, 5, "N >= 3; got N=2"), (9, 0, "got cell_nodes=0")]
)
def test_impossible_values_are_refused(num_nodes: int, cell_nodes: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw(num_nodes, 1, cell_nodes)
