"""Processes of a group that die, stop, hang or fail: who is named, who ends, and who must not."""

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partialmethod
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from helpers import FORK_SERVER, PATIENCE
from launching import free_port
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from randwire_d2.config import detector_config
from randwire_d2.engine import check_solver
from randwire_d2.engine.hooks.finite import FiniteTrainer
from randwire_d2.engine.processes import watch
from randwire_d2.engine.processes.signals import Interrupted, StopOnSignal, end_interrupted
from randwire_d2.engine.processes.watch import Judge, ReportProgress, State, watched

NAMES = ["process 0 of 2 (a)", "process 1 of 2 (b)"]

# -------------------------------------------------------------------------------------------------
# The judge
# -------------------------------------------------------------------------------------------------


def judged(judge: Judge, *states: State, until: float, since: float = 0.0) -> str:
    """What is said of states that stay, while all processes give signs of life."""
    judge(states, since)
    now = since
    while now < until:
        now += 1
        alive = [State(**{**vars(state), "beat": round(now)}) for state in states]
        if judgement := judge(alive, now):
            return judgement
    return ""


@pytest.mark.parametrize(
    ("phase", "silence", "is_dead"),
    [
        ("iteration", watch.SILENCE - 1, False),
        ("iteration", watch.SILENCE + 1, True),
        # A library that computes AP, or reads a large data set, may stop all threads.
        ("between", watch.PATIENCE - 1, False),
        ("between", watch.PATIENCE + 1, True),
        ("done", 599, False),
    ],
)
def test_a_silent_process_is_named(phase: str, silence: float, is_dead: bool) -> None:
    """Wrong: the dead are waited for, or those who are busy are taken for dead."""
    judge = Judge(NAMES, timeout=600)
    states = [State("iteration", 7), State(phase, 7)]
    judge(states, 100.0)
    said = judge([State("iteration", 7, beat=1), states[1]], 100.0 + silence)
    expected = f"{NAMES[1]} has given no sign of life for {silence:.0f} s: dead, or stopped"
    assert said == (expected if is_dead else "")


def test_a_lost_connection_names_the_other_end_sooner() -> None:
    """Wrong: who has lost a connection is taken for the one who broke it."""
    judge = Judge(NAMES, timeout=600)
    states = [State("lost", 7, where="gloo: closed by peer"), State("iteration", 7)]
    judge(states, 0.0)
    assert judge(states, watch.LOST - 1) == ""
    assert judge(states, watch.LOST + 1).startswith(NAMES[1])


def test_who_was_ended_with_the_first_is_not_named_alone() -> None:
    """Wrong: of the processes that a launcher ended, as another one had died, the first in order is
    taken for that one, whose own log or GPU nobody looks at then."""
    judge = Judge([f"process {i} of 4 (a)" for i in range(4)], timeout=600)
    lost, works = State("lost", 7, where="gloo"), State("iteration", 7)
    judge([lost, works, works, works], 0.0)
    alive = State("iteration", 7, beat=1)
    assert judge([lost, works, alive, alive], watch.BEAT) == ""  # seen a beat later
    later = [State("lost", 7, beat=2), works, alive, State("iteration", 7, beat=2)]
    assert judge(later, watch.LOST) == ""
    said = judge(later, watch.LOST + 1)
    assert said.startswith("process 1 of 4 (a), process 2 of 4 (a) have given no sign of life for")


