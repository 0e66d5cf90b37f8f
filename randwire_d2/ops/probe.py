"""Whether the operators work on a device: each is compared with ``native`` in double precision.

Kernels that are compiled where they run can fail on one machine only: there may be no C compiler or
no Python.h, the cache folder may be read-only, the driver old, or a new compiler wrong. So a
training calls ``failure`` before it uses them.
"""

import errno
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..text import one_line
from . import native, unavailable
from .launches import MOST_GRADS, MOST_INPUTS

logger = logging.getLogger(__name__)

# Why a file can't be written, in Triton's cache, say.
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}

OPERATORS = (
    *("weighted_sum", "weighted_sum_backward", "aggregate", "aggregate_backward"),
    *("batch_norm_statistics", "batch_norm_backward"),
)
# The largest error of an element, in units of the largest element.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EVERY_WANT = ((False, False), (False, True), (True, False), (True, True))
# Three images with an odd number of pixels in all, as a single image may have, and with a multiple
# of 16, as most batches have: Triton compiles different code for them.
SIZES = ((7, 5), (8, 8))


class Mismatch(RuntimeError):
    """An operator's result is not what ``native`` computes."""


@dataclass(frozen=True)
class Case:
    """Operands of the operators.

    Attributes:
        inputs: the number of a node's inputs, or of its gradients.
        affine: whether the inputs have affines.
        stride: 1 or 2.
        size: height and width of the inputs.
        channels: C.
        dtype: that of the activations.
        want: the values of the argument of ``aggregate_backward``.
        mean: the mean of the activations; their standard deviation is 1.
        only: the operators that are called.
        contiguous: whether the last input is contiguous instead of channels_last.
        nodes: the number of nodes; each has one input less than the one before, but at least one.
        images: the number of images.
    """

    inputs: int
    affine: bool
    stride: int
    size: tuple[int, int]
    channels: int
    dtype: torch.dtype = torch.float64
    want: tuple[tuple[bool, bool], ...] = ((True, True),)
    mean: float = 0
    only: tuple[str, ...] = OPERATORS
    contiguous: bool = False
    nodes: int = 1
    images: int = 3

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{self.inputs} inputs of {self.channels} channels, {height}×{width}, stride "
            f"{self.stride}, {'with' if self.affine else 'without'} affines, {self.nodes} nodes"
        )


class Variants(NamedTuple):
    """The properties of a stage for which Triton compiles its own kernels.

    Attributes:
        in_channels, channels: the channels of the stage's input and of its nodes.
        inputs, readers: for each kernel that nodes share, the largest number of inputs (readers) of
            a node, and the number of nodes.
        groups: how many nodes are normalised together.
        input_nodes, output_nodes: how many there are.
        batch: whether norms use the statistics of the batch.
        backward: whether there are gradients.
    """

    in_channels: int
    channels: int
    inputs: tuple[tuple[int, int], ...]
    readers: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]
    input_nodes: int
    output_nodes: int
    batch: bool
    backward: bool


def needs_probe(device: torch.device) -> bool:
    """Whether the operators are compiled there; on a CPU they are tested when they are loaded."""
    return device.type == "cuda"


@torch.compiler.assume_constant_result
@functools.cache
def failure(device: torch.device, dtype: torch.dtype, variants: Variants) -> str:
    """Why a stage can't use the operators on a device: one line, empty if they work.

    The first call compiles the stage's kernels, which takes up to minutes.
    """
    if reason := unavailable(device):
        return reason
    try:
        largest_errors(device, dtype, variants)
    # After any error, nodes can still run one by one.
    except Exception as e:
        reason = one_line(e, 300)
        if isinstance(e, OSError) and e.errno in _NO_PLACE:
            reason += "; set TRITON_CACHE_DIR to a folder that can be written"
        return f"the operators fail on {device} in {dtype}: {type(e).__name__}: {reason}"
    return ""


