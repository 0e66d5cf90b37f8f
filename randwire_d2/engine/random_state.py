"""Work in the middle of a training that takes none of its random numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give Python, numpy and PyTorch the random state back that they had."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
