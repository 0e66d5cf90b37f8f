#!/usr/bin/env python
"""Print parameters and multiply-adds of classifiers, a row of MODEL_ZOO.md per config.

python tools/count_model.py configs/imagenet/randwire_c109_100ep.yaml [...] [--size 224]
"""

import argparse
import sys

from detectron2.config import get_cfg
from tabulate import tabulate

from randwire_d2 import add_randwire_config
from randwire_d2.classification import add_classification_config, count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="of pretrain_imagenet.py")
    parser.add_argument("--size", type=int, help="of the images (default: INPUT.TEST_CROP_SIZE)")
    args = parser.parse_args()
    rows = []
    try:
        for path in args.configs:
            cfg = get_cfg()
            add_randwire_config(cfg)
            add_classification_config(cfg)
            cfg.merge_from_file(path)
            size = args.size or cfg.INPUT.TEST_CROP_SIZE
            params, flops = count(cfg, size)
            rows.append([path, size, f"{params / 1e6:.2f} M", f"{flops / 1e6:,.1f} M"])
    except (OSError, KeyError, ValueError) as e:
        sys.exit(f"count_model.py: error: {e}")
    print(tabulate(rows, ["config", "size", "parameters", "multiply-adds"], tablefmt="pipe"))


if __name__ == "__main__":
    main()
