"""The end of a training: pictures, and a line with what comes next."""

import logging
import os
import shlex
from collections.abc import Callable

from detectron2.config import CfgNode

from ..command import in_users_words
from ..runs import RunFolder
from .config.metric import best_evaluation, best_metric
from .report import write_report

logger = logging.getLogger(__name__)


def conclude(cfg: CfgNode, iterations: int, next_command: Callable[[], str]) -> None:
    """What the main process does: draw the run's pictures into its folder, say what it is worth.

    Args:
        cfg: of the training.
        iterations: that it took.
        next_command: gives the command that makes use of it, which may be some work.
    """
    output = cfg.OUTPUT_DIR
    try:
        write_report(output, output)
    # Whatever it is: the training went well, and its files are there.
    except Exception as e:
        logger.warning(f"There is no report of {output}: {' '.join(f'{e!r}'.split())}")
    logger.info(f"{_outcome(cfg, iterations)} Next: {next_command()}")


def _outcome(cfg: CfgNode, iterations: int) -> str:
    run, metric = RunFolder(cfg.OUTPUT_DIR), best_metric(cfg)
    outcome = f"The training has ended after {iterations} iterations, {run.final_checkpoint}"
    best = best_evaluation(run, metric)
    if best is not None:
        _, last = run.evaluations(metric)[-1]
        outcome += (
            f": {metric} {last:.1f}; the best, {best[1]:.1f} at iteration {best[0]}, is "
            f"{run.best_checkpoint}"
        )
    return f"{outcome}."


def predict_command(folder: str) -> str:
    """That of a prediction with the best checkpoint of a run."""
    output = os.path.normpath(folder)
    predictions = os.path.join(output, "predictions")
    command = ["python", "tools/predict.py", output, "images/", "--output", predictions]
    return in_users_words(shlex.join(command))