def largest_errors(
    device: torch.device, dtype: torch.dtype, variants: Variants
) -> dict[str, float]:
    """The largest error of each operator, by ``compare``, in all cases that a stage needs.

    Raises:
        Exception: an operator does not work; whatever it raised, or a ``Mismatch``.
    """
    worst = dict.fromkeys(OPERATORS, 0.0)
    with _one_thread():
        if needs_probe(device):
            _compile_ahead(device, dtype, variants)
        for case in cases(dtype, variants):
            for name in case.only:
                found = compare(case, name, getattr(torch.ops.randwire, name), device)
                worst[name] = max(worst[name], found)
    return worst


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit PyTorch on the CPU to one thread: the operands are tiny, and compilers and other
    processes need the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compile_ahead(device: torch.device, dtype: torch.dtype, variants: Variants) -> None:
    from .triton_kernels import compiling_ahead  # where there is no GPU, there may be no Triton

    logger.info(
        f"Compiling the fused operators of {variants.channels} channels for {device} in {dtype}; "
        "the first time on a machine this takes up to minutes"
    )
    with compiling_ahead(), torch.no_grad():
        for case in cases(dtype, variants):
            for operator in case.only:
                for arguments in operands(case, operator, device):
                    getattr(torch.ops.randwire, operator)(*arguments)


def cases(dtype: torch.dtype, stage: Variants) -> Iterator[Case]:
    """One, two and three inputs with affines, and all other cases that the stage needs.

    Without gradients, the backward operators are left out, because they take long to compile.
    """
    only: tuple[str, ...]
    sums, sums_backward, norms = OPERATORS[:1], OPERATORS[1:2], OPERATORS[4:]
    read = OPERATORS[2:4] if stage.backward else OPERATORS[2:3]
    general: tuple[str, ...] = OPERATORS if stage.backward else (*sums, *read)
    for size in SIZES:
        for n in (1, 2, 3):
            yield Case(n, True, 1, size, stage.channels, dtype, only=general)
        yield Case(stage.output_nodes, True, 1, size, stage.channels, dtype, only=sums)
        if stage.backward:
            yield Case(stage.input_nodes, False, 1, size, stage.in_channels, dtype, only=sums)
        # What other operators sum up first: see ``launches``.
        for n in {n for n, _ in stage.inputs if n > MOST_INPUTS}:
            yield Case(n, True, 1, size, stage.channels, dtype, only=sums)
        for n in {n for n, _ in stage.readers if n > MOST_GRADS and stage.backward and stage.batch}:
            yield Case(n, False, 1, size, stage.channels, dtype, only=sums)
    size, *_ = SIZES  # for both, the other operators have the same kernels
    for k in {1, stage.input_nodes}:
        yield Case(1, False, 2, size, stage.in_channels, dtype, EVERY_WANT, only=read, nodes=k)
    for n, nodes in stage.inputs:
        yield Case(n, True, 1, size, stage.channels, dtype, only=read, nodes=nodes)
    if stage.backward:
        only = norms[1:] if stage.batch else sums_backward
        for n, nodes in stage.readers:
            yield Case(n, False, 1, size, stage.channels, dtype, only=only, nodes=nodes)
    if stage.batch:
        only = norms if stage.backward else norms[:1]
        for n in stage.groups:
            yield Case(1, False, 1, size, stage.channels, dtype, only=only, nodes=n)


