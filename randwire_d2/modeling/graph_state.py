"""The forward pass of a random graph of separable convolutions, and what it leaves for the other.

See ``graph_function`` for the names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..wiring.plan import Plan
from .shares import Shares


@dataclass(frozen=True)
class Run:
    """What is known of one pass through a graph, beside its tensors.

    Attributes:
        plan: the plan of the graph.
        batch: whether norms use the statistics of the batch; else they are folded into the 1×1
            convolutions.
        shares: for synchronised norms, how the batch is shared.
        eps: the norms'.
        dtype: what activations are in, and the weights of the convolutions are cast to.
        save: whether there will be a backward pass.
        recompute: whether to save less for it.
    """

    plan: Plan
    batch: bool
    shares: Shares | None
    eps: float
    dtype: torch.dtype
    save: bool
    recompute: bool

    def saves_result(self, v: int) -> bool:
        """Nobody but its batch norm reads an output node's result in the backward pass."""
        read = self.batch or bool(self.plan.successors[v])
        return self.save and read and not (self.recompute and v in self.plan.forgettable)

    @property
    def saves_inner(self) -> bool:
        return self.save and not self.recompute


class State:
    """The tensors of one pass; those of nodes by their number.

    Attributes:
        depthwise, pointwise, scale, bias: D, P, and of the norm γ and β, or a and b if statistics
            are fixed.
        inner, results: d and z, as long as somebody will read them.
        affines, moments: the batch norms'; see ``randwire_d2.ops``. Empty if statistics are fixed.
    """

    def __init__(
        self, run: Run, x: Tensor, coefficients: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        n = run.plan.num_nodes
        self.run, self.x, self.coefficients = run, x, coefficients
        self.one = coefficients.new_ones(1)
        self.depthwise = cast(parameters[:n], run.dtype)
        self.pointwise = parameters[n : 2 * n]
        self.scale, self.bias = parameters[2 * n : 3 * n], parameters[3 * n :]
        if run.batch:
            self.pointwise = cast(self.pointwise, run.dtype)
        else:  # P's product with a is cast, so that it is rounded once
            self.bias = cast(self.bias, run.dtype)
        self.inner: dict[int, Tensor] = {}
        self.results: dict[int, Tensor] = {}
        self.affines: dict[int, Tensor] = {}
        self.moments: dict[int, Tensor] = {}

    @property
    def by_node(self) -> tuple[dict[int, Tensor], ...]:
        """What the backward pass needs of the forward pass, beside its arguments."""
        return self.inner, self.results, self.affines, self.moments

    def inputs(self, v: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The inputs of node v's weighted sum, their coefficients, their affines."""
        predecessors = self.run.plan.predecessors[v]
        if not predecessors:
            return [self.x], self.one, []
        return (
            [self.results[u] for u in predecessors],
            self.coefficients[self.run.plan.coefficients[v]] if len(predecessors) > 1 else self.one,
            [self.affines[u] for u in predecessors] if self.run.batch else [],
        )

    def stride(self, v: int) -> int:
        return 1 if self.run.plan.predecessors[v] else 2

    def compute(self, v: int, done: Iterable[int] = ()) -> None:
        """Run both convolutions of node v, the last to read the results of ``done``."""
        inputs, coefficients, affines = self.inputs(v)
        self.inner[v] = ops.aggregate(
            inputs, coefficients, affines, self.depthwise[v], self.stride(v)
        )
        # Before the next result is made, whose memory can then be theirs.
        del inputs
        for u in done:
            del self.results[u]
        bias = None if self.run.batch else self.bias[v]
        self.results[v] = F.conv2d(self.inner[v], self.conv1x1(v), bias)

    def conv1x1(self, v: int) -> Tensor:
        """The weight of node v's 1×1 convolution. With fixed statistics it is a_v · P_v, made anew
        whenever it is used: all of them at once would be a copy of most of a network's weights."""
        if self.run.batch:
            return self.pointwise[v]
        weight, scale = self.pointwise[v], self.scale[v][:, None, None, None]
        if self.run.dtype == weight.dtype == scale.dtype:
            return weight * scale
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=self.run.dtype))

    def forward(self) -> Tensor:
        """Run all nodes; return the mean of the output nodes."""
        run, plan = self.run, self.run.plan
        output = None
        for group in plan.groups:
            for v in group:
                self.compute(v, [u for u in plan.done[v] if not run.saves_result(u)])
                if not run.saves_inner:
                    del self.inner[v]
                if run.batch:
                    self.affines[v], self.moments[v] = ops.batch_norm_statistics(
                        self.results[v], self.scale[v], self.bias[v], run.eps
                    )
                elif not plan.successors[v]:
                    # z_v is y_v already, and nobody reads it but the mean: added up at once, all
                    # output nodes take one tensor. (Where it is not y_v, it is saved for its norm
                    # anyway.)
                    result = self.results.pop(v)
                    output = result if output is None else output.add_(result)
                    del result
            if run.shares:
                self.synchronise(group, run.shares)
        outputs = plan.output_nodes
        if output is None:
            return ops.weighted_sum(
                [self.results[v] for v in outputs],
                self.one.new_full((len(outputs),), 1 / len(outputs)),
                [self.affines[v] for v in outputs],
            )
        return output.div_(len(outputs)) if len(outputs) > 1 else output

    def synchronise(self, nodes: Sequence[int], shares: Shares) -> None:
        """Replace statistics of this process's images by those of all processes'."""
        own, scale, bias = (
            torch.stack([by_node[v] for v in nodes])
            for by_node in (self.moments, self.scale, self.bias)
        )
        moments, affines = shares.normalise(own, scale, bias, self.run.eps)
        for i, v in enumerate(nodes):
            # Tensors of their own: a view can't be returned by an autograd function, nor saved
            # without all of what it is a view of.
            self.moments[v], self.affines[v] = moments[i].clone(), affines[i]


def cast(tensors: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
    """All of them in another type, in one launch."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast
