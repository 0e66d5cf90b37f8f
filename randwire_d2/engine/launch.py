"""Command lines and processes: what a training tool does, once its config is known to be good."""

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
    """Detectron2's command line with a few flags more."""
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
    """Add the options that give a data set by its path, and set these keys of the config; and the
    one for names of its classes that were corrected."""
    parser.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="a detector's data set: a folder in COCO's layout or Roboflow's, "
        "annotations.json:images, YOLO's data.yaml, or a Pascal VOC folder; sets "
        f"{key}",
    )
    parser.add_argument(
        "--data-val",
        default="",
        metavar="PATH",
        help=f"the validation split, if --data does not contain it; sets {key_val}",
    )
    add_renamed_class(parser, "--resume or --eval-only")


def add_renamed_class(parser: argparse.ArgumentParser, goes_with: str) -> None:
    """Add the option for names of a data set's classes that were corrected.

    Args:
        goes_with: the options that have them compared with the checkpoint's.
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
    """Files and the KEY VALUE pairs that follow them, which argparse can't tell apart."""
    pairs = (i for i, text in enumerate(given) if re.fullmatch(r"[A-Z]\w*(\.[A-Z]\w*)+", text))
    first = next(pairs, len(given))
    return list(given[:first]), list(given[first:])


def setup(cfg: CfgNode, args: argparse.Namespace, given: Any = None) -> None:
    """Detectron2's ``default_setup``, this project's log beside its, and the data by path.

    Args:
        cfg: its OUTPUT_DIR may be None, for no files.
        given: the LazyConfig whose keys ``cfg`` has in YAML's words, if it is one's.
    """
    default_setup(cfg if given is None else given, args)
    log = logging.getLogger("randwire_d2")
    bare = comm.get_world_size() > 1 and not log.handlers  # launch has started this process
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name=log.name, configure_stdout=bare)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    elif cfg.MODEL.DEVICE.startswith("cuda:"):
        # torch seeds, measures the memory of, and pins memory for the current GPU: 0 by default.
        torch.cuda.set_device(cfg.MODEL.DEVICE)
    register_data(cfg)  # launch may have started this process, whose catalog is its own
    check_same_data(cfg)


def train_or_evaluate(
    cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer] = Trainer
) -> Any:
    """What each process of a training tool does, with ``--resume`` and ``--eval-only``.

    SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end it, and leave a checkpoint (processes/signals.py).
    """
    # The lock is ahead of setup, which writes there.
    work = _evaluate if args.eval_only else locked(cfg.OUTPUT_DIR)(_train)
    workers = f"DATALOADER.NUM_WORKERS {cfg.DATALOADER.NUM_WORKERS}"
    return explained(workers, work, cfg, args, trainer_class)


def _train(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer]) -> Any:
    config = setup_training(cfg, args)
    return train_to_the_end(partial(trainer_class, cfg), args.resume, config)


def setup_training(cfg: CfgNode, args: argparse.Namespace, given: Any = None) -> Contents:
    """``setup`` of a training, whose OUTPUT_DIR is locked and may hold an earlier one; the
    ``resumed_config``."""
    earlier = set_earlier_aside(cfg.OUTPUT_DIR, args.resume, cfg.MODEL.WEIGHTS)
    config = resumed_config(cfg.OUTPUT_DIR, args.resume)
    setup(cfg, args, given)
    if earlier:
        logger.warning(earlier)
    log_data(cfg)
    return config


def train_to_the_end(make: Callable[[], Trainer], resume: bool, config: Contents) -> Any:
    """Train with what ``make`` returns, or end as the signal that has ended the training.

    Args:
        config: what ``setup_training`` returned.
    """
    with config_kept(config):
        trainer = make()
        trainer.resume_or_load(resume=resume)
    try:
        return trainer.train()
    except Interrupted as e:
        number = e.number
    del trainer  # and the workers that read its images
    return end_training(number)


def _evaluate(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer]) -> Any:
    # The first process decides: a training at work may write its next checkpoint any moment.
    cfg = comm.all_gather(evaluation_config(cfg, args.resume))[0]
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
    """Load MODEL.WEIGHTS as a training's own evaluations tested them: with SOLVER.EMA the
    average."""
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
    """Write the results.json of an evaluation into its folder."""
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
    """Call ``main`` in all processes of a training (``run_processes``), or submit it.

    Args:
        task: the command line, for ``--slurm``.
        main_args: what ``main`` is called with (default: cfg and args).

    Raises:
        ValueError: Slurm refuses.
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
    """Call ``main(*main_args)`` in ``--num-gpus`` processes on each of ``--num-machines`` machines,
    or in this one, if a launcher has started it and the others.

    On a CPU the processes share the cores that others leave free.

    Args:
        timeout: the seconds that an iteration may take before it is taken for one that hangs.

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
        # A process that sees GPUs must have one of its own, and gets NCCL.
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
    """A file of what this process has read of data, for the processes that it starts.

    Arguments reach them through a pipe of 64 KiB. With more, each would be started only once the
    one before has imported the tool and reads its own. Labels are not kept here, too: those of
    COCO's size take gigabytes for as long as the training lasts.
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
    """Call ``main(*args)``, watched, with what its parent process has read of data.

    Args:
        path: of that; None in the only process, where a group, if any, is the caller's to end.
        method: how the parent starts processes. One that was spawned would spawn its workers, too:
            each then imports PyTorch for itself, again in each evaluation.
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
