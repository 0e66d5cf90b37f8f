"""Train or evaluate a detector from a LazyConfig, a config in Python.

    python tools/lazyconfig_train_net.py --num-gpus 8 \\
        --config-file configs/lazy/mask_rcnn_randwire_c109_fpn_1x.py train.max_iter=1000
"""

from collections.abc import Sequence

from detectron2.engine import default_argument_parser
from detectron2.utils.logger import setup_logger

from ..engine.launch import add_data_arguments
from ..engine.lazy.config import load_lazy_config
from ..engine.lazy.training import run_lazy
from ..engine.processes.slurm import add_slurm_arguments
from .frame import framed, task_of, training, training_parser

SCRIPT = "lazyconfig_train_net.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = training_parser(SCRIPT, __doc__, default_argument_parser)
    add_data_arguments(parser, "train.data", "train.data_val")
    add_slurm_arguments(parser)
    args = parser.parse_args(argv)
    setup_logger(name="randwire_d2")
    cfg = load_lazy_config(args)
    with training(SCRIPT, argv, args, cfg.train.output_dir):
        run_lazy(cfg, args, task_of(SCRIPT, argv))
