"""Reading images: of 8 bits only, from a disk that may be gone for a while, as network ones are."""

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.data import DatasetMapper

from .probing import why_turned_twice
from .reading import open_image

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds, from one attempt to the next

# What a file system says while its server or device is away.
_AWAY = {
    errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ESHUTDOWN,
}  # fmt: skip
# What INPUT.FORMAT can be, all of 8 bits; a LazyConfig's mapper may have None, for what a file has.
INPUT_FORMATS = ("RGB", "BGR", "L", "YUV-BT.601")

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class DiskGone(OSError):
    """A disk has not come back; the message is one line."""


def patiently(read: Callable[[], _T], path: str) -> _T:
    """What ``read`` returns, tried again and again while the disk of the file at ``path`` is away.

    A file that alone is missing or broken is not waited for: its error is raised at once.

    Raises:
        DiskGone: the disk was away for all of ``PAUSES``.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return read()
        except (OSError, ValueError) as e:
            reason = _away(e, path)
            if reason is None:
                raise
            pause = next(pauses, None)
            if pause is None:
                raise DiskGone(
                    f"{path} can't be read ({reason}): its disk was away for {sum(PAUSES):.0f} s. "
                    "Bring it back, and go on with --resume"
                ) from e
        logger.warning(
            f"{path} can't be read ({reason}): its disk is away; trying again in {pause} s"
        )
        time.sleep(pause)


def _away(error: Exception, path: str) -> str | None:
    """Why a disk is away, if that is why a file can't be read."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError):
        return None
    gone = cause.errno == errno.ENOENT and "://" not in path and _is_empty(os.path.dirname(path))
    return cause.strerror if gone or cause.errno in _AWAY else None


def _is_empty(folder: str) -> bool:
    """Whether a folder is missing or empty, as a place where nothing is mounted is."""
    try:
        with os.scandir(folder or ".") as entries:
            return next(entries, None) is None
    except OSError:
        return True


class PatientMapper(DatasetMapper):
    """Detectron2's, which waits for a disk. It draws random numbers only after it has read.

    Of data by path, images of more than 8 bits are left out before a training. Whoever registered a
    set by its name has not looked at them, and here is the first that does.

    Raises:
        ValueError: an image has more than 8 bits per channel, and would be read as white, would be
            turned twice, ends too early, or can't be resized as configured, such as one of 1 x 5000
            pixels; one line that names it.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        call, path = super().__call__, str(dataset_dict["file_name"])

        def read() -> Any:
            if self.image_format in INPUT_FORMATS:
                with open_image(path) as image:
                    if reason := why_turned_twice(image):
                        raise ValueError(reason)
            return call(dataset_dict)

        try:
            return patiently(read, path)
        except (OSError, ValueError) as e:
            if isinstance(e, DiskGone) or getattr(e, "errno", None):  # which say of what file
                raise
            raise ValueError(f"{path} can't be trained on or tested: {e}") from e
