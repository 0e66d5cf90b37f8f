"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a local file for writing; it takes its name only once it is complete and on disk.

    Until then it is ``path`` with ``.tmp`` appended, which a later attempt overwrites. If the block
    raises, that file is removed and whatever was at ``path`` stays.
    """
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_or_print(text: str, path: str | os.PathLike[str] | None) -> None:
    """Write a text to a file, whole, and make the folder that it lies in; without a path, print it.

    The text ends with a newline in both.
    """
    if path is None:
        print(text)
        return
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    with atomic_open(path) as f:
        f.write(f"{text}\n")


def megabytes(num_bytes: int) -> str:
    """A number of bytes, for a message."""
    return f"{num_bytes / 1e6:.1f} MB"
