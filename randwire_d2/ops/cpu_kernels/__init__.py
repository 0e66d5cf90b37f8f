"""The operators on a CPU, in C++ if possible, else with ``native``.

The kernels are a library of plain C functions. This machine's C++ compiler compiles it when an
operator is first called; that takes seconds, once, because the library is cached. The kernels take
float32 in channels_last, with at least as many channels as a vector has elements. ``native``
computes everything else; it computes all if there is no compiler, or if the library computes
wrongly.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...text import one_line
from .. import native
from ..launches import pieces
from ..memory_format import empty_image
from ..probe import Case, compare
from .build import built

OPERATORS = (
    *("weighted_sum", "weighted_sum_backward", "separable", "separable_backward"),
    *("batch_norm_statistics", "batch_norm_backward"),
)

logger = logging.getLogger(__name__)


def run(name: str, *args: Any) -> Any:
    """The result of the operator of that name."""
    kernels = _kernels() if name in OPERATORS and _fit(args) else None
    few = kernels is not None and _fewest_channels(name, args) < kernels.lanes
    return getattr(native if kernels is None or few else kernels, name)(*args)


def join(dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernels compute ``separable`` for nodes with so many channels."""
    kernels = _kernels() if dtype == torch.float32 else None
    return kernels is not None and channels >= kernels.lanes


def _fewest_channels(name: str, args: Sequence[Any]) -> int:
    """Of the images that an operator reads or returns, which are all alike but for a 1×1
    convolution's."""
    if not name.startswith("separable"):
        return int(args[0][0].shape[1])
    pointwise = args[-1] if name == "separable" else args[-2]
    return min(pointwise[0].shape[:2])


def _fit(args: Sequence[Any]) -> bool:
    """Whether the kernels can take all these tensors: float32, not empty, in the right layout."""
    for arg in args:
        if isinstance(arg, (list, tuple)):
            if not _fit(arg):
                return False
        elif isinstance(arg, Tensor):
            # A depthwise convolution's weight is (C, 1, 3, 3).
            image = arg.dim() == 4 and arg.shape[1] > 1
            form = torch.channels_last if image else torch.contiguous_format
            if arg.dtype != torch.float32 or not arg.numel():
                return False
            if not arg.is_contiguous(memory_format=form):
                return False
    return True


