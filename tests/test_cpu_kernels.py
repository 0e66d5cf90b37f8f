"""The compiled operators do what the native ones do, and where they can't, the native ones run."""

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor
from torch.utils._pytree import tree_leaves

from randwire_d2 import NetworkGenerator, RandWire
from randwire_d2.ops import cpu_kernels, native, probe
from randwire_d2.ops.cpu_kernels import Kernels, build

TOLERANCE = 2e-5  # of float32, relative to the largest element


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Compiled, unless an earlier session did that."""
    found = cpu_kernels._kernels()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing was compiled, and an empty folder is the cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu_kernels._kernels.cache_clear()
    yield tmp_path
    cpu_kernels._kernels.cache_clear()


def image(channels: int = 35, size: int = 6, images: int = 2) -> Tensor:
    x = torch.randn(images, channels, size, size)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5, 9, 17])
def test_operators_are_the_native_ones(kernels: Kernels, inputs: int, affine: bool) -> None:
    """Else a result or a gradient is wrong: at a border, in the last channels, for some number of
    inputs, or between the pieces that an image's rows are cut into."""
    for channels, size in ((16, (7, 5)), (35, (8, 8)), (109, (33, 10))):
        for stride in (1, 2):
            case = probe.Case(inputs, affine, stride, size, channels, torch.float32, nodes=2)
            for operator in cpu_kernels.OPERATORS:
                error = probe.compare(case, operator, getattr(kernels, operator))
                assert error < TOLERANCE, (operator, case)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(16, 109), (109, 16), (40, 218), (436, 109)])
@pytest.mark.parametrize(
    "size", [(2, 1, 1), (2, 3, 1), (2, 2, 9), (2, 5, 70), (2, 40, 12), (9, 7, 7)]
)
def test_other_numbers_of_results(
    kernels: Kernels, channels: tuple[int, int], size: tuple[int, int, int], stride: int
) -> None:
    """Else a stage's first nodes are wrong, tiles that are narrow, the last of a row, images that
    share a piece of the work, or weights' gradients of more pixels than stay in the cache."""
    (inputs, outputs), (images, *rest) = channels, size
    x = torch.randn(images, inputs, *rest, dtype=torch.double)
    x = x.contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(inputs, 1, 3, 3).double(), torch.randn(outputs, inputs, 1, 1).double()]
    own = [1], torch.ones(1).double(), [], weights[:1], stride, weights[1:]
    expected = native.separable([x], *own)
    grads = [torch.randn_like(y) for y in expected]
    expected += tree_leaves(native.separable_backward(grads, [x], *own, True))

    own = [1], torch.ones(1), [], [weights[0].float()], stride, [weights[1].float()]
    actual = kernels.separable([x.float()], *own)
    backward = kernels.separable_backward([g.float() for g in grads], [x.float()], *own, True)
    for ours, theirs in zip(actual + tree_leaves(backward), expected, strict=True):
        assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_a_mean_far_from_zero_costs_no_digits(kernels: Kernels) -> None:
    """Else the variance of a channel is rounding errors."""
    x = image(size=40) + 100
    _, (moments,) = kernels.batch_norm_statistics([x], torch.ones(1, 2, 35), 1e-5)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.double(), torch.stack((mean, variance)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [7, 40])
