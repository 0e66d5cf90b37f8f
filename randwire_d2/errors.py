"""What a user can mend, and what a bug is; also of errors of other processes."""

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is what was short; cuDNN and CUDA say so in words of their own."""
    said = ("out of memory", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error).lower() for s in said)


def system_error(error: BaseException) -> OSError | None:
    """The error of the system that an error is, or has come of: where a file can't be written,
    ``torch.save`` raises a RuntimeError in the middle of it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found


def _names(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


class MissingLibrary(ValueError):
    """Something was asked for whose library is not installed."""
