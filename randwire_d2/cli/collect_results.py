"""Make Tables 2 to 5 from the folders of runs, beside the paper's numbers.

    python tools/collect_results.py output
    python tools/collect_results.py output/faster_rcnn_*_fpn_1x --format json

A FOLDER is the OUTPUT_DIR of tools/train_net.py or tools/pretrain_imagenet.py, or any folder above
such folders. Detectors make one table (box AP, Table 5), classifiers another (top-1 and top-5,
Tables 2 to 4). A row is a training, or an evaluation of one (--eval-only), such as Table 4's at
320×320. Runs that differ only in their seeds share a row, with mean ± sample standard deviation. If
a network has several rows, the keys that differ stand beside the data.

The paper's row stands below a run that was trained and tested like the paper's: every key of its
config that affects a result has the value of the paper's config in configs/, scaled to the run's
batch as the trainers scale it. For other runs of the paper's networks, the tool lists the keys that
differ, with both values.

It also lists unfinished runs, and the folders whose config.yaml it can't read. It fails only if it
can read no run.
"""

from collections.abc import Sequence

from ..experiments.results import read_runs, to_json, to_markdown
from ..files import check_file, write_or_print
from .frame import framed, parser_of

SCRIPT = "collect_results.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of runs")
    parser.add_argument(
        "--format",
        choices=("markdown", "json"),
        default="markdown",
        help="the form of the tables; JSON has each single run (default: markdown)",
    )
    parser.add_argument("--output", metavar="FILE", help="write to this file instead of printing")
    args = parser.parse_args(argv)
    check_file("--output", args.output)
    results, unreadable = read_runs(args.folders)
    form = to_json if args.format == "json" else to_markdown
    write_or_print(form(results, unreadable), args.output)
