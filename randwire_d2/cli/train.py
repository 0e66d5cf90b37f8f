"""Train or evaluate a detector, with Detectron2's command line.

    python tools/train_net.py --config-file configs/faster_rcnn_randwire_c109_fpn_1x.yaml \\
        --num-gpus 8
"""

from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from ..engine import load_config, run_distributed, train_or_evaluate
from .frame import framed, task_of, training, training_parser

SCRIPT = "train_net.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = training_parser(SCRIPT, __doc__).parse_args(argv)
    setup_logger(name="randwire_d2")
    cfg = load_config(args)
    with training(SCRIPT, argv, args, cfg.OUTPUT_DIR):
        run_distributed(train_or_evaluate, cfg, args, task_of(SCRIPT, argv))
