"""The fused operators of a random graph's nodes: custom operators, in ``torch.ops.randwire``.

A node (§3.2) is a weighted sum, ReLU, a depthwise and a 1×1 convolution, and a batch norm. Written
with torch's own operators, that moves three times the bytes of a ResNet of the same FLOPs. Here:

- A batch norm whose statistics are known is an affine function of each channel. It is never
  written: what travels between the nodes is the *raw* output of the 1×1 convolution, and whoever
  reads it applies the scale and the shift (its ``affine``) on the fly.
- Weighted sum, ReLU and depthwise convolution are one operator, which writes its result alone.
- The gradients of a node's readers are summed where they are read, by the backward of its norm.

The 1×1 convolution is torch's. ``modeling.fused`` puts the operators together, with the gradients.

Operators, for tensors (N, C, H, W) in channels_last, whose rows are pixels:

``weighted_sum(inputs, coefficients, affines) -> Tensor``
    The sum over i of coefficients[i] · (scale[i] · inputs[i] + shift[i]).
``weighted_sum_backward(grads, coefficients, output) -> (Tensor, Tensor)``
    For a node's result and the gradients of the weighted sums that read it: the gradient of the
    result, sum over i of coefficients[i] · grads[i], and the gradients of the coefficients,
    ⟨grads[i], output⟩.
``aggregate(inputs, coefficients, affines, weight, stride) -> Tensor``
    ReLU of the weighted sum, then the 3×3 depthwise convolution.
``aggregate_backward(grad, inputs, coefficients, affines, weight, stride, want) -> 3 Tensors``
    The gradient of the weighted sum (not of the inputs: their own nodes gather it), that of the
    weight, and what ``aggregate`` returned, computed again. ``want`` says which of the first and
    the third are asked for; one that is not is empty.
``batch_norm_statistics(x, weight, bias, eps) -> (Tensor, Tensor)``
    The affine function that a batch norm is for this batch, and the batch's moments.
``batch_norm_backward(grads, coefficients, x, weight, bias, moments, eps) -> 4 Tensors``
    ``weighted_sum_backward`` for the norm's output, then the norm's own: the gradients of x, of the
    coefficients, of weight and bias.

``coefficients`` is (n,) for n inputs; an ``affine`` is (2, C), scale above shift, and ``affines``
has one for each input, or none at all; ``moments`` is (2, C), mean above biased variance. Affines,
moments, coefficients and the parameters of norms are float32 (float64 for float64) where the
activations are of lower precision. The CPU runs torch's own operators, CUDA Triton kernels.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native
from .memory_format import empty_image

_LIBRARY = torch.library.Library("randwire", "DEF")


def available(device: torch.device) -> bool:
    """Whether the operators run there: on a CPU, and on a GPU of NVIDIA's that Triton knows."""
    return device.type == "cpu" or (device.type == "cuda" and _has_triton(device))


@torch.compiler.assume_constant_result
@functools.cache
def _has_triton(device: torch.device) -> bool:
    return (
        torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
    )


def _on_cuda(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # Not before it is needed: not every PyTorch has Triton, and to import it takes a second.
        from . import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return run


def _define(name: str, arguments: str, results: str) -> None:
    _LIBRARY.define(f"{name}({arguments}) -> {results}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, getattr(native, name), "CPU")
    _LIBRARY.impl(name, _on_cuda(name), "CUDA")


_define("weighted_sum", "Tensor[] inputs, Tensor coefficients, Tensor[] affines", "Tensor")
_define(
    "weighted_sum_backward",
    "Tensor[] grads, Tensor coefficients, Tensor output",
    "(Tensor, Tensor)",
)
_define(
    "aggregate",
    "Tensor[] inputs, Tensor coefficients, Tensor[] affines, Tensor weight, int stride",
    "Tensor",
)
_define(
    "aggregate_backward",
    "Tensor grad, Tensor[] inputs, Tensor coefficients, Tensor[] affines, Tensor weight, "
    "int stride, bool[2] want",
    "(Tensor, Tensor, Tensor)",
)
_define(
    "batch_norm_statistics", "Tensor x, Tensor weight, Tensor bias, float eps", "(Tensor, Tensor)"
)
_define(
    "batch_norm_backward",
    "Tensor[] grads, Tensor coefficients, Tensor x, Tensor weight, Tensor bias, Tensor moments, "
    "float eps",
    "(Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("randwire::weighted_sum", lib=_LIBRARY)
def _(inputs: list[Tensor], coefficients: Tensor, affines: list[Tensor]) -> Tensor:
    return empty_image(inputs[0])


@torch.library.register_fake("randwire::weighted_sum_backward", lib=_LIBRARY)
def _(grads: list[Tensor], coefficients: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    return empty_image(output), torch.empty_like(coefficients)


@torch.library.register_fake("randwire::aggregate", lib=_LIBRARY)
def _(
    inputs: list[Tensor],
    coefficients: Tensor,
    affines: list[Tensor],
    weight: Tensor,
    stride: int,
) -> Tensor:
    return empty_image(inputs[0], stride)


@torch.library.register_fake("randwire::aggregate_backward", lib=_LIBRARY)
def _(
    grad: Tensor,
    inputs: list[Tensor],
    coefficients: Tensor,
    affines: list[Tensor],
    weight: Tensor,
    stride: int,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_image(inputs[0]) if want[0] else grad.new_empty(0),
        torch.empty_like(weight),
        empty_image(grad) if want[1] else grad.new_empty(0),
    )


@torch.library.register_fake("randwire::batch_norm_statistics", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return weight.new_empty(2, len(weight)), weight.new_empty(2, len(weight))


@torch.library.register_fake("randwire::batch_norm_backward", lib=_LIBRARY)
def _(
    grads: list[Tensor],
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_image(x),
        torch.empty_like(coefficients),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


# Two for each multiply-add, and of convolutions alone, as PyTorch's own formulas count.
@register_flop_formula(torch.ops.randwire.aggregate)
def _(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * 9 * math.prod(out_shape)


@register_flop_formula(torch.ops.randwire.aggregate_backward)
def _(grad_shape: Any, *args: Any, **kwargs: Any) -> int:
    want = args[-1]
    return 2 * 9 * math.prod(grad_shape) * (1 + sum(want))
