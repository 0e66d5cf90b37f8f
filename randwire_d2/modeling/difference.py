"""How far one way of running a stage is from another, and how to try one and leave no trace."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The largest relative errors that rounding explains; what gradients lose on the way grows with the
# depth of the graph. Of float32 they are those of convolutions in float32: see below.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 0.5}


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """After the block, tensors have the values that they have now."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """In the block, cuDNN's convolutions of float32 compute in float32.

    By default they use TF32, whose mantissa is float16's: of a stage's gradients, both ways of
    running it then lose up to 4%, as an error in a kernel might.
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def random_gradient(output: Tensor) -> Tensor:
    """The same each time; no random number is drawn from torch's own generators.

    A weight's gradient is larger than a pixel's by the root of their number. So that neither leaves
    float16's range, pixels are smaller by half of that.
    """
    generator = torch.Generator(output.device).manual_seed(0)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    pixels = output.numel() // output.shape[1]
    return torch.empty_like(output).copy_(values / pixels**0.25)


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The Euclidean norm of the difference, in units of what is expected."""
    reference = _flat(expected)
    return float((_flat(actual) - reference).norm() / reference.norm().clamp_min(1e-30))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])
