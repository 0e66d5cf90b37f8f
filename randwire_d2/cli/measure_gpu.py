"""Measure what the fused operators gain on a GPU, at once or in portions.

    make gpu [MINUTES=8]
    python tools/measure_gpu.py [--output output/gpu] [--device cuda] [--minutes 8]

The parts, in this order:

- It compares RandWire (fused, without CUDA graphs, with RECOMPUTE, plain, and plain with
  torch.compile) with ResNet-50 and ResNeXt-50, the most telling cases first: classifiers at batches
  of 32, 128 and 256, in float32 and in mixed precision, with and without channels_last; and
  detectors' backbones with two images, of one size and of several.
- It examines the operators and a stage, as tools/check_gpu.py does.
- It trains a classifier fused and node by node: on CIFAR-10 for two epochs if DETECTRON2_DATASETS
  has it, else on the demo's images.
- It runs `pytest -k cuda` file by file, if there are the checkout's tests and pytest.

OUTPUT/gpu.md has one table of all times, then all tables; OUTPUT/gpu.json has all numbers. Both are
written again after each part. After an interruption, give the same command again. It skips the
parts that gpu.json has, and measures those that never began, then those that failed or were
interrupted. It refuses an OUTPUT of another machine, PyTorch, Triton or code; --overwrite begins
anew.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..benchmark import Case, Settings, run, to_json, to_markdown
from ..benchmark.comparison import describe_machine
from ..benchmark.health import examine, summary
from ..benchmark.markdown import overview
from ..command import in_users_words, process, program
from ..config_files import get_config_file
from ..files import check_folder, write_or_print
from ..runs import RunFolder
from ..text import one_line, parse_json
from ..wiring import NetworkGenerator
from .frame import at_least, framed, parser_of, say

SCRIPT = "measure_gpu.py"
ROOT = Path(__file__).parents[2]  # the checkout, if this is one
TOP1 = "classification/top1"
RESNETS = ("resnet50", "resnext50")
FUSED = ("randwire", "randwire-launched", "randwire-recompute", "randwire-plain", *RESNETS)
Measure = Callable[[], tuple[str, dict[str, Any]]]  # a part's text in gpu.md, and its numbers


@dataclass
class Report:
    """The measurements so far.

    Attributes:
        folder: the folder of gpu.md and gpu.json.
        made_with: the machine, versions and settings that all parts share.
        parts: text, seconds and numbers of each part, by its title, in the order of gpu.md, in
            which the parts were first begun.
    """

    folder: Path
    made_with: dict[str, Any]
    parts: dict[str, dict[str, Any]]

    def add(self, title: str, measure: Measure) -> float:
        """Measure a part, write its result or its error to the files, and return its seconds."""
        say(title)
        begun = "FAILED: it was begun, and did not end"  # stays if this process is killed
        self.parts[title] = {"text": begun, "seconds": 0.0, "numbers": {"error": begun}}
        self.write()
        start = time.perf_counter()
        try:
            text, numbers = measure()
        # A kernel or a compiler can fail in any way; the other parts are still measured.
        except Exception as e:
            text = f"FAILED: {type(e).__name__}: {one_line(e, 500)}"
            numbers = {"error": text}
        seconds = time.perf_counter() - start
        self.parts[title] = {"text": text, "seconds": seconds, "numbers": numbers}
        self.write()
        return seconds

    def write(self) -> None:
        content = {"made with": self.made_with, "parts": self.parts}
        write_or_print(json.dumps(content, indent=1), self.folder / "gpu.json")
        texts = [overview({title: part["numbers"] for title, part in self.parts.items()})]
        texts += [
            f"## {title}\n\n{part['text']}\n\n({part['seconds']:.0f} s)"
            for title, part in self.parts.items()
        ]
        write_or_print("\n\n".join(filter(None, texts)), self.folder / "gpu.md")

    @property
    def failed(self) -> list[str]:
        return [
            title
            for title, part in self.parts.items()
            if "error" in part["numbers"] or part["numbers"].get("works") is False
        ]


def read_parts(folder: Path, made_with: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts in a folder's gpu.json; empty without the file.

    Raises:
        ValueError: the file is damaged, not from this tool, or not ``made_with`` this; one line.
    """
    path, way_out = folder / "gpu.json", "name another --output, or begin anew with --overwrite"
    if not path.exists():
        return {}
    try:
        content = parse_json(path.read_bytes())
        parts, noted = dict(content["parts"]), dict(content["made with"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged, or of another tool: {way_out}") from e
    for name, own in made_with.items():
        if noted.get(name) != own:
            raise ValueError(
                f"{path} was made with another {name} ({noted.get(name)}; now {own}): {way_out}"
            )
    return parts


def describe(device: str, quick: bool) -> dict[str, Any]:
    """The machine, versions and settings of a report, with a hash of the package's source files."""
    sources = sorted((ROOT / "randwire_d2").rglob("*.py"))
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "quick": quick,
        **describe_machine(torch.device(device)),
        "triton": importlib.import_module("triton").__version__ if has_triton else None,
        "code": sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16],
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("output/gpu"), help="the folder (default: output/gpu)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="the device (default: cuda)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run everything once with a tiny network, as a rehearsal; the numbers mean nothing",
    )
    parser.add_argument(
        "--minutes",
        type=at_least(1),
        default=math.inf,
        help="measure at least one part; begin another only if it would end within so many "
        "minutes, should it take as long as the longest part so far",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever gpu.json in OUTPUT contains"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use")
    return args


