"""Measure everything about a GPU in one go: what the fused operators are worth on it.

    make gpu
    python tools/measure_gpu.py [--output output/gpu] [--device cuda]

First the operators and a stage are examined, as by tools/check_gpu.py. Then the classifiers are
compared at batches of 32, 128 and 256, in float32 and in mixed precision, with and without
channels_last, and the detectors' backbones at two images, of one size and of several; RandWire
fused, without CUDA graphs, with RECOMPUTE, plain, and plain with torch.compile, beside ResNet-50
and ResNeXt-50. Last, the demo's classifier is trained fused and node by node. OUTPUT/gpu.md has all
tables, OUTPUT/gpu.json all numbers; both are written again after each part, so that nothing is lost
if a later one fails.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..benchmark import Case, Settings, run, to_json, to_markdown
from ..benchmark.health import examine, summary
from ..command import in_users_words, process, program
from ..config_files import get_config_file
from ..files import check_folder, write_or_print
from ..runs import RunFolder
from ..text import one_line
from ..wiring import NetworkGenerator
from .frame import framed, parser_of, say

SCRIPT = "measure_gpu.py"
TOP1 = "classification/top1"
RESNETS = ("resnet50", "resnext50")
FUSED = ("randwire", "randwire-launched", "randwire-recompute", "randwire-plain", *RESNETS)


@dataclass
class Report:
    """What was measured so far.

    Attributes:
        folder: where gpu.md and gpu.json are written.
        texts: the paragraphs of gpu.md.
        numbers: the content of gpu.json.
    """

    folder: Path
    texts: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, title: str, measure: Callable[[], tuple[str, Any]]) -> None:
        """Measure something, and write it down; if it fails, why."""
        say(title)
        start = time.perf_counter()
        try:
            text, numbers = measure()
        # Whatever a kernel or a compiler does: the other parts are worth having.
        except Exception as e:
            text = f"FAILED: {type(e).__name__}: {one_line(e, 500)}"
            numbers = {"error": text}
        seconds = time.perf_counter() - start
        self.texts.append(f"## {title}\n\n{text}\n\n({seconds:.0f} s)")
        self.numbers[title] = numbers
        write_or_print("\n\n".join(self.texts), self.folder / "gpu.md")
        write_or_print(json.dumps(self.numbers, indent=1), self.folder / "gpu.json")

    @property
    def failed(self) -> list[str]:
        return [
            title
            for title, numbers in self.numbers.items()
            if isinstance(numbers, dict) and ("error" in numbers or numbers.get("works") is False)
        ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("output/gpu"), help="a folder (default: output/gpu)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="the device")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="do everything once, with a tiny network: a rehearsal, whose numbers say nothing",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use")
    return args


def check(device: str, quick: bool) -> tuple[str, Any]:
    channels, batch = (6, 2) if quick else (109, 64)
    report = examine(device, channels, batch, progress=say)
    return "```\n" + "\n".join(summary(report)) + "\n```", report


def compare(case: Case, settings: Settings) -> tuple[str, Any]:
    result = run(case, settings, progress=say)
    command = in_users_words("python tools/measure_gpu.py")
    return to_markdown(result, command), json.loads(to_json(result, command))


def comparisons(device: str, quick: bool) -> dict[str, tuple[Case, Settings]]:
    """What is compared, by its title."""
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
        "Classifiers, batch 32, float32": classifiers(32),
        "Classifiers, batch 32, mixed": classifiers(32, **lower),
        "Classifiers, batch 32, mixed, channels_last": classifiers(32, **lower, **last),
        "Classifiers, batch 128, float32, channels_last": classifiers(128, **last),
        "Classifiers, batch 128, mixed, channels_last": classifiers(128, **lower, **last),
        "Classifiers, batch 256, mixed, channels_last": classifiers(256, 5, **lower, **last),
        "Detectors, 2 images, float32": detectors(),
        "Detectors, 2 images, mixed, channels_last": detectors(**lower, **last),
        "Detectors, 2 images of 8 sizes, mixed, channels_last": detectors(
            16, sizes=2 if quick else 8, **lower, **last
        ),
        "Compiled, batch 128, mixed, channels_last": classifiers(
            128, **lower, **last, models=("randwire", "randwire-compiled", "resnet50")
        ),
    }


def train(device: str, quick: bool, folder: Path, fused: str) -> tuple[str, Any]:
    """Train the demo's classifier; its accuracy, and the seconds of an iteration."""
    output = folder / f"train_{fused}"
    options = ["SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 4] if quick else []
    command = [
        *process("pretrain_imagenet.py"),
        *("--config-file", get_config_file("shapes/randwire_pretrain.yaml")),
        *("MODEL.DEVICE", device, "MODEL.RANDWIRE.FUSED", fused, "OUTPUT_DIR", output, *options),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training failed: {done.stderr[-400:]}")
    metrics = RunFolder(output).metrics().values()
    *_, top1 = (values[TOP1] for values in metrics if TOP1 in values)
    seconds = statistics.median(values["time"] for values in metrics if "time" in values)
    return f"top-1 {top1:.1f}%, {seconds:.4f} s an iteration", {"top1": top1, "seconds": seconds}


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--output", args.output)
    # Convolutions of float32 in float32: else the comparisons are of TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(args.output)
    report.add("The check", lambda: check(args.device, args.quick))
    for title, (case, settings) in comparisons(args.device, args.quick).items():
        report.add(title, lambda case=case, settings=settings: compare(case, settings))  # type: ignore[misc]
    for fused in ("on", "off"):
        report.add(
            f"A training, FUSED {fused}",
            lambda fused=fused: train(args.device, args.quick, args.output, fused),  # type: ignore[misc]
        )
    say(f"The tables are in {args.output / 'gpu.md'}, the numbers in {args.output / 'gpu.json'}")
    if report.failed:
        sys.exit(f"{program(SCRIPT)}: error: these failed: {'; '.join(report.failed)}")
