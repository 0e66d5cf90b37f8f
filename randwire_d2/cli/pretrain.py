"""Train or evaluate a classifier, with Detectron2's command line.

    python tools/pretrain_imagenet.py --config-file configs/imagenet/randwire_c109_100ep.yaml \\
        --num-gpus 8
"""

from collections.abc import Sequence
from functools import partial

from detectron2.utils.logger import setup_logger

from ..classification import ClassificationTrainer, load_config, measure_input
from ..engine import run_distributed, train_or_evaluate
from .frame import framed, task_of, training, training_parser

SCRIPT = "pretrain_imagenet.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = training_parser(SCRIPT, __doc__, unshown=("data", "data_val"))
    parser.add_argument(
        "--measure-input",
        action="store_true",
        help="only measure how many images per second can be read, and how many training consumes",
    )
    args = parser.parse_args(argv)
    setup_logger(name="randwire_d2")
    cfg = load_config(args)
    train = partial(train_or_evaluate, trainer_class=ClassificationTrainer)
    work = measure_input if args.measure_input else train
    with training(SCRIPT, argv, args, cfg.OUTPUT_DIR):
        run_distributed(work, cfg, args, task_of(SCRIPT, argv))
