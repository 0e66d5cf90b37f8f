"""Check an image file without decoding it: its size, and whether it is complete."""

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

# The last bytes of a complete file; a file with other last bytes is decoded to check it.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL = 256  # bytes
_ORIENTATION = 0x0112  # the tag of EXIF
# Pillow converts these modes to RGB by clipping at 255, which makes most of an image white. Only
# the owner knows which values should become 0 and 255.
_DEEP_MODES = ("I", "F")  # and I;16, I;16B, …
TO_8_BITS = "such as by ImageMagick's mogrify -level 0,LARGEST -depth 8"


@dataclass(frozen=True)
class ImageFile:
    """The result of checking an image file.

    Attributes:
        size: width and height after the rotation by EXIF, as Detectron2 reads it; None if it can't.
        error: why the image can't be read; "" if it can.
        is_deep: whether the reason is more than 8 bits per channel.
        turned: whether EXIF rotates it by 90° or 270°.
        key: the number of bytes and a digest of the last ones: equal files have equal keys.
    """

    size: tuple[int, int] | None
    error: str = ""
    is_deep: bool = False
    turned: bool = False
    key: tuple[int, str] = (0, "")


# The results of this process, with the time and size of each file; and those of another process.
_found: dict[str, tuple[tuple[int, int], ImageFile]] = {}
_told: dict[str, ImageFile] = {}


def probe(path: str) -> ImageFile:
    """Check an image file by its first and last bytes; once, as long as the file doesn't change.

    A file whose result came through ``take_files`` is not opened.
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
    """All results that this process has, for ``take_files`` in another one."""
    return {path: file for path, (_, file) in _found.items()} | _told


def take_files(files: Mapping[str, ImageFile]) -> None:
    """Take over the results of another process, so that both use the same images even if files
    change meanwhile, and files are checked only once.

    Args:
        files: the return value of ``known_files``.
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
    """Why Detectron2's mappers would rotate an image wrongly; "" if they don't."""
    if image.format != "TIFF" or _orientation(image) not in range(2, 9):
        return ""
    return (
        "it is a TIFF with an orientation tag, by which Pillow turns it, and Detectron2 turns it "
        "again: convert it, such as by ImageMagick's mogrify -auto-orient"
    )


def check_kind(image: Image.Image) -> None:
    """
    Raises:
        ValueError: the image is PostScript, whatever its suffix; one line.
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
    # Pillow raises SyntaxError and other errors for damaged files.
    except Exception as e:
        return ImageFile(None, one_line(e) or type(e).__name__)
    key = (num_bytes, hashlib.sha256(tail).hexdigest()[:16])
    return ImageFile((size[1], size[0]) if turned else size, turned=turned, key=key)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF is ignored, as in Detectron2
        return 1


def _tail(f: IO[bytes], num_bytes: int) -> bytes:
    f.seek(max(num_bytes - _TAIL, 0))
    return f.read()