def compare(
    case: Case, operator: str, function: Callable[..., Any], device: torch.device | str = "cpu"
) -> float:
    """Compare an operator with ``native`` on the same values in double precision.

    Returns:
        float: the largest error of an element, divided by the result's largest element or, for a
            sum over pixels, by the expected size of such a sum if that is larger.

    Raises:
        Mismatch: a result has another value, type, size or memory format.
    """
    worst = 0.0
    for arguments in operands(case, operator, device):
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            results = function(*arguments)
        expected = getattr(native, operator)(*_in_double(arguments))
        if isinstance(results, Tensor):
            results, expected = (results,), (expected,)
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        for i, (result, reference) in enumerate(
            zip(_whole(operator, results), _whole(operator, expected), strict=True)
        ):
            image = result.dim() == 4 or not result.numel()
            where = f"{operator}, result {i}, of {case}"
            if (result.shape, result.dtype) != (reference.shape, case.dtype if image else wide):
                raise Mismatch(f"{where}: {result.dtype} of {tuple(result.shape)}")
            if not result.numel():
                continue
            if image and not result.is_contiguous(memory_format=torch.channels_last):
                raise Mismatch(f"{where}: not in channels_last")
            size = reference.abs()  # the rows of moments and affines are compared one by one
            rows = operator == "batch_norm_statistics"
            size = size.amax(-1, keepdim=True) if rows else size.max()
            least = torch.finfo(torch.float64).tiny  # all may be 0: a ReLU's result
            if not image and operator in ("weighted_sum_backward", "batch_norm_backward"):
                # Sums over pixels, which may cancel by chance; their rounding errors do not.
                least = math.sqrt(case.images * math.prod(case.size))
            size = size.clamp_min(least)
            error = float(((result.cpu().double() - reference).abs() / size).max())
            if not error <= TOLERANCE[case.dtype]:
                raise Mismatch(f"{where}: off by {error:.1e} of its largest element")
            worst = max(worst, error)
    return worst


def _whole(operator: str, results: Sequence[Any]) -> list[Tensor]:
    """The results of an operator as a flat list, with sums over parts of the pixels added up."""
    if operator in ("weighted_sum_backward", "aggregate_backward", "separable_backward"):
        first, parts, *others = results
        results = first, parts.sum(0 if parts.dim() == 2 else 1), *others
    return tree_leaves(results)


def operands(
    case: Case, operator: str, device: torch.device | str = "cpu"
) -> Iterator[tuple[Any, ...]]:
    """Argument lists of an operator, in the dtype of the case; the same ones each time."""
    generator = torch.Generator("cpu").manual_seed(0)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def draw(*size: int, dtype: torch.dtype = wide) -> Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
        return x.to(device)

    def image(stride: int = 1) -> Tensor:
        h, w = (-(-length // stride) for length in case.size)
        x = draw(case.images, case.channels, h, w, dtype=case.dtype) + case.mean
        return x.contiguous(memory_format=torch.channels_last)

    n, c, stride, nodes = case.inputs, case.channels, case.stride, case.nodes
    numbers = [max(n - i, 1) for i in range(nodes)] if operator != "weighted_sum" else [n]
    inputs, coefficients = [image() for _ in range(sum(numbers))], draw(sum(numbers))
    # So that products are large compared with their rounding errors.
    outputs = [inputs[0] + image(), *(image() + image() for _ in range(1, nodes))]
    if case.contiguous:
        inputs[-1] = inputs[-1].contiguous()
    if n > 1:
        coefficients[n // 2] = 0  # a dropped edge
    affines = [draw(2, c) for _ in inputs] if case.affine else []
    kernels = [draw(c, 1, 3, 3, dtype=case.dtype) for _ in range(nodes)]
    read = inputs, numbers, coefficients, affines, kernels
    # No variance near 0, whose inverse would leave float16's range.
    parameters, moments = draw(nodes, 2, c), draw(nodes, 2, c).abs() + 0.5
    if operator == "weighted_sum":
        yield inputs, coefficients, affines
    elif operator == "weighted_sum_backward":
        yield inputs, numbers, coefficients, outputs, [draw(2, c) for _ in outputs]
    elif operator == "aggregate":
        yield *read, stride
    elif operator == "aggregate_backward":
        for want in case.want:
            yield [image(stride) for _ in range(nodes)], *read, stride, want
    elif operator.startswith("separable"):
        pointwise = [draw(c, c, 1, 1, dtype=case.dtype) / math.sqrt(c) for _ in range(nodes)]
        own = *read, stride, pointwise
        if operator == "separable":
            yield own
        else:
            for need_sum in (False, True):
                yield [image(stride) for _ in range(nodes)], *own, need_sum
    elif operator == "batch_norm_statistics":
        yield outputs, parameters, 1e-5
    else:
        yield inputs, numbers, coefficients, outputs, parameters, moments, 1e-5


def _in_double(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(_in_double(item) for item in x)
    return x.cpu().double() if isinstance(x, Tensor) else x
