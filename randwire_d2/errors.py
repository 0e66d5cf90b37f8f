"""Distinguish errors that users can fix from bugs, also for errors of other processes."""

import torch

# Errors that users can fix: values and files, a diverged training, memory, a missing library, a
# failing network. Bad input raises a ValueError of one line: a KeyError or TypeError is a bug.
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
    """The class name and the message of an error in the process that first raised it.

    If ``launch`` or a loader raises an error of a child or a worker, its text contains the
    traceback of the original error.
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
    """Whether an error that ``raised_first`` described is ``MENDABLE``."""
    if name == "RuntimeError":
        return "can't allocate memory" in message  # what torch says on a CPU
    return any(name in _names(kind) for kind in MENDABLE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory; cuDNN and CUDA have their own messages for it."""
    said = ("out of memory", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error).lower() for s in said)


def system_error(error: BaseException) -> OSError | None:
    """The OSError that an error is or was caused by, if any: if a file can't be written,
    ``torch.save`` raises a RuntimeError while handling the OSError."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found


def _names(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


class MissingLibrary(ValueError):
    """A requested feature needs a library that is not installed."""
