"""What the config of a training that goes on must leave as it was."""

import argparse
import logging

from detectron2.config import CfgNode

from ..config import flat
from ..data.layouts import find_splits
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
    _check_split(own, cfg)
    if not args.eval_only:
        _check_optimizer(own, cfg)


def _check_split(own: CfgNode, cfg: CfgNode) -> None:
    before, now = own.DATASETS, cfg.DATASETS
    names = [(*node.TRAIN, *node.TEST) for node in (before, now)]
    if not now.HOLD_BACK or before.PATH != now.PATH or names[0] == names[1]:
        return
    if "val" not in find_splits(now.PATH, now.PATH_VAL):
        raise ValueError(
            f"--resume: DATASETS.HOLD_BACK {now.HOLD_BACK} draws other images of {now.PATH!r} for "
            f"validation than those that the training in OUTPUT_DIR {cfg.OUTPUT_DIR!r} held back "
            f"(HOLD_BACK {before.HOLD_BACK}, SEED {own.SEED}; older versions drew otherwise): it "
            "was trained on some of them. Give it a validation set of its own, --data-val, or "
            "train anew in another OUTPUT_DIR"
        )


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
