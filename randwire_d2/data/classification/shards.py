"""Tar shards of labelled images in webdataset's layout, with random access to the images.

A shard is a tar file in which adjacent members with the same key form a sample: ``key.jpg``, or any
other of torchvision's image types, and ``key.cls``, its label in digits. ``classes.txt`` beside the
shards has the class names, one per line in the order of the labels; without it, the names are the
labels' numbers.

A shard is scanned once for the positions of its images. They are kept in iopath's cache
(``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``), and are valid while the shard's size and
modification time don't change. So samples are read by index, in any order, like the files of a
folder; with a shuffle buffer, a resumed training would read another stream of images.
"""

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir

from ...files import atomic_open
from ...text import brief, one_line, parse_json
from ..images.names import is_image_file
from ..paths import in_threads, read_text

CLASSES_FILE = "classes.txt"
PREFIX = "tar://"
VERSION = 1  # of the cached positions
_MOST_CLASSES = 2**20  # about 50 times ImageNet's 21k
_END = bytes(tarfile.BLOCKSIZE)  # what follows the last member

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """An image in a shard: its member's name, and the position and number of its bytes."""

    member: str
    offset: int
    size: int
    label: int


def find_shards(path: str) -> list[str]:
    """The shards that a path names, in their order; none if it names no shards.

    Args:
        path: a folder with ``*.tar`` files and no subfolders, one such file, or a pattern such as
            ``train-{000000..000127}.tar``, whose files need not exist.
    """
    if os.path.isdir(path):
        files = [*Path(path).iterdir()]
        if any(file.is_dir() for file in files):  # class folders, perhaps with their archives
            return []
        return sorted(str(file) for file in files if file.suffix == ".tar")
    if not path.endswith(".tar"):
        return []
    return _expand(path) if "{" in path else [path] * os.path.isfile(path)


