"""A stage of the network: one random graph, or the single convolution of conv1 and conv2 (§3.2)."""

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn

from ..wiring import ConvSpec, StageSpec
from ..wiring.plan import Plan
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


class PlainStage(CNNBlockBase):
    """A random graph as a stage: input nodes have stride 2; the output is the output nodes' mean.

    Its nodes run one by one. Networks consist of ``RandWireStage``, a subclass that computes the
    same with fused operators where they work.

    Args:
        spec: the wiring and the channels.
        node_op: a name in ``NODE_OP_REGISTRY``.
        norm: see ``build_norm``.

    Attributes:
        plan: the order of the nodes, and when their results are no longer needed.
    """

    def __init__(self, spec: StageSpec, node_op: str, norm: str) -> None:
        super().__init__(spec.in_channels, spec.channels, stride=2)
        self.nodes = nn.ModuleList(
            Node(len(predecessors), spec.channels, spec.channels, 1, node_op, norm)
            if predecessors
            else Node(1, spec.in_channels, spec.channels, 2, node_op, norm)
            for predecessors in spec.dag.predecessors
        )
        self.plan = Plan(spec.dag)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).
            kept: for each edge that has a weight, in the order of ``plan.learned``, False if it is
                left out of its target's weighted sum; by default all are kept.

        Returns:
            Tensor: (N, channels, ceil(H / 2), ceil(W / 2)), the mean of the output nodes.
        """
        nodes, plan = [*self.nodes], self.plan
        results: dict[int, Tensor] = {}
        total = None
        for v in plan.order:
            inputs = [results[u] for u in plan.predecessors[v]] or [x]
            y = nodes[v](inputs, None if kept is None else kept[plan.coefficients[v]])
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
