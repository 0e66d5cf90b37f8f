"""The number of PyTorch's threads on a CPU whose cores other processes use, too.

At the end of every operation OpenMP's threads wait for each other in busy loops. If one thread
loses its core to another process, all wait. On two cores that two other processes kept busy, a
training step of the demo's detector took 2.9 s with two threads, 1.0 s with two that sleep while
they wait (OMP_WAIT_POLICY=PASSIVE) and 0.65 s with one; on idle cores, 0.34 s with two and 0.44 s
with one.
"""

import logging
import os
import time
from pathlib import Path
from statistics import median

import torch

logger = logging.getLogger(__name__)

_VARIABLE = "OMP_NUM_THREADS"


def share_cores(processes: int = 1) -> None:
    """Limit the threads of this process, or of those that it will start, to the free cores.

    If the environment variable OMP_NUM_THREADS is set, nothing is changed.

    Args:
        processes: the number of processes that will compute at the same time.
    """
    if _VARIABLE in os.environ:
        return
    cores, available, busy = os.cpu_count() or 1, available_cores(), busy_cores()
    threads = fair_threads(available, cores, busy, processes)
    alone = fair_threads(available, cores, 0, processes)
    if threads < alone:
        logger.warning(
            f"{busy} threads of other processes use the machine's {cores} cores, so PyTorch gets "
            f"{threads} threads, not {alone}; the environment variable {_VARIABLE} sets another "
            "number. Results of different numbers of threads differ in their last bits."
        )
    if processes > 1 or threads < alone:
        os.environ[_VARIABLE] = str(threads)  # for the processes to be started
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def fair_threads(available: int, cores: int, busy: int, processes: int = 1) -> int:
    """The number of threads for each process: its share of the free cores, at least one.

    Args:
        available: the cores that these processes may use.
        cores: the number of the machine's cores.
        busy: the number of cores that other processes use.
        processes: the number of processes that share the free cores.
    """
    return max(1, min(available, cores - busy) // processes)


def available_cores() -> int:
    """The cores that this process may use, by its affinity and its cgroup's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone has it
        return os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or a quota of "max"
        return cores


def busy_cores(samples: int = 5, seconds: float = 0.25) -> int:
    """The number of other threads that run or wait for a core now; 0 without /proc/loadavg.

    The load average would include, for minutes, work that has ended, such as a pretraining.
    """
    counts = []
    try:
        for _ in range(samples):
            running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
            counts.append(int(running) - 1)  # without this thread, which reads the file
            time.sleep(seconds / samples)
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, round(median(counts)))
