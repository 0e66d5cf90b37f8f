"""Make Figure 5: the accuracy that trained networks lose without one node or one edge.

    python tools/damage_graph.py output/er output/ba output/ws --output output/damage.png
    python tools/damage_graph.py output/ws --images 1000 --nodes-only TEST.IMS_PER_PROCESS 50

Each RUN is the OUTPUT_DIR of tools/pretrain_imagenet.py. The tool removes every node and every edge
of the random graphs alone, without training again. It plots the loss of top-1 accuracy on the run's
test set over the node's output degree, or over the input degree of the edge's target. The edges of
the extra input and output nodes do not count.

A node that loses an input has one term less in its weighted sum. If it loses its only input, it
computes with zeros, and sends out the constant that its norm makes of their convolution. A removed
output node leaves the mean that is the stage's output. If it was the only one, the output is zero.

Runs of one generator share a column, such as its five seeds; if they differ in regime, N, node
operation or test set, each kind has its own.

The work before a damage is shared. After every batch, the results are kept in RUN/damage_*.json.
The same command continues from there; when all is done, it draws the figure at once.
"""

import argparse
import sys
from collections.abc import Sequence

from ..command import program
from ..drawing.style import FORMATS, check_format, save_figure
from ..engine import share_cores, split_pairs
from ..experiments.damage import KINDS
from ..experiments.damage_report import plot_damage, to_json, to_markdown
from ..experiments.damage_runs import evaluate, load_run, tell_apart
from ..files import check_file, write_or_print
from ..malloc import keep_freed_memory
from .frame import command_line, framed, parser_of

SCRIPT = "damage_graph.py"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__, "%(prog)s RUN ... [options] [KEY VALUE ...]")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the folder of a trained network; KEY VALUE pairs after the last one change the "
        "configs of all, such as MODEL.DEVICE cpu, or TEST.IMS_PER_PROCESS, the images of a batch "
        "(after each batch the state is saved)",
    )
    parser.add_argument(
        "--output",
        default="output/damage.png",
        metavar="FILE",
        help=f"the figure; the file ends in {', '.join(FORMATS)} (default: output/damage.png)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result of every single damage to this JSON file"
    )
    only = parser.add_mutually_exclusive_group()
    for kind in KINDS:
        only.add_argument(
            f"--{kind}s-only",
            dest="kinds",
            action="store_const",
            const=(kind,),
            default=KINDS,
            help=f"remove only {kind}s (default: nodes and edges)",
        )
    parser.add_argument(
        "--images",
        type=int,
        help="the number of images, spread evenly over the test set (default: all)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the checkpoint of a single RUN (default: model_final.pth)",
    )
    args = parser.parse_intermixed_args(argv)
    args.runs, args.opts = split_pairs(args.runs)
    if not args.runs:
        parser.error("no RUN is given")
    return args


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    share_cores()
    keep_freed_memory()
    command = command_line(SCRIPT, argv)
    check_format(args.output, "--output")
    if args.weights and len(args.runs) > 1:
        raise ValueError(f"--weights belongs to one RUN; got {len(args.runs)}")
    check_file("--json", args.json)
    try:
        loaded = [
            load_run(run, args.opts, args.weights, args.kinds, args.images) for run in args.runs
        ]
        outcomes = [evaluate(run) for run in tell_apart(loaded)]
        print(to_markdown(outcomes))
        if args.json:
            write_or_print(to_json(outcomes, command), args.json)
        print(f"\n{save_figure(plot_damage(outcomes), args.output)}")
    except KeyboardInterrupt:
        sys.exit(
            f"{program(SCRIPT)}: interrupted; what is done is saved, the same command goes on from "
            f"there: {command}"
        )
