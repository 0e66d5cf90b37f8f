"""The end of a training: pictures, and a line with what comes next."""

import logging
import os
from collections.abc import Callable

from detectron2.config import CfgNode
from torch import nn

from ..command import command_of
from ..modeling import NODE_OP_REGISTRY, RandWire
from ..runs import RunFolder
from ..weight_files.reading import iteration_of
from .config.metric import best_evaluation, best_metric

# Packages whose modules every tool has.
_STOCK = {"detectron2", "fvcore", "randwire_d2", "torch", "torchvision"}

logger = logging.getLogger(__name__)


def conclude(
    cfg: CfgNode, iterations: int, model: nn.Module, next_command: Callable[[], list[str]]
) -> None:
    """Draw the run's pictures into its folder and log its result; only the main process calls this.

    Args:
        cfg: the training's config.
        iterations: the number of iterations of the training.
        model: the trained model.
        next_command: returns the tool to use next and its arguments, or [] if there is none; the
            call may take a while.
    """
    output = cfg.OUTPUT_DIR
    try:
        _draw(output)
    # Any error is only logged, since the training has succeeded and its files are written.
    except Exception as e:
        logger.warning(f"No report of {output} could be drawn: {' '.join(f'{e!r}'.split())}")
    following = ""
    if command := next_command():
        following = f" Next: {command_of(command[0], command[1:], _own_parts(model))}"
    logger.info(f"{_outcome(cfg, iterations)}{following}")


def _draw(output: str) -> None:
    from .report import write_report  # here: Matplotlib would take half a second of every start

    write_report(output, output)


def _outcome(cfg: CfgNode, iterations: int) -> str:
    run, metric = RunFolder(cfg.OUTPUT_DIR), best_metric(cfg)
    outcome = f"The training has ended after {iterations} iterations, {run.final_checkpoint}"
    best = best_evaluation(run, metric)
    if best is not None:
        _, last = run.evaluations(metric)[-1]
        outcome += f": {metric} {last:.1f}; the best, {best[1]:.1f} at iteration {best[0]}, is "
        is_kept = iteration_of(run.best_checkpoint) == best[0]
        outcome += str(run.best_checkpoint) if is_kept else "in no checkpoint"
    return f"{outcome}."


def _own_parts(model: nn.Module) -> list[str]:
    """The names of modules and node operators from the user's own code, which no tool imports."""
    parts = {type(module).__name__: type(module) for module in model.modules()}
    ops = {module.spec.node_op for module in model.modules() if isinstance(module, RandWire)}
    parts |= {op: NODE_OP_REGISTRY.get(op) for op in ops}
    return sorted(n for n, part in parts.items() if part.__module__.split(".")[0] not in _STOCK)


def predict_command(folder: str) -> list[str]:
    """The tool and arguments that predict with the best checkpoint of a run."""
    output = os.path.normpath(folder)
    return ["predict.py", output, "path/to/images", "--output", os.path.join(output, "predictions")]
