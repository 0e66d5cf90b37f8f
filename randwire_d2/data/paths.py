"""The local paths of a data set's files, and reading many files at once."""

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
    """The local path of a data set's file or folder; a built-in set is drawn if it doesn't exist.

    Args:
        name: the name of the data set, for errors.
        path: any path that Detectron2's PathManager supports.

    Raises:
        ValueError: the path does not exist, or the set can't be drawn; one line.
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
        ValueError: the file can't be read, or is not UTF-8; one line.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"it is no text in UTF-8: {e}"
        raise ValueError(f"{os.fspath(path)!r} can't be read: {reason}") from e


def files_in(folder: str | os.PathLike[str], suffix: str) -> list[Path]:
    """The files of a kind in a folder, sorted; none if there is no such folder.

    Hidden files are left out: macOS writes its metadata of photo.xml to ._photo.xml.
    """
    found = Path(folder).glob(f"*{suffix}")
    return sorted(path for path in found if path.name[0] != "." and path.is_file())


def files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and its subfolders, without hidden files and folders.

    Links to folders are followed, as Python's glob and so Ultralytics do, except links to a folder
    that contains them, which ``ln -s`` makes if it is called twice.

    Args:
        folder: the folder to search.
        above: the real paths of the folders that contain it.
    """
    own = os.path.realpath(folder)
    if own in above:
        return
    # os.walk, used for one level, skips folders that can't be listed, and links to themselves.
    _, folders, names = next(os.walk(folder), (folder, [], []))
    yield from (os.path.join(folder, name) for name in names if name[0] != ".")
    for name in folders:
        if name[0] != ".":
            yield from files_below(os.path.join(folder, name), (*above, own))


def in_threads(read: Callable[[_Given], _Result], files: Sequence[_Given]) -> list[_Result]:
    """Call ``read`` for each file, in threads, since reads from a network disk wait; the results
    are in the order of the files."""
    shares = [files[i::_THREADS] for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:  # a task per file would cost more than reading it
        found = list(pool.map(lambda share: list(map(read, share)), shares))
    return [found[i % _THREADS][i // _THREADS] for i in range(len(files))]
