"""The order in which to run a stage's nodes so that the fewest results are held at once.

The exact search over downsets (the sets of nodes that can have run so far) follows SERENITY:
"Ordering Chaos: Memory-Aware Scheduling of Irregularly Wired Neural Networks for Edge Devices"
(Ahn et al., MLSys 2020); the rules by which downsets are left out are our own.
"""

import heapq
from collections.abc import Iterable
from functools import lru_cache

from .dag import Dag

# The search is given up after so many sets of nodes, some seconds. Graphs of the paper's generators
# with 32 nodes have thousands.
LIMIT = 200_000


@lru_cache(maxsize=1024)
def schedule(dag: Dag) -> tuple[int, ...]:
    """All nodes, each after its predecessors, in an order with the lowest peak of memory; the
    ascending order if that is among the best.

    The model of memory, in units of one node's result: between two nodes, memory holds the results
    that later nodes read, and the running sum of the output nodes' results. (The stage's input
    belongs to the caller.) A node first writes its aggregation, which is as large as one result.
    Then the inputs that no later node reads are freed. Then it needs two more results at a time:
    the output of the depthwise convolution, and that of the 1×1 convolution.

    The search is exact, and so at worst exponential in the number of nodes that can run side by
    side: it takes a fraction of a second for the paper's generators with 32 nodes. For far larger
    graphs it is given up after ``LIMIT`` sets of nodes, and the order is the ascending one.
    """
    memory = _Memory(dag)
    ascending = tuple(range(dag.num_nodes))
    bound = memory.peak(ascending)
    after = _without_symmetry(dag)
    everything = (1 << dag.num_nodes) - 1

    # Dijkstra's algorithm with a path's highest point in place of its length. A vertex is the set
    # of nodes that have run (bit v is node v). Of equal peaks, the one nearest to the end goes on
    # first, then the one whose nodes come first. Only what beats the ascending order is kept.
    peaks = {0: 0}
    last: dict[int, int] = {}
    heap = [(0, 0, 0, 0)]
    while heap and len(peaks) < LIMIT:
        peak, ahead, done, live = heapq.heappop(heap)
        if peak > peaks[done]:
            continue  # reached again, at less
        if done == everything:
            return _path(last, done)
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
    return ascending


class _Memory:
    """What ``schedule`` says that a node takes, in results."""

    def __init__(self, dag: Dag) -> None:
        self.predecessors = dag.predecessors
        self.readers = tuple(_mask(nodes) for nodes in dag.successors)
        self.output_nodes = _mask(dag.output_nodes)

    def step(self, done: int, node: int) -> tuple[int, int]:
        """What a node needs at most while it runs, and what it leaves, beyond what is live."""
        left = ~(done | 1 << node)
        freed = sum(not self.readers[u] & left for u in self.predecessors[node])
        kept = int(self.readers[node] != 0 or not self.output_nodes & done)
        return max(1, 2 - freed), kept - freed

    def peak(self, order: Iterable[int]) -> int:
        live = done = peak = 0
        for node in order:
            most, change = self.step(done, node)
            peak = max(peak, live + most)
            live += change
            done |= 1 << node
        return peak


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
