"""One training or evaluation in a folder: a second process with the same OUTPUT_DIR is refused.

The lock is an fcntl lock on a file in the folder. The system releases it when its process ends in
any way. Unlike a flock lock it isn't inherited by the workers of loaders, which outlive a killed
process by some seconds. On NFS the server keeps the lock for all machines (in version 3 its lockd,
if that runs). If a machine crashes, its lock is released there about 90 seconds later. A mount with
nolock excludes only processes of the same machine. If the file system has no locks, a training goes
on without one, after a warning.
"""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from detectron2.utils import comm

from ...runs import RunFolder
from ...text import parse_json

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: str | None) -> Iterator[None]:
    """Create an OUTPUT_DIR and hold its lock during the block.

    All processes of a training, or of an evaluation, call this; the main one holds the lock.

    Args:
        folder: the OUTPUT_DIR; None for none.

    Raises:
        ValueError: in all processes: another process has the lock, or the folder can't be written;
            one line that names the process, or the reason.
    """
    file, refusal = None, ""
    if folder and comm.is_main_process():
        try:
            os.makedirs(folder, exist_ok=True)
            file = _lock(RunFolder(folder))
        except ValueError as e:
            refusal = str(e)
        except OSError as e:
            refusal = f"OUTPUT_DIR {folder!r} can't be written ({e.strerror}): set another one"
    refusal = comm.all_gather(refusal)[0]
    if refusal:
        raise ValueError(refusal)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _lock(run: RunFolder) -> IO[str]:
    what = "evaluation" if run.is_evaluation else "training"
    file = open(run.lock_file, "a+")  # noqa: SIM115  it is open as long as it is locked
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX allows either error for a held lock
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        raise ValueError(
            f"OUTPUT_DIR {str(run.path)!r} is in use by another {what}, {holder}: set another "
            "OUTPUT_DIR, or end that one"
        ) from e
    except OSError as e:
        logger.warning(f"{run.lock_file} can't be locked ({e.strerror}): start no second {what}")
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file


def _holder(text: str) -> str:
    try:
        written = parse_json(text)
        return f"process {written['pid']} on {written['host']}"
    except (ValueError, KeyError, TypeError):
        return "which has just begun"
