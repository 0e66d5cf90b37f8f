"""Training on Detectron2's engine: trainer, checks, launching, threads, and a run's report."""

from .config.checks import (
    check_device,
    check_model,
    check_output,
    data_config,
    load_config,
    read_config,
)
from .config.continuation import check_continuation
from .config.datasets import look_at_data, register_data
from .config.metric import check_best_metric
from .config.schedule import check_solver, scale_schedule
from .launch import argument_parser, run_distributed, setup, split_pairs, train_or_evaluate
from .processes.threads import share_cores
from .trainer import Trainer
from .validation import mean_losses

__all__ = [
    "Trainer",
    "argument_parser",
    "check_best_metric",
    "check_continuation",
    "check_device",
    "check_model",
    "check_output",
    "check_solver",
    "data_config",
    "load_config",
    "look_at_data",
    "mean_losses",
    "read_config",
    "register_data",
    "run_distributed",
    "scale_schedule",
    "setup",
    "share_cores",
    "split_pairs",
    "train_or_evaluate",
]
