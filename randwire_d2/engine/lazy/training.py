"""Trainings with Detectron2's LazyConfigs, which are Python, and this project's checkpoints."""

import argparse
import copy
import logging
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ...checkpoint import Classes
from ...files import atomic_open
from ...runs import RunFolder, evaluation_config
from ..config.keys import LAZY_KEYS
from ..launch import (
    load_tested_weights,
    run_distributed,
    setup,
    setup_training,
    train_to_the_end,
    write_results,
)
from ..processes.failures import explained
from ..processes.lock import locked
from ..processes.random_state import run_seed
from ..processes.signals import guard_workers
from ..processes.slurm import Task
from ..trainer import Trainer, share_statistics
from ..validation import detection_losses, mean_losses
from .config import build_optimizer, building, read_lazy_config
from .data import use_data
from .in_yaml import add_detector, in_lazy_words, yaml_config
from .loader import lazy_loss_loader, lazy_train_loader

logger = logging.getLogger(__name__)


def run_lazy(cfg: DictConfig, args: argparse.Namespace, task: Task) -> None:
    """Call ``run_distributed`` for a LazyConfig. Each process loads the config itself, because it
    may hold functions that can't be pickled."""
    run_distributed(_train_or_evaluate, yaml_config(cfg), args, task, (args,))


def _train_or_evaluate(args: argparse.Namespace) -> Any:
    cfg = read_lazy_config(args)
    use_data(cfg, args.opts)  # a process that launch has started has its own, empty catalog
    work = _evaluate if args.eval_only else locked(cfg.train.output_dir)(_train)
    workers = "dataloader.train.num_workers, dataloader.test.num_workers"
    return explained(workers, work, cfg, args)


# -------------------------------------------------------------------------------------------------
# Evaluation
# -------------------------------------------------------------------------------------------------


def _evaluate(cfg: DictConfig, args: argparse.Namespace) -> Any:
    model = instantiate(cfg.model).to(cfg.train.device)  # the evaluation's folder depends on it
    own, _ = _in_yaml(yaml_config(cfg), cfg, model)
    # The first process chooses for all: a running training may write a newer checkpoint meanwhile.
    own = comm.all_gather(evaluation_config(own, args.resume))[0]
    cfg.train.output_dir, cfg.train.init_checkpoint = own.OUTPUT_DIR, own.MODEL.WEIGHTS
    with locked(own.OUTPUT_DIR):
        setup(own, args, cfg)
        _write_detector(own)
        load_tested_weights(model, own)
        results = _test(cfg, model)
        if comm.is_main_process():
            write_results(own, results)
    return results


def _test(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    share_statistics(model)  # also for train.eval_loss, which needs no evaluator
    if not cfg.dataloader.get("evaluator"):
        return {}
    evaluator = instantiate(cfg.dataloader.evaluator)
    loader = guard_workers(instantiate(cfg.dataloader.test))
    results: dict[str, Any] = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _in_yaml(own: CfgNode, cfg: DictConfig, model: nn.Module) -> tuple[CfgNode, str]:
    """The config ``own`` with the LazyConfig's detector added, and ""; or ``own`` and the reason
    why YAML's keys can't describe the detector."""
    try:
        return add_detector(own, cfg, model), ""
    except ValueError as e:
        return own, str(e)


def _write_detector(own: CfgNode) -> None:
    """Write detector.yaml, which tools read in place of a LazyConfig; remove an older one."""
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
    own = yaml_config(cfg)
    config = setup_training(own, args, cfg)
    model = instantiate(cfg.model).to(cfg.train.device)
    own, obstacle = _in_yaml(own, cfg, model)
    if obstacle and comm.is_main_process():
        logger.warning(
            f"{obstacle}: checkpoints hold only weights, and tools/predict.py and others can't "
            "load them"
        )
    make = partial(LazyTrainer, own, cfg, model)
    return train_to_the_end(make, args.resume, config)


class LazyTrainer(Trainer):
    """A ``Trainer`` with the parts of a LazyConfig; its build methods are not classmethods.

    Args:
        own: the LazyConfig in YAML's keys.
        lazy: the LazyConfig; its data sets are registered.
        model: the model that the LazyConfig builds.
    """

    keys = LAZY_KEYS

    def __init__(self, own: CfgNode, lazy: DictConfig, model: nn.Module) -> None:
        self._lazy, self._built = lazy, model
        self.log_period, self.ddp = lazy.train.log_period, lazy.train.ddp
        super().__init__(own)

    def build_model(self, cfg: CfgNode) -> nn.Module:
        return self._built

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(self._lazy.optimizer, model)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, instantiate(self._lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

    def build_train_loader(self, cfg: CfgNode) -> Any:  # type: ignore[override]
        with building("dataloader.train"):
            return lazy_train_loader(self._lazy.dataloader.train, run_seed(cfg.SEED))

    def loader_without_workers(self) -> Any:
        call = copy.deepcopy(self._lazy.dataloader.train)
        if "num_workers" in call:
            call.num_workers = 0
        return instantiate(call)

    def saved_config(self, cfg: CfgNode) -> CfgNode | None:
        return cfg if cfg.MODEL.LAZY else None  # without MODEL.LAZY it describes no detector

    def classes(self, cfg: CfgNode) -> Classes:  # type: ignore[override]
        return super().classes(cfg) if cfg.DATASETS.TRAIN else Classes([])

    def test(self, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:  # type: ignore[override]
        return _test(self._lazy, model)

    def test_losses(self) -> dict[str, float]:
        return mean_losses(detection_losses(self.evaluated_model), lazy_loss_loader(self._lazy))

    def resume_or_load(self, resume: bool = True) -> None:
        with in_lazy_words():
            super().resume_or_load(resume)

    def train(self) -> Any:
        _write_detector(self.cfg)  # after all checks that may refuse to resume
        return super().train()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's state, also that of older versions, which had one level less."""
        super().load_state_dict({"_trainer": {**state_dict, "hooks": {}}, **state_dict})

    def conclude(self) -> None:
        if self.cfg.MODEL.LAZY:  # else no tool can load the trained model
            super().conclude()
