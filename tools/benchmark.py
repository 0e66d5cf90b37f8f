#!/usr/bin/env python
"""Compare RandWire, ResNet-50 and ResNeXt-50: bytes, kernels, memory, times, and their growth.

    python tools/benchmark.py --batch 64 --no-time
    python tools/benchmark.py --batch 8 --rounds 11 --json output/benchmark.json
    python tools/benchmark.py --detection --no-time
    python tools/benchmark.py --batch 4 --growth output/growth.png

Bytes, kernels, saved and peak memory are counted on fake tensors, in seconds for any size, and are
the same on any machine. Times, and the ceilings that they are set against, are the present
device's: a GPU's, where there is one. The tables are Markdown.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from randwire_d2.benchmark import (
    AXES,
    GROWTH_MODELS,
    MODELS,
    STEPS,
    Case,
    Settings,
    grow,
    plot_growth,
    run,
    to_json,
    to_markdown,
)
from randwire_d2.benchmark.comparison import DEVICES, MEMORY_FORMATS, PRECISIONS
from randwire_d2.drawing.style import FORMATS, save_figure
from randwire_d2.files import atomic_open
from randwire_d2.wiring import NetworkGenerator


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    work = parser.add_argument_group("the work")
    work.add_argument("--batch", type=int, help="images (default: 8; of --detection: 1)")
    work.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="of images, one number or height and width (default: 224; of --detection: 800 1344)",
    )
    work.add_argument(
        "--detection",
        action="store_true",
        help="backbones with FrozenBN and FREEZE_AT 2, instead of classifiers",
    )
    work.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="(default: both)")
    work.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        help=f"(default: {' '.join(Settings.models)}; of --growth: {' '.join(GROWTH_MODELS)})",
    )
    drawn = parser.add_argument_group("the RandWire, WS(4, 0.75)")
    drawn.add_argument("--regime", choices=("small", "regular"), default="regular")
    drawn.add_argument("--channels", type=int, default=109, help="C (default: 109)")
    drawn.add_argument("--nodes", type=int, default=32, help="N (default: 32)")
    drawn.add_argument("--seed", type=int, default=1, help="(default: 1)")
    how = parser.add_argument_group("how")
    how.add_argument("--no-time", action="store_true", help="only count")
    how.add_argument("--rounds", type=int, default=5, help="of the timing (default: 5)")
    how.add_argument("--device", choices=DEVICES, help="(default: a GPU, if there is one)")
    how.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
    how.add_argument("--amp", choices=PRECISIONS, help="automatic mixed precision")
    how.add_argument("--memory-format", choices=MEMORY_FORMATS, default="default")
    out = parser.add_argument_group("output, beside the tables")
    out.add_argument("--json", metavar="FILE", help="everything, in bytes and seconds")
    out.add_argument(
        "--growth",
        metavar="FILE",
        help=f"a figure of a training step's growth: {', '.join(FORMATS)}",
    )
    for name, (values, title) in AXES.items():
        out.add_argument(
            f"--growth-{name}",
            type=int,
            nargs="*",
            default=values,
            metavar="VALUE",
            help=f"{title} (default: {' '.join(map(str, values))})",
        )
    args = parser.parse_args(argv)
    if args.batch is None:
        args.batch = 1 if args.detection else 8
    args.size = args.size or ([800, 1344] if args.detection else [224])
    if len(args.size) > 2:
        parser.error(f"--size takes one or two numbers; got {len(args.size)}")
    if not args.no_time and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, or use --no-time; got {args.rounds}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1; got {args.threads}")
    # Better now than after minutes of measuring.
    if args.growth and Path(args.growth).suffix.lower() not in FORMATS:
        parser.error(f"--growth must end in one of {', '.join(FORMATS)}; got {args.growth}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = shlex.join(
        ["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        case = Case(
            batch=args.batch,
            height=args.size[0],
            width=args.size[-1],
            detection=args.detection,
            generator=NetworkGenerator(args.regime, args.channels, args.nodes),
            seed=args.seed,
        )
        settings = Settings(
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            rounds=0 if args.no_time else args.rounds,
            amp=args.amp,
            memory_format=args.memory_format,
            models=tuple(args.models or Settings.models),
            steps=tuple(args.steps),
        )
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        result = run(case, settings, progress=say)
        print(to_markdown(result, command), flush=True)
        points = []
        if args.growth:
            axes = {name: getattr(args, f"growth_{name}") for name in AXES}
            grown = replace(settings, models=tuple(args.models or GROWTH_MODELS))
            points = grow(case, grown, axes, progress=say)
            caption = f"{case}; {settings}; {result.machine['device']}"
            save_figure(plot_growth(points, caption), args.growth)
        if args.json:
            with atomic_open(args.json) as f:
                f.write(to_json(result, command, points))
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as e:
        sys.exit(f"benchmark.py: error: {' '.join(str(e).split())}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
