"""What a checkpoint file holds, read without running its code, and one kind of error for all."""

import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..array_pickle import ArrayUnpickler
from ..checksum import DamagedFile, check_whole
from .safetensors_file import MissingLibrary, read_safetensors

_AGAIN = "copy or download it again"
_LONGEST_REASON = 160  # characters of another library's message


def read_entries(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What lies in a local file, as it was saved: weights, wiring, config, optimizer, …

    Args:
        path: ``.safetensors``; ``.pkl``, arrays in a pickle; else what ``torch.save`` wrote.

    Raises:
        ValueError: it is missing, empty, cut off or damaged, no checkpoint, or would run code; one
            line that names the file and the way out.
        MissingLibrary: it is a ValueError too; a ``.safetensors`` needs one.
    """
    path = os.fspath(path)
    try:
        data = _read(path)
    except (MissingLibrary, DamagedFile):
        raise
    except OSError as e:
        raise ValueError(f"{path!r} can't be read: {e.strerror or _brief(e)}") from e
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


def check_state(path: str | os.PathLike[str], state: Any) -> None:
    """Refuse what is no state dict: names, each with a tensor or an array.

    Args:
        path: of the file that holds it, for the message.

    Raises:
        ValueError: it is none, or a tensor in it claims to be larger than the file; one line.
    """
    path = os.fspath(path)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path!r} holds no weights: its entry 'model' is a {type(state).__name__}, not a "
            "state dict; save {'model': model.state_dict()} with torch.save"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor | np.ndarray | np.generic):
            raise ValueError(
                f"{path!r} holds no state dict: {_brief(name)!r} is a {type(value).__name__}, "
                "and nothing is called 'model'; save {'model': model.state_dict()} with torch.save"
            )


class _Refused(Exception):
    """What is wrong with a file, to be said after its name."""


def _read(path: str) -> Any:
    if os.path.getsize(path) == 0:
        raise _Refused(f"is empty: it was never written; {_AGAIN}")
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    with open(path, "rb") as f:
        head = f.read(16)
        if head.startswith(b"PK") and not path.endswith(".pkl"):
            _check_archive(path)
            check_whole(path)
        elif not head.startswith(b"\x80") and not path.endswith(".pkl"):
            raise _Refused(
                f"is no checkpoint: it begins with {head!r}, not as torch.save or pickle begin "
                f"a file; {_AGAIN}, or name another"
            )
        if path.endswith(".pkl"):
            f.seek(0)
            return ArrayUnpickler(f, encoding="latin1").load()
    # map_location: a file saved on a GPU must load where there is none.
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: str) -> None:
    """Refuse a ZIP file that PyTorch would unpack into more bytes than it has, or run."""
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
    if claimed > size:  # torch.save compresses nothing
        raise _Refused(
            f"was not loaded: its parts would unpack into {claimed} bytes, the file has {size}; "
            "save it with torch.save, which compresses nothing"
        )


def _explain(error: Exception) -> str:
    message = str(error)
    refused = re.search(r"GLOBAL (\S+)|refused to load (\S+?):", message)
    if refused:
        name = _brief(refused[1] or refused[2])
        return (
            f"was not loaded: it holds {name}, and to unpickle that could run code. Save the state "
            "dict alone, where you trust the file: torch.save(model.state_dict(), path)"
        )
    if isinstance(error, EOFError) or "truncated" in message:
        return f"is cut off: its end is missing; {_AGAIN}"
    reason = f"{type(error).__name__}: {_brief(error)}"
    return f"is damaged, cut off, or no checkpoint in the format of its suffix ({reason}); {_AGAIN}"


def _brief(text: object) -> str:
    """The beginning of another's text, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 2]} …"
