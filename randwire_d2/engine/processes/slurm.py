"""Trainings as Slurm jobs, through submitit: a task per GPU, back in the queue when time is up.

Each task is submitit's process, whose child is the tool with the command line that was given, one
of a process group (torchrun.py). Before the time limit Slurm sends SIGUSR2 to the tasks: the first
has the training leave its checkpoint and end, and has the job put back into the queue.
"""

import argparse
import ast
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import submitit

from ...files import atomic_open
from ...text import one_line
from .signals import SIGNALS

logger = logging.getLogger(__name__)

FOLDER = "slurm"  # in OUTPUT_DIR: submitit's files, and the tasks' output
_REQUEUES = 1000  # at a time limit; that of a run which makes no progress is its own
_WARNING = 300  # seconds before the time limit: an iteration, an evaluation and a checkpoint


class Nodes(NamedTuple):
    """What ``--slurm`` asks for."""

    nodes: int
    gpus: int

    @classmethod
    def parse(cls, text: str) -> "Nodes":
        """
        Raises:
            argparse.ArgumentTypeError: ``text`` is not as in "2x8" or "2×8".
        """
        found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NODES×GPUS, such as 2x8: two nodes, and eight GPUs on each"
            )
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus}"


def add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Slurm")
    group.add_argument(
        "--slurm",
        type=Nodes.parse,
        metavar="NODES×GPUS",
        help="submit this command to Slurm, and return; 2x8 is 2 nodes with 8 GPUs (or processes "
        "on a CPU) each. The nodes must share the disk of OUTPUT_DIR. At the time limit the job "
        "returns to the queue; it resumes when it starts again",
    )
    group.add_argument("--partition", help="the job's partition (default: the cluster's)")
    group.add_argument(
        "--time-limit",
        type=int,
        metavar="MINUTES",
        help="the time limit of each start of the job (default: 1440)",
    )
    group.add_argument(
        "--slurm-option",
        action="append",
        metavar="NAME=VALUE",
        help="another parameter of submitit's AutoExecutor, such as mem_gb=200, cpus_per_task=12 "
        "or slurm_account=vision; repeat it for more",
    )


def is_submitted(args: argparse.Namespace) -> bool:
    """Whether a command line asks for a job, and this process isn't one of its tasks.

    Args:
        args: with or without the arguments of ``add_slurm_arguments``.

    Raises:
        ValueError: it can't be had, or makes no sense.
    """
    given = vars(args)
    if given.get("slurm") is None:
        for name in ("partition", "time_limit", "slurm_option"):
            if given.get(name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --slurm NODES×GPUS")
        return False
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "RANK" in os.environ:
        return False
    if "RANK" in os.environ:
        raise ValueError(
            f"--slurm {args.slurm}: torchrun has started the processes already; leave one out"
        )
    if (args.num_gpus, args.num_machines) != (1, 1):
        raise ValueError(
            f"--slurm {args.slurm} says how many processes there are; leave out --num-gpus and "
            "--num-machines"
        )
    if args.time_limit is not None and args.time_limit * 60 < 2 * _WARNING:
        raise ValueError(
            f"--time-limit {args.time_limit}: at least {2 * _WARNING // 60} minutes, of which the "
            f"last {_WARNING // 60} are for the checkpoint"
        )
    for name in ("sbatch", "srun"):
        if shutil.which(name) is None:
            raise ValueError(
                f"--slurm {args.slurm}: there is no {name} here; start it on a machine that "
                "submits to Slurm, or leave --slurm out"
            )
    parse_parameters(args.slurm_option or ())
    return True


def parse_parameters(given: Iterable[str]) -> dict[str, Any]:
    """Parameters of ``submitit.AutoExecutor``, of NAME=VALUE each: a number, a truth value or a
    list as Python writes it, or else a text.

    Raises:
        ValueError: there is no "=".
    """
    parameters: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"a parameter of Slurm's is NAME=VALUE; got {text!r}")
        parameters[name] = value
        with suppress(ValueError, SyntaxError):
            read = ast.literal_eval(value)
            if isinstance(read, bool | int | float | list | dict):  # nodes 3,4 are no tuple
                parameters[name] = read
    return parameters


