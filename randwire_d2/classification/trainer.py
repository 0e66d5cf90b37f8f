"""Training a classifier on Detectron2's engine, with bitwise reproducible resumption."""

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator, inference_context
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoint import Classes
from ..data.classification.listing import listed
from ..engine import Trainer, mean_losses, setup
from ..engine.processes.agreement import summed
from ..engine.processes.random_state import run_seed
from ..modeling.image_classifier import ImageClassifier
from .backbone import write_backbone
from .compiling import compile_network
from .data import UNREADABLE, TrainLoader, build_test_loader
from .evaluation import AccuracyEvaluator

TIMES = "data_time", "time"  # of an iteration, in Detectron2's metrics

logger = logging.getLogger(__name__)


class ClassificationTrainer(Trainer):
    """The project's trainer, for ``ImageClassifier`` and folders of images."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        loader = self._trainer.data_loader
        self._trainer.image_names = lambda batch, iteration: loader.file_names(iteration)
        (model,) = (m for m in self.model.modules() if isinstance(m, ImageClassifier))
        self._trainer.figures = lambda: {"train_top1": model.train_top1}

    def build_hooks(self) -> list[HookBase]:
        return [WatchInput(self._trainer.data_loader), *super().build_hooks()]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model; with SOLVER.COMPILE, its network is trained with torch.compile."""
        model = super().build_model(cfg)
        if cfg.SOLVER.COMPILE:
            compile_network(model)
        return model

    @classmethod
    @torch.compiler.set_stance("force_eager")  # it would compile anew, and for the last batch again
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return TrainLoader(cfg, run_seed(cfg.SEED))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def classes(cls, cfg: CfgNode) -> Classes:
        return Classes(listed(cfg.DATASETS.TRAIN[0]).classes)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        return AccuracyEvaluator()

    @torch.compiler.set_stance("force_eager")
    def validation_losses(self, dataset_name: str) -> dict[str, float]:
        return mean_losses(
            partial(_test_losses, self.evaluated_model), build_test_loader(self.cfg, dataset_name)
        )

    def next_command(self) -> list[str]:
        """Convert the network to a backbone; return the command that fine-tunes a detector."""
        if self.cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
            return super().next_command()
        return write_backbone(self.cfg)


def _test_losses(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The losses of a test batch without the images that can't be read, and their number."""
    readable = batch["label"] != UNREADABLE
    if not readable.any():
        return {}, 0
    with inference_context(model):
        logits = model({"image": batch["image"][readable]})
    labels = batch["label"][readable].to(model.device)
    return model.losses(logits, labels), len(labels)


class WatchInput(HookBase):
    """Logs when training waits for its data, and how many images of all processes were broken.

    Args:
        loader: the training loader.
        period: the iterations from one check to the next.
    """

    def __init__(self, loader: TrainLoader, period: int = 100) -> None:
        self._loader, self._period = loader, period
        self._broken = 0

    def after_step(self) -> None:
        # In each iteration, since the main process may save a checkpoint in any of them.
        self._broken = summed(self._loader.broken)
        if (self.trainer.iter + 1) % self._period or not comm.is_main_process():
            return
        storage = self.trainer.storage
        storage.put_scalar("broken_images", self._broken, smoothing_hint=False)
        found = storage.histories()
        # A training that was resumed just before has not measured an iteration yet.
        waited, total = (found[k].avg(self._period) if k in found else 0.0 for k in TIMES)
        if waited > 0.1 * total > 0:
            logger.warning(
                f"Training waited for its data {waited / total:.0%} of the last {self._period} "
                "iterations' time: raise DATALOADER.NUM_WORKERS, or put the images on a faster disk"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"broken": self._broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if comm.is_main_process():  # the others count on from zero
            self._loader.broken = self._broken = state["broken"]

    def after_train(self) -> None:
        if self._broken and comm.is_main_process():
            logger.warning(f"{self._broken} training images could not be read, and were replaced")


class _WithoutHooks(ClassificationTrainer):
    def build_hooks(self) -> list[HookBase]:
        return []


def measure_input(cfg: CfgNode, args: argparse.Namespace, seconds: float = 10.0) -> None:
    """Log the images per second of the input alone, and of the training alone.

    Call it in each process (``engine.run_distributed``); the rates are totals of all processes. No
    file is written, so OUTPUT_DIR may be that of a training.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = None
    cfg.freeze()
    setup(cfg, args)
    trainer = _WithoutHooks(cfg)
    steps = trainer._trainer
    feed = steps._data_loader_iter
    batch = next(feed)  # the workers have started
    fed = _rate(partial(next, feed), seconds)
    del feed
    steps.reset_data_loader(lambda: repeat(batch))  # ends the workers
    with EventStorage():
        steps.run_step()
        consumed = _rate(steps.run_step, seconds)
    fed, consumed = (sum(comm.all_gather(rate * len(batch["label"]))) for rate in (fed, consumed))
    if not cfg.DATALOADER.NUM_WORKERS:
        verdict = f"with no workers they take turns, {1 / (1 / fed + 1 / consumed):.0f}"
    elif fed > consumed:
        verdict = "enough"
    else:
        verdict = "training will wait; raise DATALOADER.NUM_WORKERS"
    workers = f"{comm.get_world_size()} × {cfg.DATALOADER.NUM_WORKERS} workers"
    logger.info(
        f"The input feeds {fed:.0f} images/s ({workers}), training alone consumes {consumed:.0f}: "
        + verdict
    )


def _rate(step: Callable[[], Any], seconds: float) -> float:
    """Calls per second of the slowest process, measured for at least so many seconds.

    All processes make the same number of calls, because training steps wait for each other.
    """
    start, calls, spent = time.perf_counter(), 0, 0.0
    while spent < seconds:
        for _ in range(max(calls, 1)):  # twice as many as before
            step()  # a training step waits for its loss, and so for all the steps before it
            calls += 1
        spent = max(comm.all_gather(time.perf_counter() - start))
    return calls / spent
