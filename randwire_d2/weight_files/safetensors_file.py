"""Checkpoints as .safetensors: weights, and all other entries as JSON in its metadata."""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import MissingLibrary
from ..text import parse_json


def require_safetensors() -> Any:
    """Import the library safetensors.

    Raises:
        MissingLibrary: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as e:
        raise MissingLibrary(
            ".safetensors needs a library that is not installed: pip install safetensors"
        ) from e
    return safetensors


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the entries of a checkpoint, the weights as "model"; nothing in it is unpickled.

    Raises:
        MissingLibrary: safetensors is not installed.
        safetensors.SafetensorError, ValueError, OSError: the file is damaged, or another format.
    """
    with require_safetensors().safe_open(os.fspath(path), framework="pt") as f:
        names = f.keys()
        # Copy: otherwise, writing to the file would change the weights.
        weights = {name: f.get_tensor(name).clone() for name in names}
        texts = {k: v for k, v in (f.metadata() or {}).items() if k != "format"}
    # The weights last: another project's metadata may have an entry "model", such as its name.
    return {**{key: _from_json(text) for key, text in texts.items()}, "model": weights}


def _from_json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:  # another project's metadata
        return text


def safetensors_bytes(state: Mapping[str, Tensor], entries: Mapping[str, Any]) -> bytes:
    """The content of a file with weights and the other entries of a checkpoint.

    Raises:
        MissingLibrary: safetensors is not installed.
    """
    # Copy: safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    texts = {key: json.dumps(value) for key, value in entries.items()}
    content: bytes = require_safetensors().torch.save(tensors, metadata={"format": "pt", **texts})
    return _with_sorted_metadata(content)


def _with_sorted_metadata(content: bytes) -> bytes:
    """The same file, with the metadata's keys in order: safetensors writes them in a random one, so
    that a model's sha256 would be another each time it is written."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights stay aligned, as the format wants
    return len(text).to_bytes(8, "little") + text + content[end:]
