"""The fast path of a stage: the same function of the same weights, with less memory traffic.

This file reads a stage's modules and updates their running statistics; ``fusible`` says when that
will do. ``graph_function`` computes the result and its gradients.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..wiring.plan import Plan
from .graph_function import GraphFunction
from .graph_state import Run, aligned
from .shares import Shares
from .weights import cast, padding_of

Fused = Literal["auto", "on", "off"]


def uses_batch(norm: nn.Module) -> bool:
    """Whether a norm normalises by statistics of the batch."""
    return isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) and norm.training


def sharing(norm: nn.Module) -> Any:
    """The processes with which a synchronised norm shares a batch; None for other norms."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


class Settings(NamedTuple):
    """The settings of a norm; ``momentum`` and ``group`` are None unless ``batch`` is true."""

    eps: float
    batch: bool
    momentum: float | None
    group: Any


def settings(norm: Any) -> Settings:
    batch = uses_batch(norm)
    return Settings(norm.eps, batch, norm.momentum if batch else None, sharing(norm))


def tensors_of(nodes: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers; in a tenth of the time that ``nn.Module`` takes."""
    parameters: list[Tensor | None] = []
    buffers: list[Tensor | None] = []
    for module in _modules_of(nodes):
        parameters.extend(module._parameters.values())
        buffers.extend(module._buffers.values())
    return [p for p in parameters if p is not None], [b for b in buffers if b is not None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a stage computes in: autocast's (never for float64), or that of its input."""
    device = x.device.type
    casts = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


@contextmanager
def replaced(nodes: Sequence[Any], parameters: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """In the block, nodes have other tensors in place of these parameters."""
    places = [
        (module._parameters, name, own)
        for module in _modules_of(nodes)
        for name, own in module._parameters.items()
        if own in parameters
    ]
    try:
        for where, name, own in places:
            where[name] = parameters[own]
        yield
    finally:
        for where, name, own in places:
            where[name] = own


def _modules_of(nodes: Sequence[Any]) -> Iterator[Any]:
    for node in nodes:
        own = node._modules
        yield from (node, *own["conv"]._modules.values(), own["norm"])


def run_fused(
    plans: Sequence[Plan],
    edges: Sequence[Tensor],
    nodes: Sequence[Any],
    x: Tensor,
    kept: Tensor | None,
    recompute: bool,
) -> Tensor:
    """Run a whole random graph, and update its running statistics as its nodes would.

    Args:
        plans: the one that holds the fewest results at once, and the one by level, which takes more
            memory, but fewer launches and messages between processes.
        edges: of each plan; see ``RandWireStage``.
        nodes: its nodes, for which ``why_not`` is empty.
        x: the stage's input (N, in_channels, H, W).
        kept: see ``RandWireStage``.
        recompute: save less for the backward pass, and compute it again.

    Returns:
        Tensor: (N, channels, ceil(H / 2), ceil(W / 2)), in channels_last; see ``narrower_image``.

    Raises:
        ValueError: a batch has at most one value per channel to compute statistics of, or weights
            are on another device than x.
    """
    dtype, norm = compute_dtype(x), settings(nodes[0].norm)
    count = _count_values(x, norm)
    channels = nodes[0].conv.pointwise.out_channels
    padding, in_padding = (padding_of(c, dtype, x.device) for c in (channels, x.shape[1]))
    x = x.to(dtype)
    save = wants_gradients(x, (p for node in nodes for p in node.parameters()))
    # By level takes more memory, which recomputation is to save; in inference, a CPU gains nothing.
    together = not recompute and (save or x.device.type != "cpu")
    by_level = norm.group is not None or together or (norm.batch and not recompute)
    plan, chosen_edges = (plans[1], edges[1]) if by_level else (plans[0], edges[0])
    coefficients, affine, convolutions = _tensors(plan, nodes, kept, norm.batch, x, padding)
    shares = None if norm.group is None else Shares.of(norm.group, count, coefficients)
    run = Run(
        plan=plan,
        batch=norm.batch,
        shares=shares,
        eps=norm.eps,
        dtype=dtype,
        padding=padding,
        in_padding=in_padding,
        save=save,
        recompute=recompute,
        affine=save and affine.requires_grad,
        joined=ops.joins(x.device, dtype, channels),
        together=together,
    )
    # All casts are done: autocast must change no other type.
    with torch.autocast(x.device.type, enabled=False):
        output, *moments = GraphFunction.apply(
            *(run, chosen_edges, x, coefficients, affine), *convolutions
        )
    if norm.batch:
        norms = [nodes[v].norm for v in plan.order]
        moments = [own[..., :channels] for own in moments]
        total = count if shares is None else shares.total
        _update_running_statistics(norms, moments, total, norm.momentum)
    return output


def _count_values(x: Tensor, norm: Settings) -> int:
    """How many values per channel a node's norm sees, for a stage's input ``x``."""
    count = x.shape[0] * -(-x.shape[2] // 2) * -(-x.shape[3] // 2)
    if norm.batch and count == 1 and norm.group is None:
        raise ValueError(
            "a batch norm in training needs more than one value per channel; the stage's input "
            f"is {tuple(x.shape)}: use larger images, a larger batch or FrozenBN"
        )
    if count == 0 and norm.group is not None:  # kernels would read a pixel that isn't there
        raise ValueError(
            "a synchronised batch norm in training needs images in each process; the stage's input "
            f"is {tuple(x.shape)}: leave no process without, or use FrozenBN"
        )
    return count


def wants_gradients(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether any gradient is needed. Call it outside of the autograd function, where gradients are
    always off."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in parameters)
    )


def _tensors(
    plan: Plan,
    nodes: Sequence[Any],
    kept: Tensor | None,
    batch: bool,
    x: Tensor,
    padding: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The tensors of the nodes for ``GraphFunction``: coefficients, norms and convolutions."""
    # Values per channel are in single precision at least, even if the model was cast to bfloat16.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    affine = (_parameters if batch else _as_affine)([nodes[v].norm for v in plan.order], wide)
    if padding:
        affine = F.pad(affine, (0, padding))
    convs = [node.conv for node in nodes]
    convolutions = [conv.depthwise.weight for conv in convs]
    convolutions += [conv.pointwise.weight for conv in convs]
    coefficients = _coefficients(plan, nodes, kept, wide)
    # Operators need one device; weights that were not loaded may still be on "meta".
    if any(t.device != x.device for t in (coefficients, affine, *convolutions)):
        raise ValueError(f"a stage's input is on {x.device}, and not all of its weights are")
    return coefficients, affine, convolutions


def _coefficients(
    plan: Plan, nodes: Sequence[Any], kept: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """σ(w) of all learned edges, grouped by target node; then the plan's constants."""
    weights = [node.weight for node in nodes if node.weight is not None]
    some = nodes[0].conv.depthwise.weight
    ones = some.new_ones(plan.share - plan.one, dtype=dtype)
    outputs = len(plan.output_nodes)
    shares = some.new_full((outputs,), 1 / outputs, dtype=dtype)
    if not weights:
        return torch.cat((ones, shares))
    coefficients = torch.sigmoid(torch.cat(weights))
    # A zero, not a shorter sum: DistributedDataParallel waits for every parameter's gradient.
    if kept is not None:
        coefficients = coefficients * kept
    return torch.cat((coefficients.to(dtype), ones, shares))


def _parameters(norms: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """(nodes, 2, C): the weight and bias of each norm."""
    both = torch.stack([parameter for norm in norms for parameter in (norm.weight, norm.bias)])
    return both.to(dtype).unflatten(0, (-1, 2))


def _as_affine(norms: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """(nodes, 2, C): the scale and shift of each norm with fixed statistics."""
    names = ("weight", "bias", "running_mean", "running_var")
    both = torch.stack([getattr(norm, name) for name in names for norm in norms]).to(dtype)
    weight, bias, mean, var = both.unflatten(0, (4, -1))
    scale = weight * torch.rsqrt(var + norms[0].eps)
    return aligned(torch.stack((scale, bias - mean * scale), 1))


@torch.no_grad()
def _update_running_statistics(
    norms: Sequence[Any], moments: Sequence[Tensor], count: float | Tensor, momentum: float | None
) -> None:
    """What every batch norm does in training, for all of a stage in a few kernels."""
    assert momentum is not None, "see why_not"
    means, variances = ([m for own in moments for m in own[:, i]] for i in range(2))
    # torch normalises by the biased variance and remembers the unbiased one.
    values = [*means, *torch._foreach_mul(variances, count / (count - 1))]
    running = [getattr(norm, name) for name in ("running_mean", "running_var") for norm in norms]
    torch._foreach_lerp_(running, list(cast(values, running[0].dtype)), momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
