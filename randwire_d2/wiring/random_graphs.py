"""The random graph models of §3.3: ER(P), BA(M) and WS(K, P), and the registry they live in.

A graph model is a function ``(num_nodes, seed, **params) -> networkx.Graph`` whose nodes are the
integers 0 … N-1 in the order in which the paper indexes them (appendix, "Converting undirected
graphs into DAGs"). A project adds its own with ``@GRAPH_REGISTRY.register()``; the function's
name is the name of the model, and its further parameters are the model's parameters.
"""

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

import networkx as nx
from fvcore.common.registry import Registry

from ..text import brief
from .dag import as_integer, as_positive
from .limits import MOST_NODES, check_limit

GRAPH_REGISTRY = Registry("GRAPH")
GRAPH_REGISTRY.__doc__ = "Random graph models: ``(num_nodes, seed, **params) -> networkx.Graph``."

_MOST_PARAMETER = 1e18  # of what a label holds; no graph has as many nodes


def random_graph(model: str, num_nodes: int, seed: int, **params: float) -> nx.Graph:
    """Draw one undirected graph from a registered model.

    Args:
        model: a name in ``GRAPH_REGISTRY``, such as ``"WS"``.
        num_nodes: N, without the extra input and output nodes of §3.2.
        seed: the s of g(θ, s), at least 0.
        params: the model's own parameters, such as ``k=4, p=0.75``.

    Raises:
        ValueError: the model is unknown, a parameter is missing or superfluous, or a value is out
            of range.
    """
    draw = registered_graph(model)
    num_nodes = as_positive("num_nodes (N)", num_nodes)
    check_limit("num_nodes (N)", num_nodes, MOST_NODES, "choose a smaller N")
    check_seed(seed)
    try:
        graph = draw(num_nodes, seed, **params)
    except TypeError as e:
        raise ValueError(
            f"{model} takes the parameters {_parameters(model)}; got {brief(params)} ({e})"
        ) from e
    undirected = isinstance(graph, nx.Graph) and not graph.is_directed()
    if not undirected or set(graph) != set(range(num_nodes)):
        raise ValueError(
            f"{model} must return an undirected networkx.Graph whose nodes are 0 … {num_nodes - 1}"
        )
    return graph


def check_seed(seed: int) -> None:
    """
    Raises:
        ValueError: the seed is negative; Python's random would use its absolute value instead.
    """
    if seed < 0:
        raise ValueError(
            f"seed (s) must be at least 0; got {seed}, which would draw the graphs of seed {-seed}"
        )


def graph_label(model: str, params: Mapping[str, Any]) -> str:
    """The paper's name for a model with its parameters: ``"WS(4, 0.75)"``.

    Raises:
        ValueError: the model is unknown, or a parameter is missing or superfluous.
    """
    names = _parameters(model)
    if set(names) != set(params):
        raise ValueError(f"{model} takes the parameters {names}; got {brief(dict(params))}")
    return f"{model}({', '.join(_written(params[name]) for name in names)})" if names else model


def _written(value: Any) -> str:
    """A parameter as the paper writes it: 0.75, and 0 for 0.0, but without rounding it."""
    if not isinstance(value, (int, float)):
        return brief(value)  # of a generator of one's own
    return short if float(short := f"{value:g}") == value else repr(value)


def parse_graph(label: str) -> tuple[str, dict[str, Any]]:
    """The model and the parameters that a label like ``graph_label``'s names.

    ``"WS(4,0.75)"`` names ``"WS"`` and ``{"k": 4, "p": 0.75}``.

    Raises:
        ValueError: the label names no registered model, or lacks its parameters.
    """
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", label.strip())
    if not match:
        raise ValueError(f"a generator is written like WS(4, 0.75); got {brief(label)}")
    model, arguments = match.groups()
    names = _parameters(model)
    try:
        values = ast.literal_eval(f"({arguments},)") if arguments else ()
    except (ValueError, SyntaxError):
        values = (None,)
    numbers = [isinstance(v, (int, float)) and abs(v) < _MOST_PARAMETER for v in values]
    if len(values) != len(names) or not all(numbers):
        written = f"{model}({', '.join(names).upper()})"
        raise ValueError(f"{model} is written {written}; got {brief(label)}")
    return model, dict(zip(names, values))


def _parameters(model: str) -> list[str]:
    return list(inspect.signature(registered_graph(model)).parameters)[2:]


def registered_graph(model: str) -> Any:
    """
    Raises:
        ValueError: no graph model of that name is registered; the line names those that are.
    """
    if not isinstance(model, str) or model not in GRAPH_REGISTRY:
        known = sorted(name for name, _ in GRAPH_REGISTRY)
        raise ValueError(
            f"unknown graph model {brief(model)}; registered are {known}; one of your own needs "
            "the script that registers it (GUIDE.md, A generator of your own)"
        )
    return GRAPH_REGISTRY.get(model)


def _check_probability(model: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{model} needs a probability 0 <= P <= 1; got P={brief(p)}")


@GRAPH_REGISTRY.register()
def ER(num_nodes: int, seed: int, p: float) -> nx.Graph:
    """Erdős-Rényi: each of the N(N-1)/2 possible edges with probability ``p``, independently.

    The graph may be disconnected, as in the paper. Its nodes are exchangeable, so networkx's own
    numbering is the paper's "random order".
    """
    _check_probability("ER", p)
    return nx.gnp_random_graph(num_nodes, p, seed=seed)


@GRAPH_REGISTRY.register()
def BA(num_nodes: int, seed: int, m: int) -> nx.Graph:
    """Barabási-Albert: nodes join one by one, each with ``m`` edges to existing nodes, preferring
    those of high degree; exactly M·(N-M) edges."""
    m = as_integer("BA's M", m)
    if not 1 <= m < num_nodes:
        raise ValueError(f"BA needs 1 <= M < N; got M={brief(m)}, N={num_nodes}")
    graph = nx.barabasi_albert_graph(num_nodes, m, seed=seed)
    # networkx starts from a star and calls its centre node 0. The centre is the node that the
    # paper adds first, to M initial nodes without edges, so it comes after them.
    order = {0: m, **{leaf: leaf - 1 for leaf in range(1, m + 1)}}
    return nx.relabel_nodes(graph, {node: order.get(node, node) for node in graph})


@GRAPH_REGISTRY.register()
def WS(num_nodes: int, seed: int, k: int, p: float) -> nx.Graph:
    """Watts-Strogatz: a ring in which each node is joined to its ``k`` nearest ones, and each edge
    is rewired with probability ``p``; exactly N·K/2 edges (the paper's "N·K" counts each twice)."""
    k = as_integer("WS's K", k)
    if k % 2 or not 0 < k < num_nodes:
        raise ValueError(f"WS needs an even K with 0 < K < N; got K={brief(k)}, N={num_nodes}")
    _check_probability("WS", p)
    return nx.watts_strogatz_graph(num_nodes, k, p, seed=seed)