@dataclass(frozen=True)
class Queue:
    """A cluster's queue.

    Attributes:
        folder: of submitit's files, on a disk that all nodes share.
        parameters: of ``submitit.AutoExecutor``: ``timeout_min``, ``slurm_partition``, …
    """

    folder: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def submit(self, calls: Mapping[Path, Callable[[], None]]) -> list[submitit.Job]:
        """Submit functions, each under the file that will hold the number of its job.

        Raises:
            ValueError: Slurm, or submitit, refuses.
        """
        try:
            executor = submitit.AutoExecutor(
                folder=self.folder, cluster="slurm", slurm_max_num_timeout=_REQUEUES
            )
            executor.update_parameters(**self.parameters)
            with executor.batch():
                jobs = [executor.submit(call) for call in calls.values()]
        # NameError: an unknown parameter; OSError: there is no sbatch.
        except (RuntimeError, TypeError, NameError, ValueError, OSError) as e:
            raise ValueError(f"Slurm: {one_line(e, 300)}") from e
        for file, job in zip(calls, jobs):
            with atomic_open(file) as f:
                f.write(job.job_id)
        return jobs

    def job(self, file: Path) -> submitit.Job | None:
        """The job whose number a file holds, if it waits or runs."""
        try:
            job: submitit.Job = submitit.SlurmJob(self.folder, file.read_text())
        except FileNotFoundError:
            return None
        return None if job.done(force_check=True) else job


class Task:
    """What each task of a training's job calls.

    Args:
        tool: the command that starts the tool, without arguments.
        arguments: the command line that it was given, ``--slurm`` included.
    """

    def __init__(self, tool: Sequence[str], arguments: Sequence[str]) -> None:
        self.tool = tuple(tool)
        self.arguments = tuple(arguments)

    def __call__(self) -> None:
        there = submitit.helpers.TorchDistributedEnvironment()
        there.export(set_cuda_visible_devices=False, overwrite=True)
        # Slurm counts every restart: at the time limit, after a node's failure, a preemption.
        again = ["--resume"] if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else []
        child = self._child = subprocess.Popen([*self.tool, *again, *self.arguments])

        def hand_on(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        signal.signal(signal.SIGTERM, hand_on)
        status = child.wait()
        # A task that fails takes the others along, of which the first may still have to requeue.
        if status and -status not in SIGNALS:
            sys.exit(status if status > 0 else 128 - status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit calls in the first task, amid ``wait``, before it requeues the job."""
        with suppress(ProcessLookupError, ChildProcessError):  # it has ended
            os.kill(self._child.pid, signal.SIGUSR1)
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Task(self.tool, self.arguments))


def submit_training(
    args: argparse.Namespace,
    task: Task,
    output: str,
    on_cpu: bool,
    workers: int,
) -> None:
    """Submit a command line as a job, and say where its output will be.

    Args:
        args: the task's command line, parsed.
        output: the training's OUTPUT_DIR.
        workers: of each process's loader.

    Raises:
        ValueError: Slurm refuses, or a job of this OUTPUT_DIR waits or runs.
    """
    folder = Path(output)
    parameters = {
        "name": folder.name,
        "nodes": args.slurm.nodes,
        "tasks_per_node": args.slurm.gpus,
        "cpus_per_task": workers + 1,
        "timeout_min": args.time_limit or 1440,
        "slurm_signal_delay_s": _WARNING,
        # One that ends leaves others behind that wait for it.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        **({} if on_cpu else {"gpus_per_node": args.slurm.gpus}),
        **({"slurm_partition": args.partition} if args.partition else {}),
        **parse_parameters(args.slurm_option or ()),
    }
    queue, file = Queue(folder / FOLDER, parameters), folder / FOLDER / "job"
    if (waiting := queue.job(file)) is not None:
        raise ValueError(
            f"Slurm's job {waiting.job_id} has the same OUTPUT_DIR {output}, and waits or runs: "
            f"end it first (scancel {waiting.job_id}), or choose another one"
        )
    queue.folder.mkdir(parents=True, exist_ok=True)
    (job,) = queue.submit({file: task})
    logger.info(f"Slurm's job {job.job_id} is submitted; it writes to {job.paths.stdout}")
