"""What a prediction leaves in its folder: results, pictures, videos; each appears whole.

results.json    COCO's results: image_id, category_id, score, and of a detector bbox (x, y,
                width, height in pixels), segmentation (RLE) and keypoints (x, y, score of each), as
                COCOEvaluator writes them
images.json     what the ids are, in the form of COCO's annotations: images (file_name, height,
                width, of a video frame) and categories (name)
results.csv     the same in a table
panoptic.json   of a panoptic model: COCO's panoptic annotations (segments_info of each image) and
                categories
panoptic/       the PNGs that they name, as panopticapi reads and writes them
job.json        which checkpoint and inputs the results are of, and with which options
pictures/       the images and videos with what was found in them

Until all is in them, the files have .partial before their suffix. A prediction that an error,
Ctrl-C or SIGTERM ends leaves them so, and another one goes on from there: see ``unfinished``.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ...files import atomic_open
from ...text import one_line, parse_json
from ..inputs import PICTURES, SEGMENTS
from .unfinished import (
    COLUMNS,
    FINISHED,
    NOTE,
    Note,
    Written,
    find_written,
    partial_path,
    rows_of,
    table_rows,
)

RESULTS, TABLE, IMAGES = "results.json", "results.csv", "images.json"
PANOPTIC = "panoptic.json"


@contextmanager
def results_writer(
    folder: Path,
    categories: Mapping[int, str],
    panoptic: Sequence[dict[str, Any]] | None,
    note: Note,
    keep: Callable[[list[dict[str, Any]]], int] | None = None,
) -> Iterator["ResultsWriter"]:
    """Results in a folder, which is there.

    If the block raises, what was added so far stays, under partial names, and a line on stderr
    says so. What ends the process in the middle of that leaves files that end anywhere.

    Args:
        categories: names by id.
        panoptic: the categories of a panoptic model; None of others.
        note: what the results are of, for who goes on with them.
        keep: to go on with those of an unfinished prediction in the folder: how many of the images
            stay of which it has written all.

    Raises:
        ValueError: another prediction is at work in the folder, or what it had left is gone; one
            line.
    """
    names = (RESULTS, TABLE, IMAGES, *(() if panoptic is None else (PANOPTIC,)))
    paths = [folder / name for name in names]
    partial = [*map(partial_path, paths)]
    written: list[Written] = []
    stopped: BaseException | None = None
    with ExitStack() as stack:
        stack.enter_context(_alone_in(folder))
        if keep is not None:
            written = find_written(paths, categories)
            written = written[: keep([one.image for one in written])]
        else:  # until there are new files that a note is of
            (folder / NOTE).unlink(missing_ok=True)
        kept = written[-1] if written else None
        mode = "r+b" if kept else "wb"
        # Without a buffer: a process that is killed has written all that it found, and a full disk
        # leaves nothing that would have to be written first.
        files = [stack.enter_context(FileIO(path, mode)) for path in partial]
        writer = ResultsWriter(files, categories, panoptic, kept, len(written))
        with atomic_open(folder / NOTE) as f:
            json.dump(note, f)
        try:
            yield writer
        except BaseException as e:
            stopped = e
            if not writer.images:
                for path in (*partial, folder / NOTE):
                    path.unlink(missing_ok=True)
                raise
        writer.finish()
        if stopped is None:
            for own, path in zip(partial, paths):
                os.replace(own, path)
            os.replace(folder / NOTE, folder / FINISHED)
            return
    results, _, images = partial[:3]
    print(
        f"Stopped: what was found in {writer.images} images is in {results}, their names in "
        f"{images}. To go on, add --resume; --overwrite begins anew.",
        file=sys.stderr,
    )
    raise stopped


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases when the process ends, however it does.

    Raises:
        ValueError: another prediction has it; one line.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(
                f"--output {str(folder)!r}: another prediction is at work there; end it, or name "
                "another folder"
            ) from e
        except OSError:  # of file systems that have no locks, as over some networks
            pass
        yield
    finally:
        os.close(descriptor)


class ResultsWriter:
    """Writes the files of results while they come, so that none need be kept.

    Args:
        files: binary, without a buffer.
        kept, images: what they hold of an earlier prediction; else they are empty.
    """

    def __init__(
        self,
        files: Sequence[FileIO],
        categories: Mapping[int, str],
        panoptic: Sequence[dict[str, Any]] | None,
        kept: Written | None,
        images: int,
    ) -> None:
        self._files = files
        self._categories = categories
        self.images, self.results = images, 0
        if kept is not None:
            self._ends, self.results = kept.ends, kept.results
            self._cut()
            return
        listed = [{"id": i, "name": name} for i, name in categories.items()]
        self._write(
            b"[",
            table_rows([COLUMNS]),
            f'{{"categories": {json.dumps(listed)},\n"images": ['.encode(),
            f'{{"categories": {json.dumps(panoptic)},\n"annotations": ['.encode(),
        )

    def add(
        self,
        image: dict[str, Any],
        records: Sequence[dict[str, Any]],
        panoptic: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what was found in an image.

        Args:
            image: of images.json: id, file_name, height, width, of a video frame.
            records: of results.json.
            panoptic: of panoptic.json: image_id, file_name, segments_info.
        """
        self._write(
            "".join(
                (",\n" if number else "\n") + json.dumps(record)
                for number, record in enumerate(records, start=self.results)
            ).encode(),
            table_rows(rows_of(image, records, self._categories)),
            *(
                ((",\n" if self.images else "\n") + json.dumps(one)).encode()
                for one in (image, panoptic)
            ),
        )
        self.images, self.results = self.images + 1, self.results + len(records)

    def finish(self) -> None:
        """End the files after the last image of which everything was written."""
        self._cut()
        self._write(b"\n]\n", b"", b"\n]}\n", b"\n]}\n")
        for file in self._files:
            os.fsync(file.fileno())

    def _write(self, *contents: bytes) -> None:
        for file, content in zip(self._files, contents):
            remaining = memoryview(content)
            while remaining:  # a disk that becomes full takes a part
                remaining = remaining[file.write(remaining) :]
        self._ends = tuple(file.tell() for file in self._files)

    def _cut(self) -> None:
        for file, end in zip(self._files, self._ends):
            file.seek(end)
            file.truncate()


