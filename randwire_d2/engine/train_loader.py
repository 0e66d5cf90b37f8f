"""A detector's training images: an endless, repeatable stream, in batches of one orientation.

In the stream everything is a function of the seed and the position: which image, and how it is
augmented. Batches are formed from it by what the data set says of its images, before any is read.
So neither workers nor an interruption change it: a training that is resumed forms anew the batches
that it has had, which takes seconds, and reads no image for them.
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

MOST_REFUSED = 100  # images in a row: then it is not the images that are at fault

logger = logging.getLogger(__name__)

Place = tuple[int, int]  # a position in the stream, and the index of the image that is there


def detection_train_loader(cfg: CfgNode) -> Any:
    """The ``TrainLoader`` of a config; Detectron2's own of data that can only be iterated over."""
    mapper, seed = training_mapper(cfg), run_seed(cfg.SEED)
    choose = partial(build_detection_train_loader.from_config, cfg, mapper=mapper)
    with random_state_kept(), _with_images(cfg):
        seed_all(seed)
        options = choose(sampler=())  # TrainLoader makes one of each seed
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
    """Around Detectron2's reading of data sets: what it asserts of them, who registered them can
    mend."""
    try:
        yield
    except AssertionError as e:
        raise ValueError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} can't be trained on: {one_line(e)} An "
            "image counts if it has a box that is no crowd (iscrowd 1): label some, or name another"
        ) from e


def _sampler(cfg: CfgNode, records: Any, choose: Callable[..., dict[str, Any]]) -> Any:
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        # Detectron2's newest gives it SEED itself, be it -1, and others draw one.
        return TrainingSampler(len(records))
    return choose(dataset=records)["sampler"]


def warn_of_first_images(reason: str) -> None:
    """Say why a training has no ``TrainLoader``, and what that means."""
    logger.warning(
        f"{reason}: a resumed training begins with its first images again, so its weights differ "
        "from those of an uninterrupted one"
    )


class TrainLoader:
    """Lists of what the mapper returns, the batch size of them in all processes, without an end.

    Grouped, either all images of a process's batch are wider than high, or none is: as with
    Detectron2, which images an iteration sees then depends on the number of processes. Without
    that, or with images of one kind, it does not.

    Args:
        records: of the images, as Detectron2's dicts: a list, or a map-style data set.
        mapper: makes an item of a record, or None: then the next record takes its place.
        sampler: makes one of Detectron2's for the records; what it draws is drawn with the seed.
        seed: of the stream.
        batch_size: the images of an iteration in all processes together.
        grouped: whether a batch has one orientation.
        num_workers: of each process.

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
            # The mapper would learn an unknown size from the image.
            self._wide = [r.get("width", 0) > r.get("height", 0) for r in every]
        if isinstance(records, list):
            # It would be copied into each worker, item by item, as its items are counted.
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
            # A new iterator draws a number, which must not come from the model's generator.
            generator=torch.Generator(),
        )
        return iter(guard_workers(loader))

    def without_workers(self) -> "TrainLoader":
        """Another one of the same stream, from its beginning, which reads in this process."""
        other = copy.copy(self)
        other.start_iter = other._num_workers = 0
        return other

    def batches(self) -> Iterator[list[Place]]:
        """What each process reads in the first iteration, in their order, then in the second, …"""
        size = self._batch_size // comm.get_world_size()
        batches: tuple[list[Place], list[Place]] = ([], [])
        # All processes' images: iterating over the sampler gives this one's.
        for place in enumerate(self._sampler._infinite_indices()):
            batch = batches[self._wide[place[1]]]
            batch.append(place)
            if len(batch) == size:
                yield batch[:]
                batch.clear()


class _Images(Dataset):
    """What the mapper makes of the records, each at its place."""

    def __init__(self, records: Any, mapper: Callable[[dict], Any], seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, place: Place) -> Any:
        position, index = place
        with random_state_kept():  # with no worker, the model's generators are here
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
