"""The layouts of the two public PyTorch implementations of RandWire.

- seungwonpark/RandWireNN: the small regime; conv1 and conv2 are dense with a bias; the wiring is
  in text files that the checkpoint's config names.
- JiaminRen/RandWireNN: both regimes; conv1 and conv2 are separable; every convolution has a bias;
  the wiring is drawn from a seed, or is in YAML files beside the checkpoint.
"""

import os
import re
from collections import Counter
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
from ..yaml_tags import LimitedLoader
from .formats import Checkpoint
from .graphs import Edges, draw, read_text, read_training_config, read_yaml
from .head import read_head
from .randwire import backbone_shapes
from .source import (
    COUNTERS,
    IMAGENET_RGB,
    Features,
    Keys,
    Source,
    batch_norm,
    finish,
    preprocessing_of,
    run_conv,
    run_norm,
)
from .target import Target

SEUNGWONPARK, JIAMINREN = "seungwonpark", "jiaminren"
Graph = tuple[int, Edges]


def read_seungwonpark(
    checkpoint: Checkpoint,
    target: Target,
    preprocessing: Preprocessing | None,
    graphs: Sequence[str | os.PathLike[str]],
) -> Source:
    """Read a network of seungwonpark/RandWireNN.

    Args:
        checkpoint: the content of the file.
        target: the model that the weights are for.
        preprocessing: that of the images; by default ImageNet's, if it was trained on ImageNet.
        graphs: the folder of the text files, or the three files of the stages, in order.

    Raises:
        ValueError: if the weights do not fit the graphs, or no RandWire computes the same.
    """
    keys = Keys(checkpoint, SEUNGWONPARK)
    config = _hyperparameters(keys)
    wirings = [read_text(path) for path in _text_files(keys, config, graphs)]
    channels = len(keys("conv2.weight"))
    weights = _dense_conv(keys, "stem", "conv1", "bn1") | _dense_conv(keys, "res2", "conv2", "bn2")
    dags = []
    for stage, graph in enumerate(wirings, start=3):
        dag, read = _seungwonpark_stage(keys, stage, graph)
        dags.append(dag)
        weights |= read
    spec = NetworkSpec("small", channels, "sep_conv3x3", tuple(dags))
    weights = finish(keys, weights, backbone_shapes(spec))
    head = None
    if target.with_head:
        names = {"conv": "convlast", "norm": "bnlast", "fc": "fc"}
        head = read_head(keys, spec.stages[-1].channels, **names, relu=False)
    trained_on = config["data"].get("type", "ImageNet")
    default = IMAGENET_RGB if trained_on == "ImageNet" else None
    return Source(
        layout=SEUNGWONPARK,
        network=spec,
        weights=weights,
        used=len(keys.used),
        unused=keys.unused({**COUNTERS, "classifier head": r"(convlast|bnlast|fc)\..*"}),
        preprocessing=preprocessing_of(keys, preprocessing, default),
        features=lambda images: _seungwonpark_features(checkpoint.state, wirings, images),
        head=head,
    )


def _seungwonpark_stage(keys: Keys, stage: int, graph: Graph) -> tuple[Dag, dict[str, Tensor]]:
    """A stage's graph and weights, its nodes renumbered so that every edge ascends."""
    layer = f"dagly{stage}"
    order = _topological_order(keys, layer, graph)
    _check_in_degrees(keys, graph, f"{layer}.nodes", "agg_weight")
    place = {node: i for i, node in enumerate(order)}
    weights = {}
    for node in order:
        theirs, ours = f"{layer}.nodes.{node}", f"res{stage}.nodes.{place[node]}"
        # Their weights are in the order of the file's edges, ours in the order of the nodes.
        sources = [place[u] for u, v in graph[1] if v == node]
        scale = None
        if len(sources) > 1:
            ascending = sorted(range(len(sources)), key=sources.__getitem__)
            weights[f"{ours}.weight"] = keys(f"{theirs}.agg_weight")[ascending]
        elif f"{theirs}.agg_weight" in keys:
            # Until April 2019, a single input had a weight, too: a positive factor, which commutes
            # with the ReLU and is folded into the convolution.
            scale = torch.sigmoid(keys(f"{theirs}.agg_weight"))
        conv = f"{theirs}.conv"
        weights |= _separable(
            keys, ours, f"{conv}.conv1", f"{conv}.pointwise", f"{theirs}.bn", scale
        )
    return Dag(graph[0], tuple((place[u], place[v]) for u, v in graph[1])), weights


