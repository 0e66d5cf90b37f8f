"""The fast path of a stage: the same function of the same weights, with less memory traffic.

One autograd function for a whole random graph, made of the operators of ``randwire_d2.ops``. As one
function, because much of the traffic is between the nodes: autograd would write a gradient for
every edge and then add them up, where one pass over the gradients of a node's readers will do.

With U the size of a node's result, a training step reads and writes, per node,

    forward    aggregate 3 U, 1×1 convolution 2 U, statistics 1 U
    backward   norm 4 U, 1×1 convolution 3 U, aggregate 4 U

and saves two tensors, the results of the depthwise and of the 1×1 convolution. To save memory, only
the latter are kept, and not all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..wiring.plan import Plan
from .node import Node, SepConv3x3

kernels = torch.ops.randwire


def is_fusable(nodes: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether ``run_fused`` computes what these nodes would: separable convolutions as they were
    built, followed by batch norms that all do the same, frozen or not; no hooks, which it would not
    call; no tracing or exporting, which wants torch's own operators."""
    return (
        ops.available(x.device)
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and all(_is_simple(node) for node in nodes)
        and len({_settings(node.norm) for node in nodes if isinstance(node, Node)}) == 1
    )


def _is_simple(node: nn.Module) -> bool:
    if type(node) is not Node or type(node.conv) is not SepConv3x3:
        return False
    norm, convs = node.norm, (node.conv.depthwise, node.conv.pointwise)
    if type(norm) is nn.BatchNorm2d:
        # Without a momentum, the running statistics are cumulative averages.
        simple = norm.affine and norm.track_running_stats and norm.momentum is not None
    else:
        simple = type(norm) is FrozenBatchNorm2d
    return (
        simple
        and all(type(conv) is Conv2d and conv.bias is None for conv in convs)
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            for module in (node, node.conv, *convs, norm)
        )
    )


def _settings(norm: Any) -> tuple[Any, ...]:
    batch = isinstance(norm, nn.BatchNorm2d) and norm.training
    return norm.eps, batch, norm.momentum if batch else None


