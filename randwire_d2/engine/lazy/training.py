"""Trainings whose config is Python, Detectron2's LazyConfig, with this project's checkpoints."""

import argparse
import logging
import weakref
from contextlib import suppress
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.engine import (
    HookBase,
    default_setup,
    default_writers,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...checkpoint import EMA_KEY, RandWireCheckpointer
from ...data.detection.classes import class_entries
from ...files import atomic_open
from ...malloc import keep_freed_memory
from ...runs import RunFolder, evaluation_config
from ..conclusion import conclude, predict_command
from ..config.datasets import check_same_data, log_data
from ..config.keys import LAZY_KEYS
from ..hooks.best import TrainingStopped
from ..hooks.ema import AveragedWeights
from ..hooks.finite import FiniteAMPTrainer, FiniteTrainer
from ..hooks.order import training_hooks
from ..hooks.saving import config_kept, resumed_config, set_earlier_aside
from ..launch import load_tested_weights, log_into, run_processes, write_results
from ..processes.failures import explained
from ..processes.lock import locked
from ..processes.random_state import run_seed
from ..processes.signals import Interrupted, end_training, guard_workers
from ..processes.slurm import Task, is_submitted, submit_training
from ..trainer import in_parallel, precise_bn, settle_start, share_statistics
from ..validation import detection_losses, mean_losses
from .config import build_optimizer, building, read_lazy_config
from .data import use_data
from .in_yaml import add_detector, in_lazy_words, yaml_config
from .loader import lazy_loss_loader, lazy_precise_loader, lazy_train_loader

logger = logging.getLogger(__name__)


def run_lazy(cfg: DictConfig, args: argparse.Namespace, task: Task) -> None:
    """Train or evaluate a LazyConfig in all processes (``run_processes``), or submit it.

    Args:
        task: the command line, for ``--slurm``.

    Raises:
        ValueError: Slurm refuses.
    """
    on_cpu = cfg.train.device == "cpu"
    if is_submitted(args):
        workers = OmegaConf.select(cfg, "dataloader.train.num_workers", default=0)
        submit_training(args, task, cfg.train.output_dir, on_cpu, workers)
        return
    # A config may hold functions that can't be sent to another process; each loads its own.
    run_processes(_train_or_evaluate, (args,), args, on_cpu, cfg.train.hang_timeout)


def _train_or_evaluate(args: argparse.Namespace) -> Any:
    cfg = read_lazy_config(args)
    use_data(cfg, args.opts)  # launch may have started this process, whose catalog is its own
    work = _evaluate if args.eval_only else locked(cfg.train.output_dir)(_train)
    workers = "dataloader.train.num_workers, dataloader.test.num_workers"
    return explained(workers, work, cfg, args)


# -------------------------------------------------------------------------------------------------
# Evaluation
# -------------------------------------------------------------------------------------------------


def _evaluate(cfg: DictConfig, args: argparse.Namespace) -> Any:
    model = instantiate(cfg.model).to(cfg.train.device)  # its folder depends on what it is
    own, _ = _in_yaml(cfg, model)
    # The first process decides: a training at work may write its next checkpoint any moment.
    own = comm.all_gather(evaluation_config(own, args.resume))[0]
    cfg.train.output_dir, cfg.train.init_checkpoint = own.OUTPUT_DIR, own.MODEL.WEIGHTS
    _set_up(cfg, args)
    check_same_data(own)
    _write_detector(own)
    load_tested_weights(model, own)
    results = _test(cfg, model)
    if comm.is_main_process():
        write_results(own, results)
    return results


def _test(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    if not cfg.dataloader.get("evaluator"):
        return {}
    share_statistics(model)
    evaluator = instantiate(cfg.dataloader.evaluator)
    loader = guard_workers(instantiate(cfg.dataloader.test))
    results: dict[str, Any] = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _in_yaml(cfg: DictConfig, model: nn.Module) -> tuple[CfgNode, str]:
    """A LazyConfig in YAML's keys, and why the detector is not among them; "" if it is."""
    own = yaml_config(cfg)
    try:
        return add_detector(own, cfg, model), ""
    except ValueError as e:
        return own, str(e)


def _set_up(cfg: DictConfig, args: argparse.Namespace) -> None:
    default_setup(cfg, args)
    log_into(cfg.train.output_dir)
    if cfg.train.device == "cpu":
        keep_freed_memory()


def _write_detector(own: CfgNode) -> None:
    """What tools read of a run whose config.yaml is Python; an older training's doesn't stay."""
    file = RunFolder(own.OUTPUT_DIR).detector_file
    if comm.is_main_process():
        file.unlink(missing_ok=True)
    if comm.is_main_process() and own.MODEL.LAZY:
        with atomic_open(file) as f:
            f.write(own.dump())


# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------


def _train(cfg: DictConfig, args: argparse.Namespace) -> Any:
    start = cfg.train.init_checkpoint or ""
    earlier = set_earlier_aside(cfg.train.output_dir, args.resume, start)
    config = resumed_config(cfg.train.output_dir, args.resume)
    _set_up(cfg, args)
    if earlier:
        logger.warning(earlier)
    model = instantiate(cfg.model).to(cfg.train.device)
    own, obstacle = _in_yaml(cfg, model)
    check_same_data(own)
    log_data(own)
    if obstacle and comm.is_main_process():
        logger.warning(
            f"{obstacle}: checkpoints hold weights alone, which tools/predict.py and others do not "
            "take"
        )
    with config_kept(own.OUTPUT_DIR, config), in_lazy_words():
        trainer = _trainer(cfg, own, model)
        trainer.checkpointer.resume_or_load(own.MODEL.WEIGHTS, resume=args.resume)
        trainer.start_iter = trainer.iter + 1 if trainer.checkpointer.newest else 0
        settle_start(trainer, own, LAZY_KEYS)
    _write_detector(own)
    try:
        with suppress(TrainingStopped):
            trainer.train(trainer.start_iter, trainer.max_iter)
    except Interrupted as e:
        number = e.number
    else:
        if comm.is_main_process() and own.MODEL.LAZY:
            conclude(own, trainer.iter, model, lambda: predict_command(own.OUTPUT_DIR))
        return None
    del trainer  # and the workers that read its images
    return end_training(number)


def _trainer(cfg: DictConfig, own: CfgNode, model: nn.Module) -> Any:
    """The trainer with its hooks, and the attributes that Trainer's have: checkpointer, average,
    last_evaluation."""
    train, decay = cfg.train, own.SOLVER.EMA.DECAY
    optimizer = build_optimizer(cfg.optimizer, model)
    with building("dataloader.train"):
        loader = lazy_train_loader(cfg.dataloader.train, run_seed(train.seed))
    wrapped = in_parallel(model, train.device == "cpu", **train.ddp)
    trainer: Any = (FiniteAMPTrainer if train.amp.enabled else FiniteTrainer)(
        wrapped, loader, optimizer
    )
    classes = class_entries(own.DATASETS.TRAIN[0]) if own.DATASETS.TRAIN else {}
    trainer.checkpointer = RandWireCheckpointer(
        model,
        train.output_dir,
        cfg=own if own.MODEL.LAZY else None,
        **classes,
        trainer=weakref.proxy(trainer),
    )
    trainer.skip_nonfinite, trainer.keys = train.skip_nonfinite, LAZY_KEYS
    trainer.max_iter, trainer.last_evaluation = train.max_iter, {}
    trainer.average = AveragedWeights(model, decay) if decay else None
    if trainer.average is not None:
        trainer.checkpointer.add_checkpointable(EMA_KEY, trainer.average)
    trainer.evaluated_model = model if trainer.average is None else trainer.average.module
    trainer.register_hooks(_hooks(cfg, own, weakref.proxy(trainer)))
    return trainer


def _hooks(cfg: DictConfig, own: CfgNode, trainer: Any) -> list[HookBase]:
    train = cfg.train

    def evaluate() -> dict[str, float]:
        model = trainer.evaluated_model
        found = flatten_results_dict(_test(cfg, model))
        if own.TEST.LOSS:
            found |= mean_losses(detection_losses(model), lazy_loss_loader(cfg))
        trainer.last_evaluation = found
        return found

    return training_hooks(
        trainer,
        own,
        evaluate,
        lambda: default_writers(train.output_dir, train.max_iter),
        keys=LAZY_KEYS,
        scheduler=instantiate(cfg.lr_multiplier),
        precise_bn=precise_bn(
            own,
            trainer.evaluated_model,
            trainer.data_loader,
            lambda: lazy_precise_loader(cfg.dataloader.train),
        ),
        log_period=train.log_period,
    )
