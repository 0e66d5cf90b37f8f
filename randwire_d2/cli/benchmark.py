"""Compare what RandWire, ResNet-50 and ResNeXt-50 cost: bytes, launches, memory, and times.

    python tools/benchmark.py --batch 64 --no-time
    python tools/benchmark.py --batch 8 --rounds 11 --json output/benchmark.json
    python tools/benchmark.py --detection --no-time
    python tools/benchmark.py --batch 4 --growth output/growth.png
    python tools/benchmark.py --batch 1 8 --runtimes plain compile onnx openvino
    python tools/benchmark.py --batch 1 --size 480 640 --detector --runtimes onnx openvino

Bytes, launches, saved and peak memory are counted on fake tensors. That takes seconds for any size,
and the counts are the same on every machine. Times, and the ceilings to which they are compared,
are measured on this machine's GPU, or on its CPU if it has none. The tables are Markdown.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..benchmark import (
    AXES,
    GROWTH_MODELS,
    MODELS,
    RUNTIMES,
    STEPS,
    Case,
    Settings,
    compare_runtimes,
    grow,
    plot_growth,
    run,
    runtimes_to_markdown,
    to_json,
    to_markdown,
)
from ..benchmark.comparison import DEVICES, MEMORY_FORMATS, PRECISIONS
from ..drawing.style import FORMATS, check_format, save_figure
from ..files import check_file, write_or_print
from ..malloc import keep_freed_memory
from ..wiring import NetworkGenerator
from .frame import at_least, command_line, framed, parser_of, say

SCRIPT = "benchmark.py"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__, "%(prog)s [options]")
    add_case(parser)
    how = parser.add_argument_group("the measurement")
    how.add_argument("--no-time", action="store_true", help="only count; measure no times")
    how.add_argument(
        "--rounds", type=int, default=5, help="how often each step is timed (default: 5)"
    )
    how.add_argument(
        "--device", choices=DEVICES, help="the device (default: a GPU if there is one)"
    )
    how.add_argument(
        "--threads", type=at_least(1), help="threads on a CPU (default: PyTorch's choice)"
    )
    how.add_argument(
        "--amp", choices=PRECISIONS, help="use automatic mixed precision with this lower type"
    )
    how.add_argument(
        "--memory-format",
        choices=MEMORY_FORMATS,
        default="default",
        help="the memory format of images and weights (default: the one that each model is built "
        "with)",
    )
    add_runtimes(parser)
    out = parser.add_argument_group("output besides the tables")
    out.add_argument(
        "--json", metavar="FILE", help="write all results to this file, in bytes and seconds"
    )
    out.add_argument(
        "--growth",
        metavar="FILE",
        help="draw how a training step grows with the values below; the file ends in "
        f"{', '.join(FORMATS)}",
    )
    for name, (values, title) in AXES.items():
        out.add_argument(
            f"--growth-{name}",
            type=int,
            nargs="*",
            default=values,
            metavar="VALUE",
            help=f'the values on the axis "{title}" (default: {" ".join(map(str, values))})',
        )
    args = parser.parse_args(argv)
    args.batch = args.batch or [1 if args.detection else 8]
    args.size = args.size or ([800, 1344] if args.detection else [224])
    try:
        check(args)
    except ValueError as e:
        parser.error(str(e))
    return args


def add_runtimes(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison of runtimes."""
    how = parser.add_argument_group("runtimes, on the CPU")
    how.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        help="compare only inference with the backbones of RandWire and ResNet-50, and its peak "
        "memory, in PyTorch and in these runtimes, on the CPU",
    )
    how.add_argument(
        "--detector",
        action="store_true",
        help="with --runtimes: compare whole Faster R-CNNs instead of backbones",
    )


def add_case(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is compared."""
    work = parser.add_argument_group("the work")
    work.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="IMAGES",
        help="the number of images (default: 8; with --detection: 1); --runtimes takes several "
        "numbers, and makes a table for each",
    )
    work.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="the size of an image: one number, or its height and width (default: 224; with "
        "--detection: 800 1344)",
    )
    work.add_argument(
        "--sizes",
        type=int,
        default=1,
        help="the number of image sizes, which take turns; each is 32 pixels narrower than the one "
        "before (default: 1)",
    )
    work.add_argument(
        "--detection",
        action="store_true",
        help="compare detection backbones with FrozenBN and FREEZE_AT 2 instead of classifiers",
    )
    work.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, help="the steps (default: both)"
    )
    work.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        help=f"the models (default: {' '.join(Settings.models)}; for --growth: "
        f"{' '.join(GROWTH_MODELS)})",
    )
    drawn = parser.add_argument_group("the RandWire, WS(4, 0.75)")
    drawn.add_argument(
        "--regime",
        choices=("small", "regular"),
        default="regular",
        help="the regime (default: regular)",
    )
    drawn.add_argument("--channels", type=int, default=109, help="the width C (default: 109)")
    drawn.add_argument(
        "--nodes", type=int, default=32, help="N, the nodes of each random graph (default: 32)"
    )
    drawn.add_argument("--seed", type=int, default=1, help="the seed of the graphs (default: 1)")


def check(args: argparse.Namespace) -> None:
    """Refuse wrong options now rather than after minutes of measuring.

    Raises:
        ValueError: an option can't be used.
    """
    if len(args.size) > 2:
        raise ValueError(f"--size takes one or two numbers; got {len(args.size)}")
    if not args.no_time and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, or use --no-time; got {args.rounds}")
    unused = {
        "--no-time": args.no_time,
        "--json": args.json is not None,
        "--growth": args.growth,
        "--models": args.models,
        "--steps": "training" in args.steps and args.steps is not STEPS,
        "--device cuda": args.device == "cuda",
        "--amp": args.amp,
        "--memory-format": args.memory_format != "default",
    }
    for option in (name for name, given in unused.items() if given and args.runtimes):
        raise ValueError(
            f"--runtimes does not go with {option}: it compares the inference of RandWire and "
            "ResNet-50 on the CPU, in float32"
        )
    if args.sizes > 1 and (args.runtimes or args.growth):
        raise ValueError("--sizes goes with neither --runtimes nor --growth")
    if not args.runtimes and (args.detector or len(args.batch) > 1):
        raise ValueError("--detector, and more than one --batch, go with --runtimes")
    if args.growth:
        check_format(args.growth, "--growth")
    check_file("--json", args.json)


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = command_line(SCRIPT, argv)
    keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    case = Case(
        batch=args.batch[0],
        height=args.size[0],
        width=args.size[-1],
        sizes=args.sizes,
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
    if args.runtimes:
        for batch in args.batch:
            _compare_runtimes(replace(case, batch=batch), args, command)
        return
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
        write_or_print(to_json(result, command, points), args.json)


def _compare_runtimes(case: Case, args: argparse.Namespace, command: str) -> None:
    whole = args.detector
    rows = compare_runtimes(case, args.runtimes, args.rounds, whole=whole, progress=say)
    text = runtimes_to_markdown(rows, case, args.rounds, command, whole=whole)
    print(f"{text}\n", flush=True)