def test_an_iteration_that_hangs_names_who_is_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: the one that waits is blamed, or nobody knows for ten minutes that it hangs."""
    waits = State("iteration", 8, where="all_reduce", waits=True)
    reads = State("iteration", 7, where="image.py:3, read")
    expected = f"iteration 7 has taken 601 s: {NAMES[1]} is at image.py:3, read"
    assert judged(Judge(NAMES, 600), waits, reads, until=700) == expected
    (record,) = caplog.records
    assert "iteration 7 has taken 60 s" in record.message
    # In the same iteration; and both wait, as in an all-reduce of different lengths.
    same = State("iteration", 8, where="image.py:3, read")
    assert NAMES[0] not in judged(Judge(NAMES, 600), waits, same, until=700)
    assert judged(Judge(NAMES, 600), waits, waits, until=700).count("all_reduce") == 2


def test_who_does_not_know_of_all_does_not_say_who_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: the one that hangs takes the first process, which waits for it, for that; and ends
    before the first has said who it is."""
    waits = State("iteration", 7, where="all_reduce", waits=True)
    assert judged(Judge(NAMES[:1], 600, of_all=False), waits, until=700) == ""
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "patient", "limit"),
    [(1, False, watch.HANG), (1, True, 600), (10, False, 200), (100, False, 600)],
)
def test_an_iteration_that_takes_longer_than_others_hangs(
    seconds: float, patient: bool, limit: float
) -> None:
    """Wrong: the others wait for minutes, or an iteration that is as slow as all is one too many;
    a file server that stands still, or a compiler, ends a training."""
    judge, now = Judge(NAMES, 600), 0.0
    for i in range(watch.TIMES + 1):
        assert not judge([State("iteration", i)] * 2, now)
        now += seconds
    waits = State("iteration", watch.TIMES, where="all_reduce", waits=True)
    hangs = State("iteration", watch.TIMES, where="model.py:3, forward", patient=patient)
    since = now - seconds  # of the last move
    said = judged(judge, hangs, waits, since=since, until=since + limit)
    assert said == ""
    said = judged(judge, hangs, waits, since=since + limit, until=since + limit + 2)
    expected = f"iteration {watch.TIMES} has taken {limit + 1:.0f} s: {NAMES[0]} is at model.py:3"
    assert said.startswith(expected)


def test_an_evaluation_takes_as_long_as_it_likes(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: the slow evaluation of the first process ends the training."""
    evaluates, waits = State("between", 7), State("iteration", 8, waits=True)
    assert judged(Judge(NAMES, 600), evaluates, waits, until=1500) == ""
    assert judged(Judge(NAMES, 0), waits, waits, until=1500) == "", "no limit"
    (record,) = caplog.records
    assert record.message.endswith("there is no limit, SOLVER.HANG_TIMEOUT")
    cfg = detector_config()
    cfg.SOLVER.HANG_TIMEOUT = 0
    check_solver(cfg)
    at_the_end = [State("between", 9), State("done", 9)]
    assert judged(Judge(NAMES, 600), *at_the_end, until=1500) == ""


class Noting(torch.nn.Linear):
    """Notes, of its forward and its backward pass, what the watch makes of where they stand."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.waits: dict[str, bool] = {}

    def note(self, what: str, frame: FrameType) -> None:
        self.waits[what] = watch._position(frame)["waits"]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.note("forward", sys._getframe())
        y = super().forward(x)
        y.register_hook(lambda _: self.note("backward", sys._getframe()))
        return {"loss": y.sum()}


def test_who_computes_does_not_wait_and_who_reads_the_losses_does() -> None:
    """Wrong: with NCCL, whose messages the GPU waits for, and Python only where it reads the
    losses, those that wait are to blame, and not the one that hangs in its model."""
    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: model.note("step", sys._getframe()))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        trainer = FiniteTrainer(DistributedDataParallel(model), [torch.ones(1)], optimizer)
        trainer.image_names = lambda *_: []
        # Its caller reads the losses.
        trainer.figures = lambda: model.note("losses", sys._getframe(1)) or {}
        trainer.train(0, 1)
    finally:
        distributed.destroy_process_group()
    assert model.waits == {"forward": False, "backward": False, "losses": True, "step": False}


def gloo_threads() -> int:
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux alone names its threads")
def test_the_group_ends_with_what_was_called() -> None:
    """Wrong: NCCL warns at the end of each training that the group was not destroyed; a thread of
    gloo's that outlives it aborts a process that has done its work; or the next group of the
    process gets this one's local group."""

    def main() -> int:
        for _ in range(2):
            comm.create_local_process_group(1)
        comm.synchronize()
        group = comm._get_global_gloo_group()
        model = DistributedDataParallel(torch.nn.Linear(2, 2), process_group=group)
        model.circle = model  # as a trainer and its hooks have them
        model(torch.ones(1, 2)).sum().backward()
        return gloo_threads()

    gc.collect()
    before = gloo_threads()
    for _ in range(2):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        inside = watched(main, 0.0)
        assert inside > before or torch.__version__ < "2.10", "PyTorch 2.9 names no threads"
        assert not distributed.is_initialized()
        assert gloo_threads() == before and comm._LOCAL_PROCESS_GROUP is None


