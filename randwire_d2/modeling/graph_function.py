"""A random graph of separable convolutions as one autograd function, with its gradients.

It calls the operators of ``randwire_d2.ops``. It is one function because much of the memory traffic
is between the nodes: autograd would write a gradient for every edge and then add them up, while one
pass over the gradients of a node's readers is enough.

Node v (§3.2) computes, from the y_u of its predecessors, or from the stage's input with c = 1,

    s_v = Σ_u c_uv · y_u       the weighted sum, c_uv = σ(w_uv)
    d_v = D_v * ReLU(s_v)      the depthwise convolution; in the code, ``inner``
    z_v = P_v · d_v            the 1×1 convolution; ``results``
    y_v = a_v · z_v + b_v      the batch norm, an affine function of each channel

and the stage returns the mean of y_v over its output nodes. Only d_v and z_v are written to memory;
s_v and y_v exist only inside the operators that read them. On a CPU, both convolutions are one
operator, and d_v is not written either: a few rows of it stay in the cache. On a GPU, cuDNN does
the 1×1 convolution.

With U the size of a node's result, a training step reads and writes, per node,

    forward    aggregate 3 U, 1×1 convolution 2 U, statistics 1 U
    backward   norm 4 U, or 2 U if statistics are fixed, 1×1 convolution 3 U, aggregate 4 U

and saves two tensors, d_v and z_v. On a CPU, the forward pass takes 2 U less, and the backward pass
computes d_v again. With ``recompute``, only some z_v are saved.

Synchronised norms have the statistics of all processes' images. Nodes that do not depend on each
other send theirs in one message. The backward pass takes 3 U more: the operators know only this
process's sums; an affine function of z_v then corrects ∂z_v for the sums of all processes.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .graph_gradients import Gradients
from .graph_state import Run, State
from .once import once_differentiable
from .weights import dense_image, narrower_image, narrower_weights, wider_image, zeros_of


class GraphFunction(torch.autograd.Function):
    """(run, edges, x, coefficients, norms, *convolutions) -> (output, *moments of groups).

    ``edges`` has the plan's ``by_target``, ``by_source`` and ``by_coefficient``, one after the
    other. ``convolutions`` has D of all nodes, then P of all nodes, as single arguments, because
    autograd computes no gradients for tensors in lists.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        edges: Tensor,
        x: Tensor,
        coefficients: Tensor,
        norms: Tensor,
        *convolutions: Tensor,
    ) -> tuple[Tensor, ...]:
        by_edge = coefficients[edges[: -len(coefficients)]]
        own_types = convolutions[0].dtype, convolutions[run.plan.num_nodes].dtype
        zeros = zeros_of(x)
        # The padded input is saved: to pad it again would take more launches.
        x = wider_image(x, run.in_padding)
        if run.padding or run.in_padding:
            convolutions = tuple(run.wider(convolutions))
        state = State(run, x, coefficients, by_edge, norms, convolutions)
        output = state.forward()
        moments = [*state.moments.values()]
        if run.save:
            ctx.zeros, ctx.run, ctx.keys = zeros, run, [list(tensors) for tensors in state.saved]
            ctx.own_types = own_types
            # Not as attributes of ctx: torch frees saved tensors after the backward pass, and lets
            # hooks move them elsewhere.
            saved = [tensor for tensors in state.saved for tensor in tensors.values()]
            own = edges, x, coefficients, by_edge, norms
            ctx.save_for_backward(*own, *convolutions, *saved)
            ctx.set_materialize_grads(False)  # no zeros for the moments, which have no gradient
            ctx.mark_non_differentiable(*moments)
        return output, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Any, *grad_moments: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        run, plan = ctx.run, ctx.run.plan
        n = plan.num_nodes
        edges, x, coefficients, by_edge, norms, *tensors = ctx.saved_tensors
        state = State(run, x, coefficients, by_edge, norms, tensors[: 2 * n])
        saved = iter(tensors[2 * n :])
        for own, keys in zip(state.saved, ctx.keys, strict=True):
            own.update((key, next(saved)) for key in keys)
        need_x = ctx.needs_input_grad[2]
        gradients = Gradients(state, grad_output, need_x)
        # A node's gradient is a sum over its readers, so they come first.
        for number in reversed(range(len(plan.groups))):
            gradients.nodes(number)

        grad_x = None
        if need_x:
            grad_x = narrower_image(ops.weighted_sum(gradients.x, state.ones, []), run.in_padding)
            # If the previous layer does not pad, its backward pass would be slow with padding.
            grad_x = grad_x if ctx.zeros else dense_image(grad_x)
        grad_coefficients = gradients.coefficients()[edges[-len(coefficients) :]]
        # In the weights' own types: autograd would cast them one by one.
        return (
            *(None, None, grad_x, grad_coefficients, gradients.norms()),
            *gradients.depthwise(ctx.own_types[0]),
            *narrower_weights(gradients.pointwise, run.paddings[n:], ctx.own_types[1]),
        )