def finished_inputs(folder: Path) -> set[str]:
    """The files of which the prediction that has ended in a folder has results.

    Raises:
        ValueError: they are gone or damaged; one line.
    """
    try:
        (folder / RESULTS).stat()
        listed = parse_json((folder / IMAGES).read_bytes())["images"]
        return {one["file_name"] for one in listed}
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(
            f"--resume: the results in {str(folder)!r} are not whole any more ({one_line(e)}); "
            "--overwrite begins anew"
        ) from e


def picture_path(folder: Path, name: str, is_video: bool) -> Path:
    return folder / PICTURES / f"{name}.{'mp4' if is_video else 'jpg'}"


def segments_path(folder: Path, name: str) -> Path:
    return folder / SEGMENTS / f"{name}.png"


def save_picture(image: np.ndarray, path: Path) -> None:
    """Write an RGB image (H, W, 3) as JPEG, or as PNG if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "wb") as f:
        Image.fromarray(image).save(f, "PNG" if path.suffix == ".png" else "JPEG", quality=95)


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator["_VideoWriter"]:
    """A video that takes its name once the block ends, if it has a frame; a partial one if it
    raises.

    Raises:
        OSError: the video can't be written, or not to its end.
    """
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")  # the suffix names the format
    writer = _VideoWriter(temporary, fps)
    named = partial_path(path)
    try:
        yield writer
        writer.finish()
        named = path
    finally:
        writer.release()
        if temporary.exists():
            os.replace(temporary, named)


class _VideoWriter:
    """OpenCV's, which needs the size of the frames at once, and says of no failure."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None

    def write(self, image: np.ndarray) -> None:
        """Append an RGB image (H, W, 3).

        Raises:
            OSError: OpenCV can't write it.
        """
        height, width = image.shape[:2]
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._path), codec, self._fps, (width, height))
            if not self._writer.isOpened():
                self._path.unlink(missing_ok=True)
                raise OSError(f"OpenCV can't write {self._path} with the codec mp4v")
        self._writer.write(np.ascontiguousarray(image[:, :, ::-1]))

    def finish(self) -> None:
        """End the file.

        Raises:
            OSError: it can't be read, because it lacks its end, where the list of frames is.
        """
        self.release()
        if self._writer is None:
            return
        written = cv2.VideoCapture(str(self._path))
        whole = written.isOpened()
        written.release()
        if not whole:
            raise OSError(f"OpenCV can't write the end of {self._path}: is the disk full?")

    def release(self) -> None:
        if self._writer is not None:
            self._writer.release()
