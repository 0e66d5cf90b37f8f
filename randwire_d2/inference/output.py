"""What a prediction leaves in its folder: results, pictures, videos; each appears whole.

results.json    COCO's results: image_id, category_id, score, and of a detector bbox (x, y,
                width, height in pixels) and segmentation (RLE), as COCOEvaluator writes them
images.json     what the ids are, in the form of COCO's annotations: images (file_name, height,
                width, of a video frame) and categories (name)
results.csv     the same in a table
panoptic.json   of a panoptic model: COCO's panoptic annotations (segments_info of each image) and
                categories
panoptic/       the PNGs that they name, as panopticapi reads and writes them
pictures/       the images and videos with what was found in them

A prediction that an error, Ctrl-C or SIGTERM ends leaves what it has, with .partial before the
suffix.
"""

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from PIL import Image

from ..files import atomic_open

RESULTS, TABLE, IMAGES, PICTURES = "results.json", "results.csv", "images.json", "pictures"
PANOPTIC, SEGMENTS = "panoptic.json", "panoptic"
_COLUMNS = (
    "image_id", "file_name", "frame", "category_id", "category", "score", "x", "y", "width",
    "height",
)  # fmt: skip


def partial_path(path: Path) -> Path:
    """The name of a file that is whole, but not of all that was to be in it."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


@contextmanager
def results_writer(
    folder: Path,
    categories: Mapping[int, str],
    panoptic: Sequence[dict[str, Any]] | None = None,
) -> Iterator["ResultsWriter"]:
    """Results in a folder, which is there.

    If the block raises, what was added so far stays, under partial names, and a line on stderr
    says so.

    Args:
        categories: names by id.
        panoptic: the categories of a panoptic model.
    """
    names = (RESULTS, TABLE, IMAGES, *(() if panoptic is None else (PANOPTIC,)))
    paths = [folder / name for name in names]
    stopped: BaseException | None = None
    with ExitStack() as files:
        opened = [files.enter_context(atomic_open(partial_path(path))) for path in paths]
        writer = ResultsWriter(opened, categories, panoptic)
        try:
            yield writer
        except BaseException as e:
            if not writer.images:
                raise
            stopped = e
        writer.finish()
    if stopped is None:
        for path in paths:
            os.replace(partial_path(path), path)
        return
    results, _, images = map(partial_path, paths[:3])
    print(
        f"Stopped: what was found in {writer.images} images is in {results}, their names in "
        f"{images}. To go on, give the others and another --output; --overwrite begins anew.",
        file=sys.stderr,
    )
    raise stopped


class ResultsWriter:
    """Writes the files of results while they come, so that none need be kept."""

    def __init__(
        self,
        files: Sequence[IO[str]],
        categories: Mapping[int, str],
        panoptic: Sequence[dict[str, Any]] | None,
    ) -> None:
        results, table, images, *others = self._files = files
        self._categories = categories
        self._csv = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
        self._csv.writeheader()
        results.write("[")
        listed = [{"id": i, "name": name} for i, name in categories.items()]
        images.write(f'{{"categories": {json.dumps(listed)},\n"images": [')
        for file in others:
            file.write(f'{{"categories": {json.dumps(panoptic)},\n"annotations": [')
        self.images, self.results, self._ends = 0, 0, self._positions()

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
        results, _, images, *others = self._files
        for file, value in zip((images, *others), (image, panoptic)):
            file.write((",\n" if self.images else "\n") + json.dumps(value))
        for number, record in enumerate(records, start=self.results):
            results.write((",\n" if number else "\n") + json.dumps(record))
            row = dict(zip(("x", "y", "width", "height"), record.get("bbox", ())))
            row |= {k: image[k] for k in ("file_name", "frame") if k in image}
            row |= {k: record[k] for k in ("image_id", "category_id", "score")}
            self._csv.writerow({**row, "category": self._categories[record["category_id"]]})
        self._ends = self._positions()
        self.images, self.results = self.images + 1, self.results + len(records)

    def finish(self) -> None:
        """End the files after the last image of which everything was written."""
        last_lines = ("\n]\n", "", "\n]}\n", "\n]}\n")
        for file, end, last in zip(self._files, self._ends, last_lines):
            file.seek(end)
            file.truncate()
            file.write(last)

    def _positions(self) -> list[int]:
        return [file.tell() for file in self._files]


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
    raises."""
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")  # the suffix names the format
    writer = _VideoWriter(temporary, fps)
    named = partial_path(path)
    try:
        yield writer
        named = path
    finally:
        writer.release()  # which ends the file
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

    def release(self) -> None:
        if self._writer is not None:
            self._writer.release()
