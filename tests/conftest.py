"""Settings that every test shares."""

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Small tensors: a second thread costs more than it brings, and sums keep their order.
torch.set_num_threads(1)

# The same examples on every run; a slow machine is no failure.
settings.register_profile("randwire", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("randwire")


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Detectron2's setup_logger cuts a logger off from pytest's for the tests to come."""
    logger = logging.getLogger("randwire_d2")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.level, logger.handlers = before
