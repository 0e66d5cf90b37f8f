"""The order of a stage's nodes that takes the least memory: the model, and that none takes less."""

from collections.abc import Iterator
from functools import cache

import pytest
from helpers import played
from hypothesis import given, settings
from hypothesis import strategies as st

from randwire_d2.wiring import Dag, random_graph
from randwire_d2.wiring.schedule import schedule

CHAIN = Dag(5, ((0, 1), (1, 2), (2, 3), (3, 4)))
STAR_OUT = Dag(5, ((0, 1), (0, 2), (0, 3), (0, 4)))
STAR_IN = Dag(5, ((0, 4), (1, 4), (2, 4), (3, 4)))
DIAMOND = Dag(4, ((0, 1), (0, 2), (1, 3), (2, 3)))
THREE_CHAINS = Dag(9, tuple((v, v + 3) for v in range(6)))
ISOLATED = Dag(32, ())
FOUR_CHAINS = Dag(32, tuple((v, v + 4) for v in range(28)))
IN_TREE = Dag(31, tuple((v, 16 + v // 2) for v in range(30)))
# Of 32 nodes, seeds 1 … 5: the peaks of the ascending order, and those of the exact search.
PEAKS: list[tuple[str, dict[str, float], list[int], list[int]]] = [
    ("ER", {"p": 0.05}, [16, 12, 13, 14, 14], [7, 5, 5, 6, 6]),
    ("ER", {"p": 0.2}, [22, 23, 23, 24, 23], [18, 17, 19, 20, 20]),
    ("ER", {"p": 0.4}, [28, 27, 26, 26, 26], [26, 26, 23, 25, 26]),
    ("BA", {"m": 1}, [11, 12, 10, 10, 12], [5, 5, 5, 5, 5]),
    ("BA", {"m": 5}, [22, 24, 20, 20, 21], [17, 17, 16, 15, 17]),
    ("BA", {"m": 16}, [28, 28, 25, 26, 27], [28, 28, 25, 26, 27]),
    ("WS", {"k": 2, "p": 0.75}, [9, 11, 16, 14, 11], [5, 6, 7, 6, 5]),
    ("WS", {"k": 4, "p": 0.75}, [15, 15, 20, 16, 18], [13, 13, 17, 15, 14]),
    ("WS", {"k": 8, "p": 0.75}, [22, 24, 22, 22, 22], [22, 22, 21, 20, 22]),
]


@st.composite
def dags(draw: st.DrawFn, most: int = 7) -> Dag:
    n = draw(st.integers(1, most))
    pairs = [(u, v) for v in range(n) for u in range(v)]
    kept = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return Dag(n, tuple(pair for pair, keep in zip(pairs, kept, strict=True) if keep))


def drawn(model: str, num_nodes: int, seed: int, **params: float) -> Dag:
    return Dag.from_graph(random_graph(model, num_nodes, seed, **params))


def orders(dag: Dag, start: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every topological order, one by one."""
    if len(start) == dag.num_nodes:
        yield start
    for v in range(dag.num_nodes):
        if v not in start and set(dag.predecessors[v]) <= set(start):
            yield from orders(dag, (*start, v))


def least_of_all_downsets(dag: Dag) -> int:
    """The least peak, from every set of nodes that can have run, without leaving any out."""
    everything = frozenset(range(dag.num_nodes))

    def live(done: frozenset[int]) -> int:
        results = sum(not done.issuperset(dag.successors[u]) for u in done)
        return results + (not done.isdisjoint(dag.output_nodes))

    def kept(done: frozenset[int], v: int) -> int:
        """What the result of v adds, to be left out of what is live while v runs."""
        return bool(dag.successors[v]) or done.isdisjoint(dag.output_nodes)

    @cache
    def least(done: frozenset[int]) -> int:
        return min(
            (
                max(live(done) + 1, live(done | {v}) - kept(done, v) + 2, least(done | {v}))
                for v in everything - done
                if done.issuperset(dag.predecessors[v])
            ),
            default=0,
        )

    return least(frozenset())


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "dag, peak",
    [
        (Dag(1, ()), 2),  # the result and the workspace
        (CHAIN, 2),
        (STAR_OUT, 4),  # node 2 or 3: the centre, which stays, the sum, the result, the workspace
        (STAR_IN, 5),  # the centre's four inputs go before its result comes
        (DIAMOND, 3),  # node 1: nodes 0 and 1 and the workspace; node 2: node 0 is gone
        (THREE_CHAINS, 3),  # one after the other: the sum, a chain's result, its next one
        (FOUR_CHAINS, 3),  # however many there are
        (IN_TREE, 6),  # depth first: a result of each level, and the node that comes
        (ISOLATED, 3),  # the sum, the next node and the workspace
    ],
)
def test_least_peaks_by_hand(dag: Dag, peak: int) -> None:
    """Else the model counts something twice or not at all: each of these is counted by hand."""
    assert played(dag, schedule(dag)) == peak


# ---------------------------------------------------------------- that no order takes less


@settings(max_examples=120, deadline=None)
@given(dags())
def test_no_order_at_all_takes_less(dag: Dag) -> None:
    """Else the order is not the best one, or its peak is not the least: every order is tried; or a
    stage runs in another order than the ascending one for nothing."""
    peaks = {order: played(dag, order) for order in orders(dag)}
    order, ascending = schedule(dag), tuple(range(dag.num_nodes))
    assert peaks[order] == min(peaks.values())
    assert order == ascending or peaks[order] < peaks[ascending]


@pytest.mark.parametrize("model, params", [row[:2] for row in PEAKS if row[1] != {"m": 16}])
def test_no_downset_is_left_out_wrongly(model: str, params: dict[str, float]) -> None:
    """Else a rule that spares the search a downset loses the best order with it."""
    for seed in (1, 2, 3):
        dag = drawn(model, 11, seed, **params)
        assert played(dag, schedule(dag)) == least_of_all_downsets(dag)


@pytest.mark.parametrize("model, params, ascending, least", PEAKS)
def test_stages_of_32_nodes(
    model: str, params: dict[str, float], ascending: list[int], least: list[int]
) -> None:
    """Else the search fails, or never ends, at the paper's size; or finds no longer what it has
    found."""
    drawings = [drawn(model, 32, seed, **params) for seed in range(1, 6)]
    assert [played(dag, range(32)) for dag in drawings] == ascending
    assert [played(dag, schedule(dag)) for dag in drawings] == least


@pytest.mark.parametrize(
    "dag", [ISOLATED, STAR_IN, STAR_OUT, FOUR_CHAINS, IN_TREE], ids=lambda dag: str(dag.num_nodes)
)
def test_a_schedule_is_a_function_of_the_wiring(dag: Dag) -> None:
    """Else one wiring has two orders."""
    assert schedule(Dag(dag.num_nodes, dag.edges[::-1])) is schedule(dag)
    assert schedule.__wrapped__(dag) == schedule(dag)


def test_many_nodes_that_can_run_side_by_side() -> None:
    """Else wirings with 2**31 downsets, whose nodes are all alike, never end."""
    star = Dag(32, tuple((v, 31) for v in range(31)))
    assert schedule(star) == tuple(range(32))
    bipartite = Dag(32, tuple((u, v) for u in range(16) for v in range(16, 32)))
    assert schedule(bipartite) == tuple(range(32))


def test_a_search_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a far larger graph than the paper's never comes to its first image."""
    dag = Dag.from_graph(random_graph("WS", 32, 1, k=4, p=0.75))
    monkeypatch.setattr("randwire_d2.wiring.schedule.LIMIT", 5)
    assert schedule.__wrapped__(dag) == tuple(range(32))
    monkeypatch.undo()
    assert schedule.__wrapped__(dag) != tuple(range(32))
