"""What a prediction that ended early has left in its folder, for another one to go on with.

A prediction has job.json beside its results, job.partial.json until it is finished: which
checkpoint it is of, which inputs, and what else its results depend on. After SIGKILL, or when the
machine has gone down, the results end anywhere.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...text import parse_json
from ..inputs import FINISHED, NOTE

STAMPS = "stamps"  # in a note: the inputs' sizes and times
COLUMNS = (
    "image_id", "file_name", "frame", "category_id", "category", "score", "x", "y", "width",
    "height",
)  # fmt: skip
Note = dict[str, Any]


def partial_path(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def digest(value: bytes | object) -> str:
    """A digest of bytes, or of the JSON of something else."""
    content = value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def stamp(path: str) -> list[int] | None:
    """A file's size and time, which change with its content; None if it isn't on this machine."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def read_note(folder: Path) -> Note | None:
    """What the prediction in a folder is of, an unfinished one first; None if there is none.

    Raises:
        ValueError: it is damaged; one line.
    """
    path = folder / NOTE
    if not path.is_file() and not (path := folder / FINISHED).is_file():
        return None
    try:
        note: Note = parse_json(path.read_bytes())
        if not isinstance(note, dict) or [] in note.values():
            raise ValueError("it is no note of a prediction")
        note[STAMPS] = dict(note.get(STAMPS, {}))  # older versions have none
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}); --overwrite begins anew") from e
    return note


def check_note(folder: Path, noted: Note, own: Note) -> None:
    """
    Raises:
        ValueError: the prediction in a folder is another one; one line.
    """
    for name in own:
        before, now = (v if isinstance(v, list) else [v] for v in (noted.get(name), own[name]))
        if before[-1] != now[-1]:
            raise ValueError(
                f"--resume: the prediction in {str(folder)!r} has another {name} ({before[0]}; "
                f"now {now[0]}): give what it was begun with, or --overwrite to begin anew"
            )


class Written(NamedTuple):
    """What the files hold once an image was written.

    Attributes:
        image: of images.json.
        ends: of the files, in bytes.
        results: of this image and those before.
    """

    image: dict[str, Any]
    ends: tuple[int, ...]
    results: int


def find_written(paths: Sequence[Path], categories: Mapping[int, str]) -> list[Written]:
    """The images of which the files have everything; the files get their partial names.

    The table is made anew.

    Args:
        paths: of results, table, images and, of a panoptic model, segments, once they are whole.
        categories: names by id.

    Raises:
        ValueError: one of them is gone; one line.
    """
    partial = [*map(partial_path, paths)]
    results, table, *lists = partial
    for path, file in zip(paths, partial):
        if not file.exists() and path.exists():  # killed between the last file's end and its name
            os.replace(path, file)
        if not file.exists() and file != table:
            raise ValueError(f"--resume: {path} is not there; --overwrite begins anew")
    found: list[Written] = []
    records, end, number = _values(results), 0, 0
    record, after = next(records, (None, None))
    with open(table, "wb") as f:
        f.write(table_rows([COLUMNS]))
        for values in zip(*map(_values, lists)):
            image, own = values[0][0], []
            if image is None:
                break
            while record is not None and record["image_id"] == image["id"]:
                own.append(record)
                end, number = after or 0, number + 1
                record, after = next(records, (None, None))
            f.write(table_rows(rows_of(image, own, categories)))
            ends = (end or len(b"["), f.tell(), *(position for _, position in values))
            found.append(Written(image, ends, number))
    if after is None:  # cut off: more of the last image, and images without results, may be missing
        while found and found[-1].results == number:
            found.pop()
    return found


def _values(path: Path) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The objects of a file's list, one a line, and where each ends; None where the list does."""
    end, begun = 0, False
    with open(path, "rb") as f:
        for line in f:
            start, end = end, end + len(line)
            text = line.rstrip(b",\n")
            if not begun:
                begun = text.endswith(b"[")
                continue
            if text in (b"]", b"]}"):
                yield None, start
                return
            try:
                value = parse_json(text)
            except ValueError:  # the rest of a line that was cut off
                return
            yield value, start + len(text)


def rows_of(
    image: Mapping[str, Any], records: Sequence[Mapping[str, Any]], categories: Mapping[int, str]
) -> Iterator[list[Any]]:
    """The rows of an image in the table."""
    for record in records:
        row = dict(zip(("x", "y", "width", "height"), record.get("bbox", ())))
        row |= {k: image[k] for k in ("file_name", "frame") if k in image}
        row |= {k: record[k] for k in ("image_id", "category_id", "score")}
        row["category"] = categories[record["category_id"]]
        yield [row.get(column, "") for column in COLUMNS]


def table_rows(rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # of names that are no UTF-8
