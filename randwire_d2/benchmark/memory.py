"""Whether memory grows while something is repeated: the process's, and the tensors that live."""

import gc
import os
from dataclasses import dataclass

import numpy as np
import torch

WARM_UP = 0.25  # of the iterations: caches fill, and the allocator finds its sizes


@dataclass(frozen=True)
class Sample:
    """What was seen after an iteration.

    Attributes:
        resident: bytes of the process in memory.
        tensors: how many live of those that were made since the watch began.
    """

    iteration: int
    resident: int
    tensors: int


class MemoryWatch:
    """Samples of a process's memory; a context, within which alone it looks.

    Args:
        iterations: of what is watched; of a training, SOLVER.MAX_ITER.
        every: so many iterations there is a sample.
    """

    def __init__(self, iterations: int, every: int) -> None:
        self.iterations, self._every = iterations, every
        self.samples: list[Sample] = []

    def __enter__(self) -> "MemoryWatch":
        gc.collect()
        gc.freeze()  # what is there already is neither searched nor counted
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()

    def look(self, iteration: int) -> None:
        """Call it after each iteration."""
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
        """The least and the most that lived, after the warm-up."""
        counts = [s.tensors for s in self.settled]
        return min(counts), max(counts)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """The tensors that Python's collector knows of, but those that are frozen."""
    # By its type: what isn't alive any more, a weak proxy refuses to be asked.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