def _hyperparameters(keys: Keys) -> dict[str, dict[str, Any]]:
    """The sections of the training config that is text in the checkpoint; empty without one."""
    text = keys.checkpoint.rest.get("hp_str", "")
    try:
        documents = yaml.load_all(str(text), Loader=LimitedLoader)
        documents = [document for document in documents if isinstance(document, dict)]
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
    """The nodes in an order in which every edge ascends; unchanged if every edge does already."""
    num_nodes, edges = graph
    if len(set(edges)) != len(edges):
        twice, _ = Counter(edges).most_common(1)[0]
        raise keys.error(f"the edge {twice} of {layer} occurs twice: a DAG of ours has it once")
    directed = nx.DiGraph(edges)
    directed.add_nodes_from(range(num_nodes))
    try:
        return list(nx.lexicographical_topological_sort(directed))
    except nx.NetworkXUnfeasible:
        raise keys.error(f"the graph of {layer} has a cycle") from None


def read_jiaminren(
    checkpoint: Checkpoint,
    target: Target,
    preprocessing: Preprocessing | None,
    graphs: Sequence[str | os.PathLike[str]],
) -> Source:
    """Read a network of JiaminRen/RandWireNN.

    Args:
        checkpoint: the content of the file.
        target: if ``graphs`` is empty, its config gives the graph model, parameters and seed.
        preprocessing: that of the images; by default ImageNet's.
        graphs: the folder of the saved graphs (conv2.yaml, …), or the training config, or the
            files of the stages, in order.

    Raises:
        ValueError: if the weights do not fit the graphs, or no RandWire computes the same.
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
    wirings, notes = _jiaminren_graphs(keys, regime, channels, stages, sizes, graphs, target)
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
    head = None
    if target.with_head:
        names = {"conv": "conv", "norm": "bn2", "fc": "fc"}
        head = read_head(keys, spec.stages[-1].channels, **names, relu=True)
    return Source(
        layout=JIAMINREN,
        network=spec,
        weights=weights,
        used=len(keys.used),
        unused=keys.unused({**COUNTERS, "classifier head": r"(conv|bn2|fc)\.[a-z_]*"}),
        preprocessing=preprocessing_of(keys, preprocessing, IMAGENET_RGB),
        features=lambda images: _jiaminren_features(checkpoint.state, stages, wirings, images),
        notes=notes,
        head=head,
    )


def _jiaminren_graphs(
    keys: Keys,
    regime: str,
    channels: int,
    stages: Sequence[str],
    sizes: Sequence[int],
    graphs: Sequence[str | os.PathLike[str]],
    target: Target,
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
    else:
        config = target.graph_config()
    drawn = [draw(config["graph_model"], size, config["seed"], config) for size in sizes]
    parameters = ", ".join(f"{k}={config[k]}" for k in ("K", "P", "M") if config.get(k) is not None)
    note = (
        f"the graphs were drawn anew: {config['graph_model']}({parameters}), seed "
        f"{config['seed']}; the input degrees of all {sum(sizes)} nodes agree with the weights"
    )
    return drawn, [note]


def _check_in_degrees(keys: Keys, graph: Graph, nodes: str, aggregation: str) -> None:
    """Refuse a graph whose number of nodes, or of a node's inputs, is not that of the weights."""
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
    folded = batch_norm(keys, norm, keys.get(f"{conv}.bias"))
    return _named(ours, {"conv.weight": keys(f"{conv}.weight")}, folded)


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
    """Merge a depthwise and a 1×1 convolution into the dense convolution that they equal."""
    first, second = keys(f"{conv}.depthwise.weight"), keys(f"{conv}.pointwise.weight")
    dense = second[:, :, 0, 0, None, None] * first[:, 0]
    bias = _separable_bias(keys, f"{conv}.depthwise", f"{conv}.pointwise", second)
    return _named(ours, {"conv.weight": dense}, batch_norm(keys, norm, bias))


