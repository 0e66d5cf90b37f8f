"""Read checkpoint files without running code in them; all errors are ValueErrors of one line."""

import io
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingLibrary
from ..text import brief, one_line
from .array_pickle import ArrayUnpickler
from .checksum import DamagedFile, check_whole
from .safetensors_file import read_safetensors

_AGAIN = "copy or download it again"


def read_entries(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all entries of a local file, as they were saved: weights, wiring, config, optimizer, …

    Args:
        path: ``.safetensors``; ``.pkl``, a pickle of arrays; or any file of ``torch.save``.

    Raises:
        ValueError: it is missing, empty, cut off or damaged, no checkpoint, or would run code; one
            line that names the file and the way out.
        DamagedFile: a ValueError; the checksum shows that the file is damaged.
        MissingLibrary: a ValueError; safetensors is not installed.
    """
    path = os.fspath(path)
    try:
        data = _read(path)
    except MissingLibrary:
        raise
    except DamagedFile as e:
        raise DamagedFile(path, f"{one_line(e.what, 300)}; {_AGAIN}") from e
    except OSError as e:
        raise ValueError(f"{path!r} can't be read: {e.strerror or one_line(e)}") from e
    except _Refused as e:
        raise ValueError(f"{path!r} {e}") from e
    except Exception as e:  # damaged bytes fail in as many ways as there are bytes
        raise ValueError(f"{path!r} {_explain(e)}") from e
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise ValueError(
            f"{path!r} holds a {type(data).__name__}, not a state dict: save "
            "model.state_dict() with torch.save"
        )
    return dict(data)


def read_iteration(path: str | os.PathLike[str]) -> int:
    """Read the iteration after which a training wrote a checkpoint, without loading tensors.

    Raises:
        ValueError: the file is damaged, or not a training's; one line.
        OSError: it can't be read.
    """
    check_whole(path)
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(file["iteration"])
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"{path} has no iteration, as what a training saves has, and is for MODEL.WEIGHTS"
        ) from e


def iteration_of(path: str | os.PathLike[str]) -> int | None:
    """``read_iteration``; None if the file is missing, damaged, or not a training's."""
    with suppress(OSError, ValueError):
        return read_iteration(path)
    return None


def check_state(path: str | os.PathLike[str], state: Any) -> None:
    """Check that a state dict maps names to tensors or arrays.

    Args:
        path: the file that contains it, for the message.

    Raises:
        ValueError: it does not, or a tensor in it claims to be larger than the file; one line.
    """
    path = os.fspath(path)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path!r} holds no weights: its entry 'model' is a {type(state).__name__}, not a "
            "state dict; save {'model': model.state_dict()} with torch.save"
        )
    size = os.path.getsize(path)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor | np.ndarray | np.generic):
            raise ValueError(
                f"{path!r} holds no state dict: {brief(name)} is a {type(value).__name__}, "
                "and nothing is called 'model'; save {'model': model.state_dict()} with torch.save"
            )
        if not _is_dense(value):
            raise ValueError(
                f"{path!r}: {brief(name)} is not an array of numbers in the CPU's memory: save "
                "the state dict of the model on a CPU, with torch.save"
            )
        if value.nbytes > size:
            raise ValueError(
                f"{path!r}: {brief(name)} would have more bytes than the file, {size}: save it "
                "with torch.save, after contiguous()"
            )


def _is_dense(value: Tensor | np.ndarray | np.generic) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and value.device.type == "cpu"
    try:
        torch.from_numpy(np.empty(0, value.dtype))
    except (TypeError, ValueError):  # of texts; of bytes in another order
        return False
    return True


class _Refused(Exception):
    """A file is refused; the message continues a sentence that begins with the file's name."""


def _read(path: str) -> Any:
    if os.path.getsize(path) == 0:
        raise _Refused(f"is empty: it was never written; {_AGAIN}")
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    with open(path, "rb") as f:
        if path.endswith(".pkl"):
            # Read from memory: a file's read(n) allocates n bytes, however short the file is.
            return ArrayUnpickler(io.BytesIO(f.read()), encoding="latin1").load()
        head = f.read(16)
        if head.startswith(b"PK"):
            _check_archive(path)
            check_whole(path)
        elif not head.startswith(b"\x80"):
            raise _Refused(
                f"is no checkpoint: it begins with {head!r}, not as torch.save or pickle begin "
                f"a file; {_AGAIN}, or name another"
            )
        _refuse_bytearray(f)
    # map_location: a file saved on a GPU must load where there is none.
    if head.startswith(b"PK"):
        return torch.load(path, map_location="cpu", weights_only=True)
    with _BoundedReader(io.FileIO(path)) as bounded:
        return torch.load(bounded, map_location="cpu", weights_only=True)


class _BoundedReader(io.BufferedReader):
    """A file whose read(n) never allocates more bytes than are left, whatever a pickle asks for."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None else min(size, left))


def _check_archive(path: str) -> None:
    """Refuse a ZIP file whose members are compressed, or that PyTorch would run."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as e:
        raise _Refused(f"is cut off: the directory at its end is missing; {_AGAIN}") from e
    if any(member.filename.endswith("constants.pkl") for member in members):
        raise _Refused(
            "was not loaded: it is a TorchScript program, which is code. Save the state dict "
            "alone, where you trust the file: torch.save(model.state_dict(), path)"
        )
    size, claimed = os.path.getsize(path), sum(member.file_size for member in members)
    if claimed > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _Refused(
            f"was not loaded: its parts would unpack into {claimed} bytes, the file has {size}; "
            "save it with torch.save, which compresses nothing"
        )


def _refuse_bytearray(f: IO[bytes]) -> None:
    """Refuse bytearrays: PyTorch calls bytearray(n) for any n in a pickle; checkpoints have none.

    The pickle in an archive is not compressed (``_check_archive``).
    """
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"\nbytearray\n") >= 0:
            raise _Refused(
                "was not loaded: it holds a bytearray, which can fill any memory; save the state "
                "dict alone: torch.save(model.state_dict(), path)"
            )


def _explain(error: Exception) -> str:
    message = str(error)
    refused = re.search(r"GLOBAL (\S+)|refused to load (\S+?):", message)
    if refused:
        name = one_line(refused[1] or refused[2])
        return (
            f"was not loaded: it holds {name}, and to unpickle that could run code. Save the state "
            "dict alone, where you trust the file: torch.save(model.state_dict(), path)"
        )
    if isinstance(error, EOFError) or "truncated" in message:
        return f"is cut off: its end is missing; {_AGAIN}"
    reason = f"{type(error).__name__}: {one_line(error)}"
    return f"is damaged, cut off, or no checkpoint in the format of its suffix ({reason}); {_AGAIN}"
