"""The best checkpoint of a training, and early stopping when the metric stops improving."""

import copy
import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from ...runs import RunFolder
from ...weight_files.reading import iteration_of
from ..config.keys import Keys
from ..config.metric import best_evaluation, best_metric, is_loss
from .saving import end_of_what_counts

logger = logging.getLogger(__name__)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's BestCheckpointer, for trainings that are killed and resumed.

    model_best.pth holds the evaluated weights of the best evaluation in metrics.json, the first one
    of equals. It has no training state, so ``--resume`` does not go on from it. A resumed training
    repeats some evaluations, whose earlier results do not count. So a new best model keeps the
    previous one on disk until there is a checkpoint of its iteration.

    Args:
        cfg: the training's config.
        model: the model that is evaluated.

    It belongs only in the main process, after the hook that writes metrics.json.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        metric = best_metric(cfg)
        mode = "min" if is_loss(metric) else "max"
        super().__init__(cfg.TEST.EVAL_PERIOD, self, metric, mode)
        self._model = model
        self._checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
        self._run = RunFolder(cfg.OUTPUT_DIR)
        self._before = f"{self._run.best_checkpoint}.before"
        self._warned = False

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if not start:
            return
        found = best_evaluation(self._run, self._val_metric, end_of_what_counts(self.trainer))
        best = self._run.best_checkpoint
        if found is None:
            return
        self.best_iter, self.best_metric = found
        if iteration_of(best) == self.best_iter:
            return
        ended = start >= self.trainer.max_iter
        if ended and iteration_of(best) == start:  # it is of the end, which is evaluated again
            return
        if self.best_iter >= start - 1:  # killed before it was saved
            self.save(best.stem, iteration=self.best_iter)
        elif iteration_of(self._before) == self.best_iter:
            os.replace(self._before, best)
        else:
            logger.warning(
                f"{best} is damaged, or not of iteration {self.best_iter}, the best of "
                f"{self._run.path}: it stays until a better evaluation"
            )

    def save(self, name: str, **state: Any) -> None:
        """Save a new best model; Detectron2's hook calls this in place of a checkpointer."""
        best, trainer = self._run.best_checkpoint, self.trainer
        period = self._checkpoint_period
        saved = max(trainer.start_iter, (trainer.iter + 1) // period * period) - 1
        if self.best_iter is not None and self.best_iter <= saved and best.is_file():
            os.replace(best, self._before)
        checkpointer = copy.copy(trainer.checkpointer)
        checkpointer.model, checkpointer.checkpointables = self._model, {}
        checkpointer.tag_last_checkpoint = lambda _: None
        checkpointer.save(name, **state)

    def _best_checking(self) -> None:
        found = self.trainer.last_evaluation
        if self._val_metric in found:
            super()._best_checking()
        elif found and not self._warned:
            self._warned = True
            logger.warning(
                f"{self.trainer.keys.metric}: no evaluation gives {self._val_metric!r}, so there "
                f"is no model_best.pth; they give {', '.join(found)}"
            )

    def after_train(self) -> None:
        super().after_train()
        if self.trainer.iter >= self.trainer.max_iter and os.path.exists(self._before):
            os.remove(self._before)


class TrainingStopped(BaseException):
    """Ends TrainerBase's loop, which would log an ``Exception`` as a failure."""


class Patience(hooks.HookBase):
    """Ends a training that has not improved for SOLVER.PATIENCE evaluations, in all processes, and
    saves model_final.pth.

    It belongs behind all other hooks, because it leaves the loop.

    Args:
        check: raises an error in all processes if the weights should not be saved.

    Raises:
        TrainingStopped: in all processes, after the last evaluation.
    """

    def __init__(self, cfg: CfgNode, check: Callable[[], None]) -> None:
        self._cfg, self._check = cfg, check

    def after_step(self) -> None:
        trainer, iterations = self.trainer, self.trainer.iter + 1
        if iterations % self._cfg.TEST.EVAL_PERIOD or iterations == trainer.max_iter:
            return
        if is_exhausted(self._cfg, iterations, trainer.keys):
            self._check()
            trainer.checkpointer.save("model_final", iteration=trainer.iter)
            trainer.iter = trainer.max_iter = iterations
            raise TrainingStopped


class EvalHook(hooks.EvalHook):
    """Detectron2's EvalHook, without a second evaluation at the end of a training that ``Patience``
    has ended, even if it is resumed; and without one after an iteration that has failed."""

    _iterations = 0  # the iterations that were done at the last evaluation

    def before_train(self) -> None:
        cfg, start = self.trainer.cfg, self.trainer.start_iter
        # TEST.EXPECTED_RESULTS needs an evaluation in this process.
        if start == self.trainer.max_iter < cfg.SOLVER.MAX_ITER and not cfg.TEST.EXPECTED_RESULTS:
            found = dict(RunFolder(cfg.OUTPUT_DIR).evaluations(best_metric(cfg)))
            done = self._period and start - 1 in found
            self._iterations = start if comm.all_gather(done)[0] else 0

    def _do_eval(self) -> None:
        super()._do_eval()
        self._iterations = self.trainer.iter + 1

    def after_train(self) -> None:
        ended = self.trainer.iter >= self.trainer.max_iter
        self._eval_after_train = ended and self._iterations != self.trainer.max_iter
        super().after_train()


def is_exhausted(cfg: CfgNode, end: int, keys: Keys) -> bool:
    """Whether the metric has not improved for SOLVER.PATIENCE evaluations before iteration ``end``.
    All processes call this; the main one decides, and logs it."""
    return bool(comm.all_gather(comm.is_main_process() and _is_exhausted(cfg, end, keys))[0])


def _is_exhausted(cfg: CfgNode, end: int, keys: Keys) -> bool:
    # metrics.json tells which evaluations count after interruptions.
    metric, run = best_metric(cfg), RunFolder(cfg.OUTPUT_DIR)
    iterations = [iteration for iteration, _ in run.evaluations(metric, end)]
    best = best_evaluation(run, metric, end)
    since = len(iterations) - 1 - (iterations.index(best[0]) if best else 0)
    if since < cfg.SOLVER.PATIENCE:
        return False
    logger.info(
        f"{metric} has not improved for {since} evaluations ({keys.patience}): the training ends "
        f"after {end} iterations"
    )
    return True
