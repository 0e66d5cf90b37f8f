"""What a wiring says about running it, before there is any tensor."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from .dag import Dag
from .schedule import schedule


class Plan:
    """Orders, lifetimes, and places in vectors.

    The learned coefficients σ(w) of a stage are one vector: one sigmoid for all of them. The
    forward pass wants those of a node's inputs side by side, in the order of ``dag.predecessors``;
    the backward pass those of its readers, in the order of ``dag.successors``: two more vectors, of
    which an operator gets those of its nodes as a slice, without a copy.

    Attributes:
        num_nodes, predecessors, successors, output_nodes: the wiring's. (Its own are properties,
            which torch.compile can't look into.)
        order: the order of the nodes, the one that holds the fewest results at once.
        groups: the same order, in groups of nodes that do not need each other. With ``by_level``
            the order is another one, and there are as few groups as there can be.
        places: where each group is in the order.
        done: for each node, those whose results nobody reads after it.
        done_backward: the same for gradients, which readers leave to what they read.
        learned: the edges whose coefficients are learned: those of a node with more than one input.
            One that is alone has a coefficient of 1.
        coefficients: where each node's inputs are among them.
        inputs: where the inputs of each node are among all, those of the order's nodes one after
            the other; a node that reads the stage's input has one.
        by_target: for each of these inputs, the place of its coefficient.
        reads: what reads each node, and leaves it a gradient: nodes, or None for the output's mean.
        reader_coefficients: where the reads of each node are among all, those of the order's nodes
            one after the other.
        by_source: for each of these reads, the place of its coefficient.
        by_coefficient: for each coefficient, the read that leaves its gradient; any, of those of
            which nobody wants one.
        one, share: where, after the learned coefficients, as many 1 are as there are input nodes,
            and as many shares of the mean as there are output nodes.
        forgettable: nodes whose results had better be computed again than be saved.
    """

    def __init__(self, dag: Dag, *, by_level: bool = False) -> None:
        self.num_nodes = dag.num_nodes
        self.predecessors = dag.predecessors
        self.successors = dag.successors
        self.output_nodes = dag.output_nodes
        self.groups = _levels(dag) if by_level else _runs(schedule(dag).order, dag.predecessors)
        self.order = tuple(v for group in self.groups for v in group)
        self.places = _slices(map(len, self.groups))
        self.done = _last_uses(self.order, dag.predecessors)
        # The backward pass runs in the reversed order, where a node reads what its readers left.
        self.done_backward = _last_uses(self.order[::-1], dag.successors)
        degrees = [len(p) if len(p) > 1 else 0 for p in dag.predecessors]
        self.learned = tuple(
            (u, v) for v, degree in enumerate(degrees) if degree for u in dag.predecessors[v]
        )
        places = {edge: i for i, edge in enumerate(self.learned)}
        self.coefficients = _slices(degrees)
        # Among all edges: every reader leaves a gradient, whether its coefficient is learned or 1.
        self.one = len(self.learned)
        self.share = self.one + len(dag.input_nodes)
        own = [
            [places.get((u, v), self.one) for u in predecessors] or [self.one]
            for v, predecessors in enumerate(dag.predecessors)
        ]
        slices = _slices(len(own[v]) for v in self.order)
        self.inputs = dict(zip(self.order, slices, strict=True))
        self.by_target = [place for v in self.order for place in own[v]]
        self.reads: tuple[tuple[int | None, ...], ...] = tuple(s or (None,) for s in dag.successors)
        slices = _slices(len(self.reads[v]) for v in self.order)
        self.reader_coefficients = dict(zip(self.order, slices, strict=True))
        self.by_source = [
            self.share if v is None else places.get((u, v), self.one)
            for u in self.order
            for v in self.reads[u]
        ]
        reads = {place: read for read, place in enumerate(self.by_source)}
        number = self.share + len(dag.output_nodes)
        self.by_coefficient = [reads.get(place, 0) for place in range(number)]
        self.forgettable = self._forgettable()

    def _forgettable(self) -> frozenset[int]:
        """No two of them adjacent, so that each needs nothing but saved results; and at most a
        quarter of all, which costs a twelfth of the work: a node's forward pass is a third.

        No output nodes: a result is computed again when the first of its readers needs it, and
        theirs have none.
        """
        chosen: set[int] = set()
        # To look at predecessors is enough: when a successor's turn comes, it looks at this node.
        for v in self.order:
            few = 4 * (len(chosen) + 1) <= self.num_nodes
            if few and self.successors[v] and chosen.isdisjoint(self.predecessors[v]):
                chosen.add(v)
        return frozenset(chosen)


def _levels(dag: Dag) -> tuple[tuple[int, ...], ...]:
    """Nodes by the length of the longest path from an input node."""
    level: list[int] = []
    for predecessors in dag.predecessors:  # in topological order
        level.append(max((level[u] + 1 for u in predecessors), default=0))
    return tuple(
        tuple(v for v, own in enumerate(level) if own == number) for number in range(max(level) + 1)
    )


def _runs(
    order: Sequence[int], predecessors: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Pieces of an order, as long as they can be, of nodes that do not need each other."""
    runs: list[list[int]] = []
    for v in order:
        if not runs or not set(runs[-1]).isdisjoint(predecessors[v]):
            runs.append([])
        runs[-1].append(v)
    return tuple(map(tuple, runs))


def _slices(lengths: Iterable[int]) -> list[slice]:
    """Where pieces of these lengths are in a vector that has them one after the other."""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))]


def _last_uses(order: Sequence[int], reads: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each node, which of those it reads nobody reads after it."""
    last = {u: v for v in order for u in reads[v]}
    return [[u for u, reader in last.items() if reader == v] for v in range(len(reads))]