def test_a_fork_waits_for_what_gloo_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: before Python 3.12, one worker of thousands never starts, and the training hangs."""
    hooks: dict[str, Callable[[], None]] = {}
    monkeypatch.setattr(os, "register_at_fork", lambda **given: hooks.update(given))
    watch._fork_apart_from_messages.cache_clear()
    watched(lambda: None, 1.0)
    assert bool(hooks) == (sys.version_info < (3, 12))
    for wait in hooks.values():
        began = time.perf_counter()
        wait()
        assert time.perf_counter() - began >= 0.01


def test_a_failure_is_passed_on() -> None:
    judge = Judge(NAMES, timeout=600)
    said = judge([State("iteration", 3), State("failed", 3, where="ValueError: a bug")], 0.0)
    assert said == f"{NAMES[1]} has failed: ValueError: a bug"


@pytest.mark.parametrize("rank", [0, 1])
def test_who_has_failed_ends_before_the_others(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a launcher, which reports the first process that ends, names one that has ended
    because of another one's error, and not that error."""
    found = [("a", "x"), ("b", "y")]
    group = {"get_rank": lambda: rank, "get_world_size": lambda: 2, "all_gather": lambda _: found}
    monkeypatch.setattr(watch, "comm", SimpleNamespace(**group, synchronize=lambda: None))
    waited: list[float] = []
    monkeypatch.setattr(watch.time, "sleep", waited.append)
    monkeypatch.setattr(watch.threading.Thread, "start", lambda _: None)
    store = distributed.HashStore()
    own, other = watch.Watch(store, 0.0), distributed.PrefixStore("x", store)
    if rank:
        other.set("judgement", "")
    other.set(str(1 - rank), json.dumps(vars(State("failed", 3, where="ValueError: a bug"))))
    assert own._look() == f"{NAMES[1 - rank]} has failed: ValueError: a bug"
    assert waited == [3 * watch.BEAT]


# -------------------------------------------------------------------------------------------------
# Processes
# -------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What decides, from the mishap on, that a process is dead, or hangs; seconds.

    Ahead of it and after it nothing does: on a busy machine the living would be taken for dead.
    """

    silence: float = 60.0
    iteration: float = 0.0  # as long as it likes

    def apply(self) -> None:
        watch.SILENCE, watch.LOST = self.silence, self.silence / 2
        if watch._current is not None:
            watch._current._judge._timeout = self.iteration


class Loop(TrainerBase):
    """Ten iterations, each with an all-reduce, and in the fourth a mishap.

    Args:
        limits: of the time of the mishap.
        checkpoint: where SIGTERM leaves one.
    """

    def __init__(self, mishap: str, limits: Limits, checkpoint: Path) -> None:
        super().__init__()
        self.register_hooks([ReportProgress(), StopOnSignal(), Evaluation(mishap)])
        self._mishap, self._limits = mishap, limits
        self.checkpointer = SlowCheckpointer(checkpoint)

    def run_step(self) -> None:
        if self.iter == 5:  # the other one may evaluate until then
            Limits().apply()
        if self.iter == 3:
            self._limits.apply()
            if self._mishap.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[self._mishap])
            elif self._mishap == "hangs":
                time.sleep(1e6)
            elif self._mishap == "fails":
                raise ValueError("a bug")
            elif "slow store" in self._mishap:
                time.sleep(3 * watch.BEAT)  # until the watch asks it
                if "interrupted" in self._mishap:
                    raise KeyboardInterrupt
        distributed.all_reduce(torch.ones(3))


class Evaluation(HookBase):
    def __init__(self, mishap: str) -> None:
        self._is_slow = mishap == "evaluates"

    def after_step(self) -> None:
        if self._is_slow and self.trainer.iter == 3:
            assert watch._current is not None
            while watch._current._shown != "between":
                time.sleep(0.01)
            ctypes.PyDLL(None).sleep(12)  # which keeps the lock of all threads


class SlowCheckpointer:
    """Writes in the first process, longer than a process may be silent, or an iteration take."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, name: str, iteration: int) -> None:
        if comm.is_main_process():
            time.sleep(10)
            self._path.write_text(name)


