"""Checkpoint files of every format: reading without running code in them, atomic writing."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..checkpoint import EMA_KEY, load_checkpoint
from ..files import atomic_open
from ..weight_files.checksum import checksummed
from ..weight_files.reading import check_state, read_entries
from ..weight_files.safetensors_file import require_safetensors, safetensors_bytes

# A converted ResNe(X)t has the MODEL.RESNETS keys that it needs under this key.
RESNETS_KEY = "resnets"
FORMATS = (".pth", ".pkl", ".safetensors")

# The names of a state dict in a checkpoint: "model" in Detectron2, this project and torchvision's
# references; "state_dict" in JiaminRen's and PyTorch's ImageNet example. A file that has neither
# must be a state dict itself.
_STATE_KEYS = ("model", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        path: the file.
        state: the state dict, without the ``module.`` that DataParallel puts before every name.
        rest: everything else in the file: wiring, preprocessing, author, optimizer, …
        averaged: whether ``state`` is the average of SOLVER.EMA, which evaluations test, and not
            the last iteration's weights.
    """

    path: str
    state: dict[str, Tensor]
    rest: dict[str, Any]
    averaged: bool = False


def read_checkpoint(file: str | os.PathLike[str]) -> Checkpoint:
    """Read a ``.safetensors``, a ``.pkl`` of arrays, or anything that ``torch.save`` wrote.

    Args:
        file: a path, or a URL that Detectron2's PathManager knows.

    Raises:
        ValueError: if it is missing, damaged, no checkpoint, or would run code; one line.
    """
    path = os.fspath(file)
    if "://" in path:
        try:
            path = PathManager.get_local_path(path)
        except (OSError, RuntimeError) as e:
            raise ValueError(f"{path!r} can't be had: {e}") from e
    if not os.path.isfile(path):
        raise ValueError(f"{path!r} is no file")
    # A .pkl is read as Detectron2 reads it, Caffe2's blobs included.
    data = load_checkpoint(path) if path.endswith(".pkl") else read_entries(path)
    return _unwrap(path, data)


def _unwrap(path: str, data: Mapping[str, Any]) -> Checkpoint:
    wrapped = [key for key in _STATE_KEYS if isinstance(data.get(key), Mapping)]
    state = data[wrapped[0]] if wrapped else data
    rest = {k: v for k, v in data.items() if k != wrapped[0]} if wrapped else {}
    # In files of other projects, this key may have another meaning.
    average = rest.get(EMA_KEY)
    averaged = isinstance(average, Mapping) and average.keys() == state.keys()
    if averaged:
        state = rest.pop(EMA_KEY)
    if wrapped:
        check_state(path, state)
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            try:
                value = torch.from_numpy(value)
            except TypeError:
                raise ValueError(
                    f"{path!r} holds no state dict: {name!r} is a {type(value).__name__}, "
                    f"and nothing is called {' or '.join(map(repr, _STATE_KEYS))}"
                ) from None
        tensors[name.removeprefix("module.")] = value.detach()
    if not tensors:
        raise ValueError(f"{path!r} holds an empty state dict")
    return Checkpoint(path, tensors, rest, averaged)


def write_checkpoint(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], entries: Mapping[str, Any]
) -> None:
    """Write a checkpoint in the format of its suffix, atomically.

    Args:
        path: it ends in ``.pth`` or ``.pkl``, both in Detectron2's form, or in ``.safetensors``.
        state: the weights.
        entries: the wiring, the preprocessing, …; the metadata of a ``.safetensors``.

    Raises:
        ValueError: for another suffix, or if safetensors is not installed.
    """
    suffix = check_format(path)
    state = {name: value.contiguous() for name, value in state.items()}
    with atomic_open(path, "wb") as f:
        if suffix == ".pth":
            with checksummed(f) as summed:
                torch.save({"model": state, **entries}, summed)
        elif suffix == ".pkl":
            arrays = {name: value.numpy() for name, value in state.items()}
            # Detectron2 reads a .pkl without an author as Caffe2's.
            data = {"model": arrays, "__author__": "randwire_d2", **entries}
            pickle.dump(data, f, protocol=4)  # the highest that Python 3.6 reads
        else:
            f.write(safetensors_bytes(state, entries))


def check_format(path: str | os.PathLike[str]) -> str:
    """The suffix of a path, one of ``FORMATS``.

    Raises:
        ValueError: if it is another one, or its library is not installed.
    """
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ValueError(f"OUTPUT must end in {', '.join(FORMATS)}; got {os.fspath(path)!r}")
    if suffix == ".safetensors":
        require_safetensors()
    return suffix
