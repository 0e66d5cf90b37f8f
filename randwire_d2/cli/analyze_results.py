"""Show what a trained detector gets right and wrong, on a page that opens from disk.

    python tools/analyze_results.py output/my_run
    python tools/analyze_results.py --results predicted.json --dataset coco_2017_val --output errors

RUN is the OUTPUT_DIR of tools/train_net.py. The tool analyses its last evaluation or, if the
training had none, the newest evaluation with --eval-only. RUN may also be the folder of one
evaluation. The page, its pictures and all numbers go to RUN/analysis. They show the kinds of
errors, the confusion matrix, precision and recall, AP of each class and size, scores, and the
images with the most errors. AP is COCOEvaluator's.
"""

from collections.abc import Sequence
from pathlib import Path

from ..error_analysis import Source, source_of_run, summary, write_analysis
from .frame import framed, parser_of

SCRIPT = "analyze_results.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="detections in COCO's results format, to be analysed instead of a run's",
    )
    parser.add_argument("--dataset", metavar="NAME", help="the registered data set of --results")
    parser.add_argument(
        "--task",
        choices=("bbox", "segm"),
        default="bbox",
        help="compare boxes or masks (default: bbox)",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="the least score of a counted detection; AP counts all (default: 0.5)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="the folder of the page (default: RUN/analysis); only an earlier analysis of the same "
        "detections is replaced",
    )
    args = parser.parse_args(argv)
    if (args.run is None) == (args.results is None):
        parser.error("name a RUN, or --results and --dataset")
    if args.results and not (args.dataset and args.output):
        parser.error("--results needs --dataset and --output")
    source = (
        Source(args.dataset, args.results, Path(args.output))
        if args.results
        else source_of_run(args.run)
    )
    analysis, page = write_analysis(source, args.output, args.task, args.score_threshold)
    print(f"{summary(analysis)}\n\nThe page: {page}")
