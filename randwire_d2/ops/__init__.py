"""The fused operators of a random graph's nodes: custom operators, in ``torch.ops.randwire``.

A node (§3.2) is a weighted sum, ReLU, a depthwise and a 1×1 convolution, and a batch norm. Written
with torch's own operators, that moves three times the bytes of a ResNet of the same FLOPs. Here:

- A batch norm with known statistics is an affine function of each channel, and its output is never
  written to memory. Nodes write the output of the 1×1 convolution; the operators that read it
  apply the scale and the shift (its ``affine``).
- Weighted sum, ReLU and depthwise convolution are one operator, which writes only its result.
- The backward operator of a node's norm reads and sums the gradients from the node's readers.
- On a CPU, both convolutions are one operator, too (``separable``); elsewhere the 1×1 convolution
  is torch's.

``modeling.graph_function`` puts the operators together, with the gradients.

Three modules implement the same interface: ``native`` with torch's operators, ``cpu_kernels`` for a
CPU with a C++ compiler, and ``triton_kernels`` for CUDA. ``native`` says what each operator
computes, and its type hints are the operators' schemas.

Tensors are (N, C, H, W) in channels_last. ``coefficients`` is (n,) for n inputs. An ``affine`` is
(2, C): scale, then shift; ``affines`` has one for each input, or is empty. All operators but
``weighted_sum`` compute several nodes that do not depend on each other. Then ``inputs``,
``coefficients`` and ``affines`` first have the ``degrees[0]`` entries of the first node, then those
of the next; likewise ``grads`` with ``readers``. ``parameters`` are (nodes, 2, C): weight, then
bias; ``moments`` are (nodes, 2, C): mean, then biased variance.
Affines, moments, coefficients and the parameters of norms are float32 (float64 for float64), even
if the activations have a lower precision.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native, tiling
from .launches import launches as launches
from .launches import pieces as pieces
from .memory_format import empty_image
from .native import conv1x1_backward as conv1x1_backward

_LIBRARY = torch.library.Library("randwire", "DEF")


def unavailable(device: torch.device) -> str:
    """Why there are no operators for a device; empty for a CPU and a GPU that Triton knows."""
    if device.type == "cpu":
        return ""
    return _unavailable_on_cuda(device) if device.type == "cuda" else f"the device is {device}"


@torch.compiler.assume_constant_result
@functools.cache
def _unavailable_on_cuda(device: torch.device) -> str:
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than compute capability 7.0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


@torch.compiler.assume_constant_result
def joins(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether to use ``separable`` on this device, because it saves memory traffic there."""
    if device.type != "cpu" or torch._C._len_torch_dispatch_stack():
        return False  # a dispatch mode, as of the counters, sees the operators of a GPU
    from . import cpu_kernels

    return cpu_kernels.join(dtype, channels)


def _on_cuda(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # Not before it is needed: not every PyTorch has Triton, and to import it takes a second.
        from . import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return run


def _on_cpu(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # Not before it is needed, as above: it may have to be compiled.
        from . import cpu_kernels

        return cpu_kernels.run(name, *args)

    return run


def _operator(fake: Callable[..., Any]) -> Any:
    """The operator of that name. ``fake`` returns empty results of the right sizes, for tracing.

    The schema comes from the type hints of ``native``, as in ``torch.library.custom_op``. That one
    also checks every call in Python, which adds 7 to 27 µs to each of these operators (measured on
    a CPU); a training step of the C=109 network calls 168 of them.
    """
    name = fake.__name__
    function = getattr(native, name)
    schema = torch.library.infer_schema(function, op_name=name, mutates_args=())
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, _on_cpu(name), "CPU")
    _LIBRARY.impl(name, _on_cuda(name), "CUDA")
    torch.library.register_fake(f"randwire::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.randwire, name)


@_operator
def weighted_sum(inputs: Sequence[Tensor], *_: Any) -> Tensor:
    return empty_image(inputs[0])


@_operator
def weighted_sum_backward(
    grads: Any, readers: Any, coefficients: Tensor, inputs: Sequence[Tensor], *_: Any
) -> tuple[list[Tensor], Tensor]:
    x = inputs[0]
    parts = 1 if x.device.type == "cpu" else tiling.product_parts(x.shape)
    results = [empty_image(x) for x in inputs]
    return results, coefficients.new_empty(parts, len(coefficients))


@_operator
def aggregate(inputs: Sequence[Tensor], degrees: Sequence[int], *others: Any) -> list[Tensor]:
    *_, stride = others
    return [empty_image(inputs[0], stride) for _ in degrees]


@_operator
def aggregate_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    degrees: Any,
    coefficients: Tensor,
    *others: Any,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    *_, weights, stride, want = others
    x = inputs[0]
    parts = 1 if x.device.type == "cpu" else tiling.weight_parts(x.shape, stride)
    return (
        [empty_image(x) for _ in weights] if want[0] else [],
        coefficients.new_empty(len(weights), parts, 9, x.shape[1]),
        [empty_image(grad) for grad in grads] if want[1] else [],
    )


@_operator
def separable(inputs: Sequence[Tensor], *others: Any) -> list[Tensor]:
    *_, stride, pointwise = others
    return [empty_image(inputs[0], stride, len(weight)) for weight in pointwise]


@_operator
def separable_backward(
    grads: Any, inputs: Sequence[Tensor], degrees: Any, coefficients: Tensor, *others: Any
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    *_, weights, _, pointwise, want = others
    return (
        [empty_image(inputs[0]) for _ in weights] if want else [],
        coefficients.new_empty(len(weights), 1, 9, inputs[0].shape[1]),
        [torch.empty_like(weight) for weight in pointwise],
    )


@_operator
def batch_norm_statistics(
    inputs: Sequence[Tensor], parameters: Tensor, *_: Any
) -> tuple[list[Tensor], Tensor]:
    size = parameters.shape
    return [parameters.new_empty(size[1:]) for _ in inputs], parameters.new_empty(size)


@_operator
def batch_norm_backward(
    grads: Any, readers: Any, coefficients: Tensor, inputs: Sequence[Tensor], *others: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    parameters, *_ = others
    return (
        [empty_image(x) for x in inputs],
        coefficients.new_empty(len(coefficients)),
        parameters.new_empty(parameters.shape),
    )


# Two for each multiply-add, and of convolutions alone, as PyTorch's own formulas count.
@register_flop_formula(aggregate)
def _(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * 9 * sum(map(math.prod, out_shape))


@register_flop_formula(aggregate_backward)
def _(grad_shapes: Any, *args: Any, **kwargs: Any) -> int:
    want = args[-1]
    return 2 * 9 * sum(map(math.prod, grad_shapes)) * (1 + sum(want))
