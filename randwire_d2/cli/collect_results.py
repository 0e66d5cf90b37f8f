"""Tables 2 to 5 from the folders of runs, beside the paper's numbers.

    python tools/collect_results.py output
    python tools/collect_results.py output/faster_rcnn_*_fpn_1x --format json

A FOLDER is the OUTPUT_DIR of tools/train_net.py or tools/pretrain_imagenet.py, or any folder above
some. Detectors make one table (box AP, Table 5), classifiers another (top-1 and top-5, Tables 2 to
4). A training is a row, and so is an evaluation (--eval-only) of one, such as Table 4's at 320×320.
Those that differ in their seeds only share a row, with mean ± sample standard deviation. Where one
network has several rows, the keys in which they differ stand beside the data.

The paper's row stands below a run that was trained and tested as the paper's: every key of its
config on which a result depends has the value of the paper's config in configs/, which is scaled to
the run's batch as the trainers scale it. Of other runs of the paper's networks, the tool lists the
keys that differ, with both values.

It also lists the runs that are not finished, and the folders whose config.yaml it can't read. It
fails only if there is no run that it can read.
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
        help="the form of the results; JSON has each run by itself (default: markdown)",
    )
    parser.add_argument("--output", metavar="FILE", help="a file to write instead of printing")
    args = parser.parse_args(argv)
    if args.output:
        check_file("--output", args.output)
    results, unreadable = read_runs(args.folders)
    form = to_json if args.format == "json" else to_markdown
    write_or_print(form(results, unreadable), args.output)
