"""How many threads PyTorch gets on a CPU whose cores others use, too.

At the end of every operation OpenMP's threads wait for each other in busy loops: if one has lost
its core to another process, all have. A training step of the demo's detector, on two cores that two
other processes kept busy, took 2.9 s with two threads, 1.0 s with two that sleep while they wait
(OMP_WAIT_POLICY=PASSIVE) and 0.65 s with one; on idle cores, 0.34 s with two and 0.44 s with one.
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
    """Limit the threads of this process, or of those that it will start, to the cores left free.

    What the environment variable OMP_NUM_THREADS says is left as it is.

    Args:
        processes: how many will compute at the same time.
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
    """The threads of each of some processes: their part of the cores left free, at least one.

    Args:
        available: the cores that these processes may use.
        cores: all that the machine has.
        busy: how many of them others use.
        processes: how many share what is left.
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
    """How many threads of others run or wait for a core just now; 0 where Linux can't be asked.

    Not the load average, which remembers for minutes what has ended, such as a pretraining.
    """
    counts = []
    try:
        for _ in range(samples):
            running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
            counts.append(int(running) - 1)  # this one reads
            time.sleep(seconds / samples)
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, round(median(counts)))
