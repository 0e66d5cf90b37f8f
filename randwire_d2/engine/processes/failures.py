"""Errors with causes outside of a training, explained in one line that says what to do."""

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
    """Call ``work(*args)``, a training or an evaluation; explain the errors of loaders' workers,
    and keep tracebacks of errors that the user can fix out of Detectron2's log.

    It is not a context manager, because PyTorch's signal handler might interrupt its ``__exit__``.

    Args:
        workers: the config key of the number of workers, and the number.

    Raises:
        ChildProcessError: a worker was killed, or has no shared memory.
        OSError: a disk is full.
        MemoryError: the GPU has too little memory.
        OSError, ValueError: a system error, or an image that can't be used, in a worker; raised
            as if it were from this process.
    """

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Exception):
            said = _explain(error, workers) or error
            if isinstance(said, MENDABLE):
                record.msg, record.args, record.exc_info = f"The training ends: {said}", (), None
        return True

    # Else logging prints a traceback for each line that it can't write to a full disk.
    before, logging.raiseExceptions = logging.raiseExceptions, False
    log = logging.getLogger("detectron2.engine.train_loop")
    log.addFilter(shorten)
    try:
        return work(*args)
    except Exception as e:
        try:
            said = _explain(e, workers)
        except RuntimeError as late:  # PyTorch's signal handler raised it, but not in _lost_worker
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
    """The best explanation of a worker's death, if the error is of the connection to one."""
    if not isinstance(error, ConnectionError | EOFError):
        return None
    files = " ".join(f.f_code.co_filename for f, _ in traceback.walk_tb(error.__traceback__))
    if "torch/utils/data/dataloader.py" not in files:
        return None
    try:
        time.sleep(2)
    except RuntimeError as e:  # PyTorch's handler of SIGCHLD raises it in whatever code runs
        return e
    return error


def _room() -> str:
    try:
        usage = shutil.disk_usage(_SHARED)
    except OSError:
        return "there is none"
    return f"{megabytes(usage.free)} of {megabytes(usage.total)} are free"
