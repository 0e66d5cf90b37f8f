"""Random numbers of a training: seeds by position, and blocks that keep the random state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm


def run_seed(seed: int) -> int:
    """The seed; if it is negative, a random one, the same in all processes."""
    return int(seed if seed >= 0 else comm.shared_random_seed())


def mix_seeds(*numbers: int) -> int:
    """Hash several numbers, none negative, to a seed of 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_torch(seed: int) -> None:
    """``torch.manual_seed`` for the CPU and this process's GPU.

    PyTorch's own function keeps a stack trace of each call until CUDA is initialised, and its query
    for devices takes as long as reading a small image.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and PyTorch with a seed of 32 bits."""
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of Python, numpy and PyTorch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
