"""Settings that every test shares."""

# ruff: noqa: E402 (what the environment must hold before an import)

import gc
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Until all is imported and collected, below: to search what stays for garbage takes seconds.
gc.disable()
# Ahead of torch, and for all processes that tests start. Tensors are small: a second thread costs
# more than it brings, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"
# What a job or torchrun tells its processes, and what shows tracebacks, would change what tools do.
for name in list(os.environ):
    if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANDWIRE_D2_TRACEBACK",
    ):  # fmt: skip
        del os.environ[name]
# Ahead of randwire_d2, which reads it once.
_datasets = tempfile.TemporaryDirectory(prefix="randwire_d2_tests_")
os.environ["DETECTRON2_DATASETS"] = _datasets.name

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("helpers", "launching", "recording")
import helpers
from launching import alone, folders, two  # noqa: F401 (fixtures: each trains once a session)

torch.set_num_threads(1)

# The same examples on every run; a slow machine is no failure.
settings.register_profile(
    "randwire", deadline=None, derandomize=True, max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("randwire")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.unfreeze()  # into the oldest generation
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """No fixture computes with random numbers that depend on what came before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Nor does a test; that it is a module's first, which makes the fixtures, is no difference."""
    pytest_fixture_setup()


NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_A_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a test's tensors are; on a GPU convolutions compute float32 in float32, and the same
    bits each time."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def _small_builtin_sets() -> None:
    helpers.draw_small_builtin_sets(Path(_datasets.name))


@pytest.fixture(autouse=True)
def _no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        helpers.without_pictures(patch)
        yield


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    """What a failed test started would go on, and pytest would wait for it."""
    yield
    helpers.end_tools()


@pytest.fixture(autouse=True)
def _data_sets_as_they_were() -> Iterator[None]:
    """What a test registers, or its folders became, is forgotten after it."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A tool logs in a process of its own. Here, setup_logger cuts loggers off from pytest's, what
    is logged would go into the folders of earlier tests, and asked again it does nothing."""
    loggers = [logging.getLogger(name) for name in helpers.LOGGERS]
    before = [(logger.propagate, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, state in zip(loggers, before):
        logger.propagate, logger.level, logger.handlers = state
    setup_logger.cache_clear()
