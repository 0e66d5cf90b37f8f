"""Where a data set's files are on this machine, and reading many of them."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from detectron2.utils.file_io import PathManager

from ..text import prefixed

_THREADS = 16  # most wait for a disk
_Given = TypeVar("_Given")
_Result = TypeVar("_Result")


def existing_path(name: str, path: str) -> str:
    """The local path of a data set's file or folder; a built-in set is made if it isn't there.

    Args:
        name: the data set's, for errors.
        path: any that Detectron2's PathManager knows.

    Raises:
        ValueError: there is nothing, or it can't be made; one line.
    """
    with prefixed(f"{name!r}", (OSError, RuntimeError, ValueError)):
        local = str(PathManager.get_local_path(path))
    if not os.path.exists(local):
        raise ValueError(
            f"{name!r} needs {local!r}, which does not exist; set the environment variable "
            "DETECTRON2_DATASETS to the folder that holds it"
        )
    return local


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, without the byte order mark that some Windows programs write.

    Raises:
        ValueError: it can't be read; one line.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"it is no text in UTF-8: {e}"
        raise ValueError(f"{os.fspath(path)!r} can't be read: {reason}") from e


def files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and below it, but those that are hidden, or in a hidden folder there.

    Links to folders are followed, as by Python's and so by Ultralytics' glob, but none to a folder
    that it lies in, which ``ln -s`` makes where it is called twice.

    Args:
        above: the folders that this one was found in.
    """
    own = os.path.realpath(folder)
    if own in above:
        return
    # os.walk, for one level: it passes over what can't be listed, and a link to itself.
    _, folders, names = next(os.walk(folder), (folder, [], []))
    yield from (os.path.join(folder, name) for name in names if name[0] != ".")
    for name in folders:
        if name[0] != ".":
            yield from files_below(os.path.join(folder, name), (*above, own))


def in_threads(read: Callable[[_Given], _Result], files: Sequence[_Given]) -> list[_Result]:
    """What ``read`` returns of each file, many at once: over a network, each is waited for."""
    shares = [files[i::_THREADS] for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:  # a task for each file would take longer than it
        found = list(pool.map(lambda share: list(map(read, share)), shares))
    return [found[i % _THREADS][i // _THREADS] for i in range(len(files))]
