"""Check that a device computes correctly: fused operators, a stage (with times), and CUDA graphs.

Each examination is a separate process: after an illegal memory access, a process can't use its GPU
any more, and later examinations would fail, too.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.collect_env import collect_env_info

from .. import ops
from ..environment import variable
from ..modeling import RandWireStage
from ..modeling.difference import LIMITS, error
from ..modeling.shadow import MODES, shadow
from ..modeling.stage_graphs import LATER_CALLS
from ..modeling.weights import narrower_image, padding_of, wider_image, with_zeros
from ..ops import probe
from ..wiring import NetworkGenerator

DTYPES = ("float32", "float16", "bfloat16")
SANITIZERS = ("memcheck", "racecheck")
_SANITIZER = "compute-sanitizer"
_SIZE = 56  # pixels: height and width of a stage's input
_GRAPH_SIZES = (56, 48, 64)  # sizes in turn, as of a detector's images
_ROUNDS = 9
# For each part, the effect of its failure on a training.
PARTS = {
    "operators": "a training runs stages node by node",
    "stage": "a training stops in its first iteration: set MODEL.RANDWIRE.FUSED off",
    "graphs": "a training launches its kernels one by one",
    "sanitizer": "train with MODEL.RANDWIRE.FUSED off",
}

Report = dict[str, Any]


def examine(
    device: str,
    channels: int = 109,
    batch: int = 32,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Examine a device.

    Args:
        device: such as ``"cuda"`` or ``"cuda:1"``.
        channels: C of the stage.
        batch: the batch size of the stage.
        progress: called with a line of text before each examination, and with its outcome.

    Returns:
        dict: "works"; "environment", a text; "compiler"; and for each of ``PARTS`` the results by
        type or tool, or the "error" that ended the examination. It can be written as JSON.
    """
    report: Report = {
        "works": True,
        "device": device,
        "environment": collect_env_info(),
        "compiler": _compiler(),
        **{part: {} for part in PARTS},
    }
    # On a CPU the operators sum in the type of their inputs, so the limits for a GPU in half
    # precision do not apply. A CPU has no CUDA graphs and no sanitizer.
    on_gpu = torch.device(device).type == "cuda"
    for part, options, dtypes in (
        ("operators", [channels], DTYPES if on_gpu else DTYPES[:1]),
        ("stage", [channels, batch], DTYPES),
        ("graphs", [channels, batch], DTYPES if on_gpu else ()),
    ):
        for dtype in dtypes:
            progress(f"{part} in {dtype} ...")
            report[part][dtype] = _elsewhere([], part, device, dtype, *options)
            progress(_outcome(report, part, dtype))
    installed = shutil.which(_SANITIZER)
    for tool in SANITIZERS if on_gpu else ():
        if installed is None:
            report["sanitizer"][tool] = {"skipped": f"there is no {_SANITIZER}"}
            continue
        progress(f"operators under {_SANITIZER}, {tool} ...")
        prefix = [installed, "--tool", tool, "--error-exitcode", "86"]
        # With caching, the sanitizer would miss accesses beyond a tensor, within PyTorch's block.
        with variable("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"):
            outcome = _elsewhere(prefix, "operators", device, "float32", channels)
        report["sanitizer"][tool] = outcome
        progress(_outcome(report, "sanitizer", tool))
    report["works"] = not any(
        "error" in outcome for part in PARTS for outcome in report[part].values()
    )
    return report


def summary(report: Report) -> list[str]:
    """The report as lines of text, one for each examination, and the verdict."""
    lines = [_outcome(report, part, name) for part in PARTS for name in report[part]]
    failed = [part for part in PARTS if any("error" in found for found in report[part].values())]
    verdict = "The fast path works" if not failed else f"Not all works, so {PARTS[failed[0]]}"
    return [*lines, f"{verdict}."]


def _outcome(report: Report, part: str, name: str) -> str:
    found = report[part][name]
    if "error" in found:
        outcome = f"FAILS: {found['error']}"
    elif "skipped" in found:
        outcome = f"skipped, {found['skipped']}"
    else:
        outcome = f"right, largest error {max(found['errors'].values()):.1e}"
    for mode, seconds in found.get("seconds", {}).items():
        ratio = seconds["node by node"] / seconds["fused"]
        outcome += f"; {mode} {ratio:.2f} times as fast as node by node"
    return f"{part:9}  {name:9}  {outcome}"


def examine_operators(device: torch.device, dtype: torch.dtype, channels: int) -> Report:
    """Measure the largest error of each operator, relative to the largest element of its result.

    Raises:
        Exception: an operator fails, with any exception of its own, or a ``Mismatch``.
    """
    _must_have_operators(device)
    edges = ((4, 2), (5, 1))
    variants = probe.Variants(channels, channels, edges, edges, (2, 4), 4, 4, True, True)
    batch, frozen = (
        probe.largest_errors(device, dtype, variants._replace(batch=batch))
        for batch in (True, False)
    )
    return {"errors": {name: max(error, frozen[name]) for name, error in batch.items()}}


