"""Loaders of labelled images: an endless, repeatable stream for training, and each image for tests.

The image at each position of the stream, and its augmentation, are functions of the seed and the
position. So neither the number of processes and workers nor an interruption changes the stream.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler
from detectron2.data.transforms import RandomLighting
from detectron2.utils import comm
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from ..data.classification.listing import listed_images
from ..data.images.patience import patiently
from ..data.images.reading import center_crop, order_channels, read_rgb
from ..engine.processes.random_state import mix_seeds
from ..engine.processes.signals import guard_workers

logger = logging.getLogger(__name__)

MOST_BROKEN = 100  # images in a row; after so many, the disk is probably at fault
UNREADABLE = -1  # the label of a test image that can't be read


class PCALighting(nn.Module):
    """AlexNet's colour noise (Krizhevsky et al., 2012, §4.1): one colour is added to all pixels.

    It is drawn along the principal components of ImageNet's colours, in proportion to their
    eigenvalues. Values that leave 0 … 255 are cut off.

    Args:
        std: the standard deviation of the factor of each component.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        # Only its constants are used: it adds values for pixels of 0 … 1 to any image, and uses
        # numpy's global generator.
        pca = RandomLighting(std)
        self.components = torch.from_numpy(255 * std * pca.eigen_vecs * pca.eigen_vals).float()

    def forward(self, image: Tensor) -> Tensor:
        """Add the noise to an RGB image (3, H, W) of uint8; returns the same shape and dtype."""
        colour = self.components @ torch.randn(3)
        return (image + colour[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)


def train_transform(cfg: CfgNode) -> v2.Transform:
    """The training transform: PIL image to uint8 (3, S, S), S = INPUT.TRAIN_CROP_SIZE."""
    crop = v2.RandomResizedCrop(cfg.INPUT.TRAIN_CROP_SIZE, tuple(cfg.INPUT.TRAIN_CROP_AREA))
    flip = [v2.RandomHorizontalFlip()] if cfg.INPUT.RANDOM_FLIP == "horizontal" else []
    node, std = cfg.INPUT.RAND_AUGMENT, cfg.INPUT.PCA_LIGHTING
    operations = [v2.RandAugment(node.NUM_OPS, node.MAGNITUDE)] if node.NUM_OPS else []
    lighting = [PCALighting(std)] if std else []
    return v2.Compose([crop, *flip, *operations, v2.PILToTensor(), *lighting])


def test_transform(cfg: CfgNode) -> v2.Transform:
    """The test transform: PIL image to uint8 (3, S, S), S = INPUT.TEST_CROP_SIZE."""
    return center_crop(cfg.INPUT.TEST_CROP_SIZE, cfg.INPUT.TEST_CROP_RATIO)


def read_image(path: str) -> Image.Image | None:
    """Read an image as RGB; None, with a warning in the log, if it can't be read.

    Raises:
        DiskGone: its disk is away.
    """
    try:
        return patiently(partial(read_rgb, path), path)
    except ValueError as e:
        logger.warning(f"Skipped {e}")
        return None


class TestImages(Dataset):
    """Each image once: {"image": (3, S, S) of uint8, "label": int, or UNREADABLE}."""

    def __init__(self, records: Sequence[dict], cfg: CfgNode) -> None:
        self.records = records
        self.transform = test_transform(cfg)
        self.size = cfg.INPUT.TEST_CROP_SIZE
        self.input_format = cfg.INPUT.FORMAT

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = read_image(record["file_name"])
        if image is None:
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return {"image": blank, "label": UNREADABLE}
        return {
            "image": order_channels(self.transform(image), self.input_format),
            "label": record["label"],
        }


class TrainingStream(Dataset):
    """An endless stream of images, with a new order and new augmentations in each epoch.

    An image that can't be read is replaced by the next one. An item is {"image": (3, S, S) of
    uint8, "label": int, "broken": the number of images that were replaced}.

    Args:
        records: {"file_name", "label"} of each image.
        seed: positions of streams with the same seed have the same items.
    """

    def __init__(self, records: Sequence[dict], cfg: CfgNode, seed: int) -> None:
        self.records = records
        self.transform = train_transform(cfg)
        self.input_format = cfg.INPUT.FORMAT
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        for broken in range(MOST_BROKEN):
            record = self._record(position + broken)
            image = read_image(record["file_name"])
            if image is not None:
                break
        else:
            raise OSError(
                f"{MOST_BROKEN} images in a row can't be read, the last {record['file_name']!r}: "
                "check the disk that the data set lies on"
            )
        with torch.random.fork_rng(devices=[]):  # without workers, the generator is the model's
            # torch.manual_seed would query the devices, which takes as long as all else here.
            torch.default_generator.manual_seed(mix_seeds(self.seed, position))
            tensor = self.transform(image)
        return {
            "image": order_channels(tensor, self.input_format),
            "broken": broken,
            "label": record["label"],
        }

    def _record(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.records))
        return self.records[int(_order(len(self.records), self.seed, epoch)[offset])]


@lru_cache(maxsize=2)  # a batch may lie on both sides of an epoch's end
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


class BatchPositions(Sampler[list[int]]):
    """The positions in the stream that this process reads in each iteration, endlessly.

    Args:
        batch_size: the images of an iteration in all processes together.
        start_iter: the first iteration.
    """

    def __init__(self, batch_size: int, start_iter: int = 0) -> None:
        self._start_iter = start_iter
        self._total = batch_size
        self._own = batch_size // comm.get_world_size()
        self._offset = self._own * comm.get_rank()

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in count(self._start_iter):
            yield list(self.of(iteration))

    def of(self, iteration: int) -> range:
        """The positions of one iteration."""
        first = iteration * self._total + self._offset
        return range(first, first + self._own)


class TrainLoader:
    """The batches of a training: {"image": (N, 3, S, S) of uint8, "label": (N,)}, endless.

    Attributes:
        seed: the seed of the stream.
        start_iter: the iteration that a new iterator begins with.
        broken: the number of images that this process could not read.
    """

    def __init__(self, cfg: CfgNode, seed: int) -> None:
        self.seed, self.start_iter, self.broken = seed, 0, 0
        self._cfg, self._records = cfg, listed_images(cfg.DATASETS.TRAIN)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        loader = DataLoader(
            TrainingStream(self._records, self._cfg, self.seed),
            batch_sampler=BatchPositions(self._cfg.SOLVER.IMS_PER_BATCH, self.start_iter),
            num_workers=self._cfg.DATALOADER.NUM_WORKERS,
            pin_memory=self._cfg.MODEL.DEVICE.startswith("cuda"),
            # A new iterator draws a seed, which must not come from the model's generator.
            generator=torch.Generator(),
        )
        for batch in guard_workers(loader):
            self.broken += int(batch.pop("broken").sum())
            yield batch

    def file_names(self, iteration: int) -> list[str]:
        """The image files of this process in an iteration, if none is broken."""
        stream = TrainingStream(self._records, self._cfg, self.seed)
        positions = BatchPositions(self._cfg.SOLVER.IMS_PER_BATCH).of(iteration)
        return [stream._record(position)["file_name"] for position in positions]


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """The loader of this process's test images, with batches of TEST.IMS_PER_PROCESS."""
    images = TestImages(listed_images([dataset_name]), cfg)
    loader = DataLoader(
        images,
        batch_size=cfg.TEST.IMS_PER_PROCESS,
        sampler=InferenceSampler(len(images)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )
    return guard_workers(loader)
