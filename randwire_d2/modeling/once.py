"""Gradients of fused operators are computed once: not differentiated again, and not in batches."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REFUSED = (
    "the gradients of fused operators can't be {}; set MODEL.RANDWIRE.FUSED off "
    '(RandWire(…, fused="off"))'
)


class _Once(torch.autograd.Function):
    """A gradient as it is, whose own backward pass is an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()  # not a view, which nobody could write to

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_REFUSED.format("differentiated again, as a gradient penalty does"))


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's, which takes a gradient for a constant if what it is computed from is one, such as
    the ones of a sum's: a second derivative then lacks a share, without a word."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Whoever calls backward() in a block with autocast would have it cast what is summed up.
        device = next((g.device.type for g in grads if g is not None), "cpu")
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                found: tuple[Tensor | None, ...] = backward(ctx, *grads)
        except RuntimeError as e:
            if "vmap" not in str(e):
                raise
            raise RuntimeError(_REFUSED.format("batched, as by is_grads_batched")) from e
        if not torch.is_grad_enabled():
            return found
        return tuple(None if g is None else _Once.apply(g.requires_grad_()) for g in found)

    return once
