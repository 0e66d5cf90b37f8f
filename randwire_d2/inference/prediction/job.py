"""A prediction at work: images, then videos frame by frame; results and pictures of each."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple, TypeVar

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from tqdm import tqdm

from ...text import one_line
from ..inputs import Input, Video, check_frames
from ..models.classifier import Classifier
from ..models.detector import Detector
from ..models.panoptic import Panoptic, coco_categories
from .output import (
    ResultsWriter,
    finished_inputs,
    picture_path,
    results_writer,
    save_picture,
    segments_path,
    video_writer,
)
from .unfinished import NOTE, STAMPS, Note, digest, partial_path, stamp

_T = TypeVar("_T")
_Draw = Callable[[np.ndarray, Any, float], np.ndarray]


@dataclass
class Job:
    """What is to be done.

    Attributes:
        records: of the images: file_name, image_id and what else a data set says.
        names: of their pictures.
        videos: their frames get the ids that follow.
        folder: for what is written; it is made.
        batch: images that are computed at once.
        score_threshold: the least score of what is drawn and written; None for the model's
            ``least_drawn``, and for all.
        pictures: whether to draw.
        resume: whether to go on with a prediction of the same in the folder.
        stamps: of its inputs when it began, by their paths.
        broken: the inputs that could not be read or computed, once ``run`` has ended.
        labelled: the images whose class a data set tells; once ``run`` has ended.
        right: of them, those whose class was the best and was among the best five.
        best: the highest score that ``run`` has found, written or not.
    """

    model: Detector | Classifier
    records: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    videos: Sequence[Input]
    folder: Path
    batch: int
    score_threshold: float | None
    pictures: bool
    resume: bool
    stamps: Mapping[str, Any]
    broken: list[str] = field(default_factory=list)
    labelled: int = 0
    right: tuple[int, int] = (0, 0)
    best: float = 0.0
    # Of an earlier prediction: the images and videos, and the id of the first frame after them.
    _done: int = 0
    _videos_done: int = 0
    _next_frame: int | None = None

    def inputs(self) -> Iterator[dict[str, Any]]:
        """The images, then the frames, in the form that the model takes; broken ones left out."""
        for record in self.records:
            try:
                yield self.model.read(dict(record))
            except Exception:  # ``run`` says so
                continue
        for source, _ in self._opened:
            with closing(Video(source.path)) as video:
                yield from map(self.model.prepare, video)

    @property
    def least_drawn(self) -> float:
        """The least score of what is drawn."""
        return self.model.least_drawn if self.score_threshold is None else self.score_threshold

    @cached_property
    def total(self) -> int:
        """How many images there are, frames included, as far as the videos say it."""
        return len(self.records) + sum(frames for _, frames in self._opened)

    @cached_property
    def _opened(self) -> list[tuple[Input, int]]:
        """The videos that are none of the broken, and how many frames they say that they have."""
        return [(v, frames) for v in self.videos if (frames := self._frames(v)) is not None]

    def run(self) -> int:
        """Do it; the number of results."""
        categories = dict(zip(self.model.category_ids, self.model.class_names))
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            results_writer(
                self.folder,
                categories,
                self.panoptic,
                {**self.note(), STAMPS: {path: stamp(path) for path in self._paths}},
                self._keep if self.resume else None,
            ) as writer,
            tqdm(total=self.total, unit="image", smoothing=0.1) as bar,
        ):
            bar.update(writer.images)
            self._images(writer, bar)
            ids = count(self._next_frame or 1 + len(self.records))
            for source, _ in self._opened[self._videos_done :]:
                self._video(source, ids, writer, bar)
        return writer.results

    @property
    def finished(self) -> bool:
        """Whether there is nothing to go on with."""
        return self.resume and not (self.folder / NOTE).exists()

    def review(self) -> None:
        """What is done in place of ``run`` then: find the broken inputs."""
        done = finished_inputs(self.folder)
        self._refuse_changed(done)
        for path in self._paths:
            if path not in done:
                self._say_broken(path, ValueError("as before"))

    @property
    def _paths(self) -> list[str]:
        return [*(record["file_name"] for record in self.records), *(v.path for v in self.videos)]

    @cached_property
    def _digest(self) -> str:
        """Of the model's file, which may be large."""
        return digest(Path(self.model.file).read_bytes())

    def note(self) -> Note:
        """What the results depend on, by the names that an error's message has. In place of a long
        value there is a list: what is shown of it, and what it is compared by."""
        files = [(r["file_name"], r["image_id"]) for r in self.records]
        classes = (self.model.category_ids, self.model.class_names)
        own, paths = self._digest, self._paths
        return {
            "CHECKPOINT_OR_RUN": [f"{self.model.file}, sha256 {own}", own],
            "set of INPUTs": [
                f"{len(paths)}, {paths[0]} to {paths[-1]}" if paths else "none",
                digest([files, [v.path for v in self.videos], classes]),
            ],
            "--score-threshold": self.score_threshold,
            "--batch": self.batch,
            "choice of --no-pictures": not self.pictures,
            "--runtime": self.model.runtime,
        }

    def _keep(self, written: Sequence[Mapping[str, Any]]) -> int:
        """How many of the images that were written stay; what is done is skipped.

        Those of whole batches: in other batches they would be computed with other rounding. And
        those of whole videos. The last one's picture may be missing.
        """
        videos = [video for video, _ in self._opened]
        paths = {video.path: n for n, video in enumerate(videos)}
        frames = Counter(one["file_name"] for one in written if one["file_name"] in paths)
        ids = {one["id"] for one in written if one["file_name"] not in paths}
        places = [n for n, record in enumerate(self.records) if record["image_id"] in ids]
        if frames:
            last = written[-1]["file_name"]
            self._done, self._videos_done = len(self.records), paths[last]
            kept = len(written) - frames[last]
            self._next_frame = written[kept]["id"]
        else:
            self._done = places[-1] // self.batch * self.batch if places else 0
            kept = sum(place < self._done for place in places)
        self._refuse_changed(one["file_name"] for one in written[:kept])
        for video in videos[self._videos_done :]:
            drawn = picture_path(self.folder, video.name, is_video=True)
            partial_path(drawn).unlink(missing_ok=True)
        again = ValueError("as before")
        for record, name in zip(self.records[: self._done], self.names):
            if record["image_id"] not in ids:
                self._say_broken(record["file_name"], again)
            elif self.pictures and not picture_path(self.folder, name, is_video=False).exists():
                self._say_broken(record["file_name"], again, "Drew no picture of")
        for video, claimed in self._opened[: self._videos_done]:
            try:
                check_frames(frames[video.path], claimed)
            except ValueError as e:
                self._say_broken(video.path, e)
        return kept

    def _refuse_changed(self, done: Iterable[str]) -> None:
        for path in dict.fromkeys(done):
            if path in self.stamps and stamp(path) != self.stamps[path]:
                raise ValueError(
                    f"--resume: {path} has changed since the prediction in {str(self.folder)!r} "
                    "began; put back what it was, or --overwrite to begin anew"
                )

    @property
    def panoptic(self) -> list[dict[str, Any]] | None:
        """The categories of things and stuff; None unless the model is panoptic."""
        if isinstance(self.model, Classifier) or self.model.stuff is None:
            return None
        things = dict(zip(self.model.category_ids, self.model.class_names))
        return coco_categories(things, self.model.stuff)

    def _frames(self, source: Input) -> int | None:
        """How many a video says that it has; None if it is broken."""
        try:
            with closing(Video(source.path)) as video:
                return video.frames
        except ValueError as e:
            self._say_broken(source.path, e)
            return None

    def _images(self, writer: ResultsWriter, bar: tqdm) -> None:
        todo = zip(self.records[self._done :], self.names[self._done :])
        for batch in _batches(todo, self.batch):
            read, names = [], []
            for record, name in batch:
                try:
                    read.append(self.model.read(dict(record)))
                    names.append(name)
                except Exception as e:  # damaged images fail in as many ways as there are bytes
                    self._say_broken(record["file_name"], e)
            for prepared, name, found in zip(read, names, self._find(read), strict=True):
                if isinstance(found, Exception):
                    self._say_broken(prepared["file_name"], found)
                    continue
                self._write(writer, prepared, name, found)
                if self.pictures:
                    self._picture(prepared, name, found)
            bar.update(len(batch))

    def _picture(self, prepared: Mapping[str, Any], name: str, found: "_Found") -> None:
        try:
            drawn = self._draw(self.model.draw, self.model.picture(prepared), found)
        except Exception as e:  # of its size, for which Matplotlib and the memory have limits
            self._say_broken(prepared["file_name"], e, "Drew no picture of")
            return
        save_picture(drawn, picture_path(self.folder, name, is_video=False))

    def _video(self, source: Input, ids: Iterator[int], writer: ResultsWriter, bar: tqdm) -> None:
        draw = _drawer_of_frames(self.model)
        path = picture_path(self.folder, source.name, is_video=True)
        # A folder may lie beside it that is called as it is without a suffix.
        whole_name = source.name + Path(source.path).suffix
        with closing(Video(source.path)) as video, video_writer(path, video.fps) as drawn:
            for batch in _batches(enumerate(video), self.batch):
                prepared = [
                    {
                        **self.model.prepare(frame),
                        "file_name": source.path,
                        "frame": number,
                        "image_id": next(ids),
                    }
                    for number, frame in batch
                ]
                for (number, frame), one, found in zip(
                    batch, prepared, self._find(prepared), strict=True
                ):
                    if isinstance(found, Exception):  # those that follow have the same size
                        self._say_broken(source.path, found, f"Skipped all from frame {number} of")
                        return
                    self._write(writer, one, f"{whole_name}/{number:06}", found)
                    if self.pictures:
                        drawn.write(self._draw(draw, frame[:, :, ::-1], found))
                bar.update(len(batch))
        try:
            video.check()
        except ValueError as e:  # what was read of it is kept
            self._say_broken(source.path, e)

    def _find(self, batch: Sequence[dict[str, Any]]) -> list["_Found | Exception"]:
        """What is in each image; an error in place of one that is to blame for it.

        Raises:
            Exception: the model computes no other image either.
        """
        if not batch:
            return []
        try:
            return self._outputs(batch)
        except Exception as e:
            error = e
            clear_frames(e.__traceback__)  # of what fills the memory, if it is that
        if len(batch) > 1:  # one of them is to blame, or that they are many
            return [found for one in batch for found in self._find([one])]
        if not self._computes():
            raise error
        return [error]

    def _outputs(self, batch: Sequence[dict[str, Any]]) -> list["_Found | Exception"]:
        ids = [one["image_id"] for one in batch]
        if isinstance(self.model, Classifier):
            found = self.model.predict(batch)
            return [_Found(one, self.model.records(one, i)) for one, i in zip(found, ids)]
        return [
            _Found(
                one["instances"],
                self.model.records(one["instances"], i),
                one.get("panoptic_seg"),
            )
            for one, i in zip(self.model.outputs(batch), ids)
        ]

    def _computes(self) -> bool:
        """Whether the model computes an image in which nothing can be wrong."""
        try:
            self.model.predict([self.model.prepare(np.zeros((64, 64, 3), np.uint8))])
        except Exception:
            return False
        return True

    def _write(
        self, writer: ResultsWriter, prepared: Mapping[str, Any], name: str, found: "_Found"
    ) -> None:
        if "label" in prepared:
            best = [record["category_id"] for record in found.records]
            self.labelled += 1
            self.right = (
                self.right[0] + (best[0] == prepared["label"]),
                self.right[1] + (prepared["label"] in best),
            )
        self.best = max([self.best, *(record["score"] for record in found.records)])
        least = self.score_threshold or 0.0
        image = {"id": prepared["image_id"]}
        image |= {
            k: prepared[k] for k in ("file_name", "frame", "height", "width") if k in prepared
        }
        panoptic = None
        if found.panoptic is not None:
            assert isinstance(self.model, Detector)
            pixels, segments = self.model.segments(found.panoptic, least)
            save_picture(pixels, segments_path(self.folder, name))
            panoptic = {
                "image_id": image["id"], "file_name": f"{name}.png", "segments_info": segments,
            }  # fmt: skip
        writer.add(image, [r for r in found.records if r["score"] >= least], panoptic)

    def _draw(self, draw: _Draw, image: np.ndarray, found: "_Found") -> np.ndarray:
        least = self.least_drawn
        if found.panoptic is not None:
            assert isinstance(self.model, Detector)
            return self.model.draw_panoptic(image, found.panoptic, least)
        return draw(image, found.predicted, least)

    def _say_broken(self, path: str, error: Exception, what: str = "Skipped") -> None:
        self.broken.append(path)
        said = f"{what} {path}: {one_line(error, 300) or type(error).__name__}"
        # A name need be no UTF-8, which a terminal's stream would refuse, and may hold characters
        # that the terminal obeys.
        tqdm.write(one_line(os.fsencode(said).decode(errors="replace"), 5000))


class _Found(NamedTuple):
    """What is in an image: as ``model.predict`` gives it, as COCO's results, and panoptic_seg."""

    predicted: Any
    records: list[dict[str, Any]]
    panoptic: Panoptic | None = None


def _drawer_of_frames(model: Detector | Classifier) -> _Draw:
    if isinstance(model, Classifier):
        return model.draw
    return partial(_draw_frame, VideoVisualizer(model.metadata))


def _draw_frame(
    visualizer: VideoVisualizer, image: np.ndarray, found: Instances, score_threshold: float
) -> np.ndarray:
    shown = found[found.scores >= score_threshold]
    # Of its class, as in pictures: those of the visualizer's own choice are random.
    colors = visualizer.metadata.thing_colors
    shown.COLOR = [[c / 255 for c in colors[i]] for i in shown.pred_classes]
    return np.asarray(visualizer.draw_instance_predictions(image, shown).get_image())


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
