"""The inputs of predictions: images and videos in files, globs and folders; a video's frames."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from glob import glob
from pathlib import Path

import cv2
import numpy as np

from ..data.images.names import is_image_file, unreadable
from ..data.paths import files_below

# Of a prediction: the record of its work, and the folders of what it draws.
FINISHED, NOTE = "job.json", "job.partial.json"
PICTURES, SEGMENTS = "pictures", "panoptic"
VIDEO_EXTENSIONS = (
    ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """An image or a video file.

    Attributes:
        path: the path as the user gave it, or below the folder that the user gave.
        name: the name for pictures of it, without a suffix; it may contain folders, and no other
            input has the same.
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.lower().endswith(VIDEO_EXTENSIONS)


def find_inputs(given: Sequence[str], option: str = "INPUT") -> list[Input]:
    """The images and videos of files, globs and folders with their subfolders, each once, in order.

    A file that is given by name counts as an image if its suffix is unknown. Hidden files in
    folders are left out, as globs do: macOS's ``._photo.jpg``, for example, is no image.
    A warning lists images in formats that can't be read. What an earlier prediction has drawn into
    a folder among these is left out, unless that folder is given itself.

    Args:
        given: the files, globs and folders.
        option: the option by which the user gave them, for the error.

    Raises:
        ValueError: one of them does not exist, or contains neither image nor video; one line.
    """
    found: dict[str, tuple[str, str]] = {}
    for text in given:
        files: dict[str, str] = {}  # a folder below another is matched by ** itself, too
        drawn = cache(partial(_is_drawn, text))
        for path, name in _files(text):
            if not drawn(os.path.dirname(path)):
                files.setdefault(path, name)
        known = {path: name for path, name in files.items() if path == text or _known(path)}
        passed_over = unreadable(path for path in files if path != text)
        if not known:
            way_out = passed_over or "give files, folders, or globs such as 'images/**/*.jpg'"
            raise ValueError(f"{option} {text!r} matches no image and no video; {way_out}")
        if passed_over:
            logger.warning(f"{option} {text!r} has images that are left out: {passed_over}")
        for path, name in known.items():  # photos/a.jpg is ./photos/a.jpg
            found.setdefault(os.path.abspath(path), (path, name))
    return _inputs(found.values())


def find_images(given: Sequence[str], option: str) -> list[str]:
    """The paths of the images among ``find_inputs``.

    Raises:
        ValueError: one of them does not exist or contains nothing, or all are videos; one line.
    """
    found = [one.path for one in find_inputs(given, option) if not one.is_video]
    if given and not found:
        raise ValueError(f"{option} {' '.join(given)!r} has videos alone; give images")
    return found


def files_as_inputs(paths: Sequence[str]) -> list[Input]:
    """The files of a data set, named relative to the deepest folder that contains them all."""
    # Absolute paths have no "..", which would lead out of the folder of the pictures.
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath(folders) if paths else None
    relative = ((path, os.path.relpath(path, root)) for path in paths)
    return _inputs((path, os.path.splitext(name)[0]) for path, name in relative)


def _inputs(named: Iterable[tuple[str, str]]) -> list[Input]:
    taken: dict[str, int] = {}
    return [Input(path, _unique(name, taken)) for path, name in named]


def _files(text: str) -> list[tuple[str, str]]:
    if os.path.isfile(text):  # also one whose name could be a glob
        return [(text, Path(text).stem)]
    if os.path.isdir(text):
        return _below(text)
    matches = sorted(glob(text, recursive=True))
    alone = [(m, Path(m).stem) for m in matches if os.path.isfile(m)]
    return alone + [file for m in matches if os.path.isdir(m) for file in _below(m)]


def _below(folder: str) -> list[tuple[str, str]]:
    paths = sorted(p for p in map(Path, files_below(folder)) if p.is_file())
    return [(str(p), str(p.relative_to(folder).with_suffix(""))) for p in paths]


def _is_drawn(text: str, folder: str) -> bool:
    """Whether a folder, found as ``text``, holds pictures that a prediction has drawn there."""
    above = (Path(folder), *Path(folder).parents)
    outputs = [path.parent for path in above if path.name in (PICTURES, SEGMENTS)]
    return any(
        (output / job).is_file() and not Path(text).is_relative_to(output)
        for output in outputs
        for job in (FINISHED, NOTE)
    )


def _known(name: str) -> bool:
    return is_image_file(name) or name.lower().endswith(VIDEO_EXTENSIONS)


def _unique(name: str, taken: dict[str, int]) -> str:
    """Make a name unique; ``taken`` maps each name to the number that its next duplicate tries."""
    number, own = taken.get(name, 2), name
    while own in taken:
        own, number = f"{name}_{number}", number + 1
    taken[own], taken[name] = 2, number
    return own


class Video:
    """A video file that is read frame by frame.

    Args:
        path: the file.

    Attributes:
        fps: frames per second.
        frames: the number of frames that the file states; 0 if it states none.

    Raises:
        ValueError: it can't be opened.
    """

    def __init__(self, path: str) -> None:
        try:
            self._capture = cv2.VideoCapture(path)
            opened = self._capture.isOpened()
        except cv2.error:
            opened = False
        if not opened:
            raise ValueError("OpenCV can't open it as a video")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else 25.0
        self._read = 0
        frames = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frames = int(frames) if 0 < frames < 2**31 else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames, (H, W, 3), uint8, BGR, one at a time."""
        while True:
            try:
                there, frame = self._capture.read()
            except cv2.error:  # a damaged frame that claims too much memory; ``check`` reports it
                return
            if not there:
                return
            self._read += 1
            yield frame

    def check(self) -> None:
        """Check the number of frames, after they were read.

        Raises:
            ValueError: there were none, or clearly fewer than the file states.
        """
        check_frames(self._read, self.frames)

    def close(self) -> None:
        self._capture.release()


def check_frames(read: int, claimed: int) -> None:
    """Check the number of frames that were read from a video.

    Raises:
        ValueError: there were none, or clearly fewer than the file states.
    """
    if read < max(1, 0.95 * claimed - 1):  # some formats only estimate the number of frames
        raise ValueError(f"it ends after {read} of {claimed} frames")
