"""A training's schedule in epochs of its images, for any batch size."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase

from .limits import TRAINING_LIMITS, check_limits

# Of a training in epochs, unless WARMUP_EPOCHS says how long: a config's WARMUP_ITERS suit the data
# that it was written for, and a data set of a few images has fewer iterations in all.
LONGEST_WARM_UP = 1 / 4

logger = logging.getLogger(__name__)


def check_solver(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: a key that only trainings read has a value that no training has.
    """
    check_limits(cfg, TRAINING_LIMITS)
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise ValueError(
            f"SOLVER.NESTEROV True needs a SOLVER.MOMENTUM above 0; got {cfg.SOLVER.MOMENTUM}: set "
            "it to False"
        )
    if cfg.SOLVER.BASE_LR_END > cfg.SOLVER.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR {cfg.SOLVER.BASE_LR}; got "
            f"{cfg.SOLVER.BASE_LR_END}"
        )
    if cfg.SOLVER.PATIENCE and not cfg.TEST.EVAL_PERIOD:
        raise ValueError(
            f"SOLVER.PATIENCE {cfg.SOLVER.PATIENCE} is a number of evaluations, but "
            "TEST.EVAL_PERIOD is 0, which evaluates only at the end; set it to the iterations "
            "between evaluations"
        )


def check_length(cfg: CfgNode, opts: Sequence[str]) -> None:
    """
    Args:
        opts: the keys and values of the command line.

    Raises:
        ValueError: it sets MAX_ITER beside EPOCHS, which decide: it would only move the STEPS.
    """
    if cfg.SOLVER.EPOCHS > 0 and "SOLVER.MAX_ITER" in opts[::2]:
        raise ValueError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} has no effect on the length, which is "
            f"SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}; leave it out, or set SOLVER.EPOCHS 0 for a length "
            "in iterations"
        )


def scale_schedule(cfg: CfgNode, num_images: int) -> CfgNode:
    """The config with its schedule in iterations of IMS_PER_BATCH images, and EPOCHS 0.

    WARMUP_ITERS that are more than a quarter of the training become a quarter; a line in the log
    says so, or, without EPOCHS, that the warm-up is the whole training.

    Args:
        cfg: one with ``SOLVER.EPOCHS`` and the other keys for ``SOLVER.REFERENCE_BATCH_SIZE``.
        num_images: the images in an epoch.

    Raises:
        ValueError: WARMUP_EPOCHS is not less than EPOCHS; or, without these, a step is the end.
    """
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE
    images = cfg.SOLVER.EPOCHS * num_images
    if not images:
        _check_steps(cfg.SOLVER)
        _warn_of_warm_up(cfg.SOLVER)
        return cfg
    scaled = cfg.clone()
    scaled.defrost()
    solver = scaled.SOLVER
    in_epochs = batch > reference and not solver.WARMUP_ITERS and "WARMUP_EPOCHS" in solver
    if in_epochs:
        _warm_up(solver, num_images)
    # Detectron2's linear scaling is by the number of GPUs: here, of one image each.
    solver.REFERENCE_WORLD_SIZE = solver.IMS_PER_BATCH = reference
    scaled.freeze()
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    scaled.defrost()
    solver, iterations = scaled.SOLVER, -(-images // batch)
    solver.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    solver.REFERENCE_BATCH_SIZE = batch
    whole = max(cfg.SOLVER.MAX_ITER, 1)
    steps = {round(step * iterations / whole) for step in cfg.SOLVER.STEPS}
    # Of a few iterations, two steps may be the same, and the last one the end, as rounded.
    solver.STEPS = tuple(sorted(steps - {0, iterations}))
    solver.MAX_ITER = iterations
    solver.EPOCHS = 0
    # Of a large batch, half an iteration is none.
    solver.CHECKPOINT_PERIOD = max(solver.CHECKPOINT_PERIOD, 1)
    scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, int(cfg.TEST.EVAL_PERIOD > 0))
    longest = int(LONGEST_WARM_UP * iterations)
    if longest < solver.WARMUP_ITERS and not in_epochs:
        logger.info(
            f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} of {reference} images each would be "
            f"more than a quarter of this training ({iterations} iterations of {batch}); it warms "
            f"up for {longest} iterations"
        )
        solver.WARMUP_ITERS = longest
    return scaled


def _check_steps(solver: CfgNode) -> None:
    """Detectron2 leaves out the steps behind the end, and fails of one that is the end."""
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.MAX_ITER in solver.STEPS:
        raise ValueError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} must be less than SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}, with which the training ends; leave {solver.MAX_ITER} out"
        )


def _warn_of_warm_up(solver: CfgNode) -> None:
    """A config's keys for 90,000 iterations are literal in a training of a few hundred, too."""
    if 0 < solver.MAX_ITER <= solver.WARMUP_ITERS:
        logger.warning(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not less than SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}: the rate warms up to the end, and never reaches SOLVER.BASE_LR "
            f"{solver.BASE_LR}; set fewer, or SOLVER.EPOCHS, with which the warm-up shrinks"
        )


def _warm_up(solver: CfgNode, num_images: int) -> None:
    """Goyal et al. (2017, §2.2): from the reference's rate to that of the batch, iteration by
    iteration, in a few epochs."""
    epochs = solver.WARMUP_EPOCHS
    if epochs >= solver.EPOCHS:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is larger than REFERENCE_BATCH_SIZE "
            f"{solver.REFERENCE_BATCH_SIZE}, so its rate needs a warm-up, but SOLVER.WARMUP_EPOCHS "
            f"{epochs} is not less than EPOCHS {solver.EPOCHS}; set a smaller one, or 0 for none"
        )
    solver.WARMUP_ITERS = epochs * num_images / solver.REFERENCE_BATCH_SIZE
    solver.WARMUP_FACTOR = solver.REFERENCE_BATCH_SIZE / solver.IMS_PER_BATCH
    solver.WARMUP_METHOD = "linear"


class KeepSchedule(HookBase):
    """Refuses to resume a training in the schedule of another batch size.

    A checkpoint's iterations and rates are those of its own: with half the images in each, as many
    iterations are half as far. Who changes the batch or the length alone changes just that.

    Args:
        batch_size: the images of an iteration in all processes together.
        max_iter: the length of the whole schedule.
    """

    def __init__(self, batch_size: int, max_iter: int) -> None:
        self._own = {"batch_size": batch_size, "max_iter": max_iter}

    def state_dict(self) -> dict[str, Any]:
        return self._own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own, batch, keys = self._own, state["batch_size"], self.trainer.keys
        if own["batch_size"] == batch or own["max_iter"] == state["max_iter"]:
            self.trainer.earlier_max_iter = state["max_iter"]
            return
        raise ValueError(
            f"--resume: the checkpoint's schedule is {state['max_iter']} iterations of {batch} "
            f"images, this one {own['max_iter']} of {own['batch_size']}. Set {keys.batch} "
            f"{batch} (on fewer GPUs, more images on each); or, for a schedule of its own, "
            f"{keys.weights} to the checkpoint and another output folder, without --resume"
        )
