"""Paired timing of several steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

Step = Callable[[], object]
Clock = Callable[[Step], float]


class Ratio(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def clock_of(device: torch.device) -> Clock:
    """A function that measures the seconds of a step; on a GPU it uses CUDA's events."""
    return _cuda_clock if device.type == "cuda" else _cpu_clock


def _cpu_clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_clock(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def host_clock(step: Step) -> float:
    """The seconds until the host has launched a step; the GPU is synchronised before and after."""
    torch.cuda.synchronize()
    seconds = _cpu_clock(step)
    torch.cuda.synchronize()
    return seconds


def paired(
    steps: Mapping[str, Step],
    clock: Clock,
    rounds: int,
    *,
    warmup: int,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Run every step once in each round, forwards and backwards in turn, after a warm-up.

    A machine that slows down for a while slows down all steps of a round, so ratios within a round
    vary less than ratios of times that are taken one model after the other.

    Args:
        steps: name -> a function that runs the step.
        clock: a function that runs a step and returns its seconds.
        rounds: the number of rounds.
        warmup: the number of runs of each step before the timing.
        before: called with a step's name before each of its runs, outside the measured time.

    Returns:
        dict[str, list[float]]: the seconds of each step, one for each round.
    """
    for name, step in steps.items():
        for _ in range(warmup):
            before(name)
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            before(name)
            times[name].append(clock(steps[name]))
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """The median and the quartiles of the ratios of times to reference within each round."""
    return quartiles([a / b for a, b in zip(times, reference, strict=True)])


def quartiles(values: Sequence[float]) -> Ratio:
    """The median and the quartiles of at least one value."""
    return Ratio(*np.percentile(values, (50, 25, 75)).tolist())
