"""Training on Detectron2's engine: trainer, checks, launching, threads, and a run's report."""

from .checks import check_device, check_model, data_config, load_config, read_config
from .datasets import look_at_data, register_data
from .launch import argument_parser, run_distributed, setup, split_pairs, train_or_evaluate
from .threads import share_cores
from .trainer import Trainer

__all__ = [
    "Trainer",
    "argument_parser",
    "check_device",
    "check_model",
    "data_config",
    "load_config",
    "look_at_data",
    "read_config",
    "register_data",
    "run_distributed",
    "setup",
    "share_cores",
    "split_pairs",
    "train_or_evaluate",
]
