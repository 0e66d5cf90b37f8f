"""Trainings whose config is Python, Detectron2's LazyConfig, with this project's checkpoints.

LazyConfig files are Python by nature: loading one runs it. So none is taken from a checkpoint or a
run's folder, and a YAML file, in which Detectron2 would let tags run code, is not read as one.

Beside Detectron2's keys, ``train`` has those of ``_TRAIN``, which mean what YAML's do.
"""

import argparse
import logging
import os
import traceback
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..checkpoint import RandWireCheckpointer, load_checkpoint
from ..config_files import config_path
from ..data.classes import class_entries
from ..modeling import RandWire
from ..runs import RunFolder
from .checks import (
    check_dataset,
    check_order,
    check_output,
    check_processes,
    similar,
    usable_device,
)
from .datasets import thing_classes
from .failures import explained
from .finite import FiniteAMPTrainer, FiniteTrainer, FiniteWeights, Keys
from .launch import log_into, run_processes
from .lazy_loader import lazy_train_loader
from .limits import at_least
from .lock import locked
from .random_state import run_seed
from .resumption import EndOnce, FinishIteration, resumption_hooks
from .saving import PeriodicCheckpointer, PeriodicWriter, save_end
from .shadow_steps import ShadowSteps
from .signals import Interrupted, StopOnSignal, end_interrupted, guard_workers
from .slurm import Task, is_submitted, submit_training
from .trainer import share_statistics
from .watch import HANG_TIMEOUT, ReportProgress

# What Detectron2's lazyconfig_train_net.py reads, too.
_SECTIONS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
# What ``train`` may have beside Detectron2's: SEED, CUDNN_BENCHMARK, SOLVER.SKIP_NONFINITE and
# SOLVER.HANG_TIMEOUT, as config.py explains them.
_TRAIN = {
    "seed": -1, "cudnn_benchmark": False, "skip_nonfinite": 0, "hang_timeout": HANG_TIMEOUT,
}  # fmt: skip
_LIMITS = {
    "train.max_iter": at_least(1),
    "train.checkpointer.period": at_least(1),
    "train.eval_period": at_least(0),
    "train.log_period": at_least(1),
    "train.skip_nonfinite": at_least(0),
    "train.hang_timeout": at_least(1),
}
_KEYS = Keys("train.skip_nonfinite", "lower optimizer.lr")

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


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """The LazyConfig of a command line, checked; the file runs.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        ValueError: for what would make the run fail later: a missing file, data set or device, a
            model that can't be built, a training that can't succeed. One line.
    """
    cfg = _read(args)
    missing = [name for name in _SECTIONS if name not in cfg]
    if missing:
        raise ValueError(f"{args.config_file} lacks {', '.join(missing)}")
    known = {*model_zoo.get_config("common/train.py").train, *_TRAIN}
    for key in cfg.train:
        if key not in known:
            raise ValueError(f"train.{key} is unknown{similar(key, known)}")
    for key, limit in _LIMITS.items():
        if not limit.holds(value := OmegaConf.select(cfg, key)):
            raise ValueError(f"{key} must be {limit.wanted}; got {value!r}")
    _check_device(cfg, args)
    check_output("train.output_dir", cfg.train.output_dir, args)
    for split in ("test",) if args.eval_only else ("train", "test"):
        for name in _datasets(cfg, split):
            check_dataset(f"dataloader.{split}.dataset.names", name)
            _check_classes(cfg, name)
    _check_model(cfg, args)
    return cfg


def _read(args: argparse.Namespace) -> DictConfig:
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
    except (HydraException, OmegaConfBaseException, KeyError) as e:
        reason = " ".join(str(e.args[0] if e.args else e).split())
        raise ValueError(f"the command line's path.key=value: {reason}") from e
    for key, value in _TRAIN.items() if "train" in cfg else ():
        cfg.train.setdefault(key, value)
    return cfg


def _datasets(cfg: DictConfig, split: str) -> list[str]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=())
    return [names] if isinstance(names, str) else list(names)


def _check_classes(cfg: DictConfig, name: str) -> None:
    number = len(thing_classes(name))
    for key in ("model.num_classes", "model.roi_heads.num_classes"):
        value = OmegaConf.select(cfg, key)
        if number and value not in (None, number):
            raise ValueError(f"{key} is {value}, but {name!r} has {number} classes: {key}={number}")


