"""The backward pass of a random graph of separable convolutions, with its equations."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .graph_state import State, aligned
from .shares import Shares
from .weights import wider_image


class Gradients:
    """The backward pass, node by node, the last one first.

    With ∂t for the gradient of the loss with respect to t, and the names of ``graph_function``'s
    docstring, it computes at node v, in this order:

        ∂y_v = Σ_w c_vw · ∂s_w                over its readers w; for an output node, ∂output
                                              divided by the number of output nodes
        ∂c_vw = ⟨∂s_w, y_v⟩                   for each reader w, since s_w = … + c_vw · y_v + …
        ∂z_v, ∂γ_v, ∂β_v                      from ∂y_v, by the backward pass of the batch norm,
                                              which includes mean and variance
        ∂d_v = P_vᵀ · ∂z_v
        ∂P_v = Σ ∂z_v · d_vᵀ                  over all pixels
        ∂s_v = [s_v > 0] · (D_v' * ∂d_v)      where D_v' is D_v rotated by 180°
        ∂D_v = Σ ∂d_v · ReLU(s_v)             over all pixels, for each shift of the kernel

    With fixed statistics ∂z_v = a_v · ∂y_v, and the gradients of a and b are those of an affine
    function. Sums over pixels are computed in parts, which are added up at the end for all nodes.

    Attributes:
        sums: ∂s of each node, until all of its predecessors have read it.
        x: the gradients of the stage's input, one from each input node.
        products: parts of ∂c; the key is the place of the first in the order of ``by_source``.
        norm_gradients: the gradients of ``State.norms``, with the same keys.
        depthwise_parts: for tuples of nodes, parts of their ∂D.
        pointwise: for each node, ∂P.
    """

    def __init__(self, state: State, grad_output: Tensor, need_x: bool) -> None:
        plan = state.run.plan
        self.state, self.need_x = state, need_x
        self.output = wider_image(grad_output, state.run.padding)
        self.sums: dict[int, Tensor] = {}
        self.x: list[Tensor] = []
        self.products: dict[int, Tensor] = {}
        self.norm_gradients: dict[int, Tensor] = {}
        self.depthwise_parts: dict[Sequence[int], Tensor] = {}
        self.pointwise: list[Tensor | None] = [None] * plan.num_nodes

    def nodes(self, number: int) -> None:
        """Compute the gradients of a group's nodes."""
        state, run, plan = self.state, self.state.run, self.state.run.plan
        group = plan.groups[number]
        grads = {}
        if run.batch:
            grads = dict(zip(group, self.batch_norms(number), strict=True))
            self.free(group)
        for nodes in reversed(run.parts(group)):
            if not run.batch:
                grads.update(zip(nodes, self.fixed_norms(nodes), strict=True))
                self.free(nodes)
            # The gradients of the convolutions need the node's inputs. Inputs that were not saved
            # are computed again only now, so that few are held at once. Their own inputs were saved
            # and are still held, because their gradients come later.
            for u in plan.predecessors[nodes[0]]:
                if u not in state.results:
                    state.compute((u,))
            grad_sums = self.convolutions(nodes, grads)
            if plan.predecessors[nodes[0]]:
                self.sums.update(zip(nodes, grad_sums, strict=True))
            elif self.need_x:
                self.x += grad_sums

    def free(self, nodes: Sequence[int]) -> None:
        """Drop what is not read again, so that the convolutions can use its memory."""
        for v in nodes:
            self.state.results.pop(v, None)
            for w in self.state.run.plan.done_backward[v]:
                del self.sums[w]

    def reads(self, v: int) -> list[Tensor]:
        """The gradients from the readers of node v."""
        return [self.output if w is None else self.sums[w] for w in self.state.run.plan.reads[v]]

    # The backward operators of the norms also return ∂c of the edges to the readers, because they
    # compute y_v.

    def readers(self, nodes: Sequence[int]) -> tuple[int, tuple[list[Tensor], list[int], Tensor]]:
        """The place of the nodes' first reader; the readers' gradients, their number for each node,
        and their coefficients."""
        places = self.state.run.plan.reader_coefficients
        first, last = places[nodes[0]].start, places[nodes[-1]].stop
        reads = [self.reads(v) for v in nodes]
        grads = [grad for some in reads for grad in some]
        coefficients = self.state.reader_coefficients[first:last]
        return first, (grads, [len(some) for some in reads], coefficients)

    def fixed_norms(self, nodes: Sequence[int]) -> list[Tensor]:
        """∂z of nodes from ∂s of their readers, for fixed statistics."""
        state, run, plan = self.state, self.state.run, self.state.run.plan
        first, readers = self.readers(nodes)
        # The result of an output node may be missing: its products are not needed.
        inputs = [
            state.results[v] if plan.successors[v] or run.affine else self.output for v in nodes
        ]
        if run.affine:
            self.norm_gradients[first] = _affine_gradients(*readers, inputs)
        affines = [state.affines[v] for v in nodes]
        grads, self.products[first] = ops.weighted_sum_backward(*readers, inputs, affines)
        return grads

    def batch_norms(self, number: int) -> list[Tensor]:
        """∂z of a group's nodes from ∂s of their readers, through means and variances."""
        state, run, plan = self.state, self.state.run, self.state.run.plan
        group = plan.groups[number]
        first, readers = self.readers(group)
        grads, products, self.norm_gradients[first] = ops.batch_norm_backward(
            *readers,
            [state.results[v] for v in group],
            state.norms[plan.places[number]],
            state.moments[number],
            run.eps,
        )
        self.products[first] = products[None]
        if run.shares:
            grads = self.synchronise(number, grads, self.norm_gradients[first], run.shares)
        return grads

    def synchronise(
        self, number: int, grads: list[Tensor], norm_gradients: Tensor, shares: Shares
    ) -> list[Tensor]:
        """∂z by all processes' sums of ∂y and of ∂y · x̂, from that by this process's sums."""
        state, plan = self.state, self.state.run.plan
        weight, _ = state.norms[plan.places[number]].unbind(1)
        grad_weight, grad_bias = norm_gradients.unbind(1)
        affines = shares.correct(
            *(grad_bias, grad_weight, state.moments[number], weight, state.run.eps)
        )
        same = torch.stack((torch.ones_like(weight), torch.zeros_like(weight)), 1)
        both = [*zip(aligned(same), aligned(affines), strict=True)]
        ones = state.coefficients.new_ones(2)
        return [
            ops.weighted_sum([grad, state.results[v]], ones, pair)
            for v, grad, pair in zip(plan.groups[number], grads, both, strict=True)
        ]

    def convolutions(self, nodes: Sequence[int], grads: dict[int, Tensor]) -> list[Tensor]:
        """Nodes' ∂s, if anybody needs it, from their ∂z, which are taken out of ``grads``."""
        state = self.state
        need_sum = self.need_x or bool(state.run.plan.predecessors[nodes[0]])
        pointwise = [state.pointwise[v] for v in nodes]
        if state.run.joined:
            grad_sums, self.depthwise_parts[nodes], found = ops.separable_backward(
                [grads.pop(v) for v in nodes], *state.operands(nodes), pointwise, need_sum
            )
            for v, grad in zip(nodes, found, strict=True):
                self.pointwise[v] = grad
            return grad_sums
        there = nodes[0] in state.inner
        grads_inner = []
        for v, weight in zip(nodes, pointwise, strict=True):
            if there:
                grad_inner, self.pointwise[v] = ops.conv1x1_backward(
                    grads.pop(v), state.inner.pop(v), weight
                )
            else:
                # ∂d_v does not depend on d_v, so it can come first. The next operator, which reads
                # the node's inputs anyway, returns d_v as well; ∂P_v waits for that.
                grad_inner = F.conv2d(grads[v], weight.transpose(0, 1))
            grads_inner.append(grad_inner)
        grad_sums, self.depthwise_parts[nodes], recomputed = ops.aggregate_backward(
            grads_inner, *state.operands(nodes), (need_sum, not there)
        )
        for v, inner in zip(() if there else nodes, recomputed, strict=True):
            _, self.pointwise[v] = ops.conv1x1_backward(
                grads.pop(v), inner, state.pointwise[v], (False, True)
            )
        return grad_sums

    def coefficients(self) -> Tensor:
        """∂c, in the order of ``by_source``."""
        whole = torch.cat([self.products[place] for place in sorted(self.products)], 1)
        # A norm's backward needs its sums at once, so they are complete.
        return whole[0] if self.state.run.batch else whole.sum(0)

    def norms(self) -> Tensor | None:
        """The gradient of ``State.norms``, if it is known."""
        known = self.norm_gradients
        return torch.cat([known[place] for place in sorted(known)]) if known else None

    def depthwise(self, dtype: torch.dtype) -> list[Tensor]:
        """∂D of all nodes."""
        plan = self.state.run.plan
        gradients: dict[int, Tensor] = {}
        # Input nodes have other sizes.
        inputs: list[Sequence[int]] = []
        others: list[Sequence[int]] = []
        for nodes in self.depthwise_parts:
            (others if plan.predecessors[nodes[0]] else inputs).append(nodes)
        for some in filter(None, (inputs, others)):
            whole = torch.cat([self.depthwise_parts[nodes] for nodes in some]).sum(1)
            padding = self.state.run.padding_read(some[0][0])
            whole = whole[..., : whole.shape[2] - padding]
            # As the weights are laid out: autograd would copy them one by one.
            weights = whole.transpose(1, 2).to(dtype).contiguous().unflatten(2, (1, 3, 3))
            gradients.update(zip([v for nodes in some for v in nodes], weights, strict=True))
        return [gradients[v] for v in range(len(gradients))]


def _affine_gradients(
    grads: Sequence[Tensor],
    readers: Sequence[int],
    coefficients: Tensor,
    inputs: Sequence[Tensor],
) -> Tensor:
    """Those of (nodes, 2, C), the affine functions of ``inputs`` that weighted sums have read."""
    found = []
    for own, x in zip(ops.pieces(readers), inputs, strict=True):
        grad = ops.weighted_sum(grads[own], coefficients[own], []).to(coefficients.dtype)
        found.append(torch.stack(((grad * x).sum((0, 2, 3)), grad.sum((0, 2, 3)))))
    return torch.stack(found)
