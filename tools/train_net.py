#!/usr/bin/env python
"""Train or evaluate a detector, with Detectron2's command line.

    python tools/train_net.py --config-file configs/faster_rcnn_randwire_c109_fpn_1x.yaml \
        --num-gpus 8
"""

import sys

from detectron2.utils.logger import setup_logger

from randwire_d2.engine import argument_parser, load_config, run_distributed, train_or_evaluate

if __name__ == "__main__":
    args = argument_parser().parse_args()
    setup_logger(name="randwire_d2")
    try:
        cfg = load_config(args)
    except ValueError as e:
        sys.exit(f"train_net.py: error: {e}")
    run_distributed(train_or_evaluate, cfg, args)