def _separable_bias(keys: Keys, depthwise: str, pointwise: str, weight: Tensor) -> Tensor | None:
    """Merge both biases into one after the 1×1 convolution: nothing is padded between the two."""
    bias, first = keys.get(f"{pointwise}.bias"), keys.get(f"{depthwise}.bias")
    if first is None:
        return bias
    through = weight[:, :, 0, 0] @ first
    return through if bias is None else bias + through


def _named(ours: str, convs: dict[str, Tensor], norm: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **{f"{ours}.{name}": value for name, value in convs.items()},
        **{f"{ours}.norm.{name}": value for name, value in norm.items()},
    }


# -------------------------------------------------------------------------------------------------
# The original networks, computed from their own weights: references for the verification.
# -------------------------------------------------------------------------------------------------


def _run_graph(
    graph: Graph, x: Tensor, run_node: Callable[[int, list[Tensor], int], Tensor]
) -> Tensor:
    """A stage's output: the mean of the outputs that no node reads.

    Args:
        x: the stage's input, which nodes without incoming edges read.
        run_node: it computes a node's output from the node's number, inputs and stride.
    """
    num_nodes, edges = graph
    sources = [[u for u, v in edges if v == node] for node in range(num_nodes)]
    outputs: dict[int, Tensor] = {}
    while len(outputs) < num_nodes:  # a node runs once all of its sources have run
        for node in range(num_nodes):
            if node not in outputs and all(u in outputs for u in sources[node]):
                inputs = [outputs[u] for u in sources[node]]
                outputs[node] = run_node(node, inputs or [x], 1 if inputs else 2)
    read = {u for u, _ in edges}
    return torch.stack([outputs[node] for node in range(num_nodes) if node not in read]).mean(0)


def _seungwonpark_features(
    state: Mapping[str, Tensor], graphs: Sequence[Graph], images: Tensor
) -> Features:
    x = run_norm(state, "bn1", run_conv(state, "conv1", images, 2))
    x = run_norm(state, "bn2", run_conv(state, "conv2", F.relu(x), 2))
    result = {"res2": x}
    for stage, graph in enumerate(graphs, start=3):

        def run_node(node: int, inputs: list[Tensor], stride: int, stage: int = stage) -> Tensor:
            name = f"dagly{stage}.nodes.{node}"
            y, aggregation = torch.stack(inputs, dim=-1), state.get(f"{name}.agg_weight")
            y = y[..., 0] if aggregation is None else y @ torch.sigmoid(aggregation.float())
            y = run_conv(state, f"{name}.conv.conv1", F.relu(y), stride)
            return run_norm(state, f"{name}.bn", run_conv(state, f"{name}.conv.pointwise", y))

        result[f"res{stage}"] = x = _run_graph(graph, x, run_node)
    return result


def _jiaminren_features(
    state: Mapping[str, Tensor], stages: Sequence[str], graphs: Sequence[Graph], images: Tensor
) -> Features:
    def separable(name: str, x: Tensor, stride: int) -> Tensor:
        return run_conv(state, f"{name}.pointwise", run_conv(state, f"{name}.depthwise", x, stride))

    x = run_norm(state, "bn1", separable("conv1", images, 2))
    result = {}
    if "conv2" not in stages:
        x = run_norm(state, "conv2.bn", separable("conv2.conv", F.relu(x), 2))
        result["res2"] = x
    for stage, graph in zip(stages, graphs):

        def run_node(node: int, inputs: list[Tensor], stride: int, stage: str = stage) -> Tensor:
            name, y = f"{stage}.nodeop.{node}", inputs[0]
            if len(inputs) > 1:
                factors = torch.sigmoid(state[f"{name}.mean_weight"].float())
                y = sum((f * i for f, i in zip(factors, inputs)), torch.zeros(()))
            y = separable(f"{name}.conv.conv", F.relu(y), stride)
            return run_norm(state, f"{name}.conv.bn", y)

        result[f"res{stage[-1]}"] = x = _run_graph(graph, x, run_node)
    return result
