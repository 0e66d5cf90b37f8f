"""Signals that end a training: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C leave a checkpoint.

All processes stop after the same iteration, whichever of them received the signal. Then the signal
ends them, so that a shell or another parent sees 128 + its number as the exit status. A program
that has called the tool as a function goes on. Launchers repeat signals that the processes have
already received, so only a second Ctrl-C, and no other signal, ends them at once.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, NoReturn, TypeVar

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from .agreement import largest
from .watch import end_watch, leave_iteration

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# Whether a training is running; shared with the workers of its loaders.
_training = RawValue("b", 0)
_Loader = TypeVar("_Loader")


class Interrupted(KeyboardInterrupt):
    """A signal has ended a training, or a prediction.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopOnSignal(HookBase):
    """Ends a training that has received a signal, between two iterations, with a checkpoint.

    If the signal comes during an evaluation, the training ends after it. During the final
    evaluation, when model_final.pth is on disk, signals have their usual effect.

    It belongs ahead of the hooks that evaluate.

    Args:
        check: raises an error in all processes if the weights should not be saved.

    Raises:
        Interrupted: in all processes, once the checkpoint is written.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._got = 0
        self._pid = 0
        self._before: dict[signal.Signals, Any] = {}

    def before_train(self) -> None:
        self._pid = os.getpid()
        self._before = _handle(self._note)
        _training.value = 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        # An evaluator's forked pool (panopticapi's) ends workers by SIGTERM, and waits for them.
        in_worker = os.getpid() != self._pid and number == signal.SIGTERM
        if in_worker or (self._got and number == signal.SIGINT):
            end_by(number)
        self._got = self._got or number

    def before_step(self) -> None:
        number = largest(self._got)
        if not number:
            return
        trainer = self.trainer
        trainer.iter -= 1  # the last completed iteration
        name = f"model_{trainer.iter:07d}"  # as PeriodicCheckpointer names them
        leave_iteration()  # writing the checkpoint may take minutes on a slow disk
        if trainer.iter >= trainer.start_iter:
            self._check()
            trainer.checkpointer.save(name, iteration=trainer.iter)
        logger.warning(
            f"{signal.Signals(number).name} ends the training after {trainer.iter + 1} iterations; "
            "--resume goes on"
        )
        _end_together(number)

    def after_train(self) -> None:
        _training.value = 0
        _restore(self._before)
        if self.trainer.iter >= self.trainer.max_iter and (number := largest(self._got)):
            _end_together(number)


def _end_together(number: int) -> NoReturn:
    comm.synchronize()  # the first process has written; until then the others are still watched
    end_watch()
    comm.synchronize()  # when the first one ends, its launcher kills the others
    raise Interrupted(number)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, which Slurm and ``docker stop`` send, end the block as Ctrl-C does.

    Raises:
        Interrupted: at the first SIGTERM; later ones, which a launcher repeats, are ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted(number)

    before = _handle(interrupt, (signal.SIGTERM,))
    try:
        yield
    finally:
        _restore(before)


def end_by(number: int) -> None:
    """End this process by the signal's default action."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_training(number: int) -> NoReturn:
    """End this process by the signal, if it is one of several; else leave that to the caller.

    Raises:
        Interrupted: there is only this process.
    """
    if comm.get_world_size() > 1:
        end_interrupted(number)
    raise Interrupted(number)


def end_interrupted(number: int) -> None:
    """Flush the log and the standard streams, and end this process by the signal."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    end_by(number)


@contextmanager
def signals_for_children() -> Iterator[None]:
    """Pass signals on to the processes that ``launch`` starts in the block.

    Ctrl-C is passed on as SIGUSR1, because a terminal sends Ctrl-C to the children, too, and a
    second one would end them at once.

    Raises:
        ChildProcessError: one of the processes has died.
        Interrupted: a signal has ended the processes.
    """
    got: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        at_once = bool(got) and number == signal.SIGINT
        got.append(number)
        handed_on = signal.SIGUSR1 if number == signal.SIGINT else number
        for child in multiprocessing.active_children():
            if child.pid is not None:
                # A process that waits in a collective handles no signal; only SIGKILL ends it.
                os.kill(child.pid, signal.SIGKILL if at_once else handed_on)
        if at_once:
            end_by(number)

    before = _handle(hand_on)
    try:
        yield
    except ProcessExitedException as e:
        if not got or e.signal_name is None:
            how = f"was ended by {e.signal_name}" if e.signal_name else "ended, as it says above"
            raise ChildProcessError(
                f"process {e.error_index} of this machine {how}, and so the others were ended; "
                "--resume goes on from the last checkpoint"
            ) from e
        raise Interrupted(got[0]) from e
    finally:
        _restore(before)


def _handle(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] = SIGNALS
) -> dict[signal.Signals, Any]:
    """Set the handler of the signals and return the handlers before; in other threads than the main
    one, which can't set any, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(before: Mapping[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def guard_workers(loader: _Loader) -> _Loader:
    """Make the workers of a loader ignore signals during a training; return the loader.

    Launchers send signals to whole process groups, and an iteration can't end without its workers.

    Args:
        loader: a DataLoader, or an object with one as its ``dataset``, like Detectron2's loaders.
    """
    inner: Any = loader
    while inner is not None and not isinstance(inner, DataLoader):
        inner = getattr(inner, "dataset", None)
    if inner is not None:
        inner.worker_init_fn = partial(_begin_worker, inner.worker_init_fn, _training)
    return loader


def _begin_worker(before: Callable[[int], None] | None, training: Any, worker: int) -> None:
    def end_unless_training(number: int, frame: FrameType | None) -> None:
        if not training.value:
            end_by(number)

    _handle(end_unless_training)
    if before is not None:
        before(worker)
