"""The wirings of the public layouts: seungwonpark's text files; JiaminRen's seeds or YAML."""

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import yaml

from ..text import brief, one_line
from ..wiring.dag import as_integer
from ..wiring.limits import MOST_CHARACTERS, MOST_EDGES, MOST_NODES, check_limit
from ..yaml_tags import compose_yaml, load_yaml

Edges = list[tuple[int, int]]


def read_text(path: str | os.PathLike[str]) -> tuple[int, Edges]:
    """Read a graph of seungwonpark's: number of nodes, number of edges, then an edge on each line.

    Returns:
        tuple[int, Edges]: the number of nodes, and the edges in their order in the file.

    Raises:
        ValueError: if the file contains no such graph, or one that is too large.
    """
    try:
        numbers = [
            [int(word) for word in line.split()] for line in _read(path).split("\n") if line.strip()
        ]
        (num_nodes,), (num_edges,), *edges = numbers
        pairs = [(u, v) for u, v in edges]
        _check_size(num_nodes, len(pairs))
    except ValueError as e:
        raise ValueError(
            f"{os.fspath(path)!r} is no graph: wanted are the number of nodes, the number of "
            f"edges, and an edge on each line ({one_line(e)})"
        ) from None
    if len(pairs) != num_edges:
        raise ValueError(
            f"{os.fspath(path)!r} announces {brief(num_edges)} edges; it has {len(pairs)}"
        )
    wrong = [edge for edge in pairs if not all(0 <= node < num_nodes for node in edge)]
    if wrong:
        raise ValueError(
            f"{os.fspath(path)!r} has {num_nodes} nodes, but the edge {brief(wrong[0])}"
        )
    return num_nodes, pairs


def read_yaml(path: str | os.PathLike[str]) -> tuple[int, Edges]:
    """Read the adjacency of a graph that networkx's ``write_yaml`` saved.

    Such a file names Python classes to construct. It is only parsed here: nothing is constructed.

    Returns:
        tuple[int, Edges]: the number of nodes, and the edges from smaller to larger index.

    Raises:
        ValueError: if the file contains no such graph, or one that is too large.
    """
    try:
        root: Any = compose_yaml(_read(path))
        fields = {key.value: value for key, value in root.value}
        adjacency = fields["_adj"] if "_adj" in fields else fields["adj"]  # networkx 2, networkx 1
        neighbours = {
            int(node.value): [int(other.value) for other, _ in others.value]
            for node, others in adjacency.value
        }
        _check_size(len(neighbours), sum(map(len, neighbours.values())) // 2)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{os.fspath(path)!r} is no graph as networkx saves it in YAML "
            f"({type(e).__name__}: {one_line(e)})"
        ) from e
    if set(neighbours) != set(range(len(neighbours))):
        raise ValueError(f"{os.fspath(path)!r}: the nodes must be 0 … {len(neighbours) - 1}")
    return len(neighbours), sorted(
        {(min(u, v), max(u, v)) for u, others in neighbours.items() for v in others}
    )


def read_training_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training config of JiaminRen's, which has the graphs' parameters and seed.

    Raises:
        ValueError: if the file is no such config.
    """
    try:
        sections = load_yaml(_read(path))
        values = {key: value for section in sections.values() for key, value in section.items()}
    except (yaml.YAMLError, AttributeError, TypeError) as e:
        raise ValueError(f"{os.fspath(path)!r} is no training config ({type(e).__name__})") from e
    missing = {"net_type", "channels", "nodes", "graph_model", "seed"} - values.keys()
    if missing:
        raise ValueError(f"{os.fspath(path)!r} is no training config: it lacks {sorted(missing)}")
    return values


def draw(model: str, num_nodes: int, seed: int, params: Mapping[str, Any]) -> tuple[int, Edges]:
    """Draw a graph as JiaminRen's code does.

    That code needs networkx before 2.6, which had ``write_yaml``. Graphs that later versions draw
    differently are drawn here as before.

    Args:
        model: "ER", "BA" or "WS".
        num_nodes: the number of nodes.
        seed: the seed; all graphs of a network have the same one.
        params: ``P`` for ER, ``M`` for BA, ``K`` and ``P`` for WS.

    Raises:
        ValueError: for an unknown model, or parameters that the model does not allow.
    """
    try:
        num_nodes = as_integer("the nodes of a graph", num_nodes)
        check_limit("the nodes of a graph", num_nodes, MOST_NODES, "choose fewer")
        if model == "ER":
            graph = nx.erdos_renyi_graph(num_nodes, params["P"], seed)
        elif model == "WS":
            graph = nx.connected_watts_strogatz_graph(
                num_nodes, params["K"], params["P"], tries=200, seed=seed
            )
        elif model == "BA":
            return num_nodes, _barabasi_albert(num_nodes, params["M"], seed)
        else:
            raise ValueError(f"the graph model {brief(model)} is none of ER, BA, WS")
    except KeyError as e:
        raise ValueError(f"{model} needs the parameter {e}") from None
    except (nx.NetworkXException, TypeError) as e:
        raise ValueError(
            f"{model} of {num_nodes} nodes with {brief(dict(params))}: {one_line(e)}"
        ) from e
    return num_nodes, sorted((min(edge), max(edge)) for edge in graph.edges)


def _barabasi_albert(num_nodes: int, m: int, seed: int) -> Edges:
    """Draw BA(M) as networkx did before 2.6: it began with M isolated nodes, not with a star."""
    if not 1 <= m < num_nodes:
        raise ValueError(f"BA needs 1 <= M < N; got M={brief(m)}, N={num_nodes}")
    rng = random.Random(seed)
    edges: Edges = []
    targets: Sequence[int] = range(m)
    ends: list[int] = []  # each node as often as it has edges: the preference for high degrees
    for node in range(m, num_nodes):
        edges += [(target, node) for target in targets]
        ends += [*targets, *[node] * m]
        chosen: set[int] = set()
        while len(chosen) < m:
            chosen.add(rng.choice(ends))
        targets = list(chosen)
    return sorted(edges)


def _check_size(num_nodes: int, num_edges: int) -> None:
    check_limit("the nodes of a stage", num_nodes, MOST_NODES, "no network of ours is so large")
    check_limit("the edges of a stage", num_edges, MOST_EDGES, "no network of ours is so large")


def _read(path: str | os.PathLike[str]) -> str:
    try:
        with open(path) as f:
            return f.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{os.fspath(path)!r} can't be read: {one_line(e)}") from e
