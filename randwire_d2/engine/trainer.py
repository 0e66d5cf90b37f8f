"""The trainer: Detectron2's DefaultTrainer with this project's checkpoints, for GPUs and CPUs."""

import inspect
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.nn.precise_bn import get_bn_modules
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import EMA_KEY, Classes, RandWireCheckpointer
from ..data.detection.classes import class_entries
from ..data.images.patience import PatientMapper
from ..modeling import RandWireStage
from .conclusion import conclude, predict_command
from .config.continuation import check_done
from .config.datasets import heads_of
from .config.keys import YAML_KEYS
from .config.schedule import scale_to_processes
from .hooks.best import TrainingStopped, is_exhausted
from .hooks.ema import AveragedWeights
from .hooks.finite import FiniteTrainer
from .hooks.order import training_hooks
from .hooks.saving import end_of_what_counts, save_end
from .processes.random_state import random_state_kept
from .processes.signals import guard_workers
from .train_loader import TrainLoader, detection_train_loader
from .validation import detection_loss_loader, detection_losses, mean_losses


def _coco(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    return COCOEvaluator(
        name,
        output_dir=folder,
        # Without a COCO file, the evaluator writes one into the folder. It must not use an earlier
        # one, since the labels may have changed.
        allow_cached_coco=False,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _sem_seg(cfg: CfgNode, name: str, folder: str) -> SemSegEvaluator:
    return SemSegEvaluator(
        name, distributed=True, output_dir=folder, sem_seg_loading_fn=_read_labels
    )


def _read_labels(file_name: str, dtype: Any) -> np.ndarray:
    """As Detectron2's default, which in its wheel fails with numpy 2."""
    with PathManager.open(file_name, "rb") as file:
        return np.asarray(Image.open(file), dtype=dtype)


# The evaluators for each ``evaluator_type`` of a data set. They are those of Detectron2's
# tools/train_net.py; its DefaultTrainer has none.
_EVALUATORS: dict[str, tuple[Callable[[CfgNode, str, str], DatasetEvaluator], ...]] = {
    "coco": (_coco,),
    "coco_panoptic_seg": (
        _sem_seg,
        _coco,
        lambda cfg, name, folder: COCOPanopticEvaluator(name, folder),
    ),
    "sem_seg": (_sem_seg,),
    "cityscapes_instance": (lambda cfg, name, folder: CityscapesInstanceEvaluator(name),),
    "cityscapes_sem_seg": (lambda cfg, name, folder: CityscapesSemSegEvaluator(name),),
    "pascal_voc": (lambda cfg, name, folder: PascalVOCDetectionEvaluator(name),),
    "lvis": (lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder),),
}


class PreciseBN(hooks.PreciseBN):
    """Detectron2's PreciseBN, whose result depends only on the weights.

    Each update begins with the loader's first images, as after an interruption. The random numbers
    that it draws do not change those of the training.
    """

    @torch.compiler.set_stance("force_eager")  # hooks and new momenta would trigger recompilations
    def update_stats(self) -> None:
        self._data_iter = None
        with random_state_kept(), _norms_may_have_hooks(self._model):
            super().update_stats()


@contextmanager
def _norms_may_have_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Make stages that are fused "on" call the norms' hooks, with which fvcore reads statistics."""
    stages = [m for m in model.modules() if isinstance(m, RandWireStage) and m.fused == "on"]
    for stage in stages:
        stage.fused = "auto"
    try:
        yield
    finally:
        for stage in stages:
            stage.fused = "on"


_KNOWN = inspect.signature(DistributedDataParallel).parameters


def in_parallel(model: torch.nn.Module, on_cpu: bool, **given: Any) -> torch.nn.Module:
    """Wrap the model in DistributedDataParallel, if there are several processes.

    Args:
        given: options of DistributedDataParallel in place of ``parallel_options``.
    """
    devices = {"device_ids": None} if on_cpu else {}
    options = {**parallel_options(), **devices, **given}
    # The name of broadcast_buffers since PyTorch 2.14; it does one more thing, but only once.
    if "forward_sync_buffers" in _KNOWN:
        options.setdefault("forward_sync_buffers", options.pop("broadcast_buffers"))
    return create_ddp_model(model, **options)


def parallel_options() -> dict[str, bool]:
    """Options of DistributedDataParallel for networks with hundreds of small tensors. By default it
    copies each gradient into its buckets and back. The results are the same to the bit."""
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    if "batched_grad_copy" in _KNOWN:
        options["batched_grad_copy"] = True  # since PyTorch 2.14
    return options


def share_statistics(model: torch.nn.Module) -> None:
    """Copy the first process's buffers to all, since each has its own batch statistics."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with this project's checkpoints, for GPUs and CPUs.

    On a CPU, with one or two processes and any number of workers, a run that is interrupted
    anywhere and resumed with as many processes ends with the same weights, average, best checkpoint
    and losses, to the bit, as an uninterrupted run. With more processes gradients are summed in an
    order that DistributedDataParallel changes after its first step. Detectron2's own trainers
    promise no such thing.

    Several processes train the same network as one process, up to rounding, with any number of
    workers, if images do not affect each other. This requires norms without batch statistics (GN,
    FrozenBN), images padded to one size (INPUT.LSJ, say, or all of one shape), the same number of
    regions sampled from each (at least ROI_HEADS.BATCH_SIZE_PER_IMAGE proposals), no grouping by
    aspect ratio, and edges dropped from the "batch". It does not hold for RetinaNet, where each
    process divides the loss by its own running mean.

    Attributes:
        keys: the names of the config's keys, for messages.
        log_period: the iterations from one line of metrics to the next.
        ddp: options of DistributedDataParallel in place of ``parallel_options``.
        average: the average of the weights, with SOLVER.EMA; else None.
        earlier_max_iter: the checkpoint's SOLVER.MAX_ITER, in a resumed training.
        last_evaluation: the metrics of the last evaluation, with their names in metrics.json; only
            in the main process.
    """

    keys = YAML_KEYS
    log_period = 20
    ddp: Mapping[str, Any] = {}
    average: AveragedWeights | None
    iter: int
    earlier_max_iter = 0
    last_evaluation: dict[str, float]

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own passes DistributedDataParallel a GPU index on any device, and fixes
        # the class of the checkpointer. Apart from that, the steps are the same.
        TrainerBase.__init__(self)
        cfg = scale_to_processes(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = in_parallel(model, cfg.MODEL.DEVICE == "cpu", **self.ddp)
        amp = cfg.SOLVER.AMP
        precision = getattr(torch, amp.PRECISION) if amp.ENABLED else None
        self._trainer = FiniteTrainer(model, data_loader, optimizer, precision)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RandWireCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            cfg=self.saved_config(cfg),
            classes=self.classes(cfg),
            trainer=weakref.proxy(self),
        )
        self._trainer.checkpointer = self.checkpointer
        self._trainer.skip_nonfinite, self._trainer.keys = cfg.SOLVER.SKIP_NONFINITE, self.keys
        decay = cfg.SOLVER.EMA.DECAY
        self.average = AveragedWeights(self.checkpointer.model, decay) if decay else None
        if self.average is not None:
            self.checkpointer.add_checkpointable(EMA_KEY, self.average)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.last_evaluation = {}
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def saved_config(self, cfg: CfgNode) -> CfgNode | None:
        """The config that checkpoints contain, so that a model can be built from a checkpoint."""
        return cfg

    def build_hooks(self) -> list[HookBase]:
        """The hooks of Detectron2 and of this project, in their order."""
        return training_hooks(weakref.proxy(self))

    def precise_bn(self) -> PreciseBN | None:
        """The hook of TEST.PRECISE_BN; None if that is off, or the model trains no batch norm."""
        node = self.cfg.TEST.PRECISE_BN
        if not (node.ENABLED and get_bn_modules(self.evaluated_model)):
            return None
        if isinstance(self.data_loader, TrainLoader):  # the labels need not be read again
            loader = self.data_loader.without_workers()
        else:
            with random_state_kept():  # it may draw a seed
                loader = self.loader_without_workers()
        return PreciseBN(self.cfg.TEST.EVAL_PERIOD, self.evaluated_model, loader, node.NUM_ITER)

    def loader_without_workers(self) -> Any:
        """Build another loader of the training images, without workers, as Detectron2 does."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        return self.build_train_loader(cfg)

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The unwrapped network that evaluations test: with SOLVER.EMA the averaged one."""
        return self.checkpointer.model if self.average is None else self.average.module

    def evaluate(self) -> dict[str, float]:
        """Test the network as it is now; return the metrics, with their names in metrics.json. In
        other processes than the main one, only losses are returned."""
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        self.last_evaluation = flatten_results_dict(self._last_eval_results)
        if self.cfg.TEST.LOSS:
            self.last_evaluation |= self.test_losses()
        return self.last_evaluation

    def test_losses(self) -> dict[str, float]:
        """The mean losses of all test sets, with their names in metrics.json."""
        sets = self.cfg.DATASETS.TEST
        return {
            f"{name}/{key}" if len(sets) > 1 else key: value
            for name in sets
            for key, value in self.validation_losses(name).items()
        }

    def validation_losses(self, dataset_name: str) -> dict[str, float]:
        """The mean losses of a test set's images; see ``mean_losses``."""
        losses = detection_losses(self.evaluated_model)
        return mean_losses(losses, detection_loss_loader(self.cfg, dataset_name))

    def train(self) -> Any:
        """Train to the end; then draw the run's pictures into its folder, and log its result.

        Returns:
            The results of the last evaluation, in the main process and with TEST.EXPECTED_RESULTS;
            else None.
        """
        # DefaultTrainer.train, except that ``conclude`` precedes the verification.
        with suppress(TrainingStopped):
            TrainerBase.train(self, self.start_iter, self.max_iter)
        if not comm.is_main_process():
            return None
        self.conclude()
        if not self.cfg.TEST.EXPECTED_RESULTS:
            return None
        verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def conclude(self) -> None:
        """Draw the pictures and log the result; only the main process calls this."""
        conclude(self.cfg, self.iter, self.checkpointer.model, self.next_command)

    def next_command(self) -> list[str]:
        """The tool that uses the result of the training, and its arguments; [] if there is none:
        only models with classes of things can predict."""
        if not heads_of(self.cfg.MODEL.META_ARCHITECTURE):
            return []
        return predict_command(self.cfg.OUTPUT_DIR)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume or load, as DefaultTrainer does. A run that was killed before it wrote
        model_final.pth writes it now, and a run that SOLVER.PATIENCE had ended does not go on."""
        super().resume_or_load(resume)
        if self.average is not None:
            self.average.begin(self.checkpointer.model)
        patience, start = self.cfg.SOLVER.PATIENCE, self.start_iter
        if start and patience and is_exhausted(self.cfg, end_of_what_counts(self), self.keys):
            self.max_iter = start
        save_end(self.checkpointer, start, self.max_iter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's state, but take the learning rates from the config (``rates_kept``)
        and its schedule: where the checkpoint's schedule had ended, its next rate is 0.

        Raises:
            ValueError: the checkpoint has more iterations than MAX_ITER; one line.
        """
        super().load_state_dict(state_dict)
        check_done(self.iter + 1, self.max_iter, self.keys)  # beyond, a schedule may have no rate
        groups = self.optimizer.param_groups
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, self.scheduler.get_lr()):
            group["lr"] = rate

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build the loader of a detector's images, a function of SEED; see ``TrainLoader``."""
        return detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = PatientMapper(cfg, is_train=False)
        return guard_workers(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def classes(cls, cfg: CfgNode) -> Classes:
        """The classes of the first training set, for checkpoints."""
        return Classes(**class_entries(cfg.DATASETS.TRAIN[0]))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate, as DefaultTrainer does, with the first process's batch statistics in all."""
        share_statistics(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation (``cfg.TEST.AUG``); its task names end in _TTA."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator of a data set, by its ``evaluator_type``.

        Raises:
            ValueError: if the type is unknown.
        """
        kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
        if kind not in _EVALUATORS:
            raise ValueError(
                f"no evaluator for {dataset_name!r}: its evaluator_type is {kind!r}, known are "
                f"{sorted(_EVALUATORS)}"
            )
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = [build(cfg, dataset_name, folder) for build in _EVALUATORS[kind]]
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