class Kernels:
    """The operators that are faster in C++. ``native`` says what they compute. They take what
    ``_fit`` allows, with at least ``lanes`` channels."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.lanes: int = library.randwire_lanes()

    def weighted_sum(
        self, inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
    ) -> Tensor:
        out = empty_image(inputs[0])
        self._call("weighted_sum", *_sum(inputs, coefficients, affines), *_pixels(out), out)
        return out

    def weighted_sum_backward(
        self,
        grads: Sequence[Tensor],
        readers: Sequence[int],
        coefficients: Tensor,
        inputs: Sequence[Tensor],
        affines: Sequence[Tensor],
    ) -> tuple[list[Tensor], Tensor]:
        results, products = [empty_image(x) for x in inputs], torch.empty_like(coefficients)
        for i, own in enumerate(pieces(readers)):
            self._call(
                *("weighted_sum_backward", *_sum(grads[own], coefficients[own], [])[:-1]),
                *(inputs[i], affines[i], *_pixels(inputs[i]), results[i], products[own]),
            )
        return results, products[None]

    def separable(
        self,
        inputs: Sequence[Tensor],
        degrees: Sequence[int],
        coefficients: Tensor,
        affines: Sequence[Tensor],
        weights: Sequence[Tensor],
        stride: int,
        pointwise: Sequence[Tensor],
    ) -> list[Tensor]:
        channels = len(pointwise[0])
        results = []
        for i, own in enumerate(pieces(degrees)):
            out = empty_image(inputs[0], stride, channels)
            operands = _sum(inputs[own], coefficients[own], affines[own])
            self._call(
                *("separable", *operands, *inputs[0].shape, weights[i], stride),
                *(pointwise[i], channels, out),
            )
            results.append(out)
        return results

    def separable_backward(
        self,
        grads: Sequence[Tensor],
        inputs: Sequence[Tensor],
        degrees: Sequence[int],
        coefficients: Tensor,
        affines: Sequence[Tensor],
        weights: Sequence[Tensor],
        stride: int,
        pointwise: Sequence[Tensor],
        want: bool,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        grad_weights = weights[0].new_empty(len(weights), *weights[0].shape)
        grad_pointwise = [torch.empty_like(weight) for weight in pointwise]
        grad_sums = [empty_image(inputs[0]) for _ in weights] if want else []
        for i, own in enumerate(pieces(degrees)):
            operands = _sum(inputs[own], coefficients[own], affines[own])
            self._call(
                *("separable_backward", grads[i], *operands, *inputs[0].shape, weights[i], stride),
                *(pointwise[i], len(pointwise[i]), grad_sums[i] if want else None),
                *(grad_weights[i], grad_pointwise[i]),
            )
        parts = grad_weights.reshape(len(weights), 1, -1, 9).transpose(2, 3).contiguous()
        return grad_sums, parts, grad_pointwise

    def batch_norm_statistics(
        self, inputs: Sequence[Tensor], parameters: Tensor, eps: float
    ) -> tuple[list[Tensor], Tensor]:
        moments = torch.empty_like(parameters)
        for x, own in zip(inputs, moments, strict=True):
            self._call("moments", x, *_pixels(x), own)
        affines = [native._affine(*own, eps) for own in zip(parameters, moments, strict=True)]
        return affines, moments

    def batch_norm_backward(
        self,
        grads: Sequence[Tensor],
        readers: Sequence[int],
        coefficients: Tensor,
        inputs: Sequence[Tensor],
        parameters: Tensor,
        moments: Tensor,
        eps: float,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        grad_inputs = [empty_image(x) for x in inputs]
        products, grad_parameters = torch.empty_like(coefficients), torch.empty_like(parameters)
        for i, (x, edges) in enumerate(zip(inputs, pieces(readers), strict=True)):
            self._call(
                "batch_norm_backward",
                *_sum(grads[edges], coefficients[edges], [])[:-1],
                *(x, *parameters[i], moments[i], eps, *_pixels(x)),
                *(grad_inputs[i], products[edges], *grad_parameters[i]),
            )
        return grad_inputs, products, grad_parameters

    def _call(self, name: str, *args: Any) -> None:
        """Of tensors the address, of sizes 64 bits."""
        function = getattr(self._library, f"randwire_{name}")
        if function.argtypes is None:
            function.argtypes = [*map(_type_of, args), ctypes.c_int64]
        pointers = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        function(*pointers, torch.get_num_threads())


def _type_of(arg: Any) -> Any:
    types = {int: ctypes.c_int64, float: ctypes.c_double}
    return types.get(type(arg), ctypes.c_void_p)


def _sum(inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]) -> Any:
    return len(inputs), _pointers(inputs), coefficients, _pointers(affines) if affines else None


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _pixels(x: Tensor) -> tuple[int, int]:
    """How many there are, and of how many channels."""
    return x.numel() // x.shape[1], x.shape[1]


@functools.cache
def _kernels() -> Kernels | None:
    """None, after one warning that says why, where there are none that work."""
    try:
        kernels = Kernels(ctypes.CDLL(str(built())))
        _check(kernels)
    # Whatever it is: torch's own operators need none of this.
    except Exception as e:
        output = getattr(e, "stderr", None) or ""
        reason = one_line(f"{type(e).__name__}: {e} {output}", 400)
        logger.warning(f"The fused operators are PyTorch's on this CPU, and slower: {reason}")
        return None
    return kernels


def _check(kernels: Kernels) -> None:
    """
    Raises:
        Mismatch: a compiled operator computes something else than ``native`` does.
    """
    for inputs, affine, stride in ((1, False, 2), (2, True, 1), (5, False, 1)):
        case = Case(inputs, affine, stride, (9, 7), 35, torch.float32, nodes=2)
        for operator in OPERATORS:
            compare(case, operator, getattr(kernels, operator))
