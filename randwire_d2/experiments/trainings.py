"""Run a sweep's trainings: as processes on this machine, or as Slurm jobs through submitit."""

import fcntl
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import submitit
import torch

from ..engine.processes.slurm import Queue, has_ended
from ..files import atomic_open
from .sweep_run import Run

POLL = 5.0  # seconds between two checks of the runs
TAIL = 4000  # characters of a failed training's output that ``Run.failure`` keeps
# Exit statuses of trainings that were stopped without a failure, as by Slurm before its time limit.
ENDED = (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2)


@dataclass(frozen=True)
class Training:
    """A function that trains or evaluates a run in a process, and waits for its end.

    It resumes from the last checkpoint, so submitit can requeue it at Slurm's time limit.

    Attributes:
        run: the run.
        command: the interpreter and the path of the run's tool.
        preparation: the command that converts the run's initial weights; ``()`` if they need no
            conversion.
    """

    run: Run
    command: tuple[str, ...]
    preparation: tuple[str, ...] = ()

    def __call__(
        self,
        environment: Mapping[str, str] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Train or evaluate. A failure is not raised, but recorded in ``Run.failure``.

        Args:
            environment: variables in addition to this process's.
            stop: when it is set, the process is killed; this is not a failure.
        """
        flag = "--eval-only" if self.run.evaluates else "--resume"
        commands = [(*self.command, flag, *self.run.arguments)]
        if self.preparation and not self.run.is_converted:
            commands.insert(0, self.preparation)
        with open(self.run.lock, "w") as lock:
            if not take(lock):
                return  # another sweep's process, or one that a killed sweep left, has the run
            for command in commands:
                status = self._execute(command, lock, {**os.environ, **(environment or {})}, stop)
                if status != 0:
                    break
        if status and status not in ENDED:
            self._record(status)

    def _execute(
        self,
        command: Sequence[str],
        lock: IO[str],
        environment: Mapping[str, str],
        stop: threading.Event | None,
    ) -> int | None:
        """Run a command; returns its exit status, or None if ``stop`` was set before its end."""
        with open(self.run.folder / "output.txt", "ab") as out:
            child = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.fileno()],  # the lock is released when both processes have ended
                start_new_session=True,  # the child gets no Ctrl-C: this process ends it
            )
        try:
            while child.poll() is None and not (stop and stop.is_set()):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(0.5)
            return child.poll()
        finally:
            end(child)

    def checkpoint(self, *args: Any, **kwargs: Any) -> submitit.helpers.DelayedSubmission:
        """The job that submitit submits again when Slurm ends this one."""
        return submitit.helpers.DelayedSubmission(self, *args, **kwargs)

    def _record(self, status: int) -> None:
        with open(self.run.folder / "output.txt", "rb") as f:
            f.seek(max(0, os.path.getsize(f.name) - TAIL))
            said = f.read().decode(errors="replace")
        ended = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
        with atomic_open(self.run.failure) as f:
            f.write(f"{ended}\n{said}")


def take(lock: IO[str]) -> bool:
    """Lock a file; returns False if another process holds it for longer than a check of its state
    takes. On a file system without locks, as on some networks, every process gets it."""
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return True
    return False


def end(child: subprocess.Popen) -> None:
    """End a process that may still run: SIGTERM first, then SIGKILL."""
    child.terminate()  # it does nothing if the process has ended
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, in the notation of CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return tuple(map(str, range(count)))
    names = [name.strip() for name in given.split(",")]
    # A process sees only the first MIG instance, but each training can have its own.
    return tuple(names if count and names[0].startswith("MIG-") else names[:count])


@dataclass(frozen=True)
class Local:
    """Runs trainings on this machine.

    Attributes:
        jobs: the number of trainings at a time.
        num_gpus: the GPUs of each training; on a CPU, its processes.
        gpus: the GPUs for all trainings, as in CUDA_VISIBLE_DEVICES; ``()`` on a CPU.

    Raises:
        ValueError: a training needs more GPUs than there are.
    """

    jobs: int
    num_gpus: int = 1
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gpus and self.num_gpus > len(self.gpus):
            raise ValueError(
                f"--num-gpus {self.num_gpus}: there are {len(self.gpus)} "
                f"(CUDA_VISIBLE_DEVICES {','.join(self.gpus)}); choose at most that many"
            )

    @property
    def shares(self) -> bool:
        """Whether several trainings run on one GPU."""
        return 0 < len(self.gpus) < self.jobs * self.num_gpus

    def __call__(self, trainings: Sequence[Training], watch: Callable[[], None]) -> None:
        """Run trainings, and call ``watch`` every few seconds; an exception ends them all."""
        slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for i in range(self.jobs):
            slots.put(self._environment(i))
        stop = threading.Event()

        def train(training: Training) -> None:
            environment = slots.get()
            try:
                training(environment, stop)
            finally:
                slots.put(environment)

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(train, training) for training in trainings]
            try:
                while wait(futures, POLL).not_done:
                    watch()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        for future in futures:
            future.result()
        watch()

    def _environment(self, slot: int) -> dict[str, str]:
        if self.gpus:
            first = slot * self.num_gpus
            devices = [self.gpus[(first + i) % len(self.gpus)] for i in range(self.num_gpus)]
            return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * self.num_gpus))
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


@dataclass(frozen=True)
class Slurm:
    """Runs trainings on a Slurm cluster. A run whose job is in the queue is not submitted again.

    Attributes:
        queue: the queue for the jobs.
    """

    queue: Queue

    def __call__(self, trainings: Sequence[Training], watch: Callable[[], None]) -> None:
        """Submit trainings and wait for them; an exception ends the waiting, not the jobs.

        Raises:
            ValueError: Slurm or submitit refuses a job.
        """
        found = {training: self.job(training) for training in trainings}
        new = {_job_file(training): training for training, job in found.items() if job is None}
        jobs = [job for job in found.values() if job is not None]
        jobs += self.queue.submit(new) if new else []
        while jobs:
            if has_ended(jobs[0]):
                del jobs[0]
                continue
            watch()
            time.sleep(POLL)
        watch()

    def job(self, training: Training) -> submitit.Job | None:
        """The training's job if it is waiting or running; else None."""
        return self.queue.job(_job_file(training))


def _job_file(training: Training) -> Path:
    return training.run.folder / "slurm_job"
