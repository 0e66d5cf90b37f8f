"""What the config of a training that goes on must leave as it was."""

import argparse
import logging

from detectron2.config import CfgNode

from ..config import flat
from ..runs import RunFolder
from ..text import one_line

# What the optimizer's state holds, which a training that goes on takes from the checkpoint.
_OPTIMIZER = (
    "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.BIAS_LR_FACTOR",
)  # fmt: skip

logger = logging.getLogger(__name__)


def check_continuation(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Compare a config with that of the training that ``--resume`` goes on with, if there is one.
    It belongs ahead of all that writes into OUTPUT_DIR, whose config.yaml is the training's.

    Raises:
        ValueError: they differ in what the training can't change any more; one line.
    """
    run = RunFolder(cfg.OUTPUT_DIR)
    if not (args.resume and run.can_resume):
        return
    try:
        own = run.config()
    except (OSError, ValueError) as e:
        logger.warning(f"Whether the training had the same config can't be told: {one_line(e)}")
        return
    if not args.eval_only:
        _check_optimizer(own, cfg)


def _check_optimizer(own: CfgNode, cfg: CfgNode) -> None:
    before, now = dict(flat(own)), dict(flat(cfg))
    changed = [key for key in _OPTIMIZER if before[key] != now[key]]
    if changed:
        differences = ", ".join(f"{key} {before[key]} (now {now[key]})" for key in changed)
        raise ValueError(
            f"--resume: the training in OUTPUT_DIR {cfg.OUTPUT_DIR!r} has {differences}, which the "
            "state of its optimizer fixes. To go on, add to the command "
            f"{' '.join(f'{key} {before[key]}' for key in changed)}; or begin a training with its "
            "weights as MODEL.WEIGHTS in another OUTPUT_DIR"
        )
