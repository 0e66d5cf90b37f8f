"""A comparison of runtimes on a CPU: PyTorch, torch.compile, ONNX Runtime and OpenVINO."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import detector_config, merge_file, set_spec
from ..config_files import get_config_file
from ..export import FORMATS, BackboneGraph, DetectorGraph, check_runtime, fold_batch_norms
from ..export import RUNTIMES as EXPORTED
from .comparison import describe_machine
from .markdown import MB, describe, table
from .models import MODELS, RANDWIRE_OPTIONS, REFERENCE, Case, build
from .timing import Ratio, Step, clock_of, paired, quartiles, ratio

RUNTIMES = {
    "eager": "PyTorch",
    "plain": "PyTorch, node by node",
    "compile": "torch.compile, node by node",
    "compile-fused": "torch.compile, fused operators",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
}
_PLAIN = ("plain", "compile")
_OF_RANDWIRE = ("plain", "compile-fused")  # a ResNet has one way to run
_COMPARED = {
    "randwire": "faster_rcnn_randwire_c109_fpn_1x.yaml",
    REFERENCE: "faster_rcnn_R_50_fpn_1x.yaml",
}


@dataclass(frozen=True)
class RuntimeRow:
    """The times and the memory of one model in one runtime.

    Attributes:
        model: a name of ``MODELS``.
        runtime: a name of ``RUNTIMES``.
        times: the seconds for the whole batch, one for each round.
        versus: the time as a multiple of ResNet-50's in PyTorch, in the same round.
        peak: the peak memory in bytes of the second step in a separate process, minus its memory
            before the model was built: weights, activations, and the runtime's own memory.
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
    whole: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[RuntimeRow]:
    """Time detectors, or their backbones, in several runtimes, side by side, on the CPU.

    Args:
        case: the work of a step; the batch norms are frozen.
        runtimes: names of ``RUNTIMES``; "eager" is always included.
        whole: compare Table 5's Faster R-CNNs with random weights, in place of their backbones.
            PyTorch takes the batch at once, an exported detector one image after the other.
            torch.compile gets only backbone and FPN: the heads' shapes depend on the detections.

    Raises:
        ValueError: a runtime is not installed; one line.
    """
    names = tuple(dict.fromkeys(("eager", *runtimes)))
    for name in set(EXPORTED) & set(names):
        check_runtime(name)
    pairs = [(m, r) for m in _COMPARED for r in names if m == "randwire" or r not in _OF_RANDWIRE]
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(replace(case, detection=True), whole, folder)
        if set(EXPORTED) & set(names):
            for model in _COMPARED:
                progress(f"exporting {MODELS[model]}")
                work.export(model)
        peaks = {}
        for model, runtime in pairs:
            progress(f"measuring the memory of {MODELS[model]} in {RUNTIMES[runtime]}")
            peaks[model, runtime] = _in_a_process(work, model, runtime)
        progress(f"timing, {rounds} rounds")
        torch.compiler.reset()  # after another batch size, torch.compile would make it dynamic
        steps = {f"{m} {r}": work.step(m, r) for m, r in pairs}
        times = paired(steps, clock_of(torch.device("cpu")), rounds, warmup=2)
    reference = times[f"{REFERENCE} eager"]
    return [
        RuntimeRow(m, r, tuple(own), ratio(own, reference), peaks[m, r])
        for (m, r), own in zip(pairs, times.values())
    ]


def runtimes_to_markdown(
    rows: Sequence[RuntimeRow], case: Case, rounds: int, command: str, *, whole: bool = False
) -> str:
    """The conditions and the table, in Markdown; times and peaks are for the whole batch."""
    machine = describe(describe_machine(torch.device("cpu")))
    where = f"{machine}; medians over {rounds} round(s), of the whole batch:"
    cells = [
        [
            MODELS[row.model],
            RUNTIMES[row.runtime],
            "{:,.1f} ({:,.1f} … {:,.1f})".format(*(1e3 * t for t in quartiles(row.times))),
            "{:.2f} ({:.2f} … {:.2f})".format(*row.versus),
            f"{row.peak / MB:,.0f}",
        ]
        for row in rows
    ]
    versus = f"× {MODELS[REFERENCE]} in PyTorch (quartiles)"
    header = ["", "runtime", "time (ms, quartiles)", versus, "peak (MB)"]
    what = f"{'Faster R-CNNs on ' if whole else ''}{replace(case, detection=True)}"
    if whole and case.batch > 1:
        what += "; ONNX Runtime and OpenVINO take one image after the other"
    return "\n\n".join([f"`{command}`", what, where, table(header, cells)])


@dataclass(frozen=True)
class _Work:
    """The models to run: backbones or whole detectors, and the folder for their exports."""

    case: Case
    whole: bool
    folder: str

    def build(self, name: str) -> nn.Module:
        """A model of ``MODELS`` in eval mode."""
        if not self.whole:
            return build(name, self.case).eval()
        cfg = detector_config()
        merge_file(cfg, get_config_file(_COMPARED[name.removesuffix("-plain")]))
        cfg.MODEL.DEVICE = "cpu"
        if name in RANDWIRE_OPTIONS:
            set_spec(cfg, self.case.generator(self.case.seed))
            cfg.MODEL.RANDWIRE.FUSED = RANDWIRE_OPTIONS[name]["fused"]
        return build_model(cfg).eval()

    def images(self) -> Tensor:
        images, _ = self.case.make_inputs()
        return images * 58 + 116 if self.whole else images  # a detector's values are 0 … 255

    def file(self, model: str) -> str:
        return str(Path(self.folder) / f"{model}.onnx")

    def export(self, model: str) -> None:
        network, images = self.build(model), self.images()
        graph = DetectorGraph(network, most=0) if self.whole else BackboneGraph(network)
        fold_batch_norms(graph)
        with open(self.file(model), "wb") as file:
            example = images[0] if self.whole else images
            FORMATS["onnx"].write(graph, example, {"version": ""}, file)

    def step(self, model: str, runtime: str) -> Step:
        images = self.images()
        if runtime in EXPORTED:
            run = EXPORTED[runtime](self.file(model))
            return lambda: [run(one) for one in images] if self.whole else run(images)
        plain = runtime in _PLAIN and model == "randwire"
        network: Any = self.build("randwire-plain" if plain else model)
        if runtime.startswith("compile"):
            if self.whole:
                network.backbone = torch.compile(network.backbone)
            else:
                network = torch.compile(network)
        inputs = [{"image": one} for one in images] if self.whole else images

        def step() -> object:
            with torch.no_grad():
                return network(inputs)

        return step


# -------------------------------------------------------------------------------------------------
# Memory
# -------------------------------------------------------------------------------------------------


def _in_a_process(work: _Work, model: str, runtime: str) -> int:
    """Measure a step's peak in a new process, as allocators keep the memory of earlier steps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        try:
            return alone.submit(_peak, work, model, runtime, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise ValueError(
                f"{MODELS[model]} in {RUNTIMES[runtime]} ended its process: too little memory?"
            ) from None


def _peak(work: _Work, model: str, runtime: str, threads: int) -> int:
    torch.set_num_threads(threads)
    before = _status("VmRSS")
    step = work.step(model, runtime)
    step()  # compiles, and fills the allocators
    with open(f"/proc/{os.getpid()}/clear_refs", "w") as f:
        f.write("5")  # reset the peak
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A value of this process's memory in /proc/self/status, in bytes."""
    with open("/proc/self/status") as f:
        (line,) = (line for line in f if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
