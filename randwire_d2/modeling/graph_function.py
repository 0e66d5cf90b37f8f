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
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..wiring.plan import Plan


@dataclass(frozen=True)
class Run:
    """What is known of one pass through a graph, beside its tensors.

    Attributes:
        plan: the plan of the graph.
        batch: whether norms use the statistics of the batch; else they are folded into the 1×1
            convolutions.
        eps: the norms'.
        dtype: what activations are in, and the weights of the convolutions are cast to.
        save: whether there will be a backward pass.
        recompute: whether to save less for it.
    """

    plan: Plan
    batch: bool
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


class _State:
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
        self.depthwise = _cast(parameters[:n], run.dtype)
        self.pointwise = parameters[n : 2 * n]
        self.scale, self.bias = parameters[2 * n : 3 * n], parameters[3 * n :]
        if run.batch:
            self.pointwise = _cast(self.pointwise, run.dtype)
        else:  # P's product with a is cast, so that it is rounded once
            self.bias = _cast(self.bias, run.dtype)
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
        for v in plan.order:
            self.compute(v, [u for u in plan.done[v] if not run.saves_result(u)])
            if not run.saves_inner:
                del self.inner[v]
            if run.batch:
                self.affines[v], self.moments[v] = ops.batch_norm_statistics(
                    self.results[v], self.scale[v], self.bias[v], run.eps
                )
            elif not plan.successors[v]:
                # z_v is y_v already, and nobody reads it but the mean: added up at once, all output
                # nodes take one tensor. (Where it is not y_v, it is saved for its norm anyway.)
                result = self.results.pop(v)
                output = result if output is None else output.add_(result)
                del result
        outputs = plan.output_nodes
        if output is None:
            return ops.weighted_sum(
                [self.results[v] for v in outputs],
                self.one.new_full((len(outputs),), 1 / len(outputs)),
                [self.affines[v] for v in outputs],
            )
        return output.div_(len(outputs)) if len(outputs) > 1 else output


class GraphFunction(torch.autograd.Function):
    """(run, by_source, x, coefficients, *parameters) -> (output, *moments of batch norms).

    ``parameters`` are those of ``_State``, one list after the other: autograd gives gradients to
    arguments that are tensors, and does not look into lists.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Run, by_source: Tensor, x: Tensor, coefficients: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        state = _State(run, x, coefficients, parameters)
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
        state = _State(ctx.run, x, coefficients, tensors[: 4 * n])
        saved = iter(tensors[4 * n :])
        for by_node, nodes in zip(state.by_node, ctx.nodes, strict=True):
            by_node.update((v, next(saved)) for v in nodes)
        need_x = ctx.needs_input_grad[2]
        need_affine = not ctx.run.batch and any(ctx.needs_input_grad[4 + 2 * n :])
        edge_coefficients = torch.cat((coefficients, state.one))[by_source]
        gradients = _Gradients(state, edge_coefficients, grad_output, need_x, need_affine)
        # A node's gradient is a sum over its readers, so they come first.
        for v in reversed(ctx.run.plan.order):
            gradients.node(v)

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
            *_cast(gradients.depthwise, own[0]), *_cast(gradients.pointwise, own[1]),
            *gradients.scale, *gradients.bias,
        )  # fmt: skip
        return None, None, grad_x, grad_coefficients[:-1], *grad_parameters


class _Gradients:
    """The backward pass, node by node, the last one first.

    With ∂t for the gradient of the loss by t, and the names of this module's docstring, it computes
    at node v, in this order:

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
        depthwise, pointwise, scale, bias: those of the tensors that ``_State`` calls so.
    """

    def __init__(
        self,
        state: _State,
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

    def node(self, v: int) -> None:
        state, plan = self.state, self.state.run.plan
        # The gradients of the convolutions want the node's inputs. Those that were forgotten are
        # computed again here, not earlier, so that few are there at once. What they are computed
        # from was saved, and is still there, because its own turn comes later.
        for u in plan.predecessors[v]:
            if u not in state.results:
                state.compute(u)
        grad_sum = self.convolutions(v, self.norm(v))
        if plan.predecessors[v]:
            self.sums[v] = grad_sum
        elif self.need_x:
            self.x.append(grad_sum)

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
        # Nobody reads these any more: their memory is for what the convolutions will write.
        state.results.pop(v, None)
        for w in plan.done_backward[v]:
            del self.sums[w]
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


def _cast(tensors: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
    """All of them in another type, in one launch."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast


def _conv1x1_backward(
    grad: Tensor, x: Tensor, weight: Tensor, want: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a 1×1 convolution's input, weight and bias, those that are wanted."""
    bias_sizes = [len(weight)] if want[2] else None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, want
    )
