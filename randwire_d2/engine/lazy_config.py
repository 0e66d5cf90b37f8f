"""The LazyConfig of a command line, and all that can be known to fail before any work.

LazyConfig files are Python by nature: loading one runs it. So none is taken from a checkpoint or a
run's folder, and a YAML file, in which Detectron2 would let tags run code, is not read as one.

Beside Detectron2's keys, ``train`` has those of ``_TRAIN``, which mean what YAML's do.
"""

import argparse
import copy
import logging
import os
import traceback
import warnings
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..checkpoint import load_checkpoint
from ..config_files import config_path
from ..modeling import RandWire
from ..modeling.on_meta import build_on_meta
from ..runs import RunFolder
from ..text import one_line, similar
from .best import check_best_metric
from .checks import (
    check_dataset,
    check_device,
    check_order,
    check_output,
    check_processes,
)
from .continuation import check_saved_groups
from .datasets import thing_classes
from .keys import LAZY_KEYS
from .lazy_loader import check_loss_images
from .lazy_yaml import (
    add_tasks,
    datasets_of,
    finds_coco_metrics,
    in_lazy_words,
    yaml_config,
)
from .limits import LIMITS, at_least, check_limits
from .schedule import check_solver
from .watch import HANG_TIMEOUT

with warnings.catch_warnings():  # ahead of the tool's first word
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    from detectron2 import model_zoo

# What Detectron2's lazyconfig_train_net.py reads, too.
_SECTIONS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
# What ``train`` may have beside Detectron2's: SEED, CUDNN_BENCHMARK and some of SOLVER and TEST, as
# config.py explains them.
_TRAIN: dict[str, Any] = {
    "seed": -1, "cudnn_benchmark": False, "skip_nonfinite": 0, "hang_timeout": HANG_TIMEOUT,
    "best_metric": "bbox/AP", "patience": 0, "ema": {"decay": 0.0}, "shadow_period": 0,
    "eval_loss": False, "precise_bn": {"enabled": False, "num_iter": 200},
}  # fmt: skip
_NODES = [key for key, value in _TRAIN.items() if isinstance(value, dict)]

_PERIOD = at_least(1)

logger = logging.getLogger(__name__)


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """The LazyConfig of a command line, checked; the file runs.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        ValueError: for what would make the run fail later: a missing file, data set or device, a
            model that can't be built, a training that can't succeed. One line.
    """
    cfg = read_lazy_config(args)
    missing = [name for name in _SECTIONS if name not in cfg]
    if missing:
        raise ValueError(f"{args.config_file} lacks {', '.join(missing)}")
    stock = model_zoo.get_config("common/train.py").train
    for node, keys in (
        ("train", {*stock, *_TRAIN}),
        ("train.checkpointer", stock.checkpointer),
        *((f"train.{key}", _TRAIN[key]) for key in _NODES),
    ):
        found = OmegaConf.select(cfg, node)
        if not isinstance(found, DictConfig):
            raise ValueError(f"{node} must have keys, {', '.join(sorted(keys))}; got {found!r}")
        for key in map(str, found):
            if key not in keys:
                raise ValueError(f"{node}.{key} is unknown{similar(key, keys)}")
    needed = [f"train.{key}" for key in stock if key != "init_checkpoint"]
    needed += [f"train.{node}.{key}" for node in _NODES for key in _TRAIN[node]]
    for key in (*needed, "train.amp.enabled", "train.checkpointer.period"):
        if OmegaConf.select(cfg, key) is None:
            raise ValueError(f"{key} has no value")
    own = yaml_config(cfg)
    with in_lazy_words():
        if OmegaConf.select(cfg, "dataloader.train.total_batch_size") is None:
            own.SOLVER.IMS_PER_BATCH = max(check_processes(args)[0], 1)  # its loader knows
        check_limits(own, LIMITS)
        check_solver(own)
        check_device(own, args)
    if not _PERIOD.holds(cfg.train.log_period):
        raise ValueError(f"train.log_period must be {_PERIOD.wanted}; got {cfg.train.log_period!r}")
    if own.TEST.LOSS:
        check_loss_images(cfg)
    elif own.SOLVER.PATIENCE and not cfg.dataloader.get("evaluator"):
        raise ValueError(f"train.patience {own.SOLVER.PATIENCE} needs a dataloader.evaluator")
    check_output("train.output_dir", cfg.train.output_dir, args, cfg.train.init_checkpoint or "")
    for split in ("test",) if args.eval_only else ("train", "test"):
        for name in datasets_of(cfg, split):
            check_dataset(f"dataloader.{split}.dataset.names", name)
            _check_classes(cfg, name)
    model = _check_model(cfg, args)
    if args.resume and not args.eval_only:
        _check_optimizer(cfg, model)
    add_tasks(own, model)
    with in_lazy_words():
        if finds_coco_metrics(cfg) and not args.eval_only:
            check_best_metric(own)
    return cfg


