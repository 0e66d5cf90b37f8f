"""Command lines and processes: what a training tool does once its config has been checked."""

import argparse
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_start_method, set_start_method
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import EMA_KEY, RandWireCheckpointer
from ..data.detection.by_path import forget_labels
from ..environment import variable
from ..files import without_options
from ..garbage import uncollected
from ..malloc import keep_freed_memory
from ..runs import Evaluation, RunFolder, evaluation_config, training_of
from .config.datasets import check_same_data, known, log_data, register_data, take_known
from .hooks.saving import Contents, config_kept, resumed_config, set_earlier_aside
from .processes.failures import explained
from .processes.lock import locked
from .processes.signals import Interrupted, end_training, signals_for_children
from .processes.slurm import Task, add_slurm_arguments, is_submitted, submit_training
from .processes.threads import share_cores
from .processes.torchrun import Launched
from .processes.watch import watched
from .trainer import Trainer

logger = logging.getLogger(__name__)


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's argument parser with additional options."""
    parser = default_argument_parser(epilog)
    add_data_arguments(parser, "DATASETS.PATH", "DATASETS.PATH_VAL")
    parser.add_argument(
        "--config-from-weights",
        action="store_true",
        help="take the wiring (MODEL.RANDWIRE.SPEC) and the preprocessing (INPUT.FORMAT, "
        "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD) from the checkpoint MODEL.WEIGHTS",
    )
    add_slurm_arguments(parser)
    return parser


def add_data_arguments(parser: argparse.ArgumentParser, key: str, key_val: str) -> None:
    """Add --data, --data-val and --renamed-class. The first two name a data set by its path; their
    help says that they set the keys ``key`` and ``key_val`` of the config."""
    parser.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="a detector's data set: a folder as labelling tools export it (COCO, YOLO, Pascal VOC "
        f"or LabelMe), or annotations.json:images; sets {key}",
    )
    parser.add_argument(
        "--data-val",
        default="",
        metavar="PATH",
        help=f"the validation split, if --data does not contain it; sets {key_val}",
    )
    add_renamed_class(parser, "--resume or --eval-only")


def add_renamed_class(parser: argparse.ArgumentParser, goes_with: str) -> None:
    """Add --renamed-class, which says that a class of the data set has a corrected name.

    Args:
        goes_with: the options with which class names are compared with the checkpoint's.
    """
    parser.add_argument(
        "--renamed-class",
        nargs=2,
        action="append",
        default=[],
        metavar=("OLD", "NEW"),
        help=f"with {goes_with}: the name of a class in the checkpoint, and its corrected name in "
        "the data; repeat it for each class",
    )


def split_pairs(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split files from the KEY VALUE pairs that follow them, since argparse can't."""
    pairs = (i for i, text in enumerate(given) if re.fullmatch(r"[A-Z]\w*(\.[A-Z]\w*)+", text))
    first = next(pairs, len(given))
    return list(given[:first]), list(given[first:])


def setup(cfg: CfgNode, args: argparse.Namespace, given: Any = None) -> None:
    """Call Detectron2's ``default_setup``, set up this project's logger, and register the data.

    Args:
        cfg: the config; with OUTPUT_DIR None no files are written.
        given: the LazyConfig that ``cfg`` was translated from; None if the user gave YAML.
    """
    default_setup(cfg if given is None else given, args)
    log = logging.getLogger("randwire_d2")
    bare = comm.get_world_size() > 1 and not log.handlers  # launch has started this process
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name=log.name, configure_stdout=bare)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    elif cfg.MODEL.DEVICE.startswith("cuda:"):
        # torch seeds the current GPU, measures its memory and pins memory for it; 0 by default.
        torch.cuda.set_device(cfg.MODEL.DEVICE)
    register_data(cfg)  # a process that launch has started has its own, empty catalog
    check_same_data(cfg)


def train_or_evaluate(
    cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer] = Trainer
) -> Any:
    """Train, or evaluate with ``--eval-only``; each process of a training tool calls this.

    SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end a training with a checkpoint (processes/signals.py).
    """
    # The folder is locked before setup, which writes there.
    work = _evaluate if args.eval_only else locked(cfg.OUTPUT_DIR)(_train)
    workers = f"DATALOADER.NUM_WORKERS {cfg.DATALOADER.NUM_WORKERS}"
    return explained(workers, work, cfg, args, trainer_class)


def _train(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer]) -> Any:
    config = setup_training(cfg, args)
    return train_to_the_end(partial(trainer_class, cfg), args.resume, config)


def setup_training(cfg: CfgNode, args: argparse.Namespace, given: Any = None) -> Contents:
    """Call ``setup`` for a training, after moving an earlier one out of the locked OUTPUT_DIR;
    return the ``resumed_config``."""
    earlier = set_earlier_aside(cfg.OUTPUT_DIR, args.resume, cfg.MODEL.WEIGHTS)
    config = resumed_config(cfg.OUTPUT_DIR, args.resume)
    setup(cfg, args, given)
    if earlier:
        logger.warning(earlier)
    log_data(cfg)
    return config


def train_to_the_end(make: Callable[[], Trainer], resume: bool, config: Contents) -> Any:
    """Train with the trainer that ``make`` returns; if a signal ends the training, exit by it.

    Args:
        config: the return value of ``setup_training``.

    Raises:
        Interrupted: a signal has ended the training, which has only this process.
    """
    with config_kept(config):
        trainer = make()
        trainer.resume_or_load(resume=resume)
    try:
        return trainer.train()
    except Interrupted as e:
        number = e.number
    del trainer  # which also ends the workers of its loader
    return end_training(number)


