"""One training in a folder: a second process that is given the same OUTPUT_DIR is refused.

The lock is one of fcntl's on a file in the folder. The system releases it when its process ends,
however that ends. Unlike one of flock's it isn't inherited by the workers of loaders, which outlive
a process that was killed by some seconds. On NFS the server keeps it for all machines (on version 3
its lockd, if that runs); there the lock of a machine that has crashed is released some 90 seconds
later, and a mount with nolock knows of its own machine's processes alone. Where there are no locks,
a training goes on without, with a warning.
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
    """Hold the lock of an OUTPUT_DIR, which is made, as long as the block runs.

    It is for all processes of a training; the main one has the lock.

    Raises:
        ValueError: in all of them: another training has it, or the folder can't be made or written;
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
    file = open(run.lock_file, "a+")  # noqa: SIM115  it is open as long as it is locked
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX allows both
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        raise ValueError(
            f"OUTPUT_DIR {str(run.path)!r} is in use by another training, {holder}: set another "
            "OUTPUT_DIR, or end that one"
        ) from e
    except OSError as e:
        logger.warning(f"{run.lock_file} can't be locked ({e.strerror}): start no second training")
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
