"""The hooks of a training, in their order, for YAML configs and LazyConfigs."""

from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ...runs import RunFolder
from ..config.schedule import KeepSchedule
from ..processes.signals import StopOnSignal
from ..processes.watch import ReportProgress
from .best import BestCheckpointer, EvalHook, Patience
from .ema import AverageWeights
from .finite import FiniteWeights
from .resumption import EndOnce, FinishIteration, resumption_hooks
from .saving import PeriodicCheckpointer, PeriodicWriter
from .shadow_steps import ShadowSteps


def training_hooks(trainer: Any) -> list[HookBase]:
    """The hooks of a training, in their order.

    Args:
        trainer: a ``Trainer``, or a proxy of it, that is complete except for its hooks.
    """
    cfg, is_main = trainer.cfg, comm.is_main_process()
    solver, run = cfg.SOLVER, RunFolder(cfg.OUTPUT_DIR)
    model, loader, checkpointer = trainer.model, trainer.data_loader, trainer.checkpointer
    batch_size, average, tested = solver.IMS_PER_BATCH, trainer.average, trainer.evaluated_model
    saved, most = solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_TO_KEEP or None
    period = cfg.TEST.EVAL_PERIOD
    weights = FiniteWeights(checkpointer, saved)
    in_order = [
        EndOnce(),
        ReportProgress(),
        weights,
        StopOnSignal(weights.check),
        KeepSchedule(batch_size, solver.MAX_ITER),
        *resumption_hooks(model, loader, batch_size, drawn=cfg.SEED < 0),
        ShadowSteps(model, run, solver.SHADOW_PERIOD),
        AverageWeights(average, checkpointer.model) if average is not None else None,
        hooks.IterationTimer(),
        hooks.LRScheduler(),
        trainer.precise_bn(),  # ahead of the hooks that save and test its statistics
        # Ahead of the evaluation: if that fails, there is a checkpoint with which to find out why.
        PeriodicCheckpointer(checkpointer, saved, max_to_keep=most) if is_main else None,
        # A bound method would refer to the trainer, so that it and its workers are never freed.
        EvalHook(period, lambda: trainer.evaluate()),
        EvalHook(0, lambda: trainer.test_with_TTA(cfg, tested)) if cfg.TEST.AUG.ENABLED else None,
        PeriodicWriter(trainer.build_writers(), period, trainer.log_period) if is_main else None,
        BestCheckpointer(cfg, tested) if is_main else None,
        Patience(cfg, weights.check) if solver.PATIENCE else None,
        FinishIteration(run),
    ]
    return [hook for hook in in_order if hook is not None]
