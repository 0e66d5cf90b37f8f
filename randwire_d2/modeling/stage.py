"""A stage of the network: one random graph, or the single convolution of conv1 and conv2 (§3.2)."""

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn

from ..wiring import ConvSpec, StageSpec
from .node import Node, build_norm, conv2d


class ConvStage(CNNBlockBase):
    """A 3×3 convolution with stride 2: Conv-BN for conv1, ReLU-Conv-BN for any other (Table 1)."""

    def __init__(self, spec: ConvSpec, norm: str) -> None:
        super().__init__(spec.in_channels, spec.channels, stride=2)
        self.relu = spec.name != "stem"
        self.conv = conv2d(spec.in_channels, spec.channels, 3, stride=2)
        self.norm = build_norm(norm, spec.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, ceil(H / 2), ceil(W / 2))."""
        return self.norm(self.conv(F.relu(x) if self.relu else x))


class RandWireStage(CNNBlockBase):
    """A random graph as a stage: its input nodes have stride 2, its output is their mean.

    Args:
        spec: the wiring and the channels.
        node_op: a name in ``NODE_OP_REGISTRY``.
        norm: see ``build_norm``.
    """

    def __init__(self, spec: StageSpec, node_op: str, norm: str) -> None:
        super().__init__(spec.in_channels, spec.channels, stride=2)
        self.dag = spec.dag
        self.nodes = nn.ModuleList(
            Node(len(predecessors), spec.channels, spec.channels, 1, node_op, norm)
            if predecessors
            else Node(1, spec.in_channels, spec.channels, 2, node_op, norm)
            for predecessors in spec.dag.predecessors
        )
        # What may be thrown away after each node has run: the results nobody reads any more.
        last_reader = dict(spec.dag.edges)  # edges are sorted: the last one of each u stays
        self._done: list[list[int]] = [[] for _ in self.nodes]
        for u, v in last_reader.items():
            self._done[v].append(u)

    def forward(self, x: Tensor, dropped_edge: tuple[int, int] | None = None) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).
            dropped_edge: an edge (u, v) of the graph to leave out of node v's weighted sum.

        Returns:
            Tensor: (N, channels, ceil(H / 2), ceil(W / 2)), the mean of the output nodes.
        """
        results: dict[int, Tensor] = {}
        total = None
        for v, (node, predecessors) in enumerate(
            zip(self.nodes, self.dag.predecessors, strict=True)
        ):
            inputs = [results[u] for u in predecessors] or [x]
            dropped = None
            if dropped_edge is not None and dropped_edge[1] == v:
                dropped = predecessors.index(dropped_edge[0])
            y = node(inputs, dropped)
            del inputs
            for u in self._done[v]:
                del results[u]
            if self.dag.successors[v]:
                results[v] = y
            else:
                total = y if total is None else total + y
            del y
        assert total is not None, "a DAG has at least one output node"
        return total / len(self.dag.output_nodes)