def _check_device(cfg: DictConfig, args: argparse.Namespace) -> None:
    processes, here = check_processes(args)
    device, gpus = str(cfg.train.device), torch.cuda.device_count()
    usable_device("train.device", device)
    if device.startswith("cuda") and gpus < here and not is_submitted(args):
        raise ValueError(
            f"train.device is {device!r} and --num-gpus {here}, but torch sees {gpus} "
            "GPUs; to train on the CPU, add train.device=cpu"
        )
    if device == "cpu" and cfg.train.amp.enabled and not args.eval_only:
        raise ValueError("train.amp.enabled needs a GPU: Detectron2's AMPTrainer has no CPU path")
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size", default=processes)
    if not args.eval_only and (batch < 1 or batch % max(processes, 1)):
        raise ValueError(
            f"dataloader.train.total_batch_size must be at least 1, and a multiple of the number "
            f"of processes, {processes}; got {batch}"
        )


def _check_model(cfg: DictConfig, args: argparse.Namespace) -> None:
    try:
        with torch.device("meta"):  # without memory or time
            modules = list(instantiate(cfg.model).modules())
    except (AssertionError, OmegaConfBaseException, TypeError, ValueError) as e:
        raise ValueError(f"model: {' '.join(str(e).split())}") from e
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
    if synchronised and cfg.train.device == "cpu" and not args.eval_only:
        raise ValueError("model: SyncBN needs GPUs; on a CPU use BN or GN")
    weights, run = cfg.train.init_checkpoint, RunFolder(cfg.train.output_dir)
    if args.resume and run.can_resume:
        return
    if weights and "://" not in weights:
        if not os.path.isfile(weights):
            raise ValueError(f"train.init_checkpoint {weights!r} does not exist")
        load_checkpoint(weights)
    if weights:
        return
    if args.eval_only:
        raise ValueError("--eval-only needs weights: set train.init_checkpoint, or --resume a run")
    networks = [module for module in modules if isinstance(module, RandWire)]
    if any(isinstance(m, FrozenBatchNorm2d) for network in networks for m in network.modules()):
        raise ValueError(
            "training starts without train.init_checkpoint, but RandWire has frozen batch norms, "
            "which diverge if they were never trained: set train.init_checkpoint, or its norm BN "
            "(or SyncBN, GN) and its freeze_at 0"
        )


def _train_or_evaluate(args: argparse.Namespace) -> Any:
    cfg = _read(args)
    lock = nullcontext() if args.eval_only else locked(cfg.train.output_dir)
    with explained("dataloader.train.num_workers, dataloader.test.num_workers"), lock:
        return _run(cfg, args)


def _run(cfg: DictConfig, args: argparse.Namespace) -> Any:
    default_setup(cfg, args)
    log_into(cfg.train.output_dir)
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        checkpointer = RandWireCheckpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        return _evaluate(cfg, model)
    try:
        return _train(cfg, args, model)
    except Interrupted as e:
        number = e.number
    return end_interrupted(number)


def _train(cfg: DictConfig, args: argparse.Namespace, model: nn.Module) -> None:
    train, run = cfg.train, RunFolder(cfg.train.output_dir)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = lazy_train_loader(cfg.dataloader.train, run_seed(train.seed))
    on_cpu = {"device_ids": None} if train.device == "cpu" else {}
    wrapped = create_ddp_model(model, **train.ddp, **on_cpu)
    kind = FiniteAMPTrainer if train.amp.enabled else FiniteTrainer
    trainer = kind(wrapped, loader, optimizer)
    names = _datasets(cfg, "train")
    classes = class_entries(names[0]) if names else {}
    checkpointer = RandWireCheckpointer(
        model, train.output_dir, **classes, trainer=weakref.proxy(trainer)
    )
    trainer.checkpointer = checkpointer
    trainer.skip_nonfinite, trainer.keys = train.skip_nonfinite, _KEYS
    is_main = comm.is_main_process()
    writers = default_writers(train.output_dir, train.max_iter) if is_main else []
    batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size", default=0)
    trainer.register_hooks(
        [
            EndOnce(),
            ReportProgress(),
            FiniteWeights(checkpointer, train.checkpointer.period, _KEYS),
            StopOnSignal(checkpointer),
            *resumption_hooks(wrapped, loader, batch_size, drawn=train.seed < 0),
            ShadowSteps(wrapped, run, 0),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            PeriodicCheckpointer(checkpointer, **train.checkpointer) if is_main else None,
            hooks.EvalHook(train.eval_period, lambda: _evaluate(cfg, model)),
            PeriodicWriter(writers, train.eval_period, train.log_period) if is_main else None,
            FinishIteration(run),
        ]
    )
    checkpointer.resume_or_load(train.init_checkpoint, resume=args.resume)
    start_iter = trainer.iter + 1 if checkpointer.newest else 0
    save_end(checkpointer, start_iter, train.max_iter)
    trainer.train(start_iter, train.max_iter)


def _evaluate(cfg: DictConfig, model: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return None
    share_statistics(model)
    evaluator = instantiate(cfg.dataloader.evaluator)
    loader = guard_workers(instantiate(cfg.dataloader.test))
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results
