"""The Triton kernels do what the operators' native implementation does.

They access no memory but that of their tensors, and none that another program writes.

Without a GPU, Triton's interpreter runs them on the CPU. It must be chosen before Triton is first
imported, so this file runs itself in another process: ``python test_triton.py interpret CASE...``
writes what was wrong in each case, as JSON. ``compile CAPABILITY`` and ``well`` run the compiler
for a GPU in place of the kernels.
"""

import copy
import inspect
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import PATIENCE, assert_same, randomise

pytest.importorskip("triton", reason="Triton, which comes with torch for CUDA, is not installed")

import triton
import triton.language as tl

from randwire_d2 import NetworkGenerator, ops
from randwire_d2.modeling import RandWireStage
from randwire_d2.modeling.weights import MULTIPLES
from randwire_d2.ops import probe, tiling, triton_kernels
from randwire_d2.ops.probe import EVERY_WANT, OPERATORS, operands
from randwire_d2.ops.triton_kernels import common

# A tile, a strip and a program's share so small that little images have several of each.
SMALL = {"TILE": 64, "SUM_TILE": 64, "STATISTICS_TILE": 64, "FLAT": 16, "PROGRAMS": 3}
SMALL |= {"MIN_ROWS": 1, "STRIP_WIDTH": 2, "STRIP_HEIGHT": 3}


@dataclass(frozen=True)
class Case(probe.Case):
    """A case with constants of ``tiling`` that are replaced."""

    contiguous: bool = True
    images: int = 2
    constants: dict[str, int] = field(default_factory=dict)


