"""The hooks of a training, in their order: for YAML's and for LazyConfigs'."""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ...runs import RunFolder
from ..config.keys import YAML_KEYS, Keys
from ..config.schedule import KeepSchedule
from ..processes.signals import StopOnSignal
from ..processes.watch import ReportProgress
from .best import BestCheckpointer, EvalHook, Patience
from .ema import AverageWeights
from .finite import FiniteWeights
from .resumption import EndOnce, FinishIteration, resumption_hooks
from .saving import PeriodicCheckpointer, PeriodicWriter
from .shadow_steps import ShadowSteps


def training_hooks(
    trainer: Any,
    cfg: CfgNode,
    evaluate: Callable[[], Any],
    writers: Callable[[], Sequence[EventWriter]],
    *,
    keys: Keys = YAML_KEYS,
    scheduler: Any = None,
    precise_bn: HookBase | None = None,
    test_with_tta: Callable[[], Any] | None = None,
    log_period: int = 20,
) -> list[HookBase]:
    """
    Args:
        trainer: has all but its hooks, and as an attribute ``evaluated_model``, what is evaluated.
        cfg: the training's; of a LazyConfig its ``yaml_config``.
        evaluate: returns what an evaluation finds.
        writers: makes what writes metrics; the main process calls it.
        keys: of the config, for messages.
        scheduler: by default the trainer's.
        precise_bn: ahead of what saves and tests its statistics.
        test_with_tta: evaluates with test-time augmentation, at the end.
        log_period: the iterations from one line of metrics to the next.
    """
    solver, run, is_main = cfg.SOLVER, RunFolder(cfg.OUTPUT_DIR), comm.is_main_process()
    model, loader, checkpointer = trainer.model, trainer.data_loader, trainer.checkpointer
    batch_size, average, tested = solver.IMS_PER_BATCH, trainer.average, trainer.evaluated_model
    saved, most = solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_TO_KEEP or None
    weights = FiniteWeights(checkpointer, saved, keys)
    in_order = [
        EndOnce(),
        ReportProgress(),
        weights,
        StopOnSignal(weights.check),
        KeepSchedule(batch_size, solver.MAX_ITER, keys),
        *resumption_hooks(model, loader, batch_size, drawn=cfg.SEED < 0),
        ShadowSteps(model, run, solver.SHADOW_PERIOD),
        AverageWeights(average, checkpointer.model) if average is not None else None,
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=scheduler),
        precise_bn,
        # Ahead of the evaluation: if that fails, there is a checkpoint to look for the cause in.
        PeriodicCheckpointer(checkpointer, saved, max_to_keep=most) if is_main else None,
        EvalHook(cfg.TEST.EVAL_PERIOD, evaluate),
        EvalHook(0, test_with_tta) if test_with_tta else None,
        PeriodicWriter(writers(), cfg.TEST.EVAL_PERIOD, log_period) if is_main else None,
        BestCheckpointer(cfg, tested, keys) if is_main else None,
        Patience(cfg, weights.check, keys) if solver.PATIENCE else None,
        FinishIteration(run),
    ]
    return [hook for hook in in_order if hook is not None]
