"""Recognise image files by their names, also photos in formats that Pillow does not read.

Folders are searched for both, so that unreadable photos are reported.
"""

import os
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec

from torchvision.datasets.folder import IMG_EXTENSIONS

_READS_AVIF = find_spec("PIL._avif") is not None  # from Pillow 11.3 on
# Pillow reads the other formats, too; from a GIF the first frame.
READABLE = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", *([".avif"] if _READS_AVIF else []))
UNREADABLE = (
    *([] if _READS_AVIF else [".avif"]), ".heic", ".heif", ".jxl",
    ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2",
)  # fmt: skip
_WAY_OUT = "can't be read here: convert to JPEG"


def is_image_file(name: str) -> bool:
    """Whether a file is a readable image; macOS's metadata files, such as ._photo.jpg, are none."""
    return name.lower().endswith(READABLE) and not os.path.basename(name).startswith("._")


def is_unreadable(name: str) -> bool:
    return name.lower().endswith(UNREADABLE)


def unconverted(names: Iterable[str]) -> list[str]:
    """The unreadable images among these, without those that have been converted: a readable image
    has the same name with another suffix."""
    names = list(names)
    found = [name for name in names if is_unreadable(name)]
    stems = {os.path.splitext(name)[0] for name in names if is_image_file(name)} if found else ()
    return [name for name in found if os.path.splitext(name)[0] not in stems]


def images_of(names: Iterable[str]) -> list[str]:
    """The readable images among these and those that are ``unconverted``, sorted."""
    names = list(names)
    return sorted([*filter(is_image_file, names), *unconverted(names)])


def unreadable(names: Iterable[str]) -> str:
    """A message about the ``unconverted`` images among these: "40 .heic can't …"; or ""."""
    counts = Counter(map(_suffix, unconverted(names)))
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in counts.most_common())
    return f"{kinds} {_WAY_OUT}" if kinds else ""


def why_no_image(path: str) -> str:
    """The reason why Pillow recognises no image in a file."""
    return f"{_suffix(path)} {_WAY_OUT}" if is_unreadable(path) else "it is no image"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
