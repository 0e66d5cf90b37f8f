"""The operators on a CPU, as ``cpu_kernels.cpp`` computes them; as ``native`` does, where it can't.

The kernels are a library of plain C functions, compiled for this machine by its C++ compiler when
an operator is first called; that takes seconds, once, because the library is kept in a cache. They
take float32 in channels_last, of at least as many channels as a vector has. Everything else is
``native``'s, and so is everything where there is no compiler, or what it made computes wrongly.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..text import one_line
from . import native
from .launches import pieces
from .memory_format import empty_image
from .probe import EVERY_WANT, OPERATORS, Case, compare

# Without an OpenMP library, which PyTorch has loaded already: two of them would each have threads
# of their own, which wait for work in busy loops.
_COMPILE = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-c")
_SOURCE, _HEADER = (Path(__file__).with_suffix(suffix) for suffix in (".cpp", ".h"))

logger = logging.getLogger(__name__)


def run(name: str, *args: Any) -> Any:
    """The result of the operator of that name."""
    kernels = _kernels() if _fit(args) else None
    source = kernels if kernels is not None and kernels.have_blocks(args) else native
    return getattr(source, name)(*args)


def _fit(args: Sequence[Any]) -> bool:
    """Whether all tensors are as the kernels take them; of images, one is enough to have none."""
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
    """The operators. See ``native`` for what they compute, and ``_fit`` for what they take."""

    # Of plain sums and of dot products, torch's own are as fast.
    weighted_sum_backward = staticmethod(native.weighted_sum_backward)

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._least = library.randwire_lanes()

    def have_blocks(self, args: Sequence[Any]) -> bool:
        """Whether images have enough channels for a vector."""
        return args[0][0].shape[1] >= self._least

    def weighted_sum(
        self, inputs: Sequence[Tensor], coefficients: Tensor, affines: Sequence[Tensor]
    ) -> Tensor:
        if not affines:
            return native.weighted_sum(inputs, coefficients, affines)
        out = empty_image(inputs[0])
        self._call("weighted_sum", *_sum(inputs, coefficients, affines), *_pixels(out), out)
        return out

    def aggregate(
        self,
        inputs: Sequence[Tensor],
        degrees: Sequence[int],
        coefficients: Tensor,
        affines: Sequence[Tensor],
        weights: Sequence[Tensor],
        stride: int,
    ) -> list[Tensor]:
        results = [empty_image(inputs[0], stride) for _ in weights]
        for own, weight, out in zip(pieces(degrees), weights, results, strict=True):
            operands = _sum(inputs[own], coefficients[own], affines[own])
            self._call("aggregate", *operands, *inputs[0].shape, weight, stride, out)
        return results

    def aggregate_backward(
        self,
        grads: Sequence[Tensor],
        inputs: Sequence[Tensor],
        degrees: Sequence[int],
        coefficients: Tensor,
        affines: Sequence[Tensor],
        weights: Sequence[Tensor],
        stride: int,
        want: Sequence[bool],
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        grad_weights = weights[0].new_empty(len(weights), *weights[0].shape)
        grad_sums, results = [], []
        for i, own in enumerate(pieces(degrees)):
            grad_sum = empty_image(inputs[0]) if want[0] else None
            out = empty_image(grads[0]) if want[1] else None
            operands = _sum(inputs[own], coefficients[own], affines[own])
            self._call(
                *("aggregate_backward", grads[i], *operands, *inputs[0].shape),
                *(weights[i], stride, grad_sum, grad_weights[i], out),
            )
            grad_sums.append(grad_sum)
            results.append(out)
        parts = grad_weights.reshape(len(weights), 1, -1, 9).transpose(2, 3).contiguous()
        return grad_sums if want[0] else [], parts, results if want[1] else []  # type: ignore[return-value]

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
                *(x, *parameters[i], moments[i], ctypes.c_double(eps), *_pixels(x)),
                *(grad_inputs[i], products[edges], *grad_parameters[i]),
            )
        return grad_inputs, products, grad_parameters

    def _call(self, name: str, *args: Any) -> None:
        """Of tensors the address, of sizes 64 bits."""
        threads = ctypes.c_int64(torch.get_num_threads())
        getattr(self._library, f"randwire_{name}")(*map(_as_argument, args), threads)


def _as_argument(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, int):
        return ctypes.c_int64(arg)
    return arg


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
        kernels = Kernels(ctypes.CDLL(str(_built())))
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
        case = Case(inputs, affine, stride, (9, 7), 35, torch.float32, EVERY_WANT, nodes=2)
        for operator in OPERATORS:
            compare(case, operator, getattr(kernels, operator))


def _built() -> Path:
    """The library's file; it is compiled if need be, by one process at a time."""
    import fcntl  # not on Windows

    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; the environment variable CXX names one")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    # A home folder may be shared by machines whose instructions differ.
    sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, _HEADER)]
    key = (*sources, *_COMPILE, version.stdout, platform.machine(), _instructions())
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    folder = (
        Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        / "randwire_d2"
    )
    path = folder / f"cpu_kernels_{digest}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system gives it back if this process dies
        if not path.is_file():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = [str(Path(scratch) / name) for name in ("kernels.o", "kernels.so")]
                for command in (
                    (compiler, *_COMPILE, "-I", str(_HEADER.parent), str(_SOURCE), "-o", made[0]),
                    (compiler, "-shared", made[0], "-o", made[1]),
                ):
                    subprocess.run(command, capture_output=True, text=True, check=True)
                os.replace(made[1], path)
            seconds = time.perf_counter() - start
            logger.info(f"Compiled the CPU's operators in {seconds:.1f} s, into {path}")
    return path


def _instructions() -> str:
    """What the CPU knows, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model"))}))
