"""Top-1 and top-5 accuracy, over all processes."""

import logging
from collections import OrderedDict
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from .data import UNREADABLE

logger = logging.getLogger(__name__)


class AccuracyEvaluator(DatasetEvaluator):
    """The share of images, in %, whose class has the highest logit, or is among the top five.

    Images that can't be read are left out; the log and the results give their number.
    """

    def reset(self) -> None:
        self._counts = torch.zeros(4, dtype=torch.long)  # images, top-1, top-5, unreadable

    def process(self, inputs: dict[str, Tensor], outputs: Tensor) -> None:
        labels = inputs["label"]
        top = outputs.topk(min(5, outputs.shape[1]), dim=1).indices.cpu()
        hits = top == labels[:, None]  # a label UNREADABLE is no index
        readable = (labels != UNREADABLE).sum()
        self._counts += torch.stack(
            [readable, hits[:, 0].sum(), hits.sum(), len(labels) - readable]
        )

    def evaluate(self) -> dict[str, Any] | None:
        counts = comm.gather(self._counts)
        if not comm.is_main_process():
            return None
        images, top1, top5, unreadable = torch.stack(counts).sum(dim=0).tolist()
        if unreadable:
            logger.warning(
                f"{unreadable} test images can't be read; accuracy is of the other {images}"
            )
        if not images:
            raise OSError("none of the test images can be read")
        accuracy = {"top1": 100 * top1 / images, "top5": 100 * top5 / images}
        return OrderedDict(classification={**accuracy, "unreadable": unreadable})
