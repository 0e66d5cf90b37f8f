"""Files of ``torch.save`` with a checksum, and the check that a file is undamaged.

``torch.load`` does not verify the checksums in the ZIP archive that it reads, so a flipped bit on a
disk becomes a wrong weight. The archive's directory has no checksum at all. So the SHA-256 of the
whole file is written into the archive's comment, which all readers of ZIP files, PyTorch's
included, skip.
"""

import hashlib
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from ..text import one_line

_MARK = b"sha256:"
_END = b"PK\x05\x06"  # the archive's end: a record of 22 bytes that begins so, then the comment
_END_BYTES = 22
_NO_COMMENT = bytes(2)  # its length is the record's last two bytes
_COMMENT_BYTES = len(_MARK) + 64
_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")
_CHUNK = 1 << 20
_SETTLED = 2.0  # seconds; a file that changes in less may keep the same times
_known: set[tuple[int, ...]] = set()  # identities and times of files that were undamaged


class DamagedFile(ValueError):
    """A file is damaged; the message is one line: "PATH is WHAT"."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(path, what)
        self.what = what

    def __str__(self) -> str:
        path, what = self.args
        return f"{path} is {what}"


@contextmanager
def checksummed(file: IO[bytes]) -> Iterator[Any]:
    """Wrap an open, empty binary file for ``torch.save``, and add the checksum at the end."""
    sums = _Summing(file)
    yield sums
    if sums.error is not None:
        raise sums.error
    assert sums.end == _NO_COMMENT, "torch.save wrote no ZIP archive"
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    file.write(_LENGTH + _MARK + sums.digest.hexdigest().encode())


class _Summing:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.end = b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.end = (self.end + bytes(data[-2:]))[-2:]
        if self.error is None:
            try:
                self._file.write(data)
            # Keep errors from PyTorch's C++: one raised in a destructor would end the process.
            except OSError as e:
                self.error = e
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_whole(path: str | os.PathLike[str]) -> None:
    """Read a file of ``torch.save`` and compare it with its checksum.

    A file without one, from another program, is compared with the checksums of the archive's
    members, which do not cover its directory. As --resume checks a file three times, and 1 GB takes
    seconds, this process reads an undamaged file again only if it has changed since.

    Raises:
        DamagedFile: it is cut off, its content has changed, or it is no ZIP archive.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        state = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if state not in _known:
            _compare(file, path)
        if time.time() - stat.st_mtime > _SETTLED:
            _known.add(state)


def _compare(file: IO[bytes], path: str | os.PathLike[str]) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END_BYTES - _COMMENT_BYTES, 0))
    end = file.read()
    written = end[_END_BYTES - len(_LENGTH) :]
    # Whichever bit has flipped, one of the two conditions still recognises a checksum.
    if written.startswith(_LENGTH) or _MARK in written:
        found = _digest(file, size - len(written))
        if _LENGTH + _MARK + found.encode() == written:
            return
        raise DamagedFile(path, "damaged: its checksum is another than when it was written")
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as e:  # damaged bytes fail in as many ways as there are bytes
        raise DamagedFile(path, f"empty, cut off or damaged: {one_line(e)}") from e
    if damaged is not None:
        raise DamagedFile(path, f"damaged: the checksum of its part {damaged} is another")


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether the file exists and ``check_whole`` accepts it."""
    try:
        check_whole(path)
    except (DamagedFile, OSError):
        return False
    return True


def _digest(file: IO[bytes], length: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while length:
        chunk = file.read(min(length, _CHUNK))
        if not chunk:  # it has become shorter meanwhile
            return ""
        digest.update(chunk)
        length -= len(chunk)
    digest.update(_NO_COMMENT)
    return digest.hexdigest()
