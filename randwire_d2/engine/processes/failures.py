"""Trainings that end by what lies outside of them, in one line that says what to do."""

import errno
import logging
import shutil
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ...errors import MENDABLE, raised_first, system_error
from ...files import megabytes
from ...text import one_line

_SHARED = "/dev/shm"
_Result = TypeVar("_Result")


def explained(workers: str, work: Callable[..., _Result], *args: Any) -> _Result:
    """Call ``work(*args)``, a training or an evaluation: what loaders raise of their workers is
    explained, and Detectron2's log has no traceback of errors that the user can mend.

    It is no context manager, whose ``__exit__`` PyTorch's handler of signals may interrupt.

    Args:
        workers: the key with their number, and the number.

    Raises:
        ChildProcessError: a worker was killed, or has no shared memory.
        OSError: a disk is full.
        OSError, ValueError: an error of the system, or an image that can't be used, in a worker, as
            if it had been raised here.
    """

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Exception):
            said = _explain(error, workers) or error
            if isinstance(said, MENDABLE):
                record.msg, record.args, record.exc_info = f"The training ends: {said}", (), None
        return True

    # Else, where the log's disk is full, each line is a traceback.
    before, logging.raiseExceptions = logging.raiseExceptions, False
    log = logging.getLogger("detectron2.engine.train_loop")
    log.addFilter(shorten)
    try:
        return work(*args)
    except Exception as e:
        try:
            said = _explain(e, workers)
        except RuntimeError as late:  # as in _lost_worker, but ahead of it, or later
            said = _explain(late, workers)
        if said is None:
            raise
        raise said from e
    finally:
        log.removeFilter(shorten)
        logging.raiseExceptions = before


def _explain(error: Exception, workers: str) -> OSError | ValueError | MemoryError | None:
    if isinstance(error, torch.OutOfMemoryError):
        return MemoryError(
            f"{one_line(error, 300)}: lower SOLVER.IMS_PER_BATCH or INPUT's sizes; set "
            "MODEL.RANDWIRE.RECOMPUTE True, which saves less for the backward pass; or "
            "MODEL.RANDWIRE.CUDA_GRAPHS False, since graphs keep the memory that they compute in"
        )
    lost = _lost_worker(error)
    text = str(lost or error)
    if "shared memory" in text or "shm" in text or "Bus error" in text:
        return ChildProcessError(
            f"a worker has no room in {_SHARED}, through which it hands images over "
            f"({_room()}): make it larger (docker run --shm-size 8g; mount -o remount,size=8G "
            f"{_SHARED}), or lower {workers}; 0 needs none"
        )
    if "DataLoader worker (pid" in text or lost:
        return ChildProcessError(
            f"a worker that reads images was killed ({one_line(text, 300)}). The system does so "
            "where memory is short (dmesg tells), and each worker has images in it: lower "
            f"{workers}, or INPUT's sizes; or {_SHARED} was full ({_room()})"
        )
    full = system_error(error)
    if full is not None and full.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        file = full.filename or "one of an evaluation, say"
        return OSError(
            f"a file can't be written ({full.strerror}), {file}: make room, in OUTPUT_DIR or "
            "wherever that is, and go on with --resume"
        )
    if isinstance(error, OSError | ValueError) and "in DataLoader worker process" in text:
        return type(error)(" ".join(raised_first(error)[1].split()))
    return None


def _lost_worker(error: Exception) -> Exception | None:
    """What is known of a worker's end, if an error is of the connection to one."""
    if not isinstance(error, ConnectionError | EOFError):
        return None
    files = " ".join(f.f_code.co_filename for f, _ in traceback.walk_tb(error.__traceback__))
    if "torch/utils/data/dataloader.py" not in files:
        return None
    try:
        time.sleep(2)
    except RuntimeError as e:  # of PyTorch's handler, in whatever runs when the system tells of it
        return e
    return error


def _room() -> str:
    try:
        usage = shutil.disk_usage(_SHARED)
    except OSError:
        return "there is none"
    return f"{megabytes(usage.free)} of {megabytes(usage.total)} are free"
