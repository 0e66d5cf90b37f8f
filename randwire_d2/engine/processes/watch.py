"""Detect a process of a group that dies or hangs, and end the others with a line that names it.

Without this they would wait in an all-reduce for the 30 minutes of NCCL's and gloo's timeout. In
each process a thread writes its state to the group's store every few seconds, through a connection
of its own. The first process reads all states and judges; the others read its judgement, and check
that it is alive. An evaluation may take as long as it needs: all processes are expected to progress
only between the beginning and the end of an iteration. Most iterations take about the same time, so
a hanging one is noticed within a minute, unless it compiles or waits for images, which may take
minutes.
"""

import faulthandler
import functools
import gc
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from ...upstream import hush_upstream

logger = logging.getLogger(__name__)

BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # a process without a sign of life for so long in an iteration is dead or stopped
LOST = 10.0  # the same, if another process has already lost its connection
# The same outside of iterations, where json.loads of a large data set, say, blocks all threads.
PATIENCE = 600.0
HANG = 40.0  # an iteration of so many seconds hangs, if it takes TIMES as long as the others
TIMES = 20
SLOW = 60.0  # an iteration of so many seconds is logged in any case
HANG_TIMEOUT = 600  # seconds; the default of a LazyConfig's train.hang_timeout

# hooks/finite.py reads the losses, which waits for the GPU, and so for NCCL's messages.
_WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "hooks/finite.py")
_PATIENT = ("torch/utils/data/", "torch/_dynamo/", "torch/_inductor/", "/triton/")


@dataclass(frozen=True)
class State:
    """The progress of a process.

    Attributes:
        phase: "iteration"; "between" two iterations, as during an evaluation; "lost" after an error
            of its connections; "failed" after an error of its own; "done".
        iteration: the last iteration that it has begun.
        beat: a counter, which distinguishes this sign of life from the last.
        where: the line that it executes, or its error.
        waits: whether it waits there for other processes.
        patient: whether it waits there for images, or compiles, which may take minutes.
    """

    phase: str = "between"
    iteration: int = -1
    beat: int = 0
    where: str = ""
    waits: bool = False
    patient: bool = False


class Judge:
    """Decides from the states of processes which one has died or hangs, if any.

    Args:
        names: the names of the processes.
        timeout: the most seconds that an iteration may take; 0 for no limit.
        of_all: whether these are all processes. If not, hanging is not judged, since a process may
            wait for one that is not among these.
    """

    def __init__(self, names: Sequence[str], timeout: float, of_all: bool = True) -> None:
        self._names, self._of_all = names, of_all
        self._timeout = timeout
        self._usual: deque[float] = deque(maxlen=100)  # seconds from one state change to the next
        self._last: list[State] = []
        self._alive: list[float] = []
        self._moved = 0.0
        self._is_warned = False

    def __call__(self, states: Sequence[State], now: float) -> str:
        """A line that names the process and the reason, or "".

        Args:
            states: the states of the processes.
            now: the time in seconds, of a clock that stops while this process is suspended.
        """
        if not self._last:
            self._last, self._alive, self._moved = list(states), [now] * len(states), now
        for i, (state, last) in enumerate(zip(states, self._last)):
            if state != last:
                self._alive[i] = now
            if (state.phase, state.iteration) != (last.phase, last.iteration):
                if last.phase == "iteration" and now > self._moved:
                    self._usual.append(now - self._moved)
                self._moved, self._is_warned = now, False
        self._last = list(states)
        for state, name in zip(states, self._names):
            if state.phase == "failed":
                return f"{name} has failed: {state.where}"
        return self._silent(now) or (self._hanging(now) if self._of_all else "")

    def _silent(self, now: float) -> str:
        lost = any(state.phase == "lost" for state in self._last)
        found = []  # of each process its name, the seconds of its silence, and the most it may have
        for state, name, alive in zip(self._last, self._names, self._alive):
            usual = SILENCE if state.phase == "iteration" else PATIENCE
            if state.phase not in ("done", "lost"):
                found.append((name, now - alive, LOST if lost else usual))
        if all(silence <= most for _, silence, most in found):
            return ""
        # After a process dies, a launcher ends the others, which are then silent almost as long.
        silent = {name: silence for name, silence, most in found if silence > most - 2 * BEAT}
        who = f"{', '.join(silent)} {'have' if len(silent) > 1 else 'has'}"
        return f"{who} given no sign of life for {max(silent.values()):.0f} s: dead, or stopped"

    def _hanging(self, now: float) -> str:
        seconds = now - self._moved
        at_work = [i for i, state in enumerate(self._last) if state.phase != "done"]
        if not at_work or any(self._last[i].phase != "iteration" for i in at_work):
            return ""
        first = min(self._last[i].iteration for i in at_work)
        behind = [i for i in at_work if self._last[i].iteration == first]
        blamed = [i for i in behind if not self._last[i].waits] or behind
        who = ", ".join(f"{self._names[i]} is at {self._last[i].where}" for i in blamed)
        line = f"iteration {first} has taken {seconds:.0f} s: {who}"
        is_patient = any(self._last[i].patient for i in blamed)
        if self._timeout and seconds > (self._timeout if is_patient else self._limit()):
            return line
        if seconds >= SLOW and not self._is_warned:
            self._is_warned = True
            limit = f"the limit is {self._timeout:.0f} s" if self._timeout else "there is no limit"
            logger.warning(f"{line}; {limit}, SOLVER.HANG_TIMEOUT")
        return ""

    def _limit(self) -> float:
        """The most seconds for an iteration in which no blamed process waits for images."""
        if len(self._usual) < TIMES:  # the first iterations compile, and time stages both ways
            return self._timeout
        return min(self._timeout, max(HANG, TIMES * max(self._usual)))


