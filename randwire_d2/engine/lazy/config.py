"""The LazyConfig of a command line, and checks for all errors that can be found before any work.

LazyConfig files are Python: loading one runs it. So none is loaded from a checkpoint or a run's
folder. A YAML file is not loaded as one either, because Detectron2 would let its tags run code.

In addition to Detectron2's keys, ``train`` has those of ``_TRAIN``, which mean the same as in YAML.
"""

import argparse
import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_batch_data_loader, build_detection_train_loader
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.utils.data import DataLoader

from ...config_files import config_path
from ...data.detection.classes import thing_classes
from ...modeling import RandWire
from ...modeling.on_meta import build_on_meta
from ...runs import RunFolder
from ...text import one_line, similar
from ..config.checks import (
    check_dataset,
    check_device,
    check_options,
    check_output,
    check_processes,
)
from ..config.continuation import check_continuation, check_groups, check_split
from ..config.datasets import heads_of, take_data
from ..config.keys import LAZY_KEYS
from ..config.limits import LIMITS, at_least, check_limits
from ..config.metric import check_best_metric
from ..config.schedule import check_solver
from ..config.weights import check_resumed, check_weights
from ..processes.watch import HANG_TIMEOUT
from .data import check_classes, use_data
from .in_yaml import (
    add_tasks,
    check_types,
    datasets_of,
    finds_coco_metrics,
    in_lazy_words,
    mask_key,
    target_of,
    yaml_config,
)
from .loader import check_loss_images

with warnings.catch_warnings():  # it would be the first line of the tool's output
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    from detectron2 import model_zoo

# The sections that Detectron2's lazyconfig_train_net.py reads, too.
_SECTIONS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
# The keys of ``train`` in addition to Detectron2's: SEED, CUDNN_BENCHMARK, and some of DATASETS,
# SOLVER and TEST, which config.py explains.
_TRAIN: dict[str, Any] = {
    "data": "", "data_val": "", "hold_back": 0.0,
    "seed": -1, "cudnn_benchmark": False, "skip_nonfinite": 0, "hang_timeout": HANG_TIMEOUT,
    "best_metric": "bbox/AP", "patience": 0, "ema": {"decay": 0.0}, "shadow_period": 0,
    "eval_loss": False, "precise_bn": {"enabled": False, "num_iter": 200},
}  # fmt: skip
_NODES = [key for key, value in _TRAIN.items() if isinstance(value, dict)]

_REFUSALS = (AssertionError, OmegaConfBaseException, TypeError, ValueError)
_PERIOD = at_least(1)
_BOTTOM_UP = "model.backbone.bottom_up"
_SCRATCH = f"train.init_checkpoint='' {_BOTTOM_UP}.norm=BN {_BOTTOM_UP}.freeze_at=0"

