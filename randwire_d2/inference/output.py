"""What a prediction leaves in its folder: results, pictures, videos; each appears whole.

results.json    COCO's results: image_id, category_id, score, and of a detector bbox (x, y,
                width, height in pixels) and segmentation (RLE), as COCOEvaluator writes them
images.json     what the ids are, in the form of COCO's annotations: images (file_name, height,
                width, of a video frame) and categories (name)
results.csv     the same in a table
pictures/       the images and videos with what was found in them
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from PIL import Image

from ..files import atomic_open

RESULTS, TABLE, IMAGES, PICTURES = "results.json", "results.csv", "images.json", "pictures"
_COLUMNS = (
    "image_id", "file_name", "frame", "category_id", "category", "score", "x", "y", "width",
    "height",
)  # fmt: skip


@contextmanager
def results_writer(folder: Path, categories: Mapping[int, str]) -> Iterator["ResultsWriter"]:
    """Results in a folder, which is there; categories are names by id."""
    with (
        atomic_open(folder / RESULTS) as results,
        atomic_open(folder / TABLE) as table,
        atomic_open(folder / IMAGES) as images,
    ):
        writer = ResultsWriter(results, table, images, categories)
        yield writer
        writer.finish()


class ResultsWriter:
    """Writes the three files of results while they come, so that none need be kept."""

    def __init__(
        self, results: IO[str], table: IO[str], images: IO[str], categories: Mapping[int, str]
    ) -> None:
        self._results, self._images, self._categories = results, images, categories
        self._csv = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
        self._csv.writeheader()
        results.write("[")
        listed = [{"id": i, "name": name} for i, name in categories.items()]
        images.write(f'{{"categories": {json.dumps(listed)},\n"images": [')
        self.images, self.results = 0, 0

    def add(self, image: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
        """Write what was found in an image.

        Args:
            image: of images.json: id, file_name, height, width, of a video frame.
            records: of results.json.
        """
        self._images.write((",\n" if self.images else "\n") + json.dumps(image))
        self.images += 1
        for record in records:
            self._results.write((",\n" if self.results else "\n") + json.dumps(record))
            self.results += 1
            row = dict(zip(("x", "y", "width", "height"), record.get("bbox", ())))
            row |= {k: image[k] for k in ("file_name", "frame") if k in image}
            row |= {k: record[k] for k in ("image_id", "category_id", "score")}
            self._csv.writerow({**row, "category": self._categories[record["category_id"]]})

    def finish(self) -> None:
        self._results.write("\n]\n")
        self._images.write("\n]}\n")


def picture_path(folder: Path, name: str, is_video: bool) -> Path:
    return folder / PICTURES / f"{name}.{'mp4' if is_video else 'jpg'}"


def save_picture(image: np.ndarray, path: Path) -> None:
    """Write an RGB image (H, W, 3) as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "wb") as f:
        Image.fromarray(image).save(f, "JPEG", quality=95)


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator["_VideoWriter"]:
    """A video that takes its name once the block ends, if it has a frame."""
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")  # the suffix names the format
    writer = _VideoWriter(temporary, fps)
    try:
        yield writer
        writer.release()
        if temporary.exists():
            os.replace(temporary, path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)


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
                raise OSError(f"OpenCV can't write {self._path} with the codec mp4v")
        self._writer.write(np.ascontiguousarray(image[:, :, ::-1]))

    def release(self) -> None:
        if self._writer is not None:
            self._writer.release()
