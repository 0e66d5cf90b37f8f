"""The compiled code of the Triton kernels, for a GPU that need not be present.

Registers decide how many threads a GPU holds at once. Spills are additional memory traffic. At
barriers and shuffles, threads wait for each other.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import triton_kernels
from .probe import Case, operands
from .triton_kernels import common


class Compiled(NamedTuple):
    """One kernel's code.

    Attributes:
        operator: the operator that launches it.
        kernel: its name.
        registers: the registers of a thread.
        spills: the bytes that a thread keeps in memory for want of registers.
        barriers, shuffles, loads, instructions: how many are in the code; loops count once.
        waits: the barriers and shuffles in loops, where threads wait for each other in every round.
        per_element: the instructions in loops, for each element of an image that a thread computes
            in a round; without a loop, all instructions.
    """

    operator: str
    kernel: str
    registers: int
    spills: int
    barriers: int
    shuffles: int
    loads: int
    instructions: int
    waits: int
    per_element: float


def replace_driver(capability: int) -> None:
    """Make Triton compile for a GPU that need not be present; this process can't run kernels then.

    Args:
        capability: the GPU's compute capability, 80 for 8.0.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )


def compile_kernels(
    case: Case, operators: Sequence[str], capability: int = 90
) -> Iterator[Compiled]:
    """Compile all kernels that operators launch with a case's operands.

    Args:
        capability: see ``replace_driver``, which it calls.
    """
    replace_driver(capability)
    compiled: dict[str, tuple[bytes, float]] = {}

    def compile_only(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        cubin = kernel.warmup(*args, grid=grid, **constants).asm["cubin"]
        compiled[kernel.fn.__name__] = cubin, _elements(kernel.fn.__name__, constants)

    launch, common.launch = common.launch, compile_only
    try:
        for operator in operators:
            compiled.clear()
            arguments: tuple[Any, ...] = next(operands(case, operator))
            getattr(triton_kernels, operator)(*arguments)
            for name, (cubin, elements) in compiled.items():
                yield Compiled(operator, name, *_examine(cubin, elements))
    finally:
        common.launch = launch


def _elements(kernel: str, constants: dict[str, int]) -> float:
    """How many elements of its images a thread computes in a round of the kernel's loop."""
    tile = [constants[name] for name in ("ROWS", "COLUMNS", "CHANNELS") if name in constants]
    # A round of this one goes on by a row of the gradient, which may be two of the input.
    rows = constants["STRIDE"] if kernel == "_aggregate_backward_kernel" else 1
    return rows * math.prod(tile) / (32 * constants.get("num_warps", 4))


def _examine(cubin: bytes, elements: float) -> tuple[Any, ...]:
    """The numbers of ``Compiled``, from NVIDIA's tools, which come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        code = _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    # An instruction's line is /*0080*/, perhaps a predicate, its name with a dot before each of its
    # options, and its operands; of a branch, the place that it leads to.
    line = (
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(?:[^;]*?(0x[0-9a-f]+)\s*;)?"
    )
    places = [(int(place, 16), name, end) for place, name, end in re.findall(line, code, re.M)]
    loops = [range(int(end, 16), place) for place, name, end in places if name == "BRA" and end]
    count = Counter(name for _, name, _ in places)
    looped = Counter(name for place, name, _ in places if any(place in loop for loop in loops))
    waiting = ("BAR", "SHFL")
    return (
        *map(int, found.groups()),
        *(count[name] for name in (*waiting, "LDG")),
        len(places) - count["NOP"],
        sum(looped[name] for name in waiting),
        (looped.total() or len(places) - count["NOP"]) / elements,
    )


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout
