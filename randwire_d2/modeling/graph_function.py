"""A random graph of separable convolutions as one autograd function, with its gradients.

It is made of the operators of ``randwire_d2.ops``. As one function, because much of the memory
traffic is between the nodes: autograd would write a gradient for every edge and then add them up,
where one pass over the gradients of a node's readers will do.

Node v (§3.2) computes, from the y_u of its predecessors, or from the stage's input with c = 1,

    s_v = Σ_u c_uv · y_u       the weighted sum, c_uv = σ(w_uv)
    d_v = D_v * ReLU(s_v)      the depthwise convolution; in the code, ``inner``
    z_v = P_v · d_v            the 1×1 convolution; ``results``
    y_v = a_v · z_v + b_v      the batch norm, an affine function of each channel

and the stage returns the mean of y_v over its output nodes. Of these, d_v and z_v are written; s_v
and y_v exist only inside the operators that read them. Where statistics are fixed, a_v and b_v are
known before z_v is: a_v · P_v and b_v are then the convolution's weight and bias, and z_v is y_v
already.

With U the size of a node's result, a training step reads and writes, per node,

    forward    aggregate 3 U, 1×1 convolution 2 U, statistics 1 U
    backward   norm 4 U, 1×1 convolution 3 U, aggregate 4 U

and saves two tensors, d_v and z_v. To save memory, only z_v are kept, and not all of them.

With synchronised norms, whose statistics are those of all processes' images, nodes that do not need
each other send theirs in one message. Their backward pass takes 3 U more: the operators know this
process's sums alone, and what those of all change in ∂z_v, an affine function of z_v, is added.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from .graph_gradients import Gradients
from .graph_state import Run, State, cast


class GraphFunction(torch.autograd.Function):
    """(run, by_source, x, coefficients, *parameters) -> (output, *moments of batch norms).

    ``parameters`` are those of ``State``, one list after the other: autograd gives gradients to
    arguments that are tensors, and does not look into lists.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Run, by_source: Tensor, x: Tensor, coefficients: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        state = State(run, x, coefficients, parameters)
        output = state.forward()
        moments = [state.moments[v] for v in range(run.plan.num_nodes) if run.batch]
        if run.save:
            ctx.run, ctx.nodes = run, [list(tensors) for tensors in state.by_node]
            # Not as attributes of ctx: torch frees these after the backward pass, and shows them to
            # hooks that move saved tensors elsewhere.
            saved = [tensor for tensors in state.by_node for tensor in tensors.values()]
            ctx.save_for_backward(by_source, x, coefficients, *parameters, *saved)
            ctx.set_materialize_grads(False)  # no zeros for the moments, which have no gradient
            ctx.mark_non_differentiable(*moments)
        return output, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Any, *grad_moments: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        n = ctx.run.plan.num_nodes
        by_source, x, coefficients, *tensors = ctx.saved_tensors
        state = State(ctx.run, x, coefficients, tensors[: 4 * n])
        saved = iter(tensors[4 * n :])
        for by_node, nodes in zip(state.by_node, ctx.nodes, strict=True):
            by_node.update((v, next(saved)) for v in nodes)
        need_x = ctx.needs_input_grad[2]
        need_affine = not ctx.run.batch and any(ctx.needs_input_grad[4 + 2 * n :])
        edge_coefficients = torch.cat((coefficients, state.one))[by_source]
        gradients = Gradients(state, edge_coefficients, grad_output, need_x, need_affine)
        # A node's gradient is a sum over its readers, so they come first.
        for group in reversed(ctx.run.plan.groups):
            gradients.nodes(group[::-1])

        grad_x = None
        if need_x:
            ones = state.one.repeat(len(gradients.x))
            grad_x = ops.weighted_sum(gradients.x, ones, [])
        # The gradients go where the coefficients came from. The last place is that of the 1 that
        # all single inputs share; whichever of their gradients it gets, nobody asks for it.
        grad_coefficients = coefficients.new_empty(len(coefficients) + 1)
        grad_coefficients.index_copy_(0, by_source, torch.cat(gradients.edges))
        # In the weights' own types: autograd would cast them one by one.
        own = [tensor.dtype for tensor in tensors[: 2 * n : n]]
        grad_parameters = (
            *cast(gradients.depthwise, own[0]), *cast(gradients.pointwise, own[1]),
            *gradients.scale, *gradients.bias,
        )  # fmt: skip
        return None, None, grad_x, grad_coefficients[:-1], *grad_parameters
