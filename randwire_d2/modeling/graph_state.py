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
        batch: whether norms use the statistics of the batch.
        shares: for synchronised norms, how the batch is shared.
        eps: the norms'.
        dtype: what activations are in, and the weights of the convolutions are cast to.
        save: whether there will be a backward pass.
        recompute: whether to save less for it.
        affine: whether the norms' own gradients are wanted though their statistics are fixed.
    """

    plan: Plan
    batch: bool
    shares: Shares | None
    eps: float
    dtype: torch.dtype
    save: bool
    recompute: bool
    affine: bool

    def saves_result(self, v: int) -> bool:
        """Nobody but its batch norm reads an output node's result in the backward pass."""
        read = self.batch or self.affine or bool(self.plan.successors[v])
        return self.save and read and not (self.recompute and v in self.plan.forgettable)

    @property
    def saves_inner(self) -> bool:
        return self.save and not self.recompute

    @property
    def folded(self) -> bool:
        """Whether norms are part of the 1×1 convolutions: a gradient would have to be unfolded."""
        return not (self.batch or self.save)


class State:
    """The tensors of one pass; those of nodes by their number.

    Attributes:
        depthwise, pointwise: D and P.
        norms: in the plan's order, of the norms γ and β, or a and b if statistics are fixed.
        inner, results: d and z, as long as somebody will read them.
        affines: the functions that the batch norms are; see ``randwire_d2.ops``.
        moments: the batch norms', by the number of a group. Empty if statistics are fixed.
    """

    def __init__(
        self,
        run: Run,
        x: Tensor,
        coefficients: Tensor,
        norms: Tensor,
        convolutions: Sequence[Tensor],
    ) -> None:
        n = run.plan.num_nodes
        self.run, self.x, self.coefficients, self.norms = run, x, coefficients, norms
        # Pieces of it all at once: a slice takes as long as a launch.
        own = coefficients[: run.plan.one].split([p.stop - p.start for p in run.plan.coefficients])
        self.ones = coefficients[run.plan.one : run.plan.share]
        one = self.ones[:1]
        self.own_coefficients = [piece if piece.numel() else one for piece in own]
        if run.folded:  # P's product with a is cast, so that it is rounded once
            self.depthwise, self.pointwise = cast(convolutions[:n], run.dtype), convolutions[n:]
        else:
            convolutions = cast(convolutions, run.dtype)
            self.depthwise, self.pointwise = convolutions[:n], convolutions[n:]
        self.inner: dict[int, Tensor] = {}
        self.results: dict[int, Tensor] = {}
        self.affines: dict[int, Tensor] = {}
        self.moments: dict[int, Tensor] = {}
        if not run.batch:
            self.affines.update(zip(run.plan.order, norms.unbind(), strict=True))

    @property
    def saved(self) -> tuple[dict[int, Tensor], ...]:
        """What the backward pass needs of the forward pass, beside its arguments."""
        affines = self.affines if self.run.batch else {}
        return self.inner, self.results, affines, self.moments

    def inputs(self, v: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The inputs of node v's weighted sum, their coefficients, their affines."""
        predecessors = self.run.plan.predecessors[v]
        if not predecessors:
            return [self.x], self.own_coefficients[v], []
        return (
            [self.results[u] for u in predecessors],
            self.own_coefficients[v],
            [] if self.run.folded else [self.affines[u] for u in predecessors],
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
        weight, bias = self.pointwise[v], None
        if self.run.folded:
            # Made when it is used: all at once would be a copy of most of a network's weights.
            scale, shift = self.affines[v]
            folded, bias = torch.empty_like(weight, dtype=self.run.dtype), shift.to(self.run.dtype)
            weight = torch.mul(weight, scale[:, None, None, None], out=folded)
        self.results[v] = F.conv2d(self.inner[v], weight, bias)

    def forward(self) -> Tensor:
        """Run all nodes; return the mean of the output nodes."""
        run, plan = self.run, self.run.plan
        output = None
        for number, group in enumerate(plan.groups):
            for v in group:
                self.compute(v, [u for u in plan.done[v] if not run.saves_result(u)])
                if not run.saves_inner:
                    del self.inner[v]
                if run.folded and not plan.successors[v]:
                    # z_v is y_v already, and nobody reads it but the mean: added up at once, all
                    # output nodes take one tensor.
                    result = self.results.pop(v)
                    output = result if output is None else output.add_(result)
                    del result
            if run.batch:
                self.normalise(number)
        outputs = plan.output_nodes
        if output is not None:
            return output.div_(len(outputs)) if len(outputs) > 1 else output
        mean = ops.weighted_sum(
            [self.results[v] for v in outputs],
            self.coefficients[plan.share :],
            [self.affines[v] for v in outputs],
        )
        for v in outputs:
            if not run.saves_result(v):
                del self.results[v]
        return mean

    def normalise(self, number: int) -> None:
        """Take the statistics of a group's nodes."""
        run, group = self.run, self.run.plan.groups[number]
        own = self.norms[run.plan.places[number]]
        affines, moments = ops.batch_norm_statistics([self.results[v] for v in group], own, run.eps)
        if run.shares:
            weight, bias = own.unbind(1)
            moments, whole = run.shares.normalise(moments, weight, bias, run.eps)
            affines = [*aligned(whole)]
        self.moments[number] = moments
        self.affines.update(zip(group, affines, strict=True))


def aligned(affines: Tensor) -> Tensor:
    """The same (nodes, 2, C), each at a multiple of 16 bytes.

    Triton compiles a kernel for each pattern of inputs whose addresses are, and whose are not.
    """
    nodes, _, channels = affines.shape
    padded = F.pad(affines.flatten(1), (0, -2 * channels % 4))
    return padded[:, : 2 * channels].view(nodes, 2, channels)


def cast(tensors: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
    """All of them in another type, in one launch."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast
