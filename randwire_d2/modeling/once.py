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


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward pass raise an error if its gradients are to be differentiated again.

    torch's decorator of this name treats the gradients as constants: with allow_unused, a second
    derivative would be None or zeros, without an error.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                _REFUSED.format("differentiated again (create_graph), as a gradient penalty does")
            )
        # If backward() is called under autocast, autocast would change the type of sums.
        device = next((g.device.type for g in grads if g is not None), "cpu")
        try:
            with torch.autocast(device, enabled=False):
                found: tuple[Tensor | None, ...] = backward(ctx, *grads)
        except RuntimeError as e:
            if "vmap" not in str(e):
                raise
            raise RuntimeError(_REFUSED.format("batched, as by is_grads_batched")) from e
        return found

    return once
