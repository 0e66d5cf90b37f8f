"""What can be known of an image file without decoding it: its size, and whether it is whole."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from ...text import one_line
from ..paths import in_threads
from .names import why_no_image

# The last bytes of a whole file; one that ends otherwise is decoded to know.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL = 256  # bytes
_ORIENTATION = 0x0112  # the tag of EXIF
# Pillow turns these into RGB by cutting off what is above 255, which makes most of an image white.
# Which values should become 0 and 255 only its owner knows.
_DEEP_MODES = ("I", "F")  # and I;16, I;16B, …
TO_8_BITS = "such as by ImageMagick's mogrify -level 0,LARGEST -depth 8"


@dataclass(frozen=True)
class ImageFile:
    """What is known of an image file.

    Attributes:
        size: width and height as Detectron2 reads it, turned as EXIF says; None if it can't be.
        error: why it can't be read; "" if it can.
        is_deep: whether that is because it has more than 8 bits per channel.
        turned: whether EXIF has it turned by a quarter.
        key: the number of bytes and a digest of the last ones: equal files have equal keys.
    """

    size: tuple[int, int] | None
    error: str = ""
    is_deep: bool = False
    turned: bool = False
    key: tuple[int, str] = (0, "")


# What this process has found, with the time and the size that a file had, and what it was told.
_found: dict[str, tuple[tuple[int, int], ImageFile]] = {}
_told: dict[str, ImageFile] = {}


def probe(path: str) -> ImageFile:
    """Look at an image file's first and last bytes; once, as long as it isn't changed.

    A file that ``take_files`` has told of is not looked at.
    """
    if (file := _told.get(path)) is not None:
        return file
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as e:  # a path with a zero byte is a ValueError
        _found[path] = (0, 0), ImageFile(None, str(e))
        return _found[path][1]
    state = stat.st_mtime_ns, stat.st_size
    if path not in _found or _found[path][0] != state:
        _found[path] = state, _look(path, stat.st_size)
    return _found[path][1]


def probe_all(paths: Sequence[str]) -> list[ImageFile]:
    """``probe`` for many files at once."""
    if all(path in _told for path in paths):
        return list(map(probe, paths))
    return in_threads(probe, paths)


def known_files() -> dict[str, ImageFile]:
    """What this process knows of all image files that it was asked about, for ``take_files``."""
    return {path: file for path, (_, file) in _found.items()} | _told


def take_files(files: Mapping[str, ImageFile]) -> None:
    """Take another process's word, so that both have the same images, whatever is changed since,
    and a disk is asked once.

    Args:
        files: of ``known_files``.
    """
    _told.update(files)


def why_deep(image: Image.Image) -> str:
    """Why an image can't be read as 8 bits per channel; "" if it can."""
    if image.mode.split(";")[0] not in _DEEP_MODES:
        return ""
    return (
        f"it has more than 8 bits per pixel (Pillow's mode {image.mode}), and all values above 255 "
        f"would be white: convert it, {TO_8_BITS}"
    )


def why_turned_twice(image: Image.Image) -> str:
    """Why Detectron2's mappers would read an image upside down or on its side; "" if they don't."""
    if image.format != "TIFF" or _orientation(image) not in range(2, 9):
        return ""
    return (
        "it is a TIFF with an orientation tag, by which Pillow turns it, and Detectron2 turns it "
        "again: convert it, such as by ImageMagick's mogrify -auto-orient"
    )


def check_kind(image: Image.Image) -> None:
    """
    Raises:
        ValueError: it is PostScript, whatever its name ends in; one line.
    """
    if image.format == "EPS":
        raise ValueError(
            "it is PostScript, a program, which Pillow would have Ghostscript run: convert it, "
            "such as to PNG, where you trust it"
        )


def digest(path: str) -> bytes:
    """The sha256 of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _look(path: str, num_bytes: int) -> ImageFile:
    try:
        with open(path, "rb") as f:
            with Image.open(f) as image:
                check_kind(image)
                kind, size = image.format, image.size
                if reason := why_deep(image):
                    return ImageFile(None, reason, is_deep=True)
                if reason := why_turned_twice(image):
                    return ImageFile(None, reason)
                turned = _orientation(image) >= 5  # by a quarter, whether mirrored or not
            tail = _tail(f, num_bytes)
            if not tail.endswith(_ENDS.get(kind or "", b"")):
                f.seek(0)
                with Image.open(f) as image:
                    image.load()
    except UnidentifiedImageError:
        return ImageFile(None, why_no_image(path))
    # Pillow raises SyntaxError and others for what is broken.
    except Exception as e:
        return ImageFile(None, one_line(e) or type(e).__name__)
    key = (num_bytes, hashlib.sha256(tail).hexdigest()[:16])
    return ImageFile((size[1], size[0]) if turned else size, turned=turned, key=key)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as in Detectron2: a broken EXIF is none
        return 1


def _tail(f: IO[bytes], num_bytes: int) -> bytes:
    f.seek(max(num_bytes - _TAIL, 0))
    return f.read()
