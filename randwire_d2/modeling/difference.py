"""How much two ways of running a stage differ, and how to run one without side effects."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The largest relative errors that rounding explains. The errors of gradients grow with the depth of
# the graph. The limit for float32 is for convolutions without TF32: see ``exact_convolutions``.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 0.5}


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """After the block, restore the values that these tensors had before."""
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

    By default they use TF32, whose mantissa is that of float16. Then the gradients of a stage have
    errors of up to 4% either way, as large as those of a wrong kernel.
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def random_gradient(output: Tensor) -> Tensor:
    """A random gradient, the same each time; it does not touch torch's default generators.

    With n pixels, the gradient of a weight is √n times that of a pixel. The values are divided by
    n^(1/4), so that both stay in float16's range.
    """
    generator = torch.Generator(output.device).manual_seed(0)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    pixels = output.numel() // output.shape[1]
    return torch.empty_like(output).copy_(values / pixels**0.25)


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The Euclidean norm of the difference, divided by that of what is expected."""
    reference = _flat(expected)
    return float((_flat(actual) - reference).norm() / reference.norm().clamp_min(1e-30))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])
