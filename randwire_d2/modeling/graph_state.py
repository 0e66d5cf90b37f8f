"""The forward pass of a random graph of separable convolutions, and what it saves for backward.

``graph_function`` explains the names.
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
from .weights import Padding, cast, narrower_image, wider_weights


@dataclass(frozen=True)
class Run:
    """The settings of one pass through a graph.

    Attributes:
        plan: the plan of the graph.
        batch: whether norms use the statistics of the batch.
        shares: for synchronised norms, how the batch is shared.
        eps: that of the norms.
        dtype: the type of activations, and of the convolutions' weights after a cast.
        padding, in_padding: how many channels of zeros pad the nodes' results, and the stage's
            input; see ``weights``.
        save: whether there will be a backward pass.
        recompute: whether to save less for it.
        affine: whether the norms' parameters need gradients although their statistics are fixed.
        joined: whether both convolutions of a node are one operator, as on a CPU. Then the result
            between them is not saved; computing it again costs little.
        together: whether the convolutions of nodes that do not depend on each other run together,
            which takes memory for all of them.
    """

    plan: Plan
    batch: bool
    shares: Shares | None
    eps: float
    dtype: torch.dtype
    padding: int
    in_padding: int
    save: bool
    recompute: bool
    affine: bool
    joined: bool
    together: bool

    def saves_result(self, v: int) -> bool:
        """Whether z of node v is saved. In the backward pass, only the norm of an output node reads
        its z, so it is not saved if the norm needs none."""
        read = self.batch or self.affine or bool(self.plan.successors[v])
        return self.save and read and not (self.recompute and v in self.plan.forgettable)

    @property
    def saves_inner(self) -> bool:
        return self.save and not self.recompute and not self.joined

    @property
    def adds_up(self) -> bool:
        """Whether output nodes are added up one by one, in one tensor."""
        return not (self.together or self.batch or self.save)

    def parts(self, group: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
        """A group, split into the nodes whose convolutions run together."""
        return (group,) if self.together else [(v,) for v in group]

    def padding_read(self, v: int) -> int:
        """How many channels of zeros pad what node v reads."""
        return self.padding if self.plan.predecessors[v] else self.in_padding

    @property
    def paddings(self) -> list[Padding]:
        """By how much the first dimensions of each D and P grow."""
        read = [self.padding_read(v) for v in range(self.plan.num_nodes)]
        return [*((padding,) for padding in read), *((self.padding, padding) for padding in read)]

    def wider(self, convolutions: Sequence[Tensor]) -> list[Tensor]:
        """D and P with ``paddings``, in ``dtype``."""
        return wider_weights(convolutions, self.paddings, self.dtype)


class State:
    """The tensors of one pass; the keys of dicts are nodes.

    Attributes:
        depthwise, pointwise: D and P.
        coefficients, reader_coefficients: c of all inputs, in the plan's orders ``by_target`` and
            ``by_source``.
        ones, shares: the coefficients of input nodes, and of output nodes in the mean.
        norms: in the plan's order, γ and β of each norm, or a and b if statistics are fixed.
        inner, results: d and z, until they have been read for the last time.
        affines: the batch norms as affine functions; see ``randwire_d2.ops``.
        moments: by the number of a group, the moments of its norms. Empty if statistics are fixed.
    """

    def __init__(
        self,
        run: Run,
        x: Tensor,
        coefficients: Tensor,
        edges: Tensor,
        norms: Tensor,
        convolutions: Sequence[Tensor],
    ) -> None:
        n = run.plan.num_nodes
        self.run, self.x, self.norms = run, x, norms
        self.ones = coefficients[run.plan.one : run.plan.share]
        self.shares = coefficients[run.plan.share :]
        sizes = len(run.plan.by_target), len(run.plan.by_source)
        self.coefficients, self.reader_coefficients = edges.split(sizes)
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
        """What the forward pass saves for the backward pass, besides its arguments."""
        affines = self.affines if self.run.batch else {}
        return self.inner, self.results, affines, self.moments

    def operands(self, nodes: Sequence[int]) -> tuple[Any, ...]:
        """The operands of ``ops.aggregate`` for nodes that are consecutive in the order. Either all
        or none of them read the stage's input."""
        plan, results, affines = self.run.plan, self.results, self.affines
        coefficients = self.coefficients[plan.inputs[nodes[0]].start : plan.inputs[nodes[-1]].stop]
        weights = [self.depthwise[v] for v in nodes]
        if not plan.predecessors[nodes[0]]:
            n = len(nodes)
            return [self.x] * n, [1] * n, coefficients, [], weights, 2
        predecessors = [u for v in nodes for u in plan.predecessors[v]]
        return (
            [results[u] for u in predecessors],
            [len(plan.predecessors[v]) for v in nodes],
            coefficients,
            [affines[u] for u in predecessors],
            weights,
            1,
        )

    def compute(self, nodes: Sequence[int], done: Iterable[int] = ()) -> None:
        """Run both convolutions of nodes; drop the results of ``done``, which they read last."""
        pointwise = [self.pointwise[v] for v in nodes]
        if self.run.joined:
            results = ops.separable(*self.operands(nodes), pointwise)
            self.drop(done)
        else:
            inner = ops.aggregate(*self.operands(nodes))
            self.drop(done)  # now, so that the next results can have their memory
            results = [F.conv2d(x, weight) for x, weight in zip(inner, pointwise, strict=True)]
            self.inner.update(zip(nodes, inner, strict=True))
        self.results.update(zip(nodes, results, strict=True))

    def drop(self, nodes: Iterable[int]) -> None:
        """Drop the results of nodes, which will not be read again."""
        for v in nodes:
            self.results.pop(v, None)

    def forward(self) -> Tensor:
        """Run all nodes; return the mean of the output nodes."""
        run, plan = self.run, self.run.plan
        mean = None
        for number, group in enumerate(plan.groups):
            for nodes in run.parts(group):
                done = [u for v in nodes for u in plan.done[v] if not run.saves_result(u)]
                self.compute(nodes, done)
                if not run.saves_inner:
                    self.inner.clear()
                if run.adds_up and not plan.successors[nodes[0]]:
                    mean = self.add(mean, nodes[0])
            if run.batch:
                self.normalise(number)
        outputs = plan.output_nodes
        if mean is None:
            affines = [self.affines[v] for v in outputs]
            mean = ops.weighted_sum([self.results[v] for v in outputs], self.shares, affines)
        self.drop(v for v in outputs if not run.saves_result(v))
        return narrower_image(mean, run.padding)

    def add(self, total: Tensor | None, v: int) -> Tensor:
        """Add node v to the mean of the output nodes, in place."""
        outputs = self.run.plan.output_nodes
        own = self.shares[outputs.index(v)] * self.affines[v]
        scale, shift = own.to(self.run.dtype)[..., None, None]
        result = self.results.pop(v)
        if total is None:
            return torch.addcmul(shift, result, scale, out=result)
        return total.addcmul_(result, scale).add_(shift)

    def normalise(self, number: int) -> None:
        """Compute the statistics of a group's nodes."""
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
    """The same (nodes, 2, C), with each node at a multiple of 16 bytes.

    Triton compiles a kernel for each pattern of aligned and unaligned inputs.
    """
    nodes, _, channels = affines.shape
    padded = F.pad(affines.flatten(1), (0, -2 * channels % 4))
    return padded[:, : 2 * channels].view(nodes, 2, channels)
