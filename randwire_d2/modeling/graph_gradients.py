"""The backward pass of a random graph of separable convolutions, with its equations."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .graph_state import State
from .shares import Shares


class Gradients:
    """The backward pass, node by node, the last one first.

    With ∂t for the gradient of the loss by t, and the names of ``graph_function``'s docstring, it
    computes at node v, in this order:

        ∂y_v = Σ_w c_vw · ∂s_w                over its readers w; at an output node, the share
                                              of ∂output that a mean gives it
        ∂c_vw = ⟨∂s_w, y_v⟩                   of each reader, since s_w = … + c_vw · y_v + …
        ∂z_v, ∂γ_v, ∂β_v                      from ∂y_v, by the batch norm's own backward, which
                                              goes through mean and variance too
        ∂d_v = P_vᵀ · ∂z_v
        ∂P_v = Σ ∂z_v · d_vᵀ                  over all pixels
        ∂s_v = [s_v > 0] · (D_v' * ∂d_v)      where D_v' is D_v turned by half a circle
        ∂D_v = Σ ∂d_v · ReLU(s_v)             over all pixels, for each shift of the kernel

    With fixed statistics ∂z_v = ∂y_v, and the 1×1 convolution gives ∂(a_v · P_v) and ∂b_v, so

        ∂P_v = a_v · ∂(a_v · P_v)
        ∂a_v = ⟨P_v, ∂(a_v · P_v)⟩            for each channel of the result

    Attributes:
        sums: ∂s of nodes whose predecessors have not all read it.
        x: the gradients that input nodes leave to the stage's input.
        edges: for each node, ∂c of the edges to its readers: together, the order of ``by_source``.
        depthwise, pointwise, scale, bias: those of the tensors that ``State`` calls so.
    """

    def __init__(
        self,
        state: State,
        edge_coefficients: Tensor,
        grad_output: Tensor,
        need_x: bool,
        need_affine: bool,
    ) -> None:
        plan = state.run.plan
        self.state, self.edge_coefficients = state, edge_coefficients
        self.need_x, self.need_affine = need_x, need_affine
        share = 1 / len(plan.output_nodes)
        self.share = state.one * share
        self.output = grad_output.contiguous(memory_format=torch.channels_last)
        if not state.run.batch:
            # It is then ∂z of every output node, so it is divided once, for all of them. A batch
            # norm's backward multiplies what it reads by coefficients anyway: no pass for that.
            self.output = self.output * share
        self.sums: dict[int, Tensor] = {}
        self.x: list[Tensor] = []
        self.edges = [edge_coefficients[:0]] * plan.num_nodes
        nothing: list[Tensor | None] = [None] * plan.num_nodes
        self.depthwise, self.pointwise = nothing.copy(), nothing.copy()
        self.scale, self.bias = nothing.copy(), nothing.copy()

    def nodes(self, group: Sequence[int]) -> None:
        """Those of nodes that do not need each other."""
        state, plan = self.state, self.state.run.plan
        grads = {v: self.norm(v) for v in group}
        if state.run.shares:
            self.synchronise(grads, state.run.shares)
        for v in group:
            # Nobody reads these any more: their memory is for what the convolutions will write.
            state.results.pop(v, None)
            for w in plan.done_backward[v]:
                del self.sums[w]
        for v in group:
            # The gradients of the convolutions want the node's inputs. Those that were forgotten
            # are computed again here, not earlier, so that few are there at once. What they are
            # computed from was saved, and is still there, because its own turn comes later.
            for u in plan.predecessors[v]:
                if u not in state.results:
                    state.compute(u)
            grad_sum = self.convolutions(v, grads.pop(v))
            if plan.predecessors[v]:
                self.sums[v] = grad_sum
            elif self.need_x:
                self.x.append(grad_sum)

    def synchronise(self, grads: dict[int, Tensor], shares: Shares) -> None:
        """From ∂z by this process's sums of ∂y and of ∂y · x̂ to that by all processes'."""
        state, nodes = self.state, [*grads]
        grad_bias, grad_scale, moments, scale = (
            torch.stack([by_node[v] for v in nodes])  # type: ignore[misc]
            for by_node in (self.bias, self.scale, state.moments, state.scale)
        )
        affines = shares.correct(grad_bias, grad_scale, moments, scale, state.run.eps)
        same = torch.stack((torch.ones_like(scale), torch.zeros_like(scale)), 1)
        for i, v in enumerate(nodes):
            grads[v] = ops.weighted_sum(
                [grads[v], state.results[v]], state.one.repeat(2), [same[i], affines[i]]
            )

    def norm(self, v: int) -> Tensor:
        """From ∂s of node v's readers to ∂z of v."""
        state, run, plan = self.state, self.state.run, self.state.run.plan
        readers = plan.successors[v]
        if readers:
            grads = [self.sums[w] for w in readers]
            coefficients = self.edge_coefficients[plan.reader_coefficients[v]]
        else:
            grads, coefficients = [self.output], self.share
        # The products are ∂c of the edges to the readers. They are had at the node that is read,
        # not at the one that reads with c: the operators here are the ones that have y_v.
        if run.batch:
            grad, products, self.scale[v], self.bias[v] = ops.batch_norm_backward(
                grads,
                coefficients,
                state.results[v],
                state.scale[v],
                state.bias[v],
                state.moments[v],
                run.eps,
            )
        elif readers:
            grad, products = ops.weighted_sum_backward(grads, coefficients, state.results[v])
        else:
            grad, products = self.output, None
        if readers:
            self.edges[v] = products
        return grad

    def convolutions(self, v: int, grad: Tensor) -> Tensor:
        """From ∂z of node v to its ∂s, which is empty if nobody needs it."""
        state, affine = self.state, self.need_affine
        inputs, coefficients, affines = state.inputs(v)
        need_sum = self.need_x or bool(state.run.plan.predecessors[v])
        weight, inner = state.conv1x1(v), state.inner.pop(v, None)
        if inner is None:
            # ∂d_v does not depend on d_v, so it can come first. The next operator, which reads the
            # node's inputs anyway, returns d_v as well; ∂P_v waits for that.
            grad_inner = F.conv2d(grad, weight.transpose(0, 1))
        else:
            grad_inner, grad_weight, grad_bias = _conv1x1_backward(
                grad, inner, weight, (True, True, affine)
            )
        grad_sum, self.depthwise[v], recomputed = ops.aggregate_backward(
            grad_inner,
            inputs,
            coefficients,
            affines,
            state.depthwise[v],
            state.stride(v),
            (need_sum, inner is None),
        )
        if inner is None:
            _, grad_weight, grad_bias = _conv1x1_backward(
                grad, recomputed, weight, (False, True, affine)
            )
        if state.run.batch:
            self.pointwise[v] = grad_weight
        else:
            self.pointwise[v] = grad_weight * state.scale[v][:, None, None, None]
            if affine:
                self.scale[v] = (grad_weight * state.pointwise[v]).sum(dim=(1, 2, 3))
                self.bias[v] = grad_bias
        return grad_sum


def _conv1x1_backward(
    grad: Tensor, x: Tensor, weight: Tensor, want: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a 1×1 convolution's input, weight and bias, those that are wanted."""
    bias_sizes = [len(weight)] if want[2] else None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, want
    )
