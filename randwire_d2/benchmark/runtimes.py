"""What runs a backbone fastest on a CPU: PyTorch, torch.compile, ONNX Runtime or OpenVINO."""

import importlib.util
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import FORMATS, BackboneGraph, fold_batch_norms
from .comparison import describe_machine
from .markdown import MB, table
from .models import MODELS, REFERENCE, Case, build
from .timing import Ratio, Step, clock_of, paired, ratio

RUNTIMES = {
    "eager": "PyTorch",
    "plain": "PyTorch, node by node",
    "compile": "torch.compile",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
}
_PLAIN = ("plain", "compile")  # node by node: torch.compile can't look into fused operators
_COMPARED = ("randwire", REFERENCE)


@dataclass(frozen=True)
class RuntimeRow:
    """One model in one runtime.

    Attributes:
        model: a name of ``MODELS``.
        runtime: a name of ``RUNTIMES``.
        times: the seconds of the whole batch, one for each round.
        versus: the time as a multiple of ResNet-50's in PyTorch, in the same round.
        peak: the most bytes that a process of its own held in a step, after the first, above what
            it held before there was a model: weights, activations, and what the runtime keeps.
    """

    model: str
    runtime: str
    times: tuple[float, ...]
    versus: Ratio
    peak: int


def compare_runtimes(
    case: Case,
    runtimes: Sequence[str],
    rounds: int,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> list[RuntimeRow]:
    """Time the backbones of detectors in several runtimes, side by side, on the CPU.

    Args:
        case: the work; its backbones have frozen batch norms, whatever it says.
        runtimes: names of ``RUNTIMES``; "eager" is one of them anyway.

    Raises:
        ValueError: a runtime is unknown or not installed, or there is no round; one line.
    """
    case = replace(case, detection=True)
    names = tuple(dict.fromkeys(("eager", *runtimes)))
    _check(names)
    pairs = [(m, r) for m in _COMPARED for r in names if (m, r) != (REFERENCE, "plain")]
    with tempfile.TemporaryDirectory() as folder:
        if {"onnx", "openvino"} & set(names):
            for model in _COMPARED:
                progress(f"exporting {MODELS[model]}")
                _export(case, model, _file(folder, model))
        peaks = {}
        for model, runtime in pairs:
            progress(f"measuring the memory of {MODELS[model]} in {RUNTIMES[runtime]}")
            peaks[model, runtime] = _in_a_process(case, model, runtime, folder)
        progress(f"timing, {rounds} rounds")
        steps = {f"{m} {r}": _step(case, m, r, folder) for m, r in pairs}
        times = paired(steps, clock_of(torch.device("cpu")), rounds, warmup=2)
    reference = times[f"{REFERENCE} eager"]
    return [
        RuntimeRow(m, r, tuple(own), ratio(own, reference), peaks[m, r])
        for m, r in pairs
        if (own := times[f"{m} {r}"])
    ]


def runtimes_to_markdown(rows: Sequence[RuntimeRow], case: Case, rounds: int, command: str) -> str:
    """The table, below the conditions; times and peaks are of the whole batch."""
    machine = describe_machine(torch.device("cpu"))
    where = (
        f"{machine['device']}, {machine['threads']} threads on {machine['cpus']} CPUs, PyTorch "
        f"{machine['torch']}; medians over {rounds} round(s), of the whole batch:"
    )
    cells = [
        [
            MODELS[row.model],
            RUNTIMES[row.runtime],
            f"{statistics.median(row.times) * 1e3:,.1f}",
            "{:.2f} ({:.2f} … {:.2f})".format(*row.versus),
            f"{row.peak / MB:,.0f}",
        ]
        for row in rows
    ]
    versus = f"× {MODELS[REFERENCE]} in PyTorch (quartiles)"
    header = ["", "runtime", "time (ms)", versus, "peak (MB)"]
    return "\n\n".join(
        [f"`{command}`", f"{replace(case, detection=True)}", where, table(header, cells)]
    )


def _check(names: Sequence[str]) -> None:
    for name in names:
        if name not in RUNTIMES:
            raise ValueError(f"unknown runtime {name!r}; known are {', '.join(RUNTIMES)}")
    if {"onnx", "openvino"} & set(names):
        FORMATS["onnx"].check()
    if "openvino" in names and importlib.util.find_spec("openvino") is None:
        raise ValueError("the runtime openvino needs its package: pip install openvino")


def _file(folder: str, model: str) -> str:
    return str(Path(folder) / f"{model}.onnx")


def _export(case: Case, model: str, path: str) -> None:
    graph = BackboneGraph(build(model, case))
    fold_batch_norms(graph)
    with open(path, "wb") as file:
        FORMATS["onnx"].write(graph, case.make_inputs()[0], {"version": ""}, file)


def _step(case: Case, model: str, runtime: str, folder: str) -> Step:
    images, _ = case.make_inputs()
    if runtime == "openvino":
        run: Any = _openvino(_file(folder, model))
    elif runtime == "onnx":
        run, _ = FORMATS["onnx"].read(_file(folder, model))
    else:
        plain = runtime in _PLAIN and model == "randwire"
        run = build("randwire-plain" if plain else model, case).eval()
        if runtime == "compile":
            run = torch.compile(run)

    def step() -> object:
        with torch.no_grad():
            return run(images)

    return step


def _openvino(path: str) -> Callable[[Tensor], object]:
    openvino = importlib.import_module("openvino")
    options: Mapping[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda images: compiled([images.numpy()])


# -------------------------------------------------------------------------------------------------
# Memory
# -------------------------------------------------------------------------------------------------


def _in_a_process(case: Case, model: str, runtime: str, folder: str) -> int:
    """The peak of a step in a process of its own: allocators keep what others have left."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, case, model, runtime, folder, torch.get_num_threads())
    process = context.Process(target=_send_peak, args=arguments)
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise ValueError(
            f"{MODELS[model]} in {RUNTIMES[runtime]} ended its process: too little memory?"
        ) from None
    finally:
        process.join()


def _send_peak(
    sender: Any, case: Case, model: str, runtime: str, folder: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    before = _status("VmRSS")
    step = _step(case, model, runtime, folder)
    step()  # compiles, and fills the allocators
    with open(f"/proc/{os.getpid()}/clear_refs", "w") as f:
        f.write("5")  # the peak from here on
    step()
    sender.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    """Bytes of this process, as Linux counts them."""
    with open("/proc/self/status") as f:
        (line,) = (line for line in f if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
