"""Files and folders that get their names only when they are complete, and checks of paths."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder; it takes its name only once all that the block writes is in it.

    Until then it is ``path`` with ``.part`` appended, which a later attempt overwrites. If the
    block raises, that is removed.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_or_print(text: str, path: str | os.PathLike[str] | None) -> None:
    """Write a text to a file with ``atomic_open``, and make its folder; without a path, print it.

    The text ends with a newline in both.
    """
    if path is None:
        print(text)
        return
    make_folder_of(path)
    with atomic_open(path) as f:
        f.write(f"{text}\n")


def make_folder_of(path: str | os.PathLike[str]) -> None:
    """Make the folder that a file will lie in, unless it is there; see ``check_file``."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def without_options(path: str) -> str:
    """A path without Detectron2's options, as in model.pth?matching_heuristics=True."""
    return path.split("?")[0]


def megabytes(num_bytes: int) -> str:
    """A number of bytes, for a message."""
    return f"{num_bytes / 1e6:.1f} MB"


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a folder that can't be made or written into, before the work for it is done.

    Args:
        name: the user's name for the folder, such as ``"--output"``.
        path: the folder.

    Raises:
        ValueError: it is a file, or below one, or is not writable; one line.
    """
    if not os.fspath(path):
        raise ValueError(f"{name} is empty; name a folder")
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{name} {os.fspath(path)!r}: {str(folder)!r} is a file; name a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} {os.fspath(path)!r}: {str(folder)!r} can't be written into; name "
            "another folder, or change its permissions"
        )


def check_file(name: str, path: str | os.PathLike[str] | None) -> None:
    """Check a file that will be written, and its folder, like ``check_folder``; ignore None."""
    if path is None:
        return
    if not os.fspath(path):
        raise ValueError(f"{name} is empty; name a file")
    if os.path.isdir(path):
        raise ValueError(f"{name} {os.fspath(path)!r} is a folder; name a file")
    check_folder(name, Path(path).absolute().parent)
