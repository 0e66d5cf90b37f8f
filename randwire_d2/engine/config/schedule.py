"""A training's schedule in epochs of its images, for any batch size."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase

from .limits import TRAINING_LIMITS, check_limits

# The longest warm-up, as a part of a training in epochs, without WARMUP_EPOCHS: a config's
# WARMUP_ITERS may be more than all iterations on a data set of few images.
LONGEST_WARM_UP = 1 / 4

logger = logging.getLogger(__name__)


def check_solver(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: a key that only trainings read has an invalid value; one line.
    """
    check_limits(cfg, TRAINING_LIMITS)
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise ValueError(
            f"SOLVER.NESTEROV True needs a SOLVER.MOMENTUM above 0; got {cfg.SOLVER.MOMENTUM}: set "
            "it to False"
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
        ValueError: the command line sets MAX_ITER with EPOCHS above 0, which set the length.
    """
    if cfg.SOLVER.EPOCHS > 0 and "SOLVER.MAX_ITER" in opts[::2]:
        raise ValueError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} has no effect on the length, which is "
            f"SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}; leave it out, or set SOLVER.EPOCHS 0 for a length "
            "in iterations"
        )


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Scale batch, learning rate and schedule from SOLVER.REFERENCE_WORLD_SIZE, if it is not 0, to
    the number of processes, as Detectron2 does, but without making a period or a step 0.

    Raises:
        ValueError: the scaled rate, or that of ``scale_schedule``, is less than BASE_LR_END.
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, max(processes, 1))
    if scaled is not cfg:
        frozen = scaled.is_frozen()
        scaled.defrost()
        _mend_rounding(scaled, cfg)
        # What the scaled rate is for, so that config.yaml with other EPOCHS is not scaled again.
        before, solver = cfg.SOLVER, scaled.SOLVER
        reference = before.REFERENCE_BATCH_SIZE * solver.IMS_PER_BATCH / before.IMS_PER_BATCH
        solver.REFERENCE_BATCH_SIZE = max(round(reference), 1)
        if frozen:
            scaled.freeze()
    solver = scaled.SOLVER
    if solver.BASE_LR_END > solver.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR {solver.BASE_LR}, the rate for "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}; got {solver.BASE_LR_END}"
        )
    return scaled


def _mend_rounding(scaled: CfgNode, cfg: CfgNode) -> None:
    """Mend what rounding does to a schedule of few iterations: a length or a period of 0, and steps
    that are equal, 0 or the end."""
    solver = scaled.SOLVER
    solver.MAX_ITER = max(solver.MAX_ITER, 1)
    solver.STEPS = tuple(sorted({*solver.STEPS} - {0, solver.MAX_ITER}))
    solver.CHECKPOINT_PERIOD = max(solver.CHECKPOINT_PERIOD, 1)
    scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, int(cfg.TEST.EVAL_PERIOD > 0))


def scale_schedule(cfg: CfgNode, num_images: int) -> CfgNode:
    """Convert a schedule from epochs to iterations of IMS_PER_BATCH images; EPOCHS becomes 0.

    If WARMUP_ITERS is more than a quarter of the training, it is reduced to a quarter, with a line
    in the log. Without EPOCHS it stays, with a warning if the warm-up takes the whole training.

    Args:
        cfg: its other keys of the schedule are for ``SOLVER.REFERENCE_BATCH_SIZE`` images.
        num_images: the images in an epoch.

    Raises:
        ValueError: WARMUP_EPOCHS is not less than EPOCHS; or, without EPOCHS, STEPS has MAX_ITER.
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
    # Detectron2 scales by the number of GPUs; here each image of a batch counts as one.
    solver.REFERENCE_WORLD_SIZE = solver.IMS_PER_BATCH = reference
    scaled.freeze()
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    scaled.defrost()
    solver, iterations = scaled.SOLVER, -(-images // batch)
    solver.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    solver.REFERENCE_BATCH_SIZE = batch
    whole = max(cfg.SOLVER.MAX_ITER, 1)
    solver.STEPS = tuple(round(step * iterations / whole) for step in cfg.SOLVER.STEPS)
    solver.MAX_ITER = iterations
    solver.EPOCHS = 0
    _mend_rounding(scaled, cfg)
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
    """Refuse a step at the end, with which Detectron2 fails; it leaves out steps after the end."""
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.MAX_ITER in solver.STEPS:
        raise ValueError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} must be less than SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}, with which the training ends; leave {solver.MAX_ITER} out"
        )


def _warn_of_warm_up(solver: CfgNode) -> None:
    """Warn if the warm-up takes the whole training, which may be shorter than the config's."""
    if 0 < solver.MAX_ITER <= solver.WARMUP_ITERS:
        logger.warning(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not less than SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}: the rate warms up to the end, and never reaches SOLVER.BASE_LR "
            f"{solver.BASE_LR}; set fewer, or SOLVER.EPOCHS, with which the warm-up shrinks"
        )


def _warm_up(solver: CfgNode, num_images: int) -> None:
    """Set the gradual warm-up of Goyal et al. (2017, §2.2): in a few epochs, the rate goes linearly
    from that of the reference batch size to that of the actual one."""
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
    """Refuses to resume a training if both the batch size and the length of its schedule differ.

    The checkpoint's iteration counts batches of its own size: with half the images in each, it is
    only half as far in the new schedule. A change of only the batch size or the length is allowed.

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
        way = f"Set {keys.batch} {batch} (on fewer GPUs, more images on each)"
        if self.trainer.cfg.SOLVER.REFERENCE_WORLD_SIZE:  # it would scale that batch, too
            way = (
                "SOLVER.REFERENCE_WORLD_SIZE scales both: start as many processes as before, or "
                "give the run's config.yaml as --config-file, with SOLVER.REFERENCE_WORLD_SIZE 0"
            )
        raise ValueError(
            f"--resume: the checkpoint's schedule is {state['max_iter']} iterations of {batch} "
            f"images, this one {own['max_iter']} of {own['batch_size']}. {way}; or, for a schedule "
            f"of its own, {keys.weights} to the checkpoint and another output folder, without "
            "--resume"
        )