def read_lazy_config(args: argparse.Namespace) -> DictConfig:
    """The LazyConfig of a command line, with all keys of ``train``; the file runs.

    Raises:
        ValueError: it is none, or can't be loaded; one line.
    """
    check_order(args)
    path = args.config_file = config_path(args.config_file)
    if not path.endswith(".py"):
        raise ValueError(
            f"--config-file {path!r} is no LazyConfig, whose name ends in .py; YAML is for "
            "tools/train_net.py"
        )
    logger.info(f"{path} is Python, as LazyConfig files are by nature: it runs now")
    try:
        cfg = LazyConfig.load(path)
    except Exception as e:  # whatever a file does that runs
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        cause = (isinstance(e, SyntaxError) and e.__cause__) or e  # Detectron2's has no line
        raise ValueError(f"{path}{where}: {type(e).__name__}: {cause}") from e
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (HydraException, OmegaConfBaseException, KeyError, NotImplementedError) as e:
        reason = " ".join(str(e.args[0] if e.args else e).split())
        raise ValueError(f"the command line's path.key=value: {reason}") from e
    for key, value in _TRAIN.items() if "train" in cfg else ():
        cfg.train.setdefault(key, value)
    return cfg


def _check_classes(cfg: DictConfig, name: str) -> None:
    number = len(thing_classes(name))
    for key in ("model.num_classes", "model.roi_heads.num_classes"):
        value = OmegaConf.select(cfg, key)
        if number and value not in (None, number):
            raise ValueError(f"{key} is {value}, but {name!r} has {number} classes: {key}={number}")


def build_optimizer(call: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """What a LazyCall of an optimizer makes for a model; a checkpoint can hold its options."""
    call.params.model = model
    optimizer: torch.optim.Optimizer = instantiate(call)
    for group in optimizer.param_groups:
        # betas, say: not every version of PyTorch makes two numbers of them.
        lists = {key: tuple(v) for key, v in group.items() if isinstance(v, ListConfig)}
        group.update(lists)
    return optimizer


def _check_optimizer(cfg: DictConfig, model: nn.Module) -> None:
    """Ahead of all that writes into the output folder; FiniteTrainer looks again."""
    if not (run := RunFolder(cfg.train.output_dir)).can_resume:
        return
    try:
        optimizer = build_optimizer(copy.deepcopy(cfg.optimizer), model)
    except Exception as e:  # whatever it does with weights that have no values
        logger.info(f"The optimizer is compared with the checkpoint's later: {one_line(e)}")
        return
    check_saved_groups(run, optimizer.param_groups, LAZY_KEYS)


def _check_model(cfg: DictConfig, args: argparse.Namespace) -> nn.Module:
    try:
        model = build_on_meta(lambda: instantiate(cfg.model))
    except (AssertionError, OmegaConfBaseException, TypeError, ValueError) as e:
        raise ValueError(f"model: {' '.join(str(e).split())}") from e
    modules = list(model.modules())
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
    if synchronised and cfg.train.device == "cpu" and not args.eval_only:
        raise ValueError("model: SyncBN needs GPUs; on a CPU use BN or GN")
    weights, run = cfg.train.init_checkpoint, RunFolder(cfg.train.output_dir)
    if args.resume and run.can_resume:
        return model
    if weights and "://" not in weights:
        if not os.path.isfile(weights):
            raise ValueError(f"train.init_checkpoint {weights!r} does not exist")
        load_checkpoint(weights)
    if weights:
        return model
    if args.eval_only:
        raise ValueError("--eval-only needs weights: set train.init_checkpoint, or --resume a run")
    networks = [module for module in modules if isinstance(module, RandWire)]
    if any(isinstance(m, FrozenBatchNorm2d) for network in networks for m in network.modules()):
        raise ValueError(
            "training starts without train.init_checkpoint, but RandWire has frozen batch norms, "
            "which diverge if they were never trained: set train.init_checkpoint, or its norm BN "
            "(or SyncBN, GN) and its freeze_at 0"
        )
    return model