def _evaluate(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer]) -> Any:
    # The first process chooses for all: a running training may write a newer checkpoint meanwhile.
    cfg = comm.all_gather(evaluation_config(cfg, args.resume))[0]
    return locked(cfg.OUTPUT_DIR)(_evaluate_there)(cfg, args, trainer_class)


def _evaluate_there(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer]) -> Any:
    setup(cfg, args)
    model = trainer_class.build_model(cfg)
    load_tested_weights(model, cfg)
    results = trainer_class.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(trainer_class.test_with_TTA(cfg, model))
    if comm.is_main_process():
        write_results(cfg, results)
        verify_results(cfg, results)
    return results


def load_tested_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Load the weights of MODEL.WEIGHTS that the training's own evaluations tested: with SOLVER.EMA
    the averaged weights."""
    rest = RandWireCheckpointer(model, save_dir=cfg.OUTPUT_DIR).load(cfg.MODEL.WEIGHTS)
    if EMA_KEY not in rest:
        return
    if cfg.SOLVER.EMA.DECAY:
        model.load_state_dict(rest[EMA_KEY])
        logger.info("With EMA, the average of the weights is evaluated")
    else:
        logger.warning(
            f"{cfg.MODEL.WEIGHTS} also holds the average of its weights, which its training "
            "evaluated: to evaluate that, set SOLVER.EMA.DECAY (train.ema.decay) above 0"
        )


def write_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Write the results of an evaluation to results.json in its OUTPUT_DIR."""
    by_task: dict[str, dict[str, float]] = {}
    for name, value in flatten_results_dict(results).items():
        task, metric = name.rsplit("/", 1)
        by_task.setdefault(task, {})[metric] = value
    weights = without_options(cfg.MODEL.WEIGHTS)
    run = RunFolder(cfg.OUTPUT_DIR)
    run.write_evaluation(Evaluation(weights, training_of(weights), by_task))
    logger.info(f"The evaluation's config, log and results are in {run.path}")


def run_distributed(
    main: Callable[..., Any],
    cfg: CfgNode,
    args: argparse.Namespace,
    task: Task,
    main_args: tuple[Any, ...] | None = None,
) -> Any:
    """Call ``main`` in all processes of a training (``run_processes``), or submit it to Slurm.

    Args:
        task: the command line, for ``--slurm``.
        main_args: the arguments of ``main`` (default: cfg and args).

    Raises:
        ValueError: Slurm refuses the job.
    """
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    if is_submitted(args):
        workers = cfg.DATALOADER.NUM_WORKERS
        return submit_training(args, task, cfg.OUTPUT_DIR, on_cpu, workers)
    main_args = (cfg, args) if main_args is None else main_args
    return run_processes(main, main_args, args, on_cpu, cfg.SOLVER.HANG_TIMEOUT)


def run_processes(
    main: Callable[..., Any],
    main_args: tuple[Any, ...],
    args: argparse.Namespace,
    on_cpu: bool,
    timeout: float,
) -> Any:
    """Call ``main(*main_args)`` in ``--num-gpus`` processes on each of ``--num-machines`` machines;
    or, if a launcher such as torchrun has started all processes, in this one.

    On a CPU the processes share the cores that other programs leave free.

    Args:
        timeout: the seconds after which an iteration counts as hanging.

    Raises:
        ChildProcessError: a process has died.
    """
    if launched := Launched.here():
        return launched.run(main, main_args, on_cpu, timeout)
    if on_cpu:
        share_cores(args.num_gpus)
    several = args.num_gpus * args.num_machines > 1
    with (
        signals_for_children() if several else nullcontext(),
        # Detectron2's launch uses NCCL, with one GPU for each process, if it sees GPUs.
        variable("CUDA_VISIBLE_DEVICES", "") if several and on_cpu else nullcontext(),
        _file_of_known() if several else nullcontext() as file,
    ):
        return launch(
            _informed,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(file, get_start_method(allow_none=True), main, timeout, *main_args),
        )


@contextmanager
def _file_of_known() -> Iterator[str]:
    """Write what this process has read of the data to a file, for the processes that it starts.

    Arguments reach them through a pipe of 64 KiB. With more data, a process would be started only
    once the one before has imported the tool and reads its arguments. This process then forgets its
    labels: those of a data set of COCO's size would take gigabytes until the training ends.
    """
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "known")
        try:
            with open(path, "wb") as file:
                pickle.dump(known(), file, pickle.HIGHEST_PROTOCOL)
        except OSError as e:
            raise OSError(
                f"the data's labels can't be written to {folder}, for the processes to be started "
                f"({e.strerror}): make room, or name another disk in the environment's TMPDIR"
            ) from e
        forget_labels()
        yield path


def _informed(
    path: str | None, method: str | None, main: Callable[..., Any], timeout: float, *args: Any
) -> Any:
    """Call ``main(*args)``, ``watched``, with what the parent process has read of the data.

    Args:
        path: the file with that data; None if there is only one process, which is not watched.
        method: the parent's start method, also for the workers of loaders. A spawned process would
            spawn its workers, which each import PyTorch again, in each evaluation.
    """
    if path is None:
        return main(*args)
    set_start_method(method, force=True)
    with open(path, "rb") as file, uncollected():
        take_known(pickle.load(file))
    comm.synchronize()
    if comm.get_local_rank() == 0:
        os.remove(path)
    return watched(main, timeout, *args)
