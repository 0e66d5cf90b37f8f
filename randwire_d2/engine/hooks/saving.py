"""Hooks that write checkpoints and metrics, and functions for an earlier training's files.

If a checkpoint can't be written, the training ends, as later ones would be lost too. If metrics
can't be written, it goes on.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, get_event_storage

from ...checkpoint import RandWireCheckpointer
from ...files import atomic_open, megabytes
from ...runs import ANEW, EVALUATIONS, RunFolder
from ...weight_files.checksum import is_whole
from ...weight_files.reading import iteration_of

Contents = Mapping[Path, bytes | None]  # the contents of files; None for a missing file

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's PeriodicCheckpointer, which deletes an older checkpoint only if the new one is
    complete, also counts those from before a resumption, and warns if the disk can't hold two."""

    max_to_keep: int | None

    def before_train(self) -> None:
        super().before_train()
        earlier = RunFolder(self.checkpointer.save_dir).periodic_checkpoints()
        start = self.trainer.start_iter  # checkpoints of later iterations will be written again
        self.recent_checkpoints = [str(path) for i, path in earlier.items() if i < start]
        folder, size = self.checkpointer.save_dir, self.checkpointer.size()
        if not self.trainer.start_iter:  # SGD has no momentum yet
            weights = self.checkpointer.model.parameters()
            size += sum(w.numel() * w.element_size() for w in weights if w.requires_grad)
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            logger.warning(
                f"{folder} has {megabytes(free)} free, and a checkpoint takes about "
                f"{megabytes(size)}: there is no room for two. The training ends where one can't "
                "be written; make room, or set another OUTPUT_DIR"
            )

    def step(self, iteration: int, **kwargs: Any) -> None:
        most, self.max_to_keep = self.max_to_keep, None  # else Detectron2 deletes without a check
        super().step(iteration, **kwargs)
        self.max_to_keep = most
        if most is None or (iteration + 1) % self.period:
            return
        newest = os.path.join(self.checkpointer.save_dir, f"{self.file_prefix}_{iteration:07d}.pth")
        self.recent_checkpoints.append(newest)
        if len(self.recent_checkpoints) > most and not is_whole(newest):
            logger.warning(f"{newest} is damaged: {self.recent_checkpoints[0]} is kept beside it")
            return
        while len(self.recent_checkpoints) > most:
            oldest = self.recent_checkpoints.pop(0)
            if os.path.isfile(oldest):
                os.remove(oldest)


def set_earlier_aside(folder: str, resume: bool, weights: str) -> str:
    """Move the files of an earlier training in OUTPUT_DIR into its subfolder earlier_N, unless the
    new training resumes it: else they would seem to be the new training's. All processes of the
    new training call this, once it has the lock and before it reads or writes in OUTPUT_DIR.

    Args:
        weights: MODEL.WEIGHTS.

    Returns:
        A line for the new training's log; "" if there is nothing to tell.
    """
    run = RunFolder(folder)
    left = run.left(weights) if comm.is_main_process() else []
    if not left or (resume and run.can_resume):
        return ""
    aside = next(path for i in count(1) if not (path := run.path / f"earlier_{i}").exists())
    aside.mkdir()
    # These are copied, not moved: --config-file may be one of them; a notebook has the log open.
    for path in (run.config_file, run.detector_file, run.log_file):
        if path.is_file():
            shutil.copy2(path, aside)
    if run.log_file.is_file():
        os.truncate(run.log_file, 0)
    for path in left:
        path.rename(aside / path.name)
    _keep_with_weights(run, RunFolder(aside))
    size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
    return (
        f"The checkpoints, metrics and evaluations of an earlier training are in {aside} now: "
        f"{megabytes(size)}; delete that folder if nobody needs it"
    )


def resumed_config(folder: str, resume: bool) -> Contents:
    """The config files of a training that is to be resumed, which ``default_setup`` will overwrite;
    empty in other processes than the main one."""
    run = RunFolder(folder)
    if not (resume and run.can_resume and comm.is_main_process()):
        return {}
    return _contents((run.config_file, run.pickled_config))