def check(device: str, quick: bool) -> tuple[str, dict[str, Any]]:
    channels, batch = (6, 2) if quick else (109, 64)
    report = examine(device, channels, batch, progress=say)
    return "```\n" + "\n".join(summary(report)) + "\n```", report


def compare(case: Case, settings: Settings) -> tuple[str, dict[str, Any]]:
    result = run(case, settings, progress=say)
    torch.cuda.empty_cache()  # the processes of later parts need the memory
    command = in_users_words("python tools/measure_gpu.py")
    return to_markdown(result, command), json.loads(to_json(result, command))


def comparisons(device: str, quick: bool) -> dict[str, tuple[Case, Settings]]:
    """The comparisons by their titles, the most telling first."""
    generator = NetworkGenerator("regular", 4, 10) if quick else NetworkGenerator()
    size = 64 if quick else 224

    def classifiers(batch: int, rounds: int = 9, **settings: Any) -> tuple[Case, Settings]:
        case = Case(2 if quick else batch, size, size, generator=generator)
        settings.setdefault("models", FUSED)
        return case, Settings(device=device, rounds=1 if quick else rounds, **settings)

    def detectors(rounds: int = 9, sizes: int = 1, **settings: Any) -> tuple[Case, Settings]:
        height, width = (64, 96) if quick else (800, 1344)
        settings |= {"device": device, "rounds": 1 if quick else rounds, "models": FUSED}
        return Case(2, height, width, True, generator, sizes=sizes), Settings(**settings)

    lower: dict[str, Any] = {"amp": "bfloat16"}
    last: dict[str, Any] = {"memory_format": "channels_last"}
    return {
        "Classifiers, batch 128, mixed, channels_last": classifiers(128, **lower, **last),
        "Detectors, 2 images, mixed, channels_last": detectors(**lower, **last),
        "Detectors, 2 images of 8 sizes, mixed, channels_last": detectors(
            16, sizes=2 if quick else 8, **lower, **last
        ),
        "Classifiers, batch 32, mixed, channels_last": classifiers(32, **lower, **last),
        "Classifiers, batch 256, mixed, channels_last": classifiers(256, 5, **lower, **last),
        "Compiled, batch 128, mixed, channels_last": classifiers(
            128, **lower, **last, models=("randwire", "randwire-compiled", "resnet50")
        ),
        "Classifiers, batch 32, mixed": classifiers(32, **lower),
        "Classifiers, batch 32, float32": classifiers(32),
        "Classifiers, batch 128, float32, channels_last": classifiers(128, **last),
        "Detectors, 2 images, float32": detectors(),
    }