def examine_stage(device: torch.device, dtype: torch.dtype, channels: int, batch: int) -> Report:
    """Run a shadow step of the first stage of the paper's network: its errors and times.

    Raises:
        RuntimeError: the errors are larger than rounding explains.
    """
    stage = _stage(device, channels)
    x = _images(batch, channels, _SIZE, dtype, device).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = shadow(stage, x, _ROUNDS)
    found.check()
    seconds = {
        MODES[training]: {"fused": fused, "node by node": nodes}
        for training, (fused, nodes) in found.seconds.items()
    }
    return {"errors": found.errors, "seconds": seconds}


def examine_graphs(device: torch.device, dtype: torch.dtype, channels: int, batch: int) -> Report:
    """Measure the largest differences between a stage with CUDA graphs and one without.

    Raises:
        RuntimeError: there is no graph, or the two stages differ.
    """
    launched = _stage(device, channels, cuda_graphs=False)
    replayed = copy.deepcopy(launched)
    replayed.cuda_graphs = True
    # The kernels are the same; only sums in no fixed order differ, by less than the usual limits.
    errors, limit = dict.fromkeys(("output", "gradients", "statistics"), 0.0), LIMITS[dtype] / 10
    for _ in range(LATER_CALLS + 3):
        for size in _GRAPH_SIZES:
            x = _images(batch, channels, size, dtype, device)
            found = [_step(stage, x, dtype) for stage in (replayed, launched)]
            for name, actual, expected in zip(errors, *found, strict=True):
                off = error(actual, expected)
                if not off <= limit:
                    raise RuntimeError(f"a replay's {name} at {size}×{size} is off by {off:.2g}")
                errors[name] = max(errors[name], off)
    if replayed.graphs.failure or not replayed.graphs.replayed:
        raise RuntimeError(f"no CUDA graph was made: {replayed.graphs.failure or 'none was tried'}")
    return {"errors": errors}


def _step(
    stage: RandWireStage, x: torch.Tensor, dtype: torch.dtype
) -> tuple[list[torch.Tensor], ...]:
    """Output, gradients and statistics of a training step."""
    x = with_zeros(torch.Tensor.clone, x).requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = stage(x)
    parameters = [*stage.parameters()]
    gradients = torch.autograd.grad(y.float().square().mean(), [x, *parameters])
    return [y.detach()], [*gradients], [b for b in stage.buffers() if b.is_floating_point()]


def _images(
    number: int, channels: int, size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A random input as one stage passes it to the next, with padded channels."""
    zeros = padding_of(channels, dtype, device)
    x = torch.randn(number, channels, size, size, device=device).to(dtype)
    return narrower_image(wider_image(x, zeros), zeros)


def _stage(device: torch.device, channels: int, **options: Any) -> RandWireStage:
    """The first random stage of the paper's network, in training mode."""
    _must_have_operators(device)
    torch.manual_seed(0)
    spec = NetworkGenerator("regular", channels, 32, "WS", {"k": 4, "p": 0.75})(1)
    stage = RandWireStage(spec.stages[1], spec.node_op, "BN", **options)
    return stage.to(device).train()


def _must_have_operators(device: torch.device) -> None:
    if reason := ops.unavailable(device):
        raise RuntimeError(f"there are no fused operators: {reason}")


def _compiler() -> Report:
    """What Triton needs to build its launcher: compiler and headers, and whether they exist."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        "Python.h": header.is_file(),
        "cache": str(cache),
        "cache can be written": os.access(existing, os.W_OK),
    }


def _elsewhere(prefix: Sequence[str], part: str, *arguments: object) -> Report:
    """Run an examination in a separate process; returns its result or error."""
    command = [*prefix, sys.executable, "-m", __name__, part, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        found: Report = json.loads(done.stdout.splitlines()[-1])
        return found
    status = (
        signal.Signals(-done.returncode).name
        if done.returncode < 0
        else f"exit status {done.returncode}"
    )
    said = (done.stderr if done.stderr.strip() else done.stdout).strip()
    last = said.splitlines()[-1] if said else "nothing was printed"
    return {"error": f"{last[:500]} ({status})", "log": said[-5000:]}


if __name__ == "__main__":
    _EXAMINE: dict[str, Callable[..., Report]] = {
        "operators": examine_operators,
        "stage": examine_stage,
        "graphs": examine_graphs,
    }
    _part, _device, _dtype, *_numbers = sys.argv[1:]
    _found = _EXAMINE[_part](torch.device(_device), getattr(torch, _dtype), *map(int, _numbers))
    print(json.dumps(_found))