def test_threads_change_no_bit(kernels: Kernels, size: int) -> None:
    """Else a training that is resumed with another number of threads goes another way."""
    case = probe.Case(3, True, 1, (size, size), 35, torch.float32)
    results: list[list[Tensor]] = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        try:
            results.append([])
            for operator in cpu_kernels.OPERATORS:
                for arguments in probe.operands(case, operator):
                    results[-1] += tree_leaves(getattr(kernels, operator)(*arguments))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_networks_are_the_same(
    kernels: Kernels, norm: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the operators are right one by one, but what they are given is not what they take."""
    # With 1 of 150 seeds, rounding takes a ReLU across 0, among the 12 pixels of the last stage.
    spec = NetworkGenerator("small", 18, 8)(seed=1)
    model = RandWire(spec, norm=norm, fused="on", recompute=recompute)
    randomise(model)
    x = torch.randn(2, 3, 70, 58)

    def run() -> list[Tensor]:
        model.zero_grad()
        features = [*model(x).values()]
        noise = torch.Generator().manual_seed(0)
        sum((y * torch.randn(y.shape, generator=noise)).mean() for y in features).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [tensor.detach() for tensor in features + gradients]

    compiled = run()
    monkeypatch.setattr(cpu_kernels, "_kernels", lambda: None)
    for ours, theirs in zip(compiled, run(), strict=True):
        # Some gradients are sums that cancel; PyTorch 2.9 adds in another order.
        assert float((ours - theirs).abs().max()) <= 5 * TOLERANCE * float(theirs.abs().max())


def test_nan_is_not_hidden(kernels: Kernels) -> None:
    """Else a training that has diverged goes on."""
    x = image()
    x[0, 3] = float("nan")
    weight, pointwise = torch.randn(35, 1, 3, 3), torch.randn(35, 35, 1, 1)
    (result,) = kernels.separable([x], [1], torch.ones(1), [], [weight], 1, [pointwise])
    assert result[0].isnan().all() and not result[1].isnan().any()


@pytest.mark.parametrize(
    "what", ["double", "half", "contiguous", "few channels", "few results", "no images"]
)
def test_what_the_kernels_do_not_take_is_native(kernels: Kernels, what: str) -> None:
    """Else memory is read as what it is not."""
    x = {
        "double": image().double(),
        "half": image().bfloat16(),
        "contiguous": image().contiguous(),
        "few channels": image(channels=3),
        "few results": image(),
        "no images": image(images=0),
    }[what]
    channels = x.shape[1]
    weight = torch.randn(channels, 1, 3, 3, dtype=x.dtype)
    pointwise = torch.randn(3 if what == "few results" else 35, channels, 1, 1, dtype=x.dtype)
    arguments: Any = ([x, x], [2], torch.tensor([0.3, 0.6]), [], [weight], 1, [pointwise])
    (expected,) = native.separable(*arguments)
    assert torch.equal(torch.ops.randwire.separable(*arguments)[0], expected)
    arguments = ([expected], *arguments, True)
    ours, theirs = torch.ops.randwire.separable_backward, native.separable_backward
    for a, b in zip(tree_leaves(ours(*arguments)), tree_leaves(theirs(*arguments)), strict=True):
        assert torch.equal(a, b)


def check_falls_back(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    weight, pointwise = torch.randn(35, 1, 3, 3), torch.randn(35, 35, 1, 1)
    own = [image()], [1], torch.ones(1), [], [weight], 2, [pointwise]
    for _ in range(2):
        (result,) = torch.ops.randwire.separable(*own)
    assert torch.equal(result, native.separable(*own)[0])
    (said,) = [r for r in caplog.records if r.name == cpu_kernels.__name__]
    assert said.levelno == logging.WARNING and reason in said.getMessage()
    assert "\n" not in said.getMessage()


@pytest.mark.parametrize("compiler", ["no_such_compiler", "false"])
def test_without_a_compiler_nothing_breaks(
    afresh: Path,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else a machine without a compiler can't run the network."""
    monkeypatch.setenv("CXX", compiler)
    check_falls_back(caplog, "false" if compiler == "false" else "there is no C++ compiler")


def test_without_a_cache_nothing_breaks(
    afresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a home folder that is read-only is enough to stop a training."""
    (afresh / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(afresh / "file"))
    check_falls_back(caplog, "NotADirectoryError")


def test_kernels_that_compute_wrongly_are_not_used(
    kernels: Kernels,
    afresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else a compiler's error is in every result."""
    folder = Path(shutil.copytree(build.FOLDER, afresh / "sources"))
    source = (folder / "separable.cpp").read_text()
    assert "< 0 ? V{} : s" in source
    (folder / "separable.cpp").write_text(source.replace("< 0 ? V{} : s", "< 1 ? V{} : s"))
    monkeypatch.setattr(build, "FOLDER", folder)
    fast = [flag.replace("O3", "O0") for flag in build.COMPILE]
    monkeypatch.setattr(build, "COMPILE", fast)
    check_falls_back(caplog, "Mismatch")


def test_processes_compile_once(
    kernels: Kernels, afresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all the processes of a machine compile at its start, or load half a file."""
    commands = []

    def run(command: Any, **options: Any) -> Any:
        commands.append(command)
        if "-o" not in command:
            return real(command, **options)
        time.sleep(0.05)  # a compiler takes longer
        return Path(command[-1]).touch()

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    with ThreadPoolExecutor(3) as pool:
        paths = {future.result() for future in [pool.submit(build.built) for _ in range(3)]}
    assert len(paths) == 1 and len([c for c in commands if "-shared" in c]) == 1
    assert sorted(p.suffix for p in (afresh / "randwire_d2").iterdir()) == ["", ".so"]


@pytest.mark.slow
@pytest.mark.parametrize("narrower", ["", "-mno-avx512f"], ids=["as here", "without AVX-512"])
def test_no_access_is_outside_of_a_tensor(
    narrower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what lies beside a tensor is read, or overwritten, and the tests above pass: what is
    read may be used for nothing, and what is overwritten needed by nobody just then. Or vectors of
    a width that the machine of the tests does not use give other results."""
    if narrower and platform.machine() != "x86_64":
        pytest.skip("this machine has no AVX")
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    # Python is not compiled so, and has to load them ahead of all else.
    libraries = [
        Path(subprocess.check_output([compiler, f"-print-file-name={name}.so"], text=True).strip())
        for name in ("libasan", "libubsan", "libstdc++")
    ]
    # Some are a text that tells a linker where the library is.
    if not all(path.is_file() and path.read_bytes()[:4] == b"\x7fELF" for path in libraries):
        pytest.skip("the C++ compiler has no sanitizers that can be preloaded")
    # Optimized less, it compiles in a quarter of the time.
    flags = f"{narrower} -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    (tmp_path / "c++").write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" {flags}\n')
    (tmp_path / "c++").chmod(0o700)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.built()  # here, because the compiler would take longer with what is preloaded

    # An access that is off by a row is to hit guarded memory, too. Python leaks when it ends.
    monkeypatch.setenv("ASAN_OPTIONS", "redzone=1024:detect_leaks=0")
    monkeypatch.setenv("LD_PRELOAD", " ".join(map(str, libraries)))
    cases = (
        *(test_operators_are_the_native_ones, test_other_numbers_of_results),
        *(test_threads_change_no_bit, test_nan_is_not_hidden),
    )
    # Not captured: a report ends the process.
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider"]
    command += [f"{__file__}::{case.__name__}" for case in cases]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    report = re.search(r"(Sanitizer: |runtime error: ).{,3000}", done.stdout, re.DOTALL)
    assert done.returncode == 0, report[0] if report else done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]