class Watch:
    """The watch of this process, which writes its state and reads the judgement.

    Args:
        store: a connection to the group's store that nothing else uses.
        timeout: see ``Judge``.
    """

    def __init__(self, store: distributed.Store, timeout: float) -> None:
        self._rank, size = comm.get_rank(), comm.get_world_size()
        found = comm.all_gather((socket.gethostname(), uuid.uuid4().hex))
        self._names = [f"process {i} of {size} ({host})" for i, (host, _) in enumerate(found)]
        # torchrun's store keeps its entries over a restart, so each start has its own prefix.
        self._store = distributed.PrefixStore(found[0][1], store)
        is_first = self._rank == 0
        self._judge = Judge(self._names if is_first else self._names[:1], timeout, is_first)
        self._state, self._beat = State(), 0
        self._since, self._shown = time.monotonic(), ""
        self._looked, self._slept, self._looks = time.monotonic(), 0.0, 0
        self._stop = threading.Event()
        self._all_done = threading.Event()
        self._write()
        if self._rank == 0:
            self._store.set("judgement", "")
        comm.synchronize()  # all processes have written their states
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def enter(self, phase: str, iteration: int | None = None, where: str = "") -> None:
        """Set the phase of this process."""
        number = self._state.iteration if iteration is None else iteration
        self._state, self._since = State(phase, number, where=where), time.monotonic()
        if phase == "iteration" and self._shown == "between":
            self._write()  # at once, so that a death in this iteration is noticed soon

    def stop(self) -> None:
        """End the watch of this process, and wait for its thread. If Python ended while the thread
        is in the store's C++ code, it would abort the process. The guard limits the wait."""
        self._stop.set()
        self._thread.join()

    def finish(self) -> None:
        """End the watch after this process has done its work."""
        self.enter("done")
        if self._rank == 0:  # the store may end with this process
            self._all_done.wait()
        self._stop_and_write()

    def fail(self, error: BaseException) -> None:
        """Report an error; if it comes from a lost connection, first wait for the judgement."""
        where = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, distributed.DistError) or "gloo" in where:
            self.enter("lost", where=where)
            self._thread.join(SILENCE + 3 * BEAT)
        self.enter("failed", where=where[:500])
        self._stop_and_write()

    def _stop_and_write(self) -> None:
        self.stop()
        with suppress(RuntimeError):
            self._write()

    def _run(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                judgement = self._look()
            except RuntimeError:  # DistError, whose class differs between versions of PyTorch
                judgement = self._no_answer
            self._looks += 1
            if judgement and not self._stop.is_set():  # else the process ends by itself
                self._end(judgement)

    def _guard(self) -> None:
        """End this process if the store does not answer; its own timeout does not always work."""
        looks = missing = 0
        while self._thread.is_alive() or not self._stop.is_set():
            self._thread.join(BEAT)
            missing = missing + 1 if self._looks == looks else 0
            looks = self._looks
            if missing * BEAT > SILENCE:
                self._end(self._no_answer)

    @property
    def _no_answer(self) -> str:
        own = f" ({self._state.where})" if self._state.phase == "failed" else ""
        return f"{self._names[0]}, or its launcher, does not answer: dead, or stopped{own}"

    def _look(self) -> str:
        now = time.monotonic()
        # If all processes were suspended, none must seem dead after that.
        self._slept += max(0.0, now - self._looked - 3 * BEAT)
        self._looked = now
        self._write()
        judgement = self._store.get("judgement").decode()
        if not judgement:
            read = range(len(self._names) if self._rank == 0 else 1)
            states = [State(**json.loads(self._store.get(str(i)))) for i in read]
            if all(state.phase == "done" for state in states):
                self._all_done.set()
            judgement = self._judge(states, now - self._slept)
            if judgement and self._rank == 0:
                self._store.set("judgement", judgement)
        if judgement:  # the others read it; one that has failed ends first, for its launcher
            time.sleep(3 * BEAT)
        return judgement

    def _write(self) -> None:
        self._beat += 1
        state = replace(self._state, beat=self._beat)  # the main thread may replace it meanwhile
        is_short = time.monotonic() - self._since < BEAT
        if state.phase == "between" and state.iteration >= 0 and is_short:
            state = replace(state, phase="iteration")  # so short a pause is no evaluation
        if state.phase == "iteration":
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            state = replace(state, **_position(frame))
        self._shown = state.phase
        self._store.set(str(self._rank), json.dumps(asdict(state)))

    def _end(self, judgement: str) -> None:
        line = f"{judgement}. This process ends; --resume goes on from the last checkpoint"
        logger.error(line)
        if self._rank:  # other processes than the first one log only to a file
            print(f"{self._names[self._rank]}: {line}", file=sys.stderr, flush=True)
        if " has taken " in judgement:
            faulthandler.dump_traceback()
        logging.shutdown()
        os._exit(1)


def _connect() -> distributed.Store | None:
    """Open a new connection to the group's store, for one thread; None if the store is a file."""
    store = _get_default_store()
    while isinstance(store, distributed.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, distributed.TCPStore):
        return None
    return distributed.TCPStore(
        store.host,
        store.port,
        is_master=False,
        timeout=timedelta(seconds=SILENCE),
        wait_for_workers=False,
    )


def _position(frame: FrameType) -> dict[str, Any]:
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"
    files = [call.f_code.co_filename for call, _ in traceback.walk_stack(frame)]
    # Only PyTorch's innermost calls tell whether it waits: DistributedDataParallel or autograd
    # are callers of all that a model does.
    last = next((i for i, file in enumerate(files) if "/torch/" not in file), len(files))
    waits, patient = (
        any(part in file for file in some for part in parts)
        for some, parts in ((files[: last + 1], _WAITING), (files, _PATIENT))
    )
    return {"where": where, "waits": waits, "patient": patient}


_current: Watch | None = None


@contextmanager
def watch(timeout: float) -> Iterator[None]:
    """Watch the processes of the group during the block, which all of them enter."""
    global _current
    store = _connect() if comm.get_world_size() > 1 else None
    _current = None if store is None else Watch(store, timeout)
    try:
        yield
        if _current is not None:
            _current.finish()
    except Exception as e:
        if _current is not None:
            _current.fail(e)
        raise
    finally:
        end_watch()


def watched(main: Callable[..., Any], timeout: float, *args: Any) -> Any:
    """Call ``main(*args)`` in a process of a group, with a ``watch``; then end the group."""
    hush_upstream()
    _fork_apart_from_messages()
    with watch(timeout):
        result = main(*args)
    if distributed.is_initialized():
        _end_group()
    return result


@functools.cache  # a registered function can't be removed
def _fork_apart_from_messages() -> None:
    """Delay forks, so that none happens right after one of gloo's messages.

    At that moment gloo's thread enters Python to free its tensors. A worker that is forked then
    never starts: it waits for a lock that only this thread would release, which the worker does not
    have (github.com/python/cpython/issues/112275).
    """
    if sys.version_info < (3, 12):
        os.register_at_fork(before=functools.partial(time.sleep, 0.01))


def _end_group() -> None:
    """End the group and its threads before the process ends.

    NCCL warns if the group ends with the process. A thread of gloo may free the tensors of the last
    message later, for which it needs Python's lock: if Python ends just then, the process aborts.
    The group waits for its threads when the last reference to it is deleted.
    """
    distributed.destroy_process_group()
    # Detectron2 keeps its own references, and would use them for a later group, too.
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # frees a DistributedDataParallel in a reference cycle


def leave_iteration() -> None:
    """Report that this process is between two iterations, where it may take as long as it needs."""
    if _current is not None:
        _current.enter("between")


def end_watch() -> None:
    """End the watch; all processes call this when they are about to end together."""
    global _current
    if _current is not None:
        _current.stop()
    _current = None


class ReportProgress(HookBase):
    """Reports each iteration to the watch; it belongs ahead of all hooks that communicate."""

    def before_step(self) -> None:
        if _current is not None:
            _current.enter("iteration", self.trainer.iter)

    def after_step(self) -> None:
        leave_iteration()
