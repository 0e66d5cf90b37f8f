"""Read images of 8 bits, also from a network disk that is unavailable for a while."""

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

# The errors of a file system while its server or device is unavailable.
_AWAY = {
    errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ESHUTDOWN,
}  # fmt: skip
# The values of INPUT.FORMAT, all of 8 bits; a LazyConfig's mapper may have None, the file's own.
INPUT_FORMATS = ("RGB", "BGR", "L", "YUV-BT.601")

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class DiskGone(OSError):
    """A disk has stayed unavailable; the message is one line."""


def patiently(read: Callable[[], _T], path: str) -> _T:
    """Call ``read``; repeat it after ``PAUSES`` while the disk of the file at ``path`` is away.

    If only the file is missing or broken, its error is raised at once.

    Raises:
        DiskGone: the disk was away in all attempts.
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
    """The reason why the disk of a file is away; None if the error is of the file itself."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError):
        return None
    gone = cause.errno == errno.ENOENT and "://" not in path and _is_empty(os.path.dirname(path))
    return cause.strerror if gone or cause.errno in _AWAY else None


def _is_empty(folder: str) -> bool:
    """Whether a folder is missing or empty, as a mount point is without its disk."""
    try:
        with os.scandir(folder or ".") as entries:
            return next(entries, None) is None
    except OSError:
        return True


class PatientMapper(DatasetMapper):
    """Detectron2's DatasetMapper, which waits for a disk; random numbers are drawn after reading.

    In data given by path, unusable images are left out before a training. The images of registered
    data sets are first checked here.

    Raises:
        ValueError: an image has more than 8 bits per channel, which would be read as white, would
            be rotated twice, is truncated, or can't be resized as configured, such as one of
            1 x 5000 pixels; one line that names it.
        DiskGone: see ``patiently``.
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
            if isinstance(e, DiskGone) or getattr(e, "errno", None):  # these name the file
                raise
            raise ValueError(f"{path} can't be trained on or tested: {e}") from e
