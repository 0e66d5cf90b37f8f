#!/usr/bin/env python
"""Train or evaluate a classifier, with Detectron2's command line.

    python tools/pretrain_imagenet.py --config-file configs/imagenet/randwire_c109_100ep.yaml \
        --num-gpus 8
"""

import sys
from functools import partial

from detectron2.utils.logger import setup_logger

from randwire_d2.classification import ClassificationTrainer, load_config, measure_input
from randwire_d2.engine import argument_parser, run_distributed, train_or_evaluate

if __name__ == "__main__":
    parser = argument_parser()
    parser.add_argument(
        "--measure-input",
        action="store_true",
        help="only measure the images per second that the input feeds and training consumes",
    )
    args = parser.parse_args()
    setup_logger(name="randwire_d2")
    try:
        cfg = load_config(args)
    except ValueError as e:
        sys.exit(f"pretrain_imagenet.py: error: {e}")
    train = partial(train_or_evaluate, trainer_class=ClassificationTrainer)
    run_distributed(measure_input if args.measure_input else train, cfg, args)