def _expand(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    return [
        shard
        for i in range(int(first), int(last) + 1)
        for shard in _expand(f"{pattern[: match.start()]}{i:0{len(first)}}{pattern[match.end() :]}")
    ]


def read_shards(shards: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The records {"file_name", "label"} of all images, in order, and the names of the classes.

    Detectron2's PathManager can open each file_name in mode "rb".

    Raises:
        ValueError: a shard is missing, damaged or of another layout, or there is no sample, or
            classes.txt doesn't fit the labels; one line that names the file.
    """
    samples = in_threads(_samples, shards)
    records: list[dict[str, Any]] = [
        {"file_name": _name(os.path.abspath(shard), sample), "label": sample.label}
        for shard, found in zip(shards, samples)
        for sample in found
    ]
    if not records:
        raise ValueError(f"{shards[0]!r}: no sample is in this and {len(shards) - 1} other shards")
    number = 1 + max(record["label"] for record in records)
    names = _class_names(os.path.dirname(shards[0]))
    if names is not None and number > len(names):
        bad = next(r["file_name"] for r in records if r["label"] >= len(names))
        raise ValueError(
            f"{bad} has a label of {len(names)} or more, but the {CLASSES_FILE} beside it names "
            f"{len(names)} classes"
        )
    return records, [str(i) for i in range(number)] if names is None else names


def _class_names(folder: str) -> list[str] | None:
    path = os.path.join(folder, CLASSES_FILE)
    if not os.path.exists(path):
        return None
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f"{path!r} names the class {twice[0]!r} twice")
    return names


# -------------------------------------------------------------------------------------------------
# The index of a shard
# -------------------------------------------------------------------------------------------------


def _samples(shard: str) -> list[Sample]:
    try:
        stat = os.stat(shard)
    except OSError as e:
        raise ValueError(f"the shard {shard!r} can't be read: {e.strerror}") from e
    path = os.path.abspath(shard)
    state = [VERSION, path, stat.st_size, stat.st_mtime_ns]
    folder = os.path.join(get_cache_dir(), "randwire_d2", "shards")
    kept = os.path.join(folder, f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json")
    samples = _read_kept(kept, state)
    if samples is None:
        logger.info(f"Looking for the images in {shard}, once")
        samples = _scan(shard)
        with suppress(OSError):  # without the cache, the next process scans again
            os.makedirs(folder, exist_ok=True)
            with file_lock(kept), atomic_open(kept) as f:
                json.dump({"state": state, "samples": samples}, f)
    return samples


def _read_kept(path: str, state: list[Any]) -> list[Sample] | None:
    try:
        with open(path, encoding="utf-8") as f:
            kept = parse_json(f.read())
        return [Sample(*sample) for sample in kept["samples"]] if kept["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _scan(shard: str) -> list[Sample]:
    try:
        with tarfile.open(shard, "r:") as archive, open(shard, "rb") as f:
            # Other members, such as macOS's ._key.jpg, may be between those of a sample.
            members = [m for m in archive if m.isfile() and _split(m.name)[0]]
            # tarfile takes a damaged header, or the end of a truncated file, for the archive's end.
            f.seek(archive.offset)
            if f.read(len(_END)) != _END:
                raise tarfile.ReadError(f"there is no member at byte {archive.offset}, and no end")
            return [*_group(members, f)]
    except (tarfile.TarError, OSError, ValueError) as e:
        raise ValueError(
            f"the shard {shard!r} is damaged, or no tar file of labelled images: {one_line(e, 300)}"
        ) from e


def _group(members: Sequence[tarfile.TarInfo], f: IO[bytes]) -> Iterator[Sample]:
    for key, neighbours in groupby(members, lambda member: _split(member.name)[0]):
        group = [*neighbours]
        parts = {_split(member.name)[1]: member for member in group}
        images = [kind for kind in parts if is_image_file(f".{kind}") and "." not in kind]
        if not images and "cls" not in parts:
            continue  # a file of webdataset's or the user's own
        if len(images) != 1 or "cls" not in parts or len(parts) < len(group):
            kinds = ", ".join(sorted(_split(member.name)[1] for member in group))
            raise ValueError(
                f"the sample {brief(key)} has {one_line(kinds)}; it needs one image, such as jpg, "
                "and cls, its label"
            )
        f.seek(parts["cls"].offset_data)
        label = f.read(min(parts["cls"].size, 20))
        if not label.strip().isdigit() or int(label) >= _MOST_CLASSES:
            raise ValueError(
                f"the label of {brief(key)} is {label!r}; it must be a number from 0, less than "
                f"{_MOST_CLASSES:,}"
            )
        image = parts[images[0]]
        yield Sample(image.name, image.offset_data, image.size, int(label))


def _split(member: str) -> tuple[str, str]:
    """Split a member's name into key and kind at the first dot of its base name, as webdataset."""
    folder, slash, name = member.rpartition("/")
    key, dot, kind = name.partition(".")
    return (f"{folder}{slash}{key}", kind.lower()) if key and dot else ("", "")


# -------------------------------------------------------------------------------------------------
# The images of shards as files
# -------------------------------------------------------------------------------------------------


def _name(shard: str, sample: Sample) -> str:
    return f"{PREFIX}{shard}//{sample.member}#{sample.offset}+{sample.size}"


def image_type(file_name: str) -> str:
    """The suffix of an image's name, such as "jpg", for a file or an image in a shard."""
    name = file_name.rpartition("#")[0] if file_name.startswith(PREFIX) else file_name
    return Path(name).suffix[1:].lower()


class _MemberHandler(PathHandler):
    """Open images in shards by the names that ``_name`` gives them."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode != "rb":
            raise OSError(f"{path} is part of a shard, which is only read, as bytes")
        name, _, where = path.removeprefix(PREFIX).rpartition("#")
        offset, size = map(int, where.split("+"))
        with open(name.partition("//")[0], "rb") as f:
            f.seek(offset)
            return io.BytesIO(f.read(size))


PathManager.register_handler(_MemberHandler(), allow_override=True)  # this module may be reloaded
