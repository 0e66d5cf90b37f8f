"""Trainings as Slurm jobs, with submitit: one task per GPU; at the time limit a job is requeued.

Each task is a process of submitit. Its child is the tool with the given command line, in one
process group with the children of the other tasks (torchrun.py). Before the time limit Slurm sends
SIGUSR2 to the tasks. The first task then ends the training with a checkpoint, and requeues the job.
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
TIME_LIMIT = 1440  # minutes; submitit's default is five
_REQUEUES = 1000  # the most times that a job is requeued at its time limit
_WARNING = 300  # seconds before the time limit, for an iteration, an evaluation and a checkpoint


class Nodes(NamedTuple):
    """The value of ``--slurm``: the number of nodes, and of GPUs on each."""

    nodes: int
    gpus: int

    @classmethod
    def parse(cls, text: str) -> "Nodes":
        """
        Raises:
            argparse.ArgumentTypeError: ``text`` does not have the form "2x8" or "2×8".
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
        help=f"the time limit of each start of the job (default: {TIME_LIMIT})",
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
        ValueError: this machine can't submit jobs, or the options contradict each other; one line.
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
    """Parse parameters of ``submitit.AutoExecutor`` that have the form NAME=VALUE. A value is a
    Python literal (number, bool, list or dict), or else a string.

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
            if isinstance(read, bool | int | float | list | dict):  # "3,4", say, stays a string
                parameters[name] = read
    return parameters


@dataclass(frozen=True)
class Queue:
    """A cluster's queue.

    Attributes:
        folder: the folder for submitit's files, on a disk that all nodes share.
        parameters: parameters of ``submitit.AutoExecutor``: ``timeout_min``, ``slurm_partition``, …
    """

    folder: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def submit(self, calls: Mapping[Path, Callable[[], None]]) -> list[submitit.Job]:
        """Submit functions; each key is the file to which the id of the job is written.

        Raises:
            ValueError: Slurm or submitit refuses a job.
        """
        try:
            executor = submitit.AutoExecutor(
                folder=self.folder, cluster="slurm", slurm_max_num_timeout=_REQUEUES
            )
            executor.update_parameters(**self.parameters)
            with executor.batch():
                jobs = [executor.submit(call) for call in calls.values()]
        # NameError is for an unknown parameter, OSError for a missing sbatch.
        except (RuntimeError, TypeError, NameError, ValueError, OSError) as e:
            raise ValueError(f"Slurm: {one_line(e, 300)}") from e
        for file, job in zip(calls, jobs):
            with atomic_open(file) as f:
                f.write(job.job_id)
        return jobs

    def job(self, file: Path) -> submitit.Job | None:
        """The job whose id is in a file; None if the job has ended, or there is no file."""
        try:
            job: submitit.Job = submitit.SlurmJob(self.folder, file.read_text())
        except FileNotFoundError:
            return None
        return None if has_ended(job) else job


def has_ended(job: submitit.Job) -> bool:
    """Whether Slurm's queue has a job no more.

    submitit asks sacct. That knows no job on a cluster without accounting, so a job that was killed
    would never end; nor would one that was preempted for good. A suspended one would have ended.
    """
    asked = None
    with suppress(OSError):
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True
        )
    if asked is not None and (asked.returncode == 0 or "Invalid job id" in asked.stderr):
        return not asked.stdout.strip()
    return bool(job.done(force_check=True))


class Task:
    """The function of each task of a training's job: it runs the tool as a child process.

    Args:
        tool: the command that starts the tool, without arguments.
        arguments: the arguments of the given command line, including ``--slurm``.
    """

    def __init__(self, tool: Sequence[str], arguments: Sequence[str]) -> None:
        self.tool = tuple(tool)
        self.arguments = tuple(arguments)

    def __call__(self) -> None:
        there = submitit.helpers.TorchDistributedEnvironment()
        there.export(set_cuda_visible_devices=False, overwrite=True)
        # Slurm counts all restarts: at the time limit, after a node failure or a preemption.
        again = ["--resume"] if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else []
        child = self._child = subprocess.Popen([*self.tool, *again, *self.arguments])

        def hand_on(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        signal.signal(signal.SIGTERM, hand_on)
        status = child.wait()
        # A failing task ends the others, of which the first may still have to requeue the job.
        if status and -status not in SIGNALS:
            sys.exit(status if status > 0 else 128 - status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """End the child with a checkpoint; submitit calls this in the first task's signal handler,
        while ``__call__`` waits for the child, before it requeues the job."""
        with suppress(ProcessLookupError, ChildProcessError):  # the child has already ended
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
    """Submit a command line as a job, and log where its output will be.

    Args:
        args: the parsed command line.
        task: the function of each task.
        output: the OUTPUT_DIR of the training.
        on_cpu: whether the training needs no GPUs.
        workers: the number of workers of each process.

    Raises:
        ValueError: Slurm refuses the job, or another job of this OUTPUT_DIR waits or runs.
    """
    folder = Path(output)
    parameters = {
        "name": folder.name,
        "nodes": args.slurm.nodes,
        "tasks_per_node": args.slurm.gpus,
        "cpus_per_task": workers + 1,
        "timeout_min": args.time_limit or TIME_LIMIT,
        "slurm_signal_delay_s": _WARNING,
        # If a task dies, the others would wait for it.
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