logger = logging.getLogger(__name__)


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """Load and check the LazyConfig of a command line; this runs the file.

    Args:
        args: the arguments of Detectron2's ``default_argument_parser``.

    Raises:
        ValueError: something would make the run fail later: a missing file, data set or device, a
            model that can't be built, a training that can't succeed. One line.
    """
    cfg = read_lazy_config(args)
    stock = model_zoo.get_config("common/train.py").train
    for node, keys in (
        ("train", {*stock, *_TRAIN}),
        ("train.amp", {*stock.amp, "precision"}),
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
    check_types(cfg)
    own = yaml_config(cfg)
    with in_lazy_words():
        if OmegaConf.select(cfg, "dataloader.train.total_batch_size") is None:
            own.SOLVER.IMS_PER_BATCH = max(check_processes(args)[0], 1)  # unknown: the loader's own
        check_limits(own, LIMITS)
        check_solver(own)
        check_device(own, args)
    if not _PERIOD.holds(cfg.train.log_period):
        raise ValueError(f"train.log_period must be {_PERIOD.wanted}; got {cfg.train.log_period!r}")
    if own.TEST.LOSS:
        check_loss_images(cfg)
    elif own.SOLVER.PATIENCE and not cfg.dataloader.get("evaluator"):
        raise ValueError(f"train.patience {own.SOLVER.PATIENCE} needs a dataloader.evaluator")
    check_output("train.output_dir", cfg.train.output_dir, args, own.MODEL.WEIGHTS)
    with in_lazy_words():
        before = check_continuation(own, args, LAZY_KEYS)
    masks = mask_key(cfg)
    own.MODEL.MASK_ON = OmegaConf.select(cfg, masks) is not None
    with in_lazy_words(masks):
        take_data(own)
        check_split(before, own)
    use_data(cfg, args.opts)
    _check_arguments(cfg.dataloader, "dataloader")
    for split in ("test",) if args.eval_only else ("train", "test"):
        for name in datasets_of(cfg, split):
            check_dataset(f"dataloader.{split}.dataset.names", name)
            check_classes(cfg, name)
    model, resumed = _check_model(cfg, args)
    if not args.eval_only:
        _check_solver_parts(cfg, model, resumed)
    add_tasks(own, model)
    with in_lazy_words():
        if finds_coco_metrics(cfg) and not args.eval_only:
            check_best_metric(own)
    return cfg


def read_lazy_config(args: argparse.Namespace) -> DictConfig:
    """Load the LazyConfig of a command line, with all keys of ``train``; this runs the file.

    Raises:
        ValueError: the file is no LazyConfig, or can't be loaded; one line.
    """
    check_options(args)
    path = args.config_file = config_path(args.config_file)
    if not path.endswith(".py"):
        raise ValueError(
            f"--config-file {path!r} is no LazyConfig, whose name ends in .py, such as "
            "configs/lazy/mask_rcnn_randwire_c109_fpn_1x.py; YAML is for tools/train_net.py"
        )
    logger.info(f"Running {path}: a LazyConfig is Python")
    try:
        cfg = LazyConfig.load(path)
    except Exception as e:  # the file's code may raise any error
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        cause = (isinstance(e, SyntaxError) and e.__cause__) or e  # Detectron2's has no line
        raise ValueError(f"{path}{where}: {type(e).__name__}: {cause}") from e
    known = list(map(str, cfg))
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (HydraException, OmegaConfBaseException, KeyError, NotImplementedError) as e:
        reason = " ".join(str(e.args[0] if e.args else e).split())
        raise ValueError(f"the command line's path.key=value: {reason}") from e
    for key in cfg:
        if key not in known:
            raise ValueError(f"{path} has no {key!r} to override{similar(key, known)}")
    missing = [name for name in _SECTIONS if not isinstance(cfg.get(name), DictConfig)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for key, value in _TRAIN.items():
        cfg.train.setdefault(key, value)
    for key in ("data", "data_val"):
        if given := getattr(args, key, ""):
            cfg.train[key] = given
    return cfg


@contextmanager
def building(key: str) -> Iterator[None]:
    """Raise errors of the block, which builds a part of the config, as ValueErrors that name it.

    Some classes check their arguments; others fail with a wrong one, with any kind of error.
    """
    try:
        yield
    except _REFUSALS as e:
        raise ValueError(f"{key}: {one_line(e, 1000) or _failed_line(e)}") from e
    except (ArithmeticError, AttributeError, LookupError, RuntimeError) as e:
        said = f"{type(e).__name__}: {one_line(e, 1000)}, in {_failed_line(e)!r}"
        raise ValueError(f"{key} can't be built: {said}; mend the value that came there") from e


def _failed_line(error: Exception) -> str:
    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


def _check_arguments(node: Any, where: str) -> None:
    """Check the argument names of LazyCalls that are not called yet, because they read images."""
    if callable(target := target_of(node)):
        given = {str(key): None for key in node if key != "_target_"}
        with building(where), suppress(ValueError):  # a builtin may have no signature
            inspect.signature(target).bind_partial(**given)
        if target is build_detection_train_loader:  # it passes unknown arguments on
            takers = (target, build_batch_data_loader, DataLoader)
            known = {key for taker in takers for key in inspect.signature(taker).parameters}
            if unknown := sorted(given.keys() - known):
                raise ValueError(f"{where}.{unknown[0]} is unknown{similar(unknown[0], known)}")
    items: Any = node.items() if isinstance(node, DictConfig) else enumerate(node)
    for key, value in items:
        if isinstance(value, DictConfig | ListConfig):
            _check_arguments(value, f"{where}.{key}")


def build_optimizer(call: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a LazyCall for a model, with options that a checkpoint can hold."""
    call.params.model = model
    optimizer: torch.optim.Optimizer = instantiate(call)
    for group in optimizer.param_groups:
        # The options may have ListConfigs, such as betas, which some versions of PyTorch keep.
        lists = {key: tuple(v) for key, v in group.items() if isinstance(v, ListConfig)}
        group.update(lists)
    return optimizer


def _check_solver_parts(cfg: DictConfig, model: nn.Module, resumed: dict[str, Any] | None) -> None:
    """Check the schedule and the optimizer before the output folder is written to; FiniteTrainer
    checks the optimizer again.

    Args:
        resumed: the checkpoint to go on from, if there is one.
    """
    with building("lr_multiplier"):
        instantiate(cfg.lr_multiplier)
    with building("optimizer"):
        try:
            optimizer = build_optimizer(copy.deepcopy(cfg.optimizer), model)
        except RuntimeError as e:  # the model's weights have no values
            logger.info(f"The optimizer is compared with the checkpoint's later: {one_line(e)}")
            return
    if resumed is not None:
        state = resumed["trainer"]
        saved = state.get("_trainer", state)["optimizer"]["param_groups"]  # see LazyTrainer
        check_groups(saved, optimizer.param_groups, LAZY_KEYS)


def _check_model(
    cfg: DictConfig, args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The model on the meta device, and the checkpoint to go on from, if there is one."""
    with building("model"):
        model = build_on_meta(lambda: instantiate(cfg.model))
    for part in ("backbone", "roi_heads") if isinstance(model, GeneralizedRCNN) else ():
        if not isinstance(built := getattr(model, part), nn.Module):
            raise ValueError(f"model.{part} must be a LazyCall of a network's part; got {built!r}")
    names = datasets_of(cfg, "test" if args.eval_only else "train")
    has_classes = names and heads_of(type(model).__name__)
    classes = thing_classes(names[0]) if has_classes else []
    renamed = getattr(args, "renamed_class", ())
    modules = list(model.modules())
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
    if synchronised and cfg.train.device == "cpu" and not args.eval_only:
        raise ValueError("model: SyncBN needs GPUs; on a CPU use naiveSyncBN, BN or GN")
    weights = cfg.train.init_checkpoint or ""
    if args.resume and (run := RunFolder(cfg.train.output_dir)).can_resume:
        return model, check_resumed(run, model, classes, renamed)
    tested = classes if args.eval_only else None
    check_weights("train.init_checkpoint", weights, model, _SCRATCH, tested, renamed)
    if weights:
        return model, None
    if args.eval_only:
        raise ValueError("--eval-only needs weights: set train.init_checkpoint, or --resume a run")
    networks = [module for module in modules if isinstance(module, RandWire)]
    if any(isinstance(m, FrozenBatchNorm2d) for network in networks for m in network.modules()):
        raise ValueError(
            "training starts without train.init_checkpoint, but RandWire has frozen batch norms, "
            "which diverge if they were never trained: set train.init_checkpoint, or its norm BN "
            "(or SyncBN, GN) and its freeze_at 0"
        )
    return model, None
