"""The layout of a DAG in a picture, by Sugiyama's method, as in Graphviz's dot.

Nodes are assigned to rows, each row is ordered so that few edges cross, and then the nodes and the
bends of the edges are moved sideways until edges are straight. The units are the distance of two
nodes in x and a row in y; ``draw_dag`` scales them to a page.
"""

from bisect import bisect_right, insort
from dataclasses import dataclass
from functools import lru_cache

from ..wiring import Dag


@dataclass(frozen=True)
class DagLayout:
    """The positions of a DAG's nodes and edges.

    The row of a node is the length of the longest path that ends in it. If the extra nodes are laid
    out, the input node, here -1, is alone in row 0, and the output node, here N, in the last row.

    Attributes:
        nodes: (x, row) of every node; x starts at 0, and two nodes of a row are at least 1 apart.
        routes: the points (x, row) of every edge, one in each row from its source to its target.
        width: the largest x.
        rows: the number of rows.
        nearest: the smallest distance between two nodes of a row, at most 1.5.
    """

    nodes: dict[int, tuple[float, int]]
    routes: dict[tuple[int, int], list[tuple[float, int]]]
    width: float
    rows: int
    nearest: float


def layout_dag(dag: Dag, extra: bool = True) -> DagLayout:
    """Lay out a DAG in rows, with few crossings and straight edges. The layout is deterministic.

    An edge that skips rows gets a bend in each of them, which keeps it away from the nodes there.

    Args:
        extra: lay out the extra input and output nodes of §3.2 and their edges, too.
    """
    return _layout(dag, extra)  # lru_cache would distinguish (dag) from (dag, extra=True)


# A page asks for each layout twice, and the stages of a network often have one wiring.
@lru_cache(maxsize=256)
def _layout(dag: Dag, extra: bool) -> DagLayout:
    source, sink = -1, dag.num_nodes
    row = {source: 0} if extra else {}
    for node in range(dag.num_nodes):
        row[node] = max((row[u] + 1 for u in dag.predecessors[node]), default=int(extra))
    edges = list(dag.edges)
    if extra:
        row[sink] = 1 + max(row.values())
        edges = [(source, v) for v in dag.input_nodes] + edges
        edges += [(u, sink) for u in dag.output_nodes]

    # The items are the nodes, then the bends; `above` and `below` list their neighbours there.
    item = {node: i for i, node in enumerate(row)}
    item_row = list(row.values())
    above: list[list[int]] = [[] for _ in item]
    below: list[list[int]] = [[] for _ in item]
    chains = {}
    for u, v in edges:
        chain = [item[u]]
        for r in range(row[u] + 1, row[v]):
            chain.append(len(item_row))
            item_row.append(r)
            above.append([])
            below.append([])
        chain.append(item[v])
        for upper, lower in zip(chain, chain[1:], strict=False):
            below[upper].append(lower)
            above[lower].append(upper)
        chains[u, v] = chain

    rows: list[list[int]] = [[] for _ in range(max(item_row) + 1)]
    for i, r in enumerate(item_row):
        rows[r].append(i)
    rows = _order(rows, above, below)
    x = _place(rows, above, below, len(item))
    in_rows = ([x[i] for i in items if i < len(item)] for items in rows)
    gaps = [right - left for xs in in_rows for left, right in zip(xs, xs[1:])]
    return DagLayout(
        nodes={node: (x[item[node]], r) for node, r in row.items()},
        routes={edge: [(x[i], item_row[i]) for i in chain] for edge, chain in chains.items()},
        width=max(x),
        rows=len(rows),
        nearest=min([1.5, *gaps]),
    )


def _order(
    rows: list[list[int]], above: list[list[int]], below: list[list[int]]
) -> list[list[int]]:
    """The rows with their items in an order that has few crossings.

    Sweeps down and up in turn order the items of a row by the mean position of their neighbours,
    and swap two adjacent ones where that saves crossings. The best order seen is kept.
    """
    position = [0.0] * len(above)

    def number(items: list[int]) -> None:
        for i, item in enumerate(items):
            position[item] = i

    def saved(a: int, b: int) -> int:
        """The crossings saved by swapping a with b, the item to its right."""
        total = 0
        for side in (above, below):
            for p in (position[n] for n in side[a]):
                for q in (position[n] for n in side[b]):
                    total += (p > q) - (p < q)
        return total

    for items in rows:
        number(items)
    best, fewest = rows, _crossings(rows, below, position)
    rows = [list(items) for items in rows]
    for sweep in range(24):
        downwards = sweep % 2 == 0
        side = above if downwards else below
        for items in rows if downwards else reversed(rows):
            centre = {
                i: sum(position[n] for n in side[i]) / len(side[i]) if side[i] else position[i]
                for i in items
            }
            items.sort(key=lambda i: (centre[i], position[i]))
            number(items)
        for items in rows:
            for i in range(len(items) - 1):
                if saved(items[i], items[i + 1]) > 0:
                    items[i], items[i + 1] = items[i + 1], items[i]
                    position[items[i]], position[items[i + 1]] = i, i + 1
        crossings = _crossings(rows, below, position)
        if crossings < fewest:
            best, fewest = [list(items) for items in rows], crossings
    return best


def _crossings(rows: list[list[int]], below: list[list[int]], position: list[float]) -> int:
    """The number of crossings between each row and the next."""
    total = 0
    for items in rows:
        seen: list[float] = []
        for item in items:
            ends = [position[n] for n in below[item]]
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _place(
    rows: list[list[int]], above: list[list[int]], below: list[list[int]], num_nodes: int
) -> list[float]:
    """The x of every item: near its neighbours, in the given order, with room for each."""
    x = [0.0] * len(above)
    # Many parallel edges get less room each; otherwise the page would shrink until nodes were dots.
    bends = max(sum(item >= num_nodes for item in items) for items in rows)
    narrow = max(0.04, min(0.18, 2.5 / max(bends, 1)))
    room = [0.5 if item < num_nodes else narrow for item in range(len(x))]
    # Straight edges matter more from bend to bend than at nodes. An isolated node does not move.
    pulls = [
        [
            ((1 + 2 * (item >= num_nodes)) * (1 + 2 * (n >= num_nodes)), n)
            for n in above[item] + below[item]
        ]
        or [(1, item)]
        for item in range(len(x))
    ]
    weights = [float(sum(weight for weight, _ in pull)) for pull in pulls]
    for items in rows:
        _space(items, x, [1.0] * len(items), room)
    for sweep in range(40):
        for items in rows if sweep % 2 == 0 else reversed(rows):
            for item in items:
                x[item] = sum(weight * x[n] for weight, n in pulls[item]) / weights[item]
            _space(items, x, [weights[item] for item in items], room)
    left = min(x)
    return [at - left for at in x]


def _space(items: list[int], x: list[float], weights: list[float], room: list[float]) -> None:
    """Move the items of a row apart, as little as possible in the weighted sum of squares.

    Isotonic regression: blocks of items that touch are merged until no two overlap.
    """
    blocks: list[list[float]] = []  # [weight, mean of x - offset, number of items]
    offsets, offset = [], 0.0
    for item, weight in zip(items, weights, strict=True):
        offset += room[item]
        offsets.append(offset)
        blocks.append([weight, x[item] - offset, 1])
        offset += room[item]
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            w, mean, count = blocks.pop()
            last = blocks[-1]
            last[1] = (last[0] * last[1] + w * mean) / (last[0] + w)
            last[0] += w
            last[2] += count
    means = [mean for _, mean, count in blocks for _ in range(int(count))]
    for item, mean, at in zip(items, means, offsets, strict=True):
        x[item] = mean + at