def run_fused(
    plan: Plan,
    nodes: Sequence[Any],
    x: Tensor,
    dropped_edge: tuple[int, int] | None,
    by_source: Tensor,
    by_target: Tensor,
    recompute: bool,
) -> Tensor:
    """Run a whole random graph, and update its running statistics as its nodes would.

    Args:
        plan: the plan of the graph.
        nodes: its nodes; they must be fusable.
        x: the stage's input (N, in_channels, H, W).
        dropped_edge: see ``RandWireStage``.
        by_source, by_target: the plan's, as tensors on x's device.
        recompute: save less for the backward pass, and compute it again.

    Returns:
        Tensor: (N, channels, ceil(H / 2), ceil(W / 2)), in channels_last.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    norms: list[Any] = [node.norm for node in nodes]
    weights = [node.weight for node in nodes if node.weight is not None]
    coefficients = torch.sigmoid(torch.cat(weights)) if weights else norms[0].weight.new_empty(0)
    if dropped_edge is not None:
        # A zero, not a shorter sum: DistributedDataParallel waits for every parameter's gradient.
        u, v = dropped_edge
        mask = torch.ones_like(coefficients)
        mask[plan.coefficients[v].start + plan.predecessors[v].index(u)] = 0
        coefficients = coefficients * mask

    depthwise = [node.conv.depthwise.weight for node in nodes]
    pointwise = [node.conv.pointwise.weight for node in nodes]
    batch = isinstance(norms[0], nn.BatchNorm2d) and norms[0].training
    if batch:
        if x.shape[0] * -(-x.shape[2] // 2) * -(-x.shape[3] // 2) == 1:
            raise ValueError(
                "a batch norm in training needs more than one value per channel; the stage's input "
                f"is {tuple(x.shape)}: use larger images, a larger batch or FrozenBN"
            )
        scale, bias = [norm.weight for norm in norms], [norm.bias for norm in norms]
        pointwise = [weight.to(dtype) for weight in pointwise]
    else:
        scale, bias = _as_affine(norms)
    tensors = [*(weight.to(dtype) for weight in depthwise), *pointwise, *scale, *bias]
    inputs = (x.to(dtype).contiguous(memory_format=torch.channels_last), coefficients, *tensors)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    run = _Run(plan, batch, norms[0].eps, save, recompute)
    with torch.autocast(device, enabled=False):
        output, *moments = _Graph.apply(run, by_source, by_target, *inputs)
    if batch:
        _update_running_statistics(norms, moments, output.numel() // output.shape[1])
    return output


def _as_affine(norms: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The scale and the shift of each channel, of norms whose statistics are fixed."""
    weight, bias, mean, var = (
        torch.stack([getattr(norm, name) for norm in norms])
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * torch.rsqrt(var + norms[0].eps)
    return list(scale), list(bias - mean * scale)


@torch.no_grad()
def _update_running_statistics(norms: Sequence[Any], moments: Sequence[Tensor], count: int) -> None:
    means, variances = zip(*(m.unbind() for m in moments), strict=True)
    unbiased = torch._foreach_mul(variances, count / (count - 1))
    torch._foreach_lerp_([norm.running_mean for norm in norms], means, norms[0].momentum)
    torch._foreach_lerp_([norm.running_var for norm in norms], unbiased, norms[0].momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


@dataclass(frozen=True)
class _Run:
    """What is known of one pass through a graph, beside its tensors.

    Attributes:
        plan: the plan of the graph.
        batch: whether norms use the statistics of the batch; else they are folded into the 1×1
            convolutions.
        eps: the norms'.
        save: whether there will be a backward pass.
        recompute: whether to save less for it.
    """

    plan: Plan
    batch: bool
    eps: float
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
    """The tensors of one pass, those of nodes by their number.

    Attributes:
        results: what the 1×1 convolutions returned: with batch statistics, before the norm.
        inner: what the depthwise convolutions returned.
        affines, moments: the batch norms'; see ``randwire_d2.ops``.
    """

    def __init__(
        self, run: _Run, x: Tensor, coefficients: Tensor, tensors: Sequence[Tensor]
    ) -> None:
        n = run.plan.num_nodes
        self.run, self.x, self.coefficients = run, x, coefficients
        self.one = coefficients.new_ones(1)
        self.depthwise, self.pointwise = tensors[:n], tensors[n : 2 * n]
        self.scale, self.bias = tensors[2 * n : 3 * n], tensors[3 * n :]
        self.results: dict[int, Tensor] = {}
        self.inner: dict[int, Tensor] = {}
        self.affines: Sequence[Tensor] = ()
        self.moments: Sequence[Tensor] = ()

    def aggregated(self, v: int) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor, int]:
        """What ``aggregate`` and its backward take for node v."""
        predecessors = self.run.plan.predecessors[v]
        if not predecessors:
            return [self.x], self.one, [], self.depthwise[v], 2
        coefficients = self.coefficients[self.run.plan.coefficients[v]]
        return (
            [self.results[u] for u in predecessors],
            coefficients if len(predecessors) > 1 else self.one,
            [self.affines[u] for u in predecessors] if self.run.batch else [],
            self.depthwise[v],
            1,
        )

    def compute(self, v: int, done: Iterable[int] = ()) -> None:
        """Run both convolutions of node v, the last to read the results of ``done``."""
        self.inner[v] = kernels.aggregate(*self.aggregated(v))
        for u in done:
            del self.results[u]
        bias = None if self.run.batch else self.bias[v].to(self.inner[v])
        self.results[v] = F.conv2d(self.inner[v], self.conv1x1(v), bias)

    def conv1x1(self, v: int) -> Tensor:
        """The weight of node v's 1×1 convolution, which a norm of fixed statistics is a part of."""
        if self.run.batch:
            return self.pointwise[v]
        return (self.pointwise[v] * self.scale[v][:, None, None, None]).to(self.x.dtype)


class _Graph(torch.autograd.Function):
    """(run, by_source, by_target, x, coefficients, *tensors) -> (output, *moments of batch norms).

    ``tensors`` are the depthwise weights of all nodes, their 1×1 weights, and the scales and biases
    of their norms: the parameters, if statistics are the batch's, else what ``_as_affine`` returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: _Run,
        by_source: Tensor,
        by_target: Tensor,
        x: Tensor,
        coefficients: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        plan, n = run.plan, run.plan.num_nodes
        state = _State(run, x, coefficients, tensors)
        state.affines, state.moments = [state.one] * n, [state.one] * n
        output = None
        for v in plan.order:
            state.compute(v, [u for u in plan.done[v] if not run.saves_result(u)])
            if not run.saves_inner:
                del state.inner[v]
            if run.batch:
                state.affines[v], state.moments[v] = kernels.batch_norm_statistics(
                    state.results[v], state.scale[v], state.bias[v], run.eps
                )
            elif not plan.successors[v]:
                result = state.results.pop(v)
                output = result if output is None else output.add_(result)
                del result
        outputs = plan.output_nodes
        if output is None:
            output = kernels.weighted_sum(
                [state.results[v] for v in outputs],
                state.one.new_full((len(outputs),), 1 / len(outputs)),
                [state.affines[v] for v in outputs],
            )
        elif len(outputs) > 1:
            output.div_(len(outputs))
        moments = state.moments if run.batch else ()
        if run.save:
            ctx.run, ctx.results, ctx.inner = run, list(state.results), list(state.inner)
            ctx.save_for_backward(
                *(by_source, by_target, x, coefficients, *tensors),
                *(state.affines if run.batch else ()),
                *moments,
                *state.results.values(),
                *state.inner.values(),
            )
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*moments)
        return output, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Any, *grad_moments: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        run: _Run = ctx.run
        plan, n = run.plan, run.plan.num_nodes
        saved: Iterator[Tensor] = iter(ctx.saved_tensors)
        by_source, by_target, x, coefficients = (next(saved) for _ in range(4))
        state = _State(run, x, coefficients, [next(saved) for _ in range(4 * n)])
        if run.batch:
            state.affines = [next(saved) for _ in range(n)]
            state.moments = [next(saved) for _ in range(n)]
        state.results = {v: next(saved) for v in ctx.results}
        state.inner = {v: next(saved) for v in ctx.inner}
        need_x = ctx.needs_input_grad[3]
        need_affine = not run.batch and any(ctx.needs_input_grad[5 + 2 * n :])

        edge_coefficients = torch.cat((coefficients, state.one))[by_source]
        share = 1 / len(plan.output_nodes)
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        if not run.batch:
            grad_output = grad_output * share
        grads: dict[int, Tensor] = {}  # of the weighted sums of nodes, until nobody reads them
        grads_x: list[Tensor] = []
        grad_edges = [coefficients[:0]] * n
        grad_depthwise: list[Tensor | None] = [None] * n
        grad_pointwise, grad_scale, grad_bias = (grad_depthwise.copy() for _ in range(3))
        for v in plan.order[::-1]:
            for u in plan.predecessors[v]:
                if u not in state.results:
                    state.compute(u)

            readers = plan.successors[v]
            if readers:
                read = [grads[w] for w in readers]
                factors = edge_coefficients[plan.reader_coefficients[v]]
            else:
                read, factors = [grad_output], state.one * share
            if run.batch:
                grad, products, grad_scale[v], grad_bias[v] = kernels.batch_norm_backward(
                    *(read, factors, state.results[v]),
                    *(state.scale[v], state.bias[v], state.moments[v], run.eps),
                )
            elif readers:
                grad, products = kernels.weighted_sum_backward(read, factors, state.results[v])
            else:
                grad = grad_output
            if readers:
                grad_edges[v] = products
            state.results.pop(v, None)
            del read
            for w in plan.done_backward[v]:
                del grads[w]

            need_input = need_x or bool(plan.predecessors[v])
            weight, inner = state.conv1x1(v), state.inner.pop(v, None)
            if inner is None:
                grad_inner = F.conv2d(grad, weight.transpose(0, 1))
                grad_input, grad_depthwise[v], inner = kernels.aggregate_backward(
                    grad_inner, *state.aggregated(v), (need_input, True)
                )
                _, grad_weight, grad_shift = _conv1x1_backward(
                    grad, inner, weight, (False, True, need_affine)
                )
            else:
                grad_inner, grad_weight, grad_shift = _conv1x1_backward(
                    grad, inner, weight, (True, True, need_affine)
                )
                grad_input, grad_depthwise[v], _ = kernels.aggregate_backward(
                    grad_inner, *state.aggregated(v), (need_input, False)
                )
            if run.batch:
                grad_pointwise[v] = grad_weight
            else:
                grad_pointwise[v] = grad_weight * state.scale[v][:, None, None, None]
                if need_affine:
                    grad_scale[v] = (grad_weight * state.pointwise[v]).sum(dim=(1, 2, 3))
                    grad_bias[v] = grad_shift
            if plan.predecessors[v]:
                grads[v] = grad_input
            elif need_x:
                grads_x.append(grad_input)

        grad_x = None
        if need_x:
            grad_x = kernels.weighted_sum(grads_x, state.one.repeat(len(grads_x)), [])
        grad_coefficients = torch.cat(grad_edges)[by_target]
        grad_tensors = (*grad_depthwise, *grad_pointwise, *grad_scale, *grad_bias)
        return None, None, None, grad_x, grad_coefficients, *grad_tensors


def _conv1x1_backward(
    grad: Tensor, x: Tensor, weight: Tensor, want: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    bias_sizes = [len(weight)] if want[2] else None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, want
    )
