"""The trainer: Detectron2's, with this project's checkpoints, for GPUs and CPUs."""

import inspect
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

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
from fvcore.nn.precise_bn import get_bn_modules
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import EMA_KEY, RandWireCheckpointer
from ..data.detection.classes import class_entries
from ..data.images.patience import PatientMapper
from ..modeling.stage import RandWireStage
from .conclusion import conclude, predict_command
from .config.continuation import check_done
from .config.keys import YAML_KEYS
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
        # Without a COCO file the ground truth is written into the folder: anew, the labels may be.
        allow_cached_coco=False,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _sem_seg(cfg: CfgNode, name: str, folder: str) -> SemSegEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


# By a data set's ``evaluator_type``, as in Detectron2's tools/train_net.py: its package, and so its
# DefaultTrainer, has no such choice.
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
    """Detectron2's, as a function of the weights alone, which leaves the training as it is.

    Each time it sees the images with which its loader begins, as after an interruption; and the
    random numbers that it draws are not missing in the training.
    """

    @torch.compiler.set_stance("force_eager")  # of hooks and momenta a compiler makes other code
    def update_stats(self) -> None:
        self._data_iter = None
        with random_state_kept(), _norms_may_have_hooks(self._model):
            super().update_stats()


@contextmanager
def _norms_may_have_hooks(model: torch.nn.Module) -> Iterator[None]:
    """fvcore sees the statistics by hooks, which no fused stage calls, "on" or not."""
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
    """The model in DistributedDataParallel, if there are several processes.

    Args:
        given: options of DistributedDataParallel in place of ``parallel_options``.
    """
    devices = {"device_ids": None} if on_cpu else {}
    options = {**parallel_options(), **devices, **given}
    # Its name since PyTorch 2.14, which warns of the other. What it does more is done once.
    if "forward_sync_buffers" in _KNOWN:
        options.setdefault("forward_sync_buffers", options.pop("broadcast_buffers"))
    return create_ddp_model(model, **options)


def parallel_options() -> dict[str, bool]:
    """DistributedDataParallel's for networks of hundreds of small tensors, whose gradients it would
    copy into its messages one by one, and back; what is computed is the same, to the bit."""
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    if "batched_grad_copy" in _KNOWN:
        options["batched_grad_copy"] = True  # since PyTorch 2.14
    return options


def share_statistics(model: torch.nn.Module) -> None:
    """Give all processes the first one's buffers: each has batch statistics of its own."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with this project's checkpoints, for GPUs and CPUs.

    A run that was interrupted anywhere and resumed with as many processes ends, on a CPU and with
    one or two of them, with the same weights, average, best checkpoint and losses, to the bit, as
    one that was not; with any number of workers. More processes sum their gradients in an order
    that DistributedDataParallel changes after its first step. Of Detectron2's own trainers none
    promises this.

    Several processes train what one would, up to rounding, with any number of workers, where
    images do not depend on their neighbours: norms without batch statistics (GN, FrozenBN), images
    padded to one size (INPUT.LSJ, say, or all of one shape), as many regions sampled from each
    (ROI_HEADS.BATCH_SIZE_PER_IMAGE proposals are there), no grouping by aspect ratio, and edges
    dropped from the "batch". Not RetinaNet, whose loss each process divides by its own mean.

    Attributes:
        keys: of the kind of config, for messages.
        log_period: the iterations from one line of metrics to the next.
        ddp: options of DistributedDataParallel in place of ``parallel_options``.
        average: of the weights, with SOLVER.EMA.
        earlier_max_iter: the length that the training was to have as its checkpoint was written.
        last_evaluation: what the last evaluation found, by its names in metrics.json; in the main
            process.
    """

    keys = YAML_KEYS
    log_period = 20
    ddp: Mapping[str, Any] = {}
    average: AveragedWeights | None
    iter: int
    earlier_max_iter = 0
    last_evaluation: dict[str, float]

    def __init__(self, cfg: CfgNode) -> None:
        # In place of DefaultTrainer's, which hands DistributedDataParallel a GPU index on any
        # device and fixes the class of the checkpointer; the steps are the same.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
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
            **self.classes(cfg),
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
        """The config in checkpoints: with it and the weights one is a whole model."""
        return cfg

    def build_hooks(self) -> list[HookBase]:
        """As Detectron2's, with this project's among them."""
        return training_hooks(weakref.proxy(self))

    def precise_bn(self) -> PreciseBN | None:
        """The hook that TEST.PRECISE_BN asks for, of a model that has norms to be precise."""
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
        """Another one of the training's images, as Detectron2 has it."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        return self.build_train_loader(cfg)

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The network that evaluations test, not wrapped: with SOLVER.EMA the average."""
        return self.checkpointer.model if self.average is None else self.average.module

    def evaluate(self) -> dict[str, float]:
        """Test the network as it is now; what was found, by its names in metrics.json, in the main
        process."""
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        self.last_evaluation = flatten_results_dict(self._last_eval_results)
        if self.cfg.TEST.LOSS:
            self.last_evaluation |= self.test_losses()
        return self.last_evaluation

    def test_losses(self) -> dict[str, float]:
        """The mean losses of all test sets, by their names in metrics.json."""
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
        """Train to the end; then draw the run's pictures into its folder, and say what it is worth.

        Returns:
            what the last evaluation found if TEST.EXPECTED_RESULTS says what it should, else None.
        """
        # DefaultTrainer's, in which nothing can be put before the verification.
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
        """What the main process does at the end of a training."""
        conclude(self.cfg, self.iter, self.checkpointer.model, self.next_command)

    def next_command(self) -> list[str]:
        """The tool that makes use of a training that has ended, and its arguments."""
        return predict_command(self.cfg.OUTPUT_DIR)

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; a run that was killed at its very end still gets model_final.pth,
        and one whose patience was lost ends there."""
        super().resume_or_load(resume)
        if self.average is not None:
            self.average.begin(self.checkpointer.model)
        patience, start = self.cfg.SOLVER.PATIENCE, self.start_iter
        if start and patience and is_exhausted(self.cfg, end_of_what_counts(self), self.keys):
            self.max_iter = start
        save_end(self.checkpointer, start, self.max_iter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As DefaultTrainer's, with the learning rates of the config (``rates_kept``), and of its
        schedule: the checkpoint's next rate is 0 where that had ended.

        Raises:
            ValueError: it has gone further than it is to go; one line.
        """
        super().load_state_dict(state_dict)
        check_done(self.iter + 1, self.max_iter, self.keys)  # beyond, a schedule may have no rate
        groups = self.optimizer.param_groups
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, self.scheduler.get_lr()):
            group["lr"] = rate

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Of a detector's images, as a function of SEED; see ``TrainLoader``."""
        return detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = PatientMapper(cfg, is_train=False)
        return guard_workers(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def classes(cls, cfg: CfgNode) -> dict[str, Any]:
        """What a checkpoint holds of the first training set's classes: names and ids; as of
        ``RandWireCheckpointer``."""
        return class_entries(cfg.DATASETS.TRAIN[0])

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """As DefaultTrainer's; all processes evaluate the first one's network, which is saved."""
        share_statistics(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation (``cfg.TEST.AUG``); its results end in ``_TTA``."""
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
