"""Check that memory does not grow over iterations: the process's, and the number of tensors."""

import gc
import os
from dataclasses import dataclass

import numpy as np
import torch

WARM_UP = 0.25  # the first part of the iterations, while caches fill and the allocator grows


@dataclass(frozen=True)
class Sample:
    """The memory after an iteration.

    Attributes:
        resident: the resident bytes of the process.
        tensors: the number of live tensors that were created since the watch began.
    """

    iteration: int
    resident: int
    tensors: int


class MemoryWatch:
    """Samples of this process's memory; a context manager around the iterations.

    Args:
        iterations: their number; for a training, SOLVER.MAX_ITER.
        every: the number of iterations from one sample to the next.
    """

    def __init__(self, iterations: int, every: int) -> None:
        self.iterations, self._every = iterations, every
        self.samples: list[Sample] = []

    def __enter__(self) -> "MemoryWatch":
        gc.collect()
        gc.freeze()  # existing objects are neither searched nor counted
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()

    def look(self, iteration: int) -> None:
        """Take a sample if it is time for one; call this after each iteration."""
        if (iteration + 1) % self._every == 0:
            gc.collect()
            self.samples.append(Sample(iteration, resident(), live_tensors()))

    @property
    def settled(self) -> list[Sample]:
        """The samples after the warm-up."""
        return [s for s in self.samples if s.iteration >= WARM_UP * self.iterations]

    @property
    def slope(self) -> float:
        """Bytes of growth per iteration, by least squares, after the warm-up."""
        settled = self.settled
        x = np.array([s.iteration for s in settled], float)
        y = np.array([s.resident for s in settled], float)
        return float(np.polyfit(x, y, 1)[0])

    @property
    def tensors(self) -> tuple[int, int]:
        """The smallest and the largest number of live tensors after the warm-up."""
        counts = [s.tensors for s in self.settled]
        return min(counts), max(counts)


def resident() -> int:
    """The resident bytes of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """The number of tensors that Python's garbage collector tracks, without frozen ones."""
    # By type: isinstance raises an error for a weak proxy whose object is dead.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