def _loop(mishap: str, limits: Limits, checkpoint: Path) -> None:
    try:
        Loop(mishap, limits, checkpoint).train(0, 10)
    except Interrupted as e:
        end_interrupted(e.number)


def _process(rank: int, port: int, mishap: str, limits: Limits, log: Path) -> None:
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    watch.BEAT = 0.1
    Limits().apply()
    url = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    if "slow store" in mishap:
        watch.Watch._look = partialmethod(_look_slowly, watch.Watch._look)  # type: ignore
    with suppress(KeyboardInterrupt), watch.watch(0.0):
        _loop(mishap, limits, log.with_name("checkpoint"))
    assert "watch" not in [thread.name for thread in threading.enumerate()]


def _look_slowly(self: watch.Watch, look: Callable[[watch.Watch], str]) -> str:
    with suppress(RuntimeError):
        self._store.wait(["never"], timedelta(seconds=1))
    return look(self)


def run_two(
    mishaps: tuple[str, str], folder: Path, limits: Limits | None = None, victim: int = -1
) -> tuple[list[int], str]:
    """The exit statuses of two processes, and what those said that are no victim."""
    port = free_port()
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = [
        FORK_SERVER.Process(target=_process, args=(rank, port, mishap, limits or Limits(), log))
        for rank, (mishap, log) in enumerate(zip(mishaps, logs, strict=True))
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            if rank != victim:
                process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = "".join(log.read_text() for rank, log in enumerate(logs) if rank != victim)
    return [process.exitcode or 0 for process in processes], said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mishap", ["SIGKILL", "SIGSTOP", "hangs", "fails"])
def test_the_others_end_and_say_who(mishap: str, victim: int, tmp_path: Path) -> None:
    """Wrong: they wait for half an hour, or say that a connection was closed by some peer."""
    mishaps = ("", mishap) if victim else (mishap, "")
    statuses, said = run_two(mishaps, tmp_path, Limits(2.0, 4.0), victim)
    assert statuses[1 - victim] == 1
    name = f"process {victim} of 2 ({socket.gethostname()})"
    assert f"{name} " in said or f"{name}, or its launcher, " in said, said
    assert "--resume goes on from the last checkpoint" in said
    if mishap == "hangs":
        assert "test_watch.py" in said and "run_step" in said


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["slow store", "slow store, interrupted"])
def test_no_thread_is_left_in_the_store(mishap: str, tmp_path: Path) -> None:
    """Wrong: Python ends it there, amid C++, which aborts a process that has done its work."""
    statuses, said = run_two(("", mishap), tmp_path, victim=0 if "interrupted" in mishap else -1)
    assert statuses[1] == 0, said


@pytest.mark.slow
def test_a_slow_evaluation_is_waited_for(tmp_path: Path) -> None:
    """Wrong: a first process whose threads all stand still while it evaluates is taken for dead."""
    statuses, said = run_two(("evaluates", ""), tmp_path, Limits(8.0, 8.0))
    assert statuses == [0, 0], said


@pytest.mark.slow
def test_a_slow_checkpoint_is_waited_for(tmp_path: Path) -> None:
    """Wrong: a signal costs the checkpoint, if writing it takes longer than a process may be
    silent: the first one, which writes, takes the others for dead, and ends."""
    statuses, said = run_two(("SIGTERM", ""), tmp_path, Limits(8.0, 8.0))
    assert statuses == [-signal.SIGTERM] * 2, said
    assert (tmp_path / "checkpoint").read_text() == "model_0000003"
