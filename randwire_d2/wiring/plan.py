"""How to run a wiring: the order of its nodes, and where their coefficients are. No tensors."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from .dag import Dag
from .schedule import schedule


class Plan:
    """The order of a stage's nodes, the lifetimes of their results, and the places of coefficients.

    The coefficients of a stage are one vector: first σ(w) of all learned edges, then a 1 for each
    input node, then 1 / (number of output nodes) for each output node. For the forward pass, a
    second vector has the coefficients of each node's inputs next to each other, in the order of
    ``dag.predecessors``. For the backward pass, a third vector has those of each node's readers, in
    the order of ``dag.successors``. So an operator gets its nodes' coefficients without a copy.

    Attributes:
        num_nodes, predecessors, successors, output_nodes: those of the wiring, copied, because
            torch.compile can't look into the wiring's properties.
        order: the order of the nodes: the one that holds the fewest results at once or, with
            ``by_level``, the one with the fewest groups.
        groups: the same order, in groups of nodes that do not depend on each other.
        places: for each group, its slice of the order.
        done: for each node, the nodes whose results are not read after it.
        done_backward: the same for gradients in the backward pass.
        learned: the edges with learned coefficients: those into nodes with more than one input.
        coefficients: for each node, the slice of the learned edges that are its inputs.
        inputs: for each node, the slice of its inputs in the second vector. A node that reads the
            stage's input has one input.
        by_target: for each entry of the second vector, its place in the first.
        reads: for each node, its readers: nodes, or None for the mean that is the stage's output.
        reader_coefficients: for each node, the slice of its readers in the third vector.
        by_source: for each entry of the third vector, its place in the first.
        by_coefficient: for each coefficient, the entry of the third vector where its gradient is;
            any entry for a coefficient that needs no gradient.
        one, share: where the 1s, and the shares of the mean, begin in the first vector.
        forgettable: the nodes whose results are computed again when memory is to be saved.
    """

    def __init__(self, dag: Dag, *, by_level: bool = False) -> None:
        self.num_nodes = dag.num_nodes
        self.predecessors = dag.predecessors
        self.successors = dag.successors
        self.output_nodes = dag.output_nodes
        self.groups = _levels(dag) if by_level else _runs(schedule(dag), dag.predecessors)
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
        """At most a quarter of the nodes. Computing them again takes a twelfth of a step,
        whose forward pass is a third. No two are adjacent, so that all they need is saved.

        Output nodes are left out: a result is computed again when its first reader needs it, and an
        output node has no reader.
        """
        chosen: set[int] = set()
        # It is enough to look at predecessors: each successor later looks at this node.
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
    """An order, cut into the longest pieces of nodes that do not depend on each other."""
    runs: list[list[int]] = []
    for v in order:
        if not runs or not set(runs[-1]).isdisjoint(predecessors[v]):
            runs.append([])
        runs[-1].append(v)
    return tuple(map(tuple, runs))


def _slices(lengths: Iterable[int]) -> list[slice]:
    """The slices of consecutive pieces of these lengths in a vector."""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))]


def _last_uses(order: Sequence[int], reads: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each node, those nodes that it reads and no later node reads."""
    last = {u: v for v in order for u in reads[v]}
    return [[u for u, reader in last.items() if reader == v] for v in range(len(reads))]
