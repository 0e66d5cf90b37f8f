"""Wirings: graphs, DAGs and the symbolic networks made of them. Nothing here knows of torch."""

from . import nas  # noqa: F401 (registers NAS)
from .complexity import (
    NODE_OP_COMPLEXITY_REGISTRY,
    Complexity,
    NetworkComplexity,
    complexity,
    find_channels,
)
from .dag import Dag
from .network import ConvSpec, NetworkGenerator, NetworkSpec, StageSpec
from .random_graphs import GRAPH_REGISTRY, graph_label, parse_graph, random_graph

__all__ = [
    "GRAPH_REGISTRY",
    "NODE_OP_COMPLEXITY_REGISTRY",
    "Complexity",
    "ConvSpec",
    "Dag",
    "NetworkComplexity",
    "NetworkGenerator",
    "NetworkSpec",
    "StageSpec",
    "complexity",
    "find_channels",
    "graph_label",
    "parse_graph",
    "random_graph",
]