def train(device: str, quick: bool, folder: Path, fused: str) -> tuple[str, dict[str, Any]]:
    """Train a small classifier; report its top-1 accuracy (%) and the seconds per iteration."""
    output = folder / f"train_{fused}"
    config, options = "shapes/randwire_pretrain.yaml", list[Any]()
    if (Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "cifar10" / "train").is_dir():
        config, options = "cifar10/randwire_c53_10ep.yaml", ["SOLVER.EPOCHS", 2]
    if quick:
        options = ["SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 4]
    command = [
        *process("pretrain_imagenet.py"),
        *("--config-file", get_config_file(config)),
        *("MODEL.DEVICE", device, "MODEL.RANDWIRE.FUSED", fused, "OUTPUT_DIR", output, *options),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training failed: {done.stderr[-400:]}")
    metrics = RunFolder(output).metrics().values()
    *_, top1 = (values[TOP1] for values in metrics if TOP1 in values)
    seconds = statistics.median(values["time"] for values in metrics if "time" in values)
    text = f"{config}: top-1 {top1:.1f}%, {seconds:.4f} s an iteration"
    return text, {"config": config, "top1": top1, "seconds": seconds}


def pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest for the tests that need a GPU: their names contain "cuda"."""
    command = [sys.executable, "-m", "pytest", "-k", "cuda", *arguments]
    both = subprocess.STDOUT
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=both, text=True, errors="replace"
    )


def find_tests() -> list[str]:
    """The files that have GPU tests, or can't be imported; if none, a printed line says why."""
    if not (ROOT / "setup.py").is_file() or importlib.util.find_spec("pytest") is None:
        say("The tests are left out: they need a checkout and pytest")
        return []
    said = pytest("--collect-only", "-qq", "tests").stdout
    files = re.findall(r"^(?:ERROR )?(tests/\w+\.py)(?=: \d+$| - |$)", said, re.MULTILINE)
    if not files:
        say(f"The tests are left out: {one_line(said[-500:], 500)}")
    return list(dict.fromkeys(files))


def run_tests(file: str) -> tuple[str, dict[str, Any]]:
    # They spend most of their time in a compiler, so several run in parallel.
    several = importlib.util.find_spec("xdist") is not None
    workers = ["-n", str(min(len(os.sched_getaffinity(0)), 8))] if several else []
    done = pytest("-q", *workers, file)
    lines = done.stdout.strip().splitlines() or ["nothing was printed"]
    if done.returncode == 0:
        return lines[-1], {"outcome": lines[-1]}
    shown = [line for line in lines[:-1] if line.startswith(("FAILED ", "ERROR "))] + lines[-1:]
    text = "\n".join(("```", *shown, f"exit status {done.returncode}", "```"))
    return f"FAILED:\n\n{text}", {"error": lines[-1], "log": done.stdout[-20_000:]}


def parts(device: str, quick: bool, folder: Path) -> dict[str, Measure]:
    """All parts by their titles, in the order in which they are first measured."""
    found: dict[str, Measure] = {
        title: partial(compare, *compared) for title, compared in comparisons(device, quick).items()
    }
    # The check comes later: it compiles the operators for three dtypes; a comparison needs one.
    found["The check"] = partial(check, device, quick)
    for fused in ("on", "off"):
        found[f"A training, FUSED {fused}"] = partial(train, device, quick, folder, fused)
    return found | {f"pytest -k cuda {file}": partial(run_tests, file) for file in find_tests()}


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    args = parse_args(argv)
    check_folder("--output", args.output)
    # Compute float32 in float32; otherwise the comparisons would measure TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    made_with = describe(args.device, args.quick)
    found = {} if args.overwrite else read_parts(args.output, made_with)
    report = Report(args.output, made_with, found)
    report.write()  # gpu.md may be older than gpu.json
    measures = parts(args.device, args.quick, args.output)
    kept = [title for title in report.parts if title not in report.failed]
    if kept:
        say(f"Measured before, and kept: {'; '.join(kept)}")
    # Parts that were never begun come first, so that no failing part keeps others from running.
    waiting = sorted((t for t in measures if t not in kept), key=report.parts.__contains__)
    longest = -math.inf  # so that the first part always begins
    while waiting and time.perf_counter() - start + longest <= 60 * args.minutes:
        title = waiting.pop(0)
        longest = max(longest, report.add(title, measures[title]))
    say(f"The tables are in {args.output / 'gpu.md'}, the numbers in {args.output / 'gpu.json'}")
    again = "the same command" + (", without --overwrite," if args.overwrite else "")
    if waiting:
        say(f"These remain, and {again} goes on with them: {'; '.join(waiting)}")
    if failed := "; ".join(report.failed):
        sys.exit(f"{program(SCRIPT)}: error: these failed: {failed}; {again} tries them again")