@contextmanager
def config_kept(before: Contents) -> Iterator[None]:
    """Restore the earlier config files during the block, which may refuse to resume; if it
    succeeds, write the new ones again.

    Args:
        before: the return value of ``resumed_config``.
    """
    now = _contents(before)
    _write(before)
    yield
    _write(now)


def _contents(paths: Iterable[Path]) -> Contents:
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def _write(contents: Contents) -> None:
    for path, content in contents.items():
        if content is None:
            path.unlink(missing_ok=True)
            continue
        with atomic_open(path, "wb") as f:
            f.write(content)


def _keep_with_weights(run: RunFolder, aside: RunFolder) -> None:
    """Correct the paths in the results of evaluations whose weights were moved to ``aside``."""
    found = (aside.path / EVALUATIONS).glob("*/results.json")
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns):  # the last stays the last
        folder = RunFolder(path.parent)
        with suppress(ValueError):  # damaged
            evaluation = folder.evaluation()
            training = os.path.abspath(aside.path)
            weights = os.path.join(training, os.path.basename(evaluation.weights))
            if evaluation.training == os.path.abspath(run.path) and os.path.isfile(weights):
                folder.write_evaluation(replace(evaluation, weights=weights, training=training))


def end_of_what_counts(trainer: Any) -> int:
    """The iteration below which a resumed run's evaluations count; the run repeats later ones.

    The final evaluation of a run that had ended has the iteration after the last one. It counts if
    the run now becomes longer.
    """
    start = int(trainer.start_iter)
    return start + (trainer.earlier_max_iter == start < trainer.max_iter)


def save_end(checkpointer: RandWireCheckpointer, start_iter: int, max_iter: int) -> None:
    """Write model_final.pth, if a resumed training was killed just before that; an existing file
    may be damaged, or of a shorter training."""
    final = RunFolder(checkpointer.save_dir).final_checkpoint
    if start_iter >= max_iter and iteration_of(final) != start_iter - 1:
        checkpointer.save("model_final", iteration=start_iter - 1)


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's PeriodicWriter, which also writes at each evaluation, does not end the training
    if it can't write, and marks in metrics.json where a resumed training repeats iterations.

    Args:
        writers: the writers to call.
        eval_period: the iterations from one evaluation to the next; 0 for none.
        period: the iterations from one line of other metrics to the next.
    """

    def __init__(self, writers: Sequence[EventWriter], eval_period: int, period: int = 20) -> None:
        super().__init__([_Tolerant(writer) for writer in writers], period)
        self._eval_period = eval_period
        self._json = [writer for writer in writers if isinstance(writer, JSONWriter)]

    def before_train(self) -> None:
        super().before_train()
        start = self.trainer.start_iter
        end = end_of_what_counts(self.trainer) if start else 0
        # Without a start, they are of a training that was killed ahead of its first checkpoint.
        written = RunFolder(self.trainer.cfg.OUTPUT_DIR).iterations()
        for writer in self._json if written else ():
            writer._last_write = max((i for i in written if i < start), default=-1)
            if start < self.trainer.max_iter and any(i >= end for i in written):
                writer._file_handle.write(json.dumps({"iteration": end, ANEW: True}) + "\n")

    def after_step(self) -> None:
        if self._evaluates():
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()

    def after_train(self) -> None:
        # If an evaluation has failed, its iteration gets no line, so that --resume repeats it.
        if self.trainer.iter < self.trainer.max_iter and self._evaluates():
            for writer in self._writers:
                writer.close()
        else:
            super().after_train()

    def _evaluates(self) -> bool:
        return bool(self._eval_period) and (self.trainer.iter + 1) % self._eval_period == 0


class _Tolerant(EventWriter):
    """A writer that logs once that it can't write, and writes the oldest values first.

    So in metrics.json an iteration is lower than the one before it only where a resumed training
    began.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failed = False

    def write(self) -> None:
        latest = get_event_storage().latest()
        in_order = sorted(latest.items(), key=lambda item: item[1][1])
        latest.clear()
        latest.update(in_order)
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Any) -> None:
        try:
            action()
        except OSError as e:
            if not self._failed:
                logger.warning(
                    f"{type(self._writer).__name__} can't write ({e}): its figures are lost while "
                    "this lasts, and the training goes on"
                )
            self._failed = True
