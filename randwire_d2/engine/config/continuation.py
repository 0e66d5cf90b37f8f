"""Checks of what a resumed training's config must not change, and of what it may."""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine.hooks import LRScheduler

from ...config import family, flat
from ...data.formats.layouts import find_splits
from ...runs import RunFolder
from ...text import one_line
from ...weight_files.reading import read_iteration
from .keys import LAZY_KEYS, YAML_KEYS, Keys

# A resumed training takes these from the checkpoint, with the optimizer's state; the last key
# decides which weights have an optimizer state.
_OPTIMIZER = (
    "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.BIAS_LR_FACTOR", "MODEL.BACKBONE.FREEZE_AT",
)  # fmt: skip
# Entries that may differ in an optimizer's parameter group: the parameters, which a checkpoint
# has as numbers; the rates, which are the config's (``rates_kept``); and how a step is computed.
_FREE = {"params", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}

NAMED = 8  # groups, or differences, in a message; an optimizer may have hundreds

logger = logging.getLogger(__name__)


def check_continuation(
    cfg: CfgNode, args: argparse.Namespace, keys: Keys = YAML_KEYS
) -> CfgNode | None:
    """Compare a config with that of the training that ``--resume`` continues, if there is one.
    Call this before data is read, which may take minutes, and before OUTPUT_DIR is written to,
    because its config.yaml is the earlier one.

    Args:
        keys: the names of the keys in the user's config, YAML or LazyConfig.

    Returns:
        The training's config; None if there is none, or it can't be read.

    Raises:
        ValueError: the configs differ in something that a training can't change; one line.
    """
    run = RunFolder(cfg.OUTPUT_DIR)
    if not (args.resume and run.can_resume):
        return None
    others = LAZY_KEYS if run.is_lazy else YAML_KEYS
    if others is not keys and run.config_file.is_file() and not args.eval_only:
        raise ValueError(
            f"--resume: OUTPUT_DIR {cfg.OUTPUT_DIR!r} holds a training of {others.tool}, whose "
            "state is of another form: go on with that tool and its config; or begin a training "
            f"with a checkpoint of it as {keys.weights} in another output folder, without --resume"
        )
    # With these keys the length depends on the number of images, or of processes.
    if not (args.eval_only or cfg.SOLVER.EPOCHS or cfg.SOLVER.REFERENCE_WORLD_SIZE):
        check_done(read_iteration(run.last_checkpoint) + 1, cfg.SOLVER.MAX_ITER, keys)
    try:
        own = run.config()
    except (OSError, ValueError) as e:
        logger.warning(f"Whether the training had the same config can't be told: {one_line(e)}")
        return None
    if keys is YAML_KEYS and not args.eval_only:  # ``check_groups`` compares a LazyConfig's
        _check_optimizer(own, cfg)
    return own


def check_done(done: int, max_iter: int, keys: Keys) -> None:
    """
    Args:
        done: the iterations that the resumed training has done.
        max_iter: the iterations that it is to have in total.
        keys: the names of the config's keys, for the message.

    Raises:
        ValueError: ``done`` is more than ``max_iter``; one line.
    """
    if done > max_iter:
        raise ValueError(
            f"--resume: the training has done {done} iterations, and is to have {max_iter} in all: "
            f"give it at least {done}, or begin a new training from an earlier checkpoint, with "
            f"{keys.weights} and another output folder, without --resume"
        )


def check_split(own: CfgNode | None, cfg: CfgNode) -> None:
    """Compare the held-back images of a config with those of the resumed training.

    Args:
        own: the return value of ``check_continuation``.
        cfg: the config, whose data is registered.

    Raises:
        ValueError: other images are held back; one line.
    """
    if own is None:
        return
    before, now = own.DATASETS, cfg.DATASETS
    # The set's name depends on the path, which may differ although the images are the same.
    drawn = [
        (*node.TRAIN, *node.TEST)
        if before.PATH == now.PATH
        else (node.HOLD_BACK, max(config.SEED, 0))
        for config, node in ((own, before), (cfg, now))
    ]
    if not now.HOLD_BACK or drawn[0] == drawn[1]:
        return
    if "val" not in find_splits(now.PATH, now.PATH_VAL):
        raise ValueError(
            f"--resume: DATASETS.HOLD_BACK {now.HOLD_BACK} holds back other images of {now.PATH!r} "
            f"than the training in OUTPUT_DIR {cfg.OUTPUT_DIR!r} did (DATASETS.HOLD_BACK "
            f"{before.HOLD_BACK}, SEED {own.SEED}; older versions drew otherwise), which was "
            "trained on some of them. Give a separate validation set, --data-val, or train anew in "
            "another OUTPUT_DIR"
        )


def _check_optimizer(own: CfgNode, cfg: CfgNode) -> None:
    before, now = dict(flat(own)), dict(flat(cfg))
    changed = [key for key in _OPTIMIZER if before[key] != now[key]]
    norm = f"MODEL.{family(cfg)}.NORM"  # FrozenBN has no weights to train
    if norm in now and (before[norm] == "FrozenBN") != (now[norm] == "FrozenBN"):
        changed.append(norm)
    if changed:
        differences = ", ".join(f"{key} {before[key]} (now {now[key]})" for key in changed)
        raise ValueError(
            f"--resume: the training in OUTPUT_DIR {cfg.OUTPUT_DIR!r} has {differences}, which the "
            "state of its optimizer fixes. To go on, add to the command "
            f"{' '.join(f'{key} {before[key]}' for key in changed)}; or begin a training with its "
            "weights as MODEL.WEIGHTS in another OUTPUT_DIR"
        )


def check_groups(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], keys: Keys
) -> None:
    """Compare an optimizer with the checkpoint's; PyTorch would load the latter without a check.

    Args:
        saved: the parameter groups in the state of the checkpoint's optimizer.
        own: the parameter groups of the training's optimizer.
        keys: the names of the config's keys, for the message.

    Raises:
        ValueError: they differ in something that a training can't change; one line.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    differences = {
        f"{key} {value} (now {group.get(key)})"
        for before, group in zip(saved, own)
        for key, value in before.items()
        if key not in _FREE and value != group.get(key)
    }
    if sizes[0] != sizes[1]:
        some, now = (group[:NAMED] for group in sizes)
        numbers = len(sizes[0]), len(sizes[1])
        differences = {f"weights in {numbers[0]} groups, {some} (now {numbers[1]}, {now})"}
    if differences:
        named = ", ".join(sorted(differences)[:NAMED])
        raise ValueError(
            f"--resume: the optimizer of the checkpoint has {named}, which its state fixes. "
            f"Set what it has; or begin a training with the checkpoint as {keys.weights} in "
            "another output folder, without --resume"
        )


@contextmanager
def rates_kept(optimizer: torch.optim.Optimizer, keys: Keys) -> Iterator[None]:
    """Keep the config's learning rates while the block loads a checkpoint's state into the
    optimizer. A user may have changed them after a divergence, say."""
    own = [_rate(group) for group in optimizer.param_groups]
    yield
    shown = LRScheduler.get_best_param_group_id(optimizer)
    if (before := _rate(optimizer.param_groups[shown])) != own[shown]:
        logger.warning(
            f"The learning rate is {keys.rate} {own[shown]} from here on; the checkpoint's was "
            f"{before}"
        )
    for group, rate in zip(optimizer.param_groups, own):
        group["initial_lr"] = rate  # the schedule multiplies it in each iteration


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group, before the schedule's factor."""
    return float(group.get("initial_lr", group["lr"]))
