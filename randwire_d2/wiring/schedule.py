"""The order in which to run a stage's nodes so that the fewest results are held at once.

The exact search over downsets (the sets of nodes that can have run so far) follows SERENITY:
"Ordering Chaos: Memory-Aware Scheduling of Irregularly Wired Neural Networks for Edge Devices"
(Ahn et al., MLSys 2020); the rules by which downsets are left out are our own.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .dag import Dag, as_integer

# The search is given up after so many sets of nodes, some seconds. Graphs of the paper's generators
# with 32 nodes have thousands.
LIMIT = 200_000


@dataclass(frozen=True)
class Schedule:
    """An order of a stage's nodes, and what it takes.

    Attributes:
        order: every node once, each after its predecessors.
        peak: the most memory at any moment, as ``peak_of`` counts it, in results of one node.
        optimal: True if no order has a lower peak; False where the search was given up.
    """

    order: tuple[int, ...]
    peak: float
    optimal: bool = True


@lru_cache(maxsize=1024)
def schedule(
    dag: Dag, *, input_size: float | Fraction = 0, workspace: float | Fraction = 0
) -> Schedule:
    """The order with the least peak of all orders; the ascending one if that is among the best.

    The search is exact, and so at worst exponential in the number of nodes that can run side by
    side: it takes a fraction of a second for the paper's generators with 32 nodes. For far larger
    graphs it is given up after ``LIMIT`` sets of nodes, and the order is the ascending one.

    Args:
        dag: the stage's wiring.
        input_size, workspace: see ``peak_of``.

    Raises:
        ValueError: a size is negative or not finite.
    """
    memory = _Memory(dag, input_size, workspace)
    ascending = tuple(range(dag.num_nodes))
    bound = memory.peak(ascending)
    after = _without_symmetry(dag)
    everything = (1 << dag.num_nodes) - 1

    # Dijkstra's algorithm with a path's highest point in place of its length. A vertex is the set
    # of nodes that have run (bit v is node v). Of equal peaks, the one nearest to the end goes on
    # first, then the one whose nodes come first. Only what beats the ascending order is kept.
    peaks = {0: 0}
    last: dict[int, int] = {}
    heap = [(0, 0, 0, memory.input_size)]
    while heap and len(peaks) < LIMIT:
        peak, ahead, done, live = heapq.heappop(heap)
        if peak > peaks[done]:
            continue  # reached again, at less
        if done == everything:
            return Schedule(_path(last, done), memory.in_results(peak))
        steps = []
        for node in ascending:
            if not (done >> node & 1 or after[node] & ~done):
                most, change = memory.step(done, node)
                steps.append((max(peak, live + most), change, node))
        # Among the steps that reach no higher than any continuation must, one after which nothing
        # more is live may go first, whatever follows: moved to the front of an order, it leaves at
        # each step that it passes no more live and no less to be freed than before, because what a
        # node adds gets only less, and what it frees only more, the later it runs.
        least = min(step[0] for step in steps)
        first = [step for step in steps if step[0] == least and step[1] <= 0]
        for new_peak, change, node in first[:1] or steps:
            new_done = done | 1 << node
            if new_peak < peaks.get(new_done, bound):
                peaks[new_done] = new_peak
                last[new_done] = node
                heapq.heappush(heap, (new_peak, ahead - 1, new_done, live + change))
    return Schedule(ascending, memory.in_results(bound), optimal=not heap)


def peak_of(
    dag: Dag,
    order: Sequence[int],
    *,
    input_size: float | Fraction = 0,
    workspace: float | Fraction = 0,
) -> float:
    """The most memory that an order of a stage's nodes takes, in results of one node.

    Held between two nodes are the results that are still to be read, the sum of the output nodes'
    results from the first one on (later ones are added into it), and the stage's input until the
    last input node has run. A node first writes its aggregation beside all that, the size of one
    result; then the inputs that nobody else reads are freed; then it needs its result and the
    workspace.

    Args:
        dag: the stage's wiring.
        order: every node once, each after its predecessors.
        input_size: the size of the stage's input, in results; 0 if it belongs to the caller.
        workspace: what a node needs beside its result once its inputs are freed, in results: 1 if
            the aggregation stays until the result is there. With 0 the peak is SERENITY's, the
            inputs and the result of a node at once.

    Raises:
        ValueError: ``order`` is no such order, or a size is negative or not finite.
    """
    memory = _Memory(dag, input_size, workspace)
    order = tuple(as_integer("a node of the order", node) for node in order)
    done: set[int] = set()
    for node in order:
        if not 0 <= node < dag.num_nodes:
            raise ValueError(f"the order has node {node}; nodes are 0 … {dag.num_nodes - 1}")
        if node in done:
            raise ValueError(f"the order has node {node} twice; every node runs once")
        for needed in dag.predecessors[node]:
            if needed not in done:
                raise ValueError(f"node {node} reads node {needed}, which must come before it")
        done.add(node)
    for node in range(dag.num_nodes):
        if node not in done:
            raise ValueError(f"the order lacks node {node}; every node runs once")
    return memory.in_results(memory.peak(order))


class _Memory:
    """The model of ``peak_of`` in whole numbers, so that sums are exact and ties are ties."""

    def __init__(self, dag: Dag, input_size: float | Fraction, workspace: float | Fraction) -> None:
        sizes = _size("input_size", input_size), _size("workspace", workspace)
        self.result = math.lcm(*(size.denominator for size in sizes))
        self.input_size, self.workspace = (int(size * self.result) for size in sizes)
        self.predecessors = dag.predecessors
        self.readers = tuple(_mask(nodes) for nodes in dag.successors)
        self.input_nodes = _mask(dag.input_nodes)
        self.output_nodes = _mask(dag.output_nodes)

    def step(self, done: int, node: int) -> tuple[int, int]:
        """What a node needs at most while it runs, and what it leaves, beyond what is live."""
        left = ~(done | 1 << node)
        freed = 0
        for u in self.predecessors[node]:
            if not self.readers[u] & left:
                freed += self.result
        if not self.predecessors[node] and not self.input_nodes & left:
            freed += self.input_size
        kept = self.result if self.readers[node] or not self.output_nodes & done else 0
        return max(self.result, self.result + self.workspace - freed), kept - freed

    def peak(self, order: tuple[int, ...]) -> int:
        live, done, peak = self.input_size, 0, 0
        for node in order:
            most, change = self.step(done, node)
            peak = max(peak, live + most)
            live += change
            done |= 1 << node
        return peak

    def in_results(self, amount: int) -> float:
        return float(Fraction(amount, self.result))


def _without_symmetry(dag: Dag) -> list[int]:
    """For each node, those to run before it: its predecessors, and some that may as well.

    Take nodes a and b with the same predecessors, where whatever descends from b descends from a.
    If b runs before a, nothing that reads either of them runs in between, so the two can change
    places: as much is held and freed at each step. Hence only orders with a before b are needed
    (with the smaller one first, if each could be a). An output node's result is held in another
    way, so it has no such place to change with a node that is none.
    """
    below = [0] * dag.num_nodes
    for u, v in reversed(dag.edges):  # sorted: v's own descendants are complete
        below[u] |= 1 << v | below[v]
    return [
        _mask(dag.predecessors[b])
        | _mask(
            a
            for a in range(dag.num_nodes)
            if a != b
            and dag.predecessors[a] == dag.predecessors[b]
            and not below[b] & ~below[a]
            and (below[a] != below[b] or a < b)
            and bool(below[a]) == bool(below[b])
        )
        for b in range(dag.num_nodes)
    ]


def _path(last: dict[int, int], done: int) -> tuple[int, ...]:
    order = []
    while done:
        order.append(last[done])
        done ^= 1 << last[done]
    return tuple(reversed(order))


def _mask(nodes: Iterable[int]) -> int:
    return sum(1 << node for node in nodes)


def _size(name: str, value: float | Fraction) -> Fraction:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0 results; got {value!r}")
    return Fraction(value)
