"""What a user can mend, and what a bug is; unreadable files, and errors of other processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Values and files, a training that diverged, memory, a missing library, a network that fails. Bad
# input is a ValueError where it is read, of one line: a KeyError or a TypeError is a bug.
MENDABLE = (
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
    MemoryError,
    torch.cuda.OutOfMemoryError,
    torch.distributed.DistError,
)
_TRACEBACK = "Traceback (most recent call last):\n"


def raised_first(error: BaseException) -> tuple[str, str]:
    """The name of what was raised, and its message, in the process where it was raised.

    The errors that ``launch`` and a loader raise have those of a child, or of a worker, in the
    traceback that is their text.
    """
    *outer, last = str(error).split(_TRACEBACK)
    if not outer:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.filename!r}: {error.strerror}"  # without its number
        if isinstance(error, ModuleNotFoundError) and error.name and "install" not in message:
            message += f"; pip install {error.name}"
        return type(error).__name__, message
    lines = last.splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), 0)
    name, _, message = "\n".join(lines[end:]).partition(": ")
    return name.strip().rpartition(".")[2], message


def is_mendable(name: str, message: str) -> bool:
    """Whether what ``raised_first`` found is ``MENDABLE``."""
    if name == "RuntimeError":
        return "can't allocate memory" in message  # what torch says on a CPU
    return any(name in _names(kind) for kind in MENDABLE)


def _names(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


class MissingLibrary(ValueError):
    """Something was asked for whose library is not installed."""


class UnreadableCheckpoint(ValueError):
    """A file is damaged, cut off, no checkpoint, or holds code."""


@contextmanager
def unreadable_in_one_line(path: str) -> Iterator[None]:
    """Around the reading of a checkpoint's file.

    Raises:
        UnreadableCheckpoint: whatever went wrong, but for a missing library, and an OSError that
            names the file.
    """
    try:
        yield
    except (MemoryError, MissingLibrary, UnreadableCheckpoint):
        raise
    except Exception as e:  # damaged bytes fail in as many ways as there are bytes
        if isinstance(e, OSError) and e.filename is not None:
            raise
        raise UnreadableCheckpoint(f"{path!r} {explain_unreadable(e)}") from e


def explain_unreadable(error: Exception) -> str:
    """Why a checkpoint could not be loaded, and the way out; it follows the file's name."""
    refused = re.search(r"GLOBAL (\S+)|refused to load (\S+?):", str(error))
    if refused:
        return (
            f"was not loaded: it holds {refused[1] or refused[2]}, and to unpickle that could run "
            "code. Save the state dict alone, where you trust the file: "
            "torch.save(model.state_dict(), path)"
        )
    return (
        "is damaged, cut off, or no checkpoint in the format of its suffix, or holds code, which "
        f"is never run ({type(error).__name__}); copy or download it again"
    )
