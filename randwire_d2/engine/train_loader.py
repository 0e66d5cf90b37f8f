"""A detector's training images: an endless, repeatable stream, in batches of one orientation.

The image at each position of the stream, and its augmentation, are functions of the seed and the
position. Batches are formed by the image sizes in the records, before any image is read. So neither
the number of workers nor an interruption changes the stream: a resumed training forms its earlier
batches again, which takes seconds and reads no image.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data import training_mapper
from ..text import one_line
from .processes.random_state import mix_seeds, random_state_kept, run_seed, seed_all
from .processes.signals import guard_workers

MOST_REFUSED = 100  # images in a row; after so many, the mapper is probably at fault

logger = logging.getLogger(__name__)

Place = tuple[int, int]  # a position in the stream, and the index of the image that is there


def detection_train_loader(cfg: CfgNode) -> Any:
    """Build the ``TrainLoader`` of a config; for an iterable-style data set, Detectron2's loader.

    Raises:
        ValueError: Detectron2 finds no usable image in DATASETS.TRAIN; one line.
    """
    mapper, seed = training_mapper(cfg), run_seed(cfg.SEED)
    choose = partial(build_detection_train_loader.from_config, cfg, mapper=mapper)
    with random_state_kept(), _with_images(cfg):
        seed_all(seed)
        options = choose(sampler=())  # TrainLoader makes its sampler from its seed
    if not isinstance(options["dataset"], IterableDataset):
        return TrainLoader(
            options["dataset"],
            mapper,
            lambda records: _sampler(cfg, records, choose),
            seed,
            batch_size=options["total_batch_size"],
            grouped=options["aspect_ratio_grouping"],
            num_workers=options["num_workers"],
        )
    warn_of_first_images(f"{cfg.DATASETS.TRAIN[0]!r} can only be iterated over")
    return guard_workers(build_detection_train_loader(**choose(dataset=options["dataset"])))


@contextmanager
def _with_images(cfg: CfgNode) -> Iterator[None]:
    """Raise the assertions of Detectron2's data set reading as ValueErrors, which users can fix."""
    try:
        yield
    except AssertionError as e:
        raise ValueError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} can't be trained on: {one_line(e)} An "
            "image counts if it has a box that is no crowd (iscrowd 1): label some, or name another"
        ) from e


def _sampler(cfg: CfgNode, records: Any, choose: Callable[..., dict[str, Any]]) -> Any:
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        # The newest Detectron2 passes SEED to it, even if it is -1; other versions draw a seed.
        return TrainingSampler(len(records))
    return choose(dataset=records)["sampler"]


def warn_of_first_images(reason: str) -> None:
    """Say why a training has no ``TrainLoader``, and what that means."""
    logger.warning(
        f"{reason}: a resumed training begins with its first images again, so its weights differ "
        "from those of an uninterrupted one"
    )


class TrainLoader:
    """An endless loader, whose batches are lists of the mapper's return values.

    With grouping, either all images of a process's batch are wider than high, or none is. As in
    Detectron2, the images of an iteration then depend on the number of processes. Without grouping,
    or with images of one orientation, they do not.

    Args:
        records: the images as Detectron2's dicts: a list, or a map-style data set.
        mapper: turns a record into an item; if it returns None, the next record is used instead.
        sampler: makes a sampler of Detectron2's for the records; the seed is set before.
        seed: the seed of the stream.
        batch_size: the images of an iteration in all processes together.
        grouped: whether all images of a batch have one orientation.
        num_workers: the number of workers of each process.

    Attributes:
        start_iter: the iteration that a new iterator begins with.
    """

    def __init__(
        self,
        records: Any,
        mapper: Callable[[dict], Any],
        sampler: Callable[[Any], Any],
        seed: int,
        *,
        batch_size: int,
        grouped: bool,
        num_workers: int,
    ) -> None:
        self.start_iter = 0
        self._records, self._mapper, self._choose_sampler = records, mapper, sampler
        self._batch_size, self._num_workers = batch_size, num_workers
        self.seed = seed
        self._wide = [False] * len(records)
        if grouped:
            every = map(records.__getitem__, range(len(records)))
            # Records may lack the size, which the mapper reads from the image.
            self._wide = [r.get("width", 0) > r.get("height", 0) for r in every]
        if isinstance(records, list):
            # Forked workers would copy a list's items, as Python changes their reference counts.
            self._records = DatasetFromList(records, copy=False)

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        with random_state_kept():
            seed_all(seed)
            self._seed, self._sampler = seed, self._choose_sampler(self._records)

    def __iter__(self) -> Iterator[list[Any]]:
        processes = comm.get_world_size()
        first = self.start_iter * processes + comm.get_rank()
        loader = DataLoader(
            _Images(self._records, self._mapper, self._seed),
            batch_sampler=islice(self.batches(), first, None, processes),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            # A new iterator draws a seed, which must not come from the model's generator.
            generator=torch.Generator(),
        )
        return iter(guard_workers(loader))

    def without_workers(self) -> "TrainLoader":
        """A loader of the same stream, from its beginning, which reads in this process."""
        other = copy.copy(self)
        other.start_iter = other._num_workers = 0
        return other

    def batches(self) -> Iterator[list[Place]]:
        """The batches of all processes, by rank, for the first iteration, then the second, …"""
        size = self._batch_size // comm.get_world_size()
        batches: tuple[list[Place], list[Place]] = ([], [])
        # The images of all processes: iterating over the sampler would give this process's only.
        for place in enumerate(self._sampler._infinite_indices()):
            batch = batches[self._wide[place[1]]]
            batch.append(place)
            if len(batch) == size:
                yield batch[:]
                batch.clear()


class _Images(Dataset):
    """The mapper's return values, as a data set whose indices are ``Place``s."""

    def __init__(self, records: Any, mapper: Callable[[dict], Any], seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, place: Place) -> Any:
        position, index = place
        with random_state_kept():  # without workers, this process's generators are the model's
            seed_all(mix_seeds(self._seed, position))  # Detectron2's augmentations draw from numpy
            for skipped in range(MOST_REFUSED):
                record = self._records[(index + skipped) % len(self._records)]
                item = self._mapper(record)
                if item is not None:
                    return item
        raise RuntimeError(
            f"{MOST_REFUSED} training images in a row were refused, the last "
            f"{record['file_name']!r}: the mapper returned None"
        )
