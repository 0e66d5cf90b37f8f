"""A stage of the network: one random graph, or the single convolution of conv1 and conv2 (§3.2)."""

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn

from ..wiring import ConvSpec, StageSpec
from ..wiring.plan import Plan
from .fused import is_fusable, run_fused
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
        fused: run the nodes as one function with fused operators, where that is possible.
        recompute: save less for the backward pass of that function, and compute it again.
    """

    by_source: Tensor

    def __init__(
        self,
        spec: StageSpec,
        node_op: str,
        norm: str,
        *,
        fused: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__(spec.in_channels, spec.channels, stride=2)
        self.nodes = nn.ModuleList(
            Node(len(predecessors), spec.channels, spec.channels, 1, node_op, norm)
            if predecessors
            else Node(1, spec.in_channels, spec.channels, 2, node_op, norm)
            for predecessors in spec.dag.predecessors
        )
        self.fused = fused
        self.recompute = recompute
        self.plan = Plan(spec.dag)
        by_source = torch.tensor(self.plan.by_source, dtype=torch.int64)
        self.register_buffer("by_source", by_source, persistent=False)

    def forward(self, x: Tensor, dropped_edge: tuple[int, int] | None = None) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).
            dropped_edge: an edge (u, v) of the graph to leave out of node v's weighted sum.

        Returns:
            Tensor: (N, channels, ceil(H / 2), ceil(W / 2)), the mean of the output nodes.
        """
        nodes, plan = [*self.nodes], self.plan
        if self.fused and is_fusable(nodes, x):
            return run_fused(plan, nodes, x, dropped_edge, self.by_source, self.recompute)
        results: dict[int, Tensor] = {}
        total = None
        for v in plan.order:
            node, predecessors = nodes[v], plan.predecessors[v]
            inputs = [results[u] for u in predecessors] or [x]
            dropped = None
            if dropped_edge is not None and dropped_edge[1] == v:
                dropped = predecessors.index(dropped_edge[0])
            y = node(inputs, dropped)
            del inputs
            for u in plan.done[v]:
                del results[u]
            if plan.successors[v]:
                results[v] = y
            else:
                total = y if total is None else total + y
            del y
        assert total is not None, "a DAG has at least one output node"
        return total / len(plan.output_nodes)
