"""The folder that ``save_pretrained`` writes: model.safetensors, config.json and a model card.

model.safetensors is a complete checkpoint, whose entries are its metadata. config.json repeats them
for readers, and states the kind of the model (``KINDS``) and the sha256 of model.safetensors.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MissingLibrary
from ..files import atomic_folder, atomic_open
from ..text import brief, one_line, parse_json, prefixed
from ..weight_files.safetensors_file import read_safetensors, safetensors_bytes
from ..wiring import NetworkSpec
from .entries import stored_spec
from .hub import PREFIX, download, is_repo

# The files, in the order in which they are written.
WEIGHTS, CARD, CONFIG = FILES = ("model.safetensors", "README.md", "config.json")
# The classes whose ``from_pretrained`` reads a folder.
KINDS = ("RandWire", "RandWireClassifier", "Classifier", "Detector")
FORMAT_KEY, FORMAT = "randwire_d2_format", 1


@dataclass(frozen=True)
class PretrainedFolder:
    """The content of a folder.

    Attributes:
        path: the folder; for a repository, its folder in the cache.
        kind: one of ``KINDS``.
        options: the arguments of a RandWire or RandWireClassifier, besides its spec.
        checkpoint: the weights as "model", and the other entries.
    """

    path: Path
    kind: str
    options: dict[str, Any]
    checkpoint: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def spec(self) -> NetworkSpec | None:
        """The spec of the RandWire; None if the model has none."""
        return stored_spec(self.checkpoint)


# -------------------------------------------------------------------------------------------------
# Reading
# -------------------------------------------------------------------------------------------------


def is_pretrained(path_or_repo: str | os.PathLike[str]) -> bool:
    """Whether it is hf://…, or a folder with a config.json of this project."""
    path = os.fspath(path_or_repo)
    if path.startswith(PREFIX):
        return True
    try:
        return FORMAT_KEY in parse_json((Path(path) / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_folder(path_or_repo: str | os.PathLike[str], kind: str | None = None) -> PretrainedFolder:
    """Read a folder that ``write_folder`` wrote, or a repository with its files.

    Args:
        path_or_repo: a folder, ``owner/name[@revision]`` of a repository if there is no such
            folder, or ``hf://owner/name[@revision]``.
        kind: the required kind, one of ``KINDS``; None accepts all.

    Raises:
        ValueError: it can't be read or downloaded, is damaged or of another kind, or its
            config.json does not match its weights; one line.
    """
    path = _locate(os.fspath(path_or_repo))
    config = _read_config(path)
    if kind not in (None, config["kind"]):
        raise ValueError(
            f"{path} holds a {config['kind']}, not a {kind}: randwire_d2.from_pretrained returns "
            "whatever it is"
        )
    with prefixed(path / CONFIG):
        stored_spec(config["entries"])
    checkpoint = _read_weights(path / WEIGHTS, config["sha256"])
    ours, theirs = config["entries"], {k: v for k, v in checkpoint.items() if k != "model"}
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        raise ValueError(
            f"{path / CONFIG} and {WEIGHTS} say different things of {brief(different[0])}: one of "
            "the two was changed, and they are not of one model"
        )
    return PretrainedFolder(path, config["kind"], config["options"], checkpoint)


def _locate(source: str) -> Path:
    if os.path.isdir(source):
        return Path(source)
    if source.startswith(PREFIX) or (is_repo(source) and not os.path.exists(source)):
        return download(source, FILES)
    raise ValueError(
        f"{source!r} is neither a folder nor a repository (owner/name or {PREFIX}owner/name)"
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        config = parse_json(file.read_text())
    except FileNotFoundError as e:
        raise ValueError(
            f"{file} does not exist: a folder of save_pretrained has one, beside {WEIGHTS}"
        ) from e
    except (OSError, ValueError) as e:
        raise ValueError(f"{file} can't be read, or is damaged: {one_line(e)}") from e
    if not isinstance(config, dict) or FORMAT_KEY not in config:
        raise ValueError(f"{file} is none of randwire_d2's: it has no {FORMAT_KEY!r}")
    if config[FORMAT_KEY] != FORMAT:
        raise ValueError(
            f"{file} has the format {brief(config[FORMAT_KEY])}, this version knows {FORMAT}: "
            "upgrade randwire_d2"
        )
    if config.get("kind") not in KINDS:
        raise ValueError(f"{file}: its kind is {brief(config.get('kind'))}, not one of {KINDS}")
    for key, types in (("sha256", str), ("options", dict), ("entries", dict)):
        if not isinstance(config.get(key), types):
            raise ValueError(f"{file} is damaged: {key!r} is {brief(config.get(key))}")
    return config


def _read_weights(file: Path, stated: str) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as e:
        raise ValueError(f"{file} can't be read: {e.strerror}") from e
    if _is_pickle(content):
        raise ValueError(
            f"{file} is a pickle under another name, as torch.save writes it; it was not loaded, "
            "for to unpickle could run code"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != stated:
        raise ValueError(
            f"{file} is damaged, cut off, or another file: its sha256 is {digest}, {CONFIG} states "
            f"{one_line(stated, 80)}"
        )
    del content
    try:
        return read_safetensors(file)
    except MissingLibrary:
        raise
    except Exception as e:  # damaged files can raise any exception
        raise ValueError(f"{file} is no whole .safetensors file ({one_line(e)})") from e


def _is_pickle(content: bytes) -> bool:
    """Whether a file begins like torch.save's: a ZIP file or, from old versions, a bare pickle.

    The header length of a .safetensors may have the same bytes, but is within the file's size.
    """
    length = int.from_bytes(content[:8], "little")
    return content.startswith((b"PK", b"\x80")) and length > len(content)


# -------------------------------------------------------------------------------------------------
# Writing
# -------------------------------------------------------------------------------------------------


def write_folder(
    folder: str | os.PathLike[str],
    kind: str,
    state: Mapping[str, Tensor],
    entries: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write a model that ``read_folder`` reads; a new folder gets its name only when complete.

    Args:
        kind: one of ``KINDS``.
        state: the weights.
        entries: the other entries of the checkpoint, in JSON's types.
        options: see ``PretrainedFolder``.
        card: the README.md, to which the file's size and sha256 are added.
        overwrite: replace the files of these names in a folder that is not empty.

    Raises:
        ValueError: the folder is a file, or not empty; or safetensors is not installed.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if not state:
        raise ValueError("the model holds no weights; save the one that it was exported from")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(
            f"{folder} is not empty: name another folder, or overwrite it (--overwrite, or "
            "save_pretrained's overwrite=True)"
        )
    weights = safetensors_bytes(state, entries)
    digest = hashlib.sha256(weights).hexdigest()
    config = {
        FORMAT_KEY: FORMAT,
        "kind": kind,
        "sha256": digest,
        "options": dict(options or {}),
        "entries": dict(entries),
    }
    card = f"{card.rstrip()}\n\n`{WEIGHTS}`: {len(weights):,} bytes, sha256 `{digest}`\n"
    contents = (weights, card.encode(), f"{json.dumps(config, indent=1)}\n".encode())
    # An existing folder is kept: it may be a link or a mount, which can't be replaced.
    with nullcontext(folder) if folder.is_dir() else atomic_folder(folder) as place:
        # config.json comes last: without it, or with another sha256 in it, the folder is refused.
        for name, content in zip(FILES, contents):
            with atomic_open(place / name, "wb") as f:
                f.write(content)
    return folder
