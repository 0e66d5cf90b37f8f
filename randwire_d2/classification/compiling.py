"""SOLVER.COMPILE: training a classifier with torch.compile."""

import importlib.util

import torch
from detectron2.config import CfgNode
from torch import nn

from ..modeling import ImageClassifier, RandWireStage
from ..text import one_line


def compile_network(model: ImageClassifier, backend: str = "inductor") -> None:
    """Make a classifier's network compile at its first call; in place.

    In a RandWire each stage is compiled separately. Dropped edges and dropout are drawn outside, as
    without a compiler; dropped edges are input data, so they cause no recompilation. State dicts
    and copies of the model do not change.

    Args:
        model: the classifier.
        backend: the backend of torch.compile.
    """
    stages = [m for m in model.network.modules() if isinstance(m, RandWireStage)]
    for stage in stages:
        stage.fused = "off"  # the compiler can't look into the fused operators
        stage.plain_because = "SOLVER.COMPILE is on"  # where it is compiled, it does not say so
    modules: list[nn.Module] = [*stages] or [model.network]
    for module in modules:
        # All stages share their code: with dynamic shapes, the second stage's channels would be
        # taken for a size that varies.
        module.compile(dynamic=False, backend=backend)


def check_compiler(cfg: CfgNode) -> None:
    """Raise a ValueError of one line if SOLVER.COMPILE can't work: compiles something small."""
    if cfg.MODEL.RANDWIRE.FUSED == "on":
        raise ValueError(
            "SOLVER.COMPILE compiles nodes that run one by one, but MODEL.RANDWIRE.FUSED is on; "
            "set it to auto, or SOLVER.COMPILE False"
        )
    try:
        if cfg.MODEL.DEVICE.startswith("cuda") and importlib.util.find_spec("triton") is None:
            raise RuntimeError("there is no triton")
        # On the CPU, whose compiler a GPU's code needs as well: no process may have touched a GPU
        # before it starts those that train.
        torch.compile(torch.sin, options={"fx_graph_cache": False})(torch.ones(2))
    # Whatever the compiler, which may be missing or old, makes of it.
    except Exception as e:
        raise ValueError(
            f"SOLVER.COMPILE: torch.compile does not work here: {one_line(e, 200)}; "
            "install a C++ compiler (the environment variable CXX names one), or set "
            "SOLVER.COMPILE False"
        ) from e
