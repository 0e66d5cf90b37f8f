"""The two public PyTorch implementations of RandWire, each a layout of its own.

- seungwonpark/RandWireNN: the small regime; conv1 and conv2 are dense with a bias; the wiring lies
  in text files that the checkpoint's config names.
- JiaminRen/RandWireNN: both regimes; conv1 and conv2 are separable; every convolution has a bias;
  the wiring is drawn from a seed, or lies in YAML files beside the checkpoint.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ..checkpoint import Preprocessing
from ..wiring import Dag, NetworkSpec
from .formats import Checkpoint
from .graphs import Edges, draw, read_text, read_training_config, read_yaml
from .randwire import backbone_shapes
from .source import (
    COUNTERS,
    EPS,
    IMAGENET_RGB,
    Features,
    Keys,
    Source,
    batch_norm,
    finish,
    preprocessing_of,
)

SEUNGWONPARK, JIAMINREN = "seungwonpark", "jiaminren"
Graph = tuple[int, Edges]


def recognise_seungwonpark(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("dagly3.nodes.") for key in state)


def recognise_jiaminren(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("conv3.nodeop.") for key in state)


def read_seungwonpark(
    checkpoint: Checkpoint,
    preprocessing: Preprocessing | None = None,
    *,
    graphs: Sequence[str | os.PathLike[str]] = (),
) -> Source:
    """
    Args:
        checkpoint: the file.
        preprocessing: in place of ImageNet's.
        graphs: the folder of the text files, or the three files of the stages, in order.

    Raises:
        ValueError: if the weights do not fit the graphs, or no network of ours is the same.
    """
    keys = Keys(checkpoint, SEUNGWONPARK)
    config = _hyperparameters(keys)
    wirings = [read_text(path) for path in _text_files(keys, config, graphs)]
    channels = len(keys("conv2.weight"))
    weights = _dense_conv(keys, "stem", "conv1", "bn1") | _dense_conv(keys, "res2", "conv2", "bn2")
    dags = []
    for stage, graph in enumerate(wirings, start=3):
        layer = f"dagly{stage}"
        order = _topological_order(keys, layer, graph)
        _check_in_degrees(keys, graph, f"{layer}.nodes", "agg_weight")
        place = {node: i for i, node in enumerate(order)}
        dags.append(Dag(graph[0], tuple((place[u], place[v]) for u, v in graph[1])))
        for node in order:
            theirs, ours = f"{layer}.nodes.{node}", f"res{stage}.nodes.{place[node]}"
            # Their weights are in the order of the file's edges, ours in that of the nodes.
            sources = [place[u] for u, v in graph[1] if v == node]
            scale = None
            if len(sources) > 1:
                ascending = sorted(range(len(sources)), key=sources.__getitem__)
                weights[f"{ours}.weight"] = keys(f"{theirs}.agg_weight")[ascending]
            elif f"{theirs}.agg_weight" in keys:
                # Until April 2019 a single input had a weight too: a positive factor, which passes
                # through the ReLU into the convolution.
                scale = torch.sigmoid(keys(f"{theirs}.agg_weight"))
            weights |= _separable(
                keys,
                ours,
                f"{theirs}.conv.conv1",
                f"{theirs}.conv.pointwise",
                f"{theirs}.bn",
                scale,
            )
    spec = NetworkSpec("small", channels, "sep_conv3x3", tuple(dags))
    weights = finish(keys, weights, backbone_shapes(spec))
    default = IMAGENET_RGB
    trained_on = config["data"].get("type", "ImageNet")
    return Source(
        SEUNGWONPARK, spec, weights, len(keys.used),
        keys.unused({"classifier head": r"(convlast|bnlast|fc)\..*", **COUNTERS}),
        preprocessing_of(keys, preprocessing, default if trained_on == "ImageNet" else None),
        lambda images: _seungwonpark_features(checkpoint.state, wirings, images),
    )  # fmt: skip


def _hyperparameters(keys: Keys) -> dict[str, dict[str, Any]]:
    """The sections of the training config that a checkpoint holds as text, if it holds one."""
    text = keys.checkpoint.rest.get("hp_str", "")
    try:
        documents = [d for d in yaml.safe_load_all(text) if isinstance(d, dict)]
    except (yaml.YAMLError, AttributeError) as e:
        raise keys.error(f"its entry 'hp_str' is no YAML ({type(e).__name__})") from e
    config: dict[str, dict[str, Any]] = {"data": {}, "model": {}}
    for document in documents:
        config.update({key: value for key, value in document.items() if isinstance(value, dict)})
    return config


def _text_files(
    keys: Keys, config: dict[str, dict[str, Any]], graphs: Sequence[str | os.PathLike[str]]
) -> Sequence[str | os.PathLike[str]]:
    if len(graphs) != 1 or not os.path.isdir(graphs[0]):
        if len(graphs) != 3:
            raise keys.error(
                "its wiring lies in three text files: add --graphs FOLDER (model/graphs/generated "
                f"in its repository), or --graphs FILE three times, in order; got {len(graphs)}"
            )
        return graphs
    names = [config["model"].get(f"graph{i}") for i in range(3)]
    if not all(isinstance(name, str) and name for name in names):
        raise keys.error(
            f"it does not say which files of {os.fspath(graphs[0])!r} are its graphs; "
            "add --graphs FILE three times, in order"
        )
    return [Path(graphs[0]) / str(name) for name in names]


def _topological_order(keys: Keys, layer: str, graph: Graph) -> list[int]:
    """The nodes in an order in which every edge ascends; their own if it is one already."""
    num_nodes, edges = graph
    if len(set(edges)) != len(edges):
        twice = next(edge for edge in edges if edges.count(edge) > 1)
        raise keys.error(f"the edge {twice} of {layer} occurs twice: a DAG of ours has it once")
    directed = nx.DiGraph(edges)
    directed.add_nodes_from(range(num_nodes))
    try:
        return list(nx.lexicographical_topological_sort(directed))
    except nx.NetworkXUnfeasible:
        raise keys.error(f"the graph of {layer} has a cycle") from None


def read_jiaminren(
    checkpoint: Checkpoint,
    preprocessing: Preprocessing | None = None,
    *,
    graphs: Sequence[str | os.PathLike[str]] = (),
    configured: Callable[[], Mapping[str, Any]] | None = None,
) -> Source:
    """
    Args:
        checkpoint: the file.
        preprocessing: in place of ImageNet's.
        graphs: the folder of the saved graphs (conv2.yaml, …), or the training config, or the
            files of the stages, in order.
        configured: where ``graphs`` is empty, what to draw them from: the keys of a training
            config.

    Raises:
        ValueError: if the weights do not fit the graphs, or no network of ours is the same.
    """
    keys = Keys(checkpoint, JIAMINREN)
    small = "conv2.bn.weight" in keys
    regime, first = ("small", 3) if small else ("regular", 2)
    channels = len(keys("conv2.bn.weight" if small else "conv2.nodeop.0.conv.bn.weight"))
    weights = _dense_of_separable(keys, "stem", "conv1", "bn1")
    if small:
        weights |= _dense_of_separable(keys, "res2", "conv2.conv", "conv2.bn")
    stages = [f"conv{i}" for i in range(first, 6)]
    sizes = [keys.indices(rf"{stage}\.nodeop\.(\d+)\.conv\.bn\.weight$") for stage in stages]
    wirings, notes = _jiaminren_graphs(keys, regime, channels, stages, sizes, graphs, configured)
    for stage, graph in zip(stages, wirings):
        _check_in_degrees(keys, graph, f"{stage}.nodeop", "mean_weight")
        for node in range(graph[0]):
            theirs, ours = f"{stage}.nodeop.{node}", f"res{stage[-1]}.nodes.{node}"
            if f"{theirs}.mean_weight" in keys:
                weights[f"{ours}.weight"] = keys(f"{theirs}.mean_weight")
            conv = f"{theirs}.conv.conv"
            weights |= _separable(
                keys, ours, f"{conv}.depthwise", f"{conv}.pointwise", f"{theirs}.conv.bn"
            )
    spec = NetworkSpec(
        regime, channels, "sep_conv3x3", tuple(Dag(n, tuple(edges)) for n, edges in wirings)
    )
    weights = finish(keys, weights, backbone_shapes(spec))
    return Source(
        JIAMINREN, spec, weights, len(keys.used),
        keys.unused({"classifier head": r"(conv|bn2|fc)\.[a-z_]*", **COUNTERS}),
        preprocessing_of(keys, preprocessing, IMAGENET_RGB),
        lambda images: _jiaminren_features(checkpoint.state, stages, wirings, images),
        notes,
    )  # fmt: skip


def _jiaminren_graphs(
    keys: Keys,
    regime: str,
    channels: int,
    stages: Sequence[str],
    sizes: Sequence[int],
    graphs: Sequence[str | os.PathLike[str]],
    configured: Callable[[], Mapping[str, Any]] | None,
) -> tuple[list[Graph], list[str]]:
    if len(graphs) == 1 and os.path.isdir(graphs[0]):
        return [read_yaml(Path(graphs[0]) / f"{stage}.yaml") for stage in stages], []
    if len(graphs) > 1:
        if len(graphs) != len(stages):
            raise keys.error(
                f"the {regime} regime has {len(stages)} graphs, {', '.join(stages)}; "
                f"--graphs names {len(graphs)}"
            )
        return [read_yaml(path) for path in graphs], []
    if graphs:
        config: Mapping[str, Any] = read_training_config(graphs[0])
        for key, value in (("net_type", regime), ("channels", channels), ("nodes", sizes[-1])):
            if config[key] != value:
                raise keys.error(
                    f"{key} is {config[key]} in {os.fspath(graphs[0])!r}; the weights are of a "
                    f"network with {key} {value}"
                )
    elif configured is not None:
        config = configured()
    else:
        raise keys.error(
            "its wiring is not in it: add --graphs with the folder of conv2.yaml … conv5.yaml, or "
            "with the training config (graph_model, seed, …)"
        )
    drawn = [draw(config["graph_model"], size, config["seed"], config) for size in sizes]
    parameters = ", ".join(f"{k}={config[k]}" for k in ("K", "P", "M") if config.get(k) is not None)
    note = (
        f"the graphs were drawn anew: {config['graph_model']}({parameters}), seed "
        f"{config['seed']}; the input degrees of all {sum(sizes)} nodes agree with the weights"
    )
    return drawn, [note]


def _check_in_degrees(keys: Keys, graph: Graph, nodes: str, aggregation: str) -> None:
    """What weights can tell of a wiring: the nodes' number, and each one's number of inputs."""
    num_nodes, edges = graph
    found = keys.indices(rf"{re.escape(nodes)}\.(\d+)\.")
    if found != num_nodes:
        raise keys.error(f"{nodes} has {found} nodes; its graph has {num_nodes}: the wrong graph")
    for v in range(num_nodes):
        inputs = max(1, sum(edge[1] == v for edge in edges))  # without an edge, the stage's input
        name = f"{nodes}.{v}.{aggregation}"
        weighted = len(keys(name)) if name in keys else 1
        if weighted != inputs:
            raise keys.error(
                f"node {v} of {nodes} adds up {weighted} inputs; in its graph it has {inputs}: "
                "the wrong graph"
            )


def _dense_conv(keys: Keys, ours: str, conv: str, norm: str) -> dict[str, Tensor]:
    bias = keys(f"{conv}.bias") if f"{conv}.bias" in keys else None
    return _named(ours, {"conv.weight": keys(f"{conv}.weight")}, batch_norm(keys, norm, bias))


def _separable(
    keys: Keys, ours: str, depthwise: str, pointwise: str, norm: str, scale: Tensor | None = None
) -> dict[str, Tensor]:
    first, second = keys(f"{depthwise}.weight"), keys(f"{pointwise}.weight")
    bias = _separable_bias(keys, depthwise, pointwise, second)
    if scale is not None:
        second = second * scale
    convs = {"conv.depthwise.weight": first, "conv.pointwise.weight": second}
    return _named(ours, convs, batch_norm(keys, norm, bias))


def _dense_of_separable(keys: Keys, ours: str, conv: str, norm: str) -> dict[str, Tensor]:
    """A depthwise and a 1×1 convolution as the one dense convolution that they make up."""
    first, second = keys(f"{conv}.depthwise.weight"), keys(f"{conv}.pointwise.weight")
    dense = second[:, :, 0, 0, None, None] * first[:, 0]
    bias = _separable_bias(keys, f"{conv}.depthwise", f"{conv}.pointwise", second)
    return _named(ours, {"conv.weight": dense}, batch_norm(keys, norm, bias))


def _separable_bias(keys: Keys, depthwise: str, pointwise: str, weight: Tensor) -> Tensor | None:
    """Both biases as one behind the 1×1: no padding lies between the two convolutions."""
    bias = keys(f"{pointwise}.bias") if f"{pointwise}.bias" in keys else None
    if f"{depthwise}.bias" in keys:
        through = weight[:, :, 0, 0] @ keys(f"{depthwise}.bias")
        bias = through if bias is None else bias + through
    return bias


def _named(ours: str, convs: dict[str, Tensor], norm: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **{f"{ours}.{name}": value for name, value in convs.items()},
        **{f"{ours}.norm.{name}": value for name, value in norm.items()},
    }


# -------------------------------------------------------------------------------------------------
# The original networks, computed from their own weights: what a conversion is held against.
# -------------------------------------------------------------------------------------------------


def _conv(state: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = state[f"{name}.weight"].float(), state.get(f"{name}.bias")
    return F.conv2d(
        x,
        weight,
        None if bias is None else bias.float(),
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=x.shape[1] // weight.shape[1],
    )


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{part}"].float()
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=EPS)


def _seungwonpark_features(
    state: Mapping[str, Tensor], graphs: Sequence[Graph], images: Tensor
) -> Features:
    x = _norm(state, "bn1", _conv(state, "conv1", images, 2))
    x = _norm(state, "bn2", _conv(state, "conv2", F.relu(x), 2))
    result = {"res2": x}
    for stage, (num_nodes, edges) in enumerate(graphs, start=3):
        name = f"dagly{stage}.nodes.{{}}"
        sources = [[u for u, v in edges if v == node] for node in range(num_nodes)]
        outputs: dict[int, Tensor] = {}
        while len(outputs) < num_nodes:  # a node runs as soon as all that it reads has run
            for node in range(num_nodes):
                if node in outputs or not all(u in outputs for u in sources[node]):
                    continue
                y = torch.stack([outputs[u] for u in sources[node]] or [x], dim=-1)
                aggregation = state.get(f"{name.format(node)}.agg_weight")
                y = y[..., 0] if aggregation is None else y @ torch.sigmoid(aggregation.float())
                y = _conv(
                    state, f"{name.format(node)}.conv.conv1", F.relu(y), 1 if sources[node] else 2
                )
                y = _conv(state, f"{name.format(node)}.conv.pointwise", y)
                outputs[node] = _norm(state, f"{name.format(node)}.bn", y)
        read = {u for u, _ in edges}
        x = torch.stack([outputs[node] for node in range(num_nodes) if node not in read]).mean(0)
        result[f"res{stage}"] = x
    return result


def _jiaminren_features(
    state: Mapping[str, Tensor], stages: Sequence[str], graphs: Sequence[Graph], images: Tensor
) -> Features:
    def separable(name: str, x: Tensor, stride: int) -> Tensor:
        return _conv(state, f"{name}.pointwise", _conv(state, f"{name}.depthwise", x, stride))

    x = _norm(state, "bn1", separable("conv1", images, 2))
    result = {}
    if "conv2" not in stages:
        x = _norm(state, "conv2.bn", separable("conv2.conv", F.relu(x), 2))
        result["res2"] = x
    for stage, (num_nodes, edges) in zip(stages, graphs):
        outputs: list[Tensor] = []
        for node in range(num_nodes):
            name = f"{stage}.nodeop.{node}"
            inputs = [outputs[u] for u in range(node) if (u, node) in edges]
            y = inputs[0] if inputs else x
            if len(inputs) > 1:
                factors = torch.sigmoid(state[f"{name}.mean_weight"].float())
                y = sum((f * i for f, i in zip(factors, inputs)), torch.zeros(()))
            y = separable(f"{name}.conv.conv", F.relu(y), 1 if inputs else 2)
            outputs.append(_norm(state, f"{name}.conv.bn", y))
        last = [node for node in range(num_nodes) if not any(u == node for u, _ in edges)]
        x = sum((outputs[node] for node in last), torch.zeros(())) / len(last)
        result[f"res{stage[-1]}"] = x
    return result
