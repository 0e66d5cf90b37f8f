"""A directed acyclic graph: the wiring of one stage (§3.2 and appendix)."""

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from ..text import brief
from .limits import MOST_EDGES, MOST_NODES, check_limit


@dataclass(frozen=True)
class Dag:
    """Nodes 0 … N-1 and edges that point from the smaller index to the larger one.

    That direction makes a cycle impossible. The extra input and output nodes of §3.2 are implied:
    the stage's input goes to every node in ``input_nodes``, and its output is the mean over
    ``output_nodes``. An isolated node is both.

    Attributes:
        num_nodes: N, 1 … ``limits.MOST_NODES``.
        edges: pairs (u, v) with 0 <= u < v < N, without duplicates, at most ``limits.MOST_EDGES``;
            kept sorted.

    Raises:
        ValueError: an edge or the number of nodes breaks these rules.
    """

    num_nodes: int
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_nodes", as_positive("num_nodes", self.num_nodes))
        check_limit("the nodes of a stage", self.num_nodes, MOST_NODES, "split it into stages")
        check_limit("the edges of a stage", len(self.edges), MOST_EDGES, "leave out edges")
        edges = sorted(_as_edge(edge) for edge in self.edges)
        for u, v in edges:
            if not 0 <= u < v < self.num_nodes:
                raise ValueError(
                    f"edge {brief((u, v))} must point from a smaller index to a larger one, "
                    f"within 0 … {self.num_nodes - 1}"
                )
        for edge, following in zip(edges, edges[1:], strict=False):
            if edge == following:
                raise ValueError(f"edge {edge} occurs twice")
        object.__setattr__(self, "edges", tuple(edges))

    @classmethod
    def from_graph(cls, graph: nx.Graph) -> "Dag":
        """Direct every edge of an undirected graph from the smaller index to the larger one."""
        pairs = graph.edges()  # ``graph.edges`` of a MultiGraph has a key as the third
        return cls(len(graph), tuple((min(pair), max(pair)) for pair in pairs))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the nodes it reads from, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for u, v in self.edges:
            found[v].append(u)
        return tuple(map(tuple, found))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the nodes that read from it, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for u, v in self.edges:
            found[u].append(v)
        return tuple(map(tuple, found))

    @cached_property
    def input_nodes(self) -> tuple[int, ...]:
        """The nodes that read the stage's input: those without predecessors."""
        return tuple(n for n in range(self.num_nodes) if not self.predecessors[n])

    @cached_property
    def output_nodes(self) -> tuple[int, ...]:
        """The nodes that make up the stage's output: those without successors."""
        return tuple(n for n in range(self.num_nodes) if not self.successors[n])


def as_integer(name: str, value: Any) -> int:
    """Any integer as a plain int, so that equal values have equal JSON."""
    try:
        return int(operator.index(value))  # True's is True
    except TypeError:
        raise ValueError(f"{name} must be an integer; got {brief(value)}") from None


def as_positive(name: str, value: Any) -> int:
    """``as_integer`` of a value that must be at least 1."""
    value = as_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {brief(value)}")
    return value


def _as_edge(edge: Any) -> tuple[int, int]:
    try:
        u, v = edge
        return int(operator.index(u)), int(operator.index(v))
    except (TypeError, ValueError):
        raise ValueError(f"an edge must be a pair of integers; got {brief(edge)}") from None