def drawn_case(seed: int) -> Case:
    draw = random.Random(seed)
    stride = draw.choice((1, 2))
    constants = {name: draw.choice((value, 4 * value)) for name, value in SMALL.items()}
    return Case(
        inputs=draw.randint(1, 8),
        affine=draw.random() < 0.5,
        stride=stride,
        size=(draw.randint(1, 9), draw.randint(1, 9)),
        channels=draw.choice((1, 2, 4, 7, 16, 33)),
        dtype=draw.choice((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        only=OPERATORS if stride == 1 else OPERATORS[2:4],
        contiguous=draw.random() < 0.2,
        nodes=draw.randint(1, 4),
        constants=constants if draw.random() < 0.7 else {},
    )


CASES = {
    "one pixel": Case(1, False, 1, (1, 1), 1),
    "one input": Case(1, False, 1, (5, 4), 5, constants=SMALL),
    "one input, stride 2": Case(1, True, 2, (5, 4), 33, constants=SMALL | {"SUM_TILE": 256}),
    "two inputs": Case(2, True, 1, (2, 3), 33),
    "two inputs, stride 2": Case(2, False, 2, (6, 4), 5, constants=SMALL),
    "five inputs": Case(5, True, 1, (4, 3), 5, constants=SMALL),
    "every want": Case(2, True, 1, (3, 2), 5, want=EVERY_WANT, only=("aggregate_backward",)),
    "twelve inputs": Case(12, False, 1, (2, 3), 5),
    "twenty inputs": Case(20, True, 1, (3, 2), 5, only=("aggregate", "aggregate_backward")),
    "two nodes": Case(3, True, 1, (4, 2), 5, constants=SMALL, nodes=2, only=OPERATORS[1:]),
    "two nodes, stride 2": Case(
        *(1, False, 2, (4, 2), 5), constants=SMALL, nodes=2, only=OPERATORS[2:4]
    ),
    "five nodes": Case(4, False, 1, (1, 2), 5, nodes=5, only=OPERATORS[1:4]),
    "eight nodes": Case(7, False, 1, (2, 1), 5, nodes=8, only=OPERATORS[4:]),
    "float32": Case(2, True, 1, (3, 5), 5, torch.float32),
    "float16": Case(3, True, 1, (3, 5), 5, torch.float16),
    "bfloat16": Case(2, False, 2, (3, 5), 5, torch.bfloat16),
    "nothing above 0": Case(1, False, 1, (2, 3), 5, mean=-9, only=OPERATORS[2:4]),
    "large mean": Case(
        *(1, False, 1, (19, 11), 3, torch.float32),
        constants=SMALL | {"PROGRAMS": 20},
        mean=1e4,
        only=("batch_norm_statistics",),
    ),
}
# Norms, whether in training, and the multiple that channels are padded to.
STAGES = [("BN", True, 8)]
SLOW_STAGES = [("BN", True, 1), ("BN", False, 1), ("BN", False, 8)]
SLOW_STAGES += [("FrozenBN", True, 1), ("FrozenBN", True, 8)]
SLOW_CASES = {
    "as on a GPU": Case(3, True, 1, (10, 9), 33),
    "as on a GPU, stride 2": Case(1, False, 2, (7, 9), 130, torch.float32),
    "twelve affine inputs": Case(12, True, 1, (4, 3), 33, torch.float32, constants=SMALL),
    "thirty-one inputs": Case(31, True, 1, (1, 2), 5),
    "many nodes": Case(3, True, 1, (3, 2), 5, nodes=19, only=OPERATORS[1:]),
    "one node with many inputs": Case(18, True, 1, (3, 2), 5, nodes=4, only=OPERATORS[1:]),
    # More than the second kernels read at a time.
    "many programs": Case(
        *(1, False, 1, (12, 11), 1),
        constants=SMALL | {"SUM_TILE": 1, "STATISTICS_TILE": 1, "PROGRAMS": 1000},
        only=OPERATORS[4:],
    ),
}
# Sizes that nobody has thought of, as many as the environment says.
DRAWN = int(os.environ.get("RANDWIRE_DRAWN_CASES", "3"))
SLOW_CASES |= {f"drawn, {seed}": drawn_case(seed) for seed in range(DRAWN)}
CUDA_CASES = {
    "stage 1": Case(2, True, 1, (56, 56), 109, torch.float32, want=EVERY_WANT),
    "stage 2, its input": Case(1, False, 2, (56, 56), 109, torch.float16),
    "stage 4": Case(4, True, 1, (7, 7), 872, torch.float32),
}


# What is wrong with an access, and what the sanitizer says of it.
FAULTS = {
    "reads the tail": "reads what is in no tensor",
    "writes the tail": "writes what is in no tensor",
    "writes gaps": "writes what is in no tensor",
    "writes in pairs": "writes an element twice",
    "writes the same": "writes what another program has written",
    "reads its own": "reads what it has written",
    "reads the last": "reads what another program has written",
    "reads the next": "writes what another program has read",
}


@triton.jit
def _faulty_kernel(x, y, count, FAULT: tl.constexpr):
    place = tl.program_id(0) * 4 + tl.arange(0, 4)
    exists = place < count
    value = tl.load(x + place, exists | (FAULT == "reads the tail"), other=0.0)
    if FAULT == "reads the next":
        value += tl.load(y + place + 4, place + 4 < count, other=0.0)
    target = place
    if FAULT == "writes in pairs":
        target = place // 2
    if FAULT == "writes the same":
        target = tl.arange(0, 4)
    tl.store(y + target, value, exists | (FAULT == "writes the tail"))
    if FAULT == "reads its own":
        tl.store(x + place, tl.load(y + place, exists, other=0.0), exists)
    if FAULT == "reads the last":
        value = tl.load(y + place - 4, exists & (place >= 4), other=0.0)


@contextmanager
def replaced(constants: dict[str, int]) -> Iterator[None]:
    """Wherever a module has one of them."""
    modules = [tiling, triton_kernels.sums]
    before = [{name: vars(m)[name] for name in constants if name in vars(m)} for m in modules]
    for module, own in zip(modules, before, strict=True):
        vars(module).update({name: constants[name] for name in own})
    yield
    for module, own in zip(modules, before, strict=True):
        vars(module).update(own)


def check(case: Case, operator: str, function: Callable[..., Any], device: str = "cpu") -> None:
    with replaced(case.constants):
        probe.compare(case, operator, function, device)


def check_nan(device: str = "cpu") -> None:
    x = torch.full((1, 1, 3, 3), torch.nan, device=device)
    one = torch.ones(1, device=device)
    read = ([x], [1], one, [], [one.expand(1, 1, 3, 3)], 1)
    (result,) = triton_kernels.aggregate(*read)
    assert result.isnan().all(), "lost in aggregate"
    (grad,), _, _ = triton_kernels.aggregate_backward([x], *read, (True, False))
    assert grad.isnan().all(), "lost in its backward"


def check_fault(fault: str) -> None:
    y = torch.zeros(20)
    y = y[::2] if fault == "writes gaps" else y[:10]
    _faulty_kernel[(3,)](torch.zeros(10), y, 10, fault)


def check_stage(norm: str, training: bool, multiple: int) -> None:
    """A stage's results, gradients and statistics are those of the native operators."""
    torch.manual_seed(0)
    spec = NetworkGenerator("small", 3, 6, "WS", {"k": 2, "p": 0.75})(1)
    stage = RandWireStage(spec.stages[0], "sep_conv3x3", norm, fused="on").double()
    randomise(stage).train(training)
    kept = torch.arange(len(stage.plan.learned)) != 1
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64) + 1

    def run(stage: RandWireStage) -> dict[str, torch.Tensor]:
        own = x.clone().requires_grad_()
        y = stage(own, kept)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert own.grad is not None
        gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        return {"result": y, "gradient": own.grad, **gradients, **dict(stage.named_buffers())}

    expected = run(copy.deepcopy(stage))
    with torch.library._scoped_library("randwire", "IMPL") as library:
        for name in OPERATORS:
            library.impl(name, getattr(triton_kernels, name), "CPU", allow_override=True)
        with mock.patch.dict(MULTIPLES, {torch.float64: multiple}):
            for name, value in run(stage).items():
                assert_same(value, expected[name], name)


def spread_comparisons_as_masks() -> None:
    """To the interpreter, a comparison of two numbers is of their type once it is spread over a
    tile; from Triton 3.9 on it loads with no such mask. Compilers know better."""
    from triton.runtime.interpreter import InterpreterBuilder

    spread = InterpreterBuilder.create_splat

    def create_splat(builder: Any, shape: Any, value: Any) -> Any:
        tile = spread(builder, shape, value)
        tile.data = tile.data.astype(value.data.dtype)
        return tile

    InterpreterBuilder.create_splat = create_splat


def replace_once() -> None:
    """The interpreter replaces Triton's functions ahead of each call, also of what a kernel calls,
    which takes a third of its time. This process needs no others."""
    from triton.runtime import interpreter

    replace, done = interpreter._patch_lang, set()

    def replace_in(function: Callable[..., Any]) -> Any:
        own = function.__globals__.values()
        kinds = any(value is tl for value in own), any(value is tl.core for value in own)
        if kinds not in done:
            done.add(kinds)
            replace(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_in


def interpret(names: list[str]) -> dict[str, str]:
    """What is wrong in each case, in Triton's interpreter."""
    from sanitizer import sanitized  # for which interpreted Triton must be imported

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what was never written is NaN
    spread_comparisons_as_masks()
    replace_once()
    wrong = {}
    checks: dict[str, Callable[[], None]] = {"NaN": check_nan}
    checks |= {f"fault/{fault}": partial(check_fault, fault) for fault in ("", *FAULTS)}
    for kind, stages in (("stage", STAGES), ("other stage", SLOW_STAGES)):
        for stage in stages:
            checks[f"{kind}/{stage}"] = partial(check_stage, *stage)
    for name, case in (CASES | SLOW_CASES).items():
        if name in CASES:  # interpreted columns take their time, also those beside an image
            case = replace(case, constants={"STRIP_WIDTH": 4} | case.constants)
        for operator in case.only:
            checks[f"{name}/{operator}"] = lambda case=case, operator=operator: check(
                case, operator, getattr(triton_kernels, operator)
            )
    for key, run in checks.items():
        if key.split("/")[0] in names:
            try:
                with sanitized():
                    run()
                wrong[key] = ""
            except Exception as error:
                wrong[key] = f"{type(error).__name__}: {error}"
    return wrong


def compile_for_gpu(capability: str) -> dict[str, str]:
    """What is wrong with each kernel, for a GPU of a compute capability, 80 for 8.0."""
    from randwire_d2.ops import compiled

    # Here it is enough that there is code: to disassemble it takes two thirds of the time.
    compiled._examine = lambda *_: (0,) * 8
    wrong = {}
    # From three gradients on, a norm's backward writes their sum.
    for n, dtype in [
        (1, torch.float32),
        (3, torch.float32),
        (2, torch.float16),
        (1, torch.float64),
    ]:
        for affine in (False, True):
            for stride in (1, 2) if n == 1 else (1,):
                case = Case(n, affine, stride, (4, 4), 109, dtype, nodes=n)
                name = f"{n} inputs, {dtype}, {affine = }, {stride = }"
                for operator in OPERATORS:
                    try:
                        for found in compiled.compile_kernels(case, [operator], int(capability)):
                            wrong[f"{found.kernel}, {name}"] = ""
                    except Exception as error:
                        wrong[f"{operator}, {name}"] = f"{type(error).__name__}: {error}"
    return wrong


def compiled_well() -> dict[str, str]:
    """The kernels that would be slow: whose threads spill, or wait for each other."""
    from randwire_d2.ops.compiled import compile_kernels

    wrong = {}
    # 112 is a multiple of 16, for which Triton compiles other loads than for 109.
    for n, stride, channels, nodes in [
        *((1, 1, 109, 1), (4, 1, 112, 1), (16, 1, 109, 1), (1, 2, 112, 1), (6, 1, 109, 1)),
        *((4, 1, 109, 3), (1, 2, 112, 7), (6, 1, 112, 5)),
    ]:
        case = Case(n, True, stride, (8, 8), channels, torch.float16, nodes=nodes)
        operators = OPERATORS[2:4] if n != 6 else (OPERATORS[1], *OPERATORS[4:])
        for found in compile_kernels(case, operators):
            strip = found.kernel.startswith("_aggregate")
            waits = found.barriers + found.shuffles if strip else found.waits
            # Far more than there are: 32 and 47 with one input of 109 channels.
            good = found.spills <= 100 and not waits and found.per_element < 50 + 12 * n
            name = f"{n}, {stride}, {channels}, {nodes}, {found.kernel}"
            wrong[name] = "" if good else str(found)
    return wrong


@cache
def elsewhere(*arguments: str) -> dict[str, str]:
    """Run this file in a process of its own."""
    env = {**os.environ, "TRITON_INTERPRET": "1" if arguments[0] == "interpret" else "0"}
    done = subprocess.run(
        [sys.executable, Path(__file__), *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wrong: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return wrong


FAST = ("interpret", "NaN", "fault", "stage", *CASES)
SLOW = ("interpret", "other stage", *SLOW_CASES)


def each(cases: dict[str, Case]) -> Any:
    pairs = [(name, operator) for name, case in cases.items() for operator in case.only]
    return pytest.mark.parametrize("name, operator", pairs)


@each(CASES)
def test_operators(name: str, operator: str) -> None:
    """If it failed, a network would compute something else on a GPU than on a CPU: other borders,
    other tails of blocks, an affine or a coefficient left out, statistics that cancel."""
    assert not elsewhere(*FAST)[f"{name}/{operator}"]


@pytest.mark.slow
@each(SLOW_CASES)
def test_operators_of_larger_operands(name: str, operator: str) -> None:
    """As ``test_operators``: wrong only with many inputs, or with the tiles that a GPU gets."""
    assert not elsewhere(*SLOW)[f"{name}/{operator}"]


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_accesses_are_found(fault: str) -> None:
    """Wrong: the other tests in the interpreter pass, but kernels read what is behind a tensor, or
    race: on a GPU they would end a training, or change its results from run to run."""
    assert FAULTS[fault] in elsewhere(*FAST)[f"fault/{fault}"]


def test_right_accesses_are_not_refused() -> None:
    """If it failed, the test above would pass whatever the sanitizer looks at."""
    assert not elsewhere(*FAST)["fault/"]


def test_nan_is_not_hidden() -> None:
    """If it failed, a ReLU would turn NaNs into zeros, and a diverged training would go on."""
    assert not elsewhere(*FAST)["NaN"]


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_stage(stage: tuple[str, bool, int]) -> None:
    """If it failed, the operators would not fit together: a group's nodes in another order, parts
    of sums that are not added up, slices whose strides a kernel does not know."""
    assert not elsewhere(*FAST)[f"stage/{stage}"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", SLOW_STAGES, ids=str)
def test_another_stage(stage: tuple[str, bool, int]) -> None:
    """As ``test_a_stage``."""
    assert not elsewhere(*SLOW)[f"other stage/{stage}"]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, tools/benchmark.py would count other launches than there are."""
    launched: list[str] = []
    monkeypatch.setattr(
        triton_kernels.common,
        "launch",
        lambda kernel, *_, **__: launched.append(kernel.fn.__name__),
    )
    for n, nodes, operator in itertools.product((1, 3, 7, 13, 17), (1, 9), OPERATORS):
        case = probe.Case(n, True, 1, (7, 5), 5, torch.float32, EVERY_WANT, nodes=nodes)
        for arguments in operands(case, operator):
            launched.clear()
            getattr(triton_kernels, operator)(*arguments)
            assert len(launched) == ops.launches(operator, arguments), (n, launched)


def kernel_of(kernel: Any, *args: Any, **constants: Any) -> tuple[Any, ...]:
    """What Triton compiles a kernel of its own for."""
    found: list[Any] = [kernel.fn.__name__]
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, (tuple, torch.Tensor)):
            value = [t.dtype for t in value] if isinstance(value, tuple) else value.dtype
        elif isinstance(value, int) and name != "channels":
            value = value % 16 == 0 if name == "size" else value >= 2**31
        found.append(value)
    return (*map(str, found), *constants.items())


@pytest.mark.parametrize(
    ("graph", "size"),
    [
        (("WS", {"k": 4, "p": 0.75}), (1, 10, 26)),
        (("WS", {"k": 4, "p": 0.75}), (2, 4, 4)),
        (("ER", {"p": 1.0}), (2, 16, 16)),
    ],
    ids=["an odd number of pixels", "two columns", "many inputs and readers"],
)
def test_the_probe_launches_the_kernels_of_a_stage(
    graph: tuple[str, dict[str, Any]], size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: some images wait for a compiler in the middle of a training, whose kernel nothing was
    held against; if one does not compile, the training fails in place of running node by node."""
    launched: set[tuple[Any, ...]] = set()
    monkeypatch.setattr(
        triton_kernels.common,
        "launch",
        lambda kernel, _, *args, **constants: launched.add(kernel_of(kernel, *args, **constants)),
    )
    monkeypatch.setattr(ops, "joins", lambda *_: False)
    spec = NetworkGenerator("small", 8, 19, *graph)(1).stages[0]
    stage = RandWireStage(spec, "sep_conv3x3", "BN").train()
    number, height, width = size
    with torch.library._scoped_library("randwire", "IMPL") as library:
        for name in OPERATORS:
            library.impl(name, getattr(triton_kernels, name), "CPU", allow_override=True)
        stage.run_fused(torch.randn(number, 8, height, width, requires_grad=True)).sum().backward()
        needed = launched.copy()
        launched.clear()
        variants = probe.Variants(8, 8, *stage._sizes, batch=True, backward=True)
        for case in probe.cases(torch.float32, variants):
            for name in case.only:
                for arguments in operands(case, name):
                    getattr(torch.ops.randwire, name)(*arguments)
    assert needed and needed <= launched, needed - launched


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile(capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, a kernel would run in the interpreter alone: the compiler is stricter, about
    types that change in a loop for one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = elsewhere("compile", capability)
    assert not {name: message for name, message in wrong.items() if message}
    modules = (triton_kernels.depthwise, triton_kernels.norms, triton_kernels.sums)
    kernels = {name for m in modules for name in vars(m) if name.endswith("_kernel")}
    assert {name.split(",")[0] for name in wrong} == kernels


@pytest.mark.slow
def test_kernels_compile_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, a convolution's threads would wait for each other at every row, as where Triton
    spreads the columns over warps, keep in memory what registers have no room for, or take more
    instructions."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = elsewhere("well")
    assert len(wrong) > 10
    assert not {name: message for name, message in wrong.items() if message}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each(CASES | CUDA_CASES)
def test_operators_on_cuda(name: str, operator: str) -> None:
    """If it failed, the operators would not run on a GPU, or do there what the CPU does not."""
    check((CASES | CUDA_CASES)[name], operator, getattr(torch.ops.randwire, operator), "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nan_is_not_hidden_on_cuda() -> None:
    """As ``test_nan_is_not_hidden``: which of a NaN and 0 is the maximum is an instruction's."""
    check_nan("cuda")


def test_kernels_are_compiled_ahead_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a first step waits minutes, as kernels, or what launches them, are compiled one after
    the other. A kernel runs before it is compiled; none runs in another thread, or afterwards. What
    a compiler says is lost, or later compilations meet a closed pool."""
    launched: list[bool] = []
    launchers: list[tuple[Any, Any]] = []
    driver = SimpleNamespace(launcher_cls=lambda src, metadata: launchers.append((src, metadata)))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    kernel = SimpleNamespace(run=lambda *args, grid, warmup: launched.append(warmup))
    both = threading.Barrier(2)
    # What ends a compilation, and from Triton 3.9 on what ends one that fails.
    takes = len(inspect.signature(triton.AsyncCompileMode.submit).parameters)
    afterwards = [lambda _: None] * (takes - 3)

    def compile_one() -> SimpleNamespace:
        both.wait(PATIENCE)  # for the other: one alone never gets past
        return SimpleNamespace(src="source", metadata="metadata")

    def fail() -> None:
        raise RuntimeError("no C compiler")

    with triton_kernels.compiling_ahead():
        common.launch(kernel, (1,), torch.zeros(1))
        beside = threading.Thread(target=common.launch, args=(kernel, (1,), torch.zeros(1)))
        beside.start()
        beside.join()
        mode = triton.runtime._async_compile.active_mode.get()
        keys = ("one", "another") if len(os.sched_getaffinity(0)) > 1 else ()
        for key in keys:
            mode.submit(key, compile_one, *afterwards)
    common.launch(kernel, (1,), torch.zeros(1))
    assert launched == [True, False, False]
    assert launchers == [("source", "metadata") for _ in keys]
    with pytest.raises(RuntimeError, match="no C compiler"), triton_kernels.compiling_ahead():
        triton.runtime._async_compile.active_mode.get().submit("bad", fail, *afterwards)
    common.launch(kernel, (1,), torch.zeros(1))
    assert launched[-1] is False
    assert triton.runtime._async_compile.active_mode.get() is None


if __name__ == "__main__":
    task, *names = sys.argv[1:]
    tasks = {"compile": compile_for_gpu, "well": compiled_well}
    print(json.dumps(tasks[task](*names) if task in tasks else interpret(names)))
