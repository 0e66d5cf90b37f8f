#!/usr/bin/env python
"""Table 5, from the folders of finished runs: AP, AP50, AP75, APs, APm, APl, and the paper's.

    python tools/collect_results.py output
    python tools/collect_results.py output/faster_rcnn_*_fpn_1x --format json

A FOLDER is the OUTPUT_DIR of tools/train_net.py, or any folder above some. Runs that differ in
their seeds only are one row, mean ± sample standard deviation; where one network has several rows,
the keys in which they differ stand beside the data. The paper's figures stand below a network of
its that was trained as the paper's; else it is said what was different. Runs of
tools/pretrain_imagenet.py make a second table: top-1 and top-5, of Tables 2 and 3. What is not
finished is listed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from randwire_d2.experiments.results import find_runs, read_result, to_json, to_markdown
from randwire_d2.files import atomic_open


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    parser.add_argument("--output", metavar="FILE", help="in place of the standard output")
    args = parser.parse_args(argv)
    try:
        results = [read_result(folder) for folder in find_runs(args.folders)]
        text = (to_json if args.format == "json" else to_markdown)(results)
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            with atomic_open(args.output) as f:
                f.write(f"{text}\n")
        else:
            print(text)
    except (OSError, ValueError) as e:
        sys.exit(f"collect_results.py: error: {e}")


if __name__ == "__main__":
    main()
