"""A LazyConfig's detector as JSON: the names of its parts (classes), and their arguments.

A LazyConfig is Python, and calls whatever it names. This JSON may come from a stranger's
checkpoint, so only parts in ``LAZY_PART_REGISTRY`` are called, and nothing is imported.
"""

import json
from dataclasses import is_dataclass
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    FCOS,
    FPN,
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
    StandardROIHeads,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from detectron2.utils.registry import Registry, locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import spec_from_config
from ..text import brief, no_python, parse_json, prefixed
from .backbone import RandWire

LAZY_PART_REGISTRY = Registry("LAZY_PART")
LAZY_PART_REGISTRY.__doc__ = """
The parts that a detector in a checkpoint of a LazyConfig may have. With any arguments, a part must
only build modules. ``@LAZY_PART_REGISTRY.register()`` adds your own.
"""
# Those of Detectron2's common/models, on this project's backbone.
for _part in (
    Box2BoxTransform, CascadeROIHeads, DefaultAnchorGenerator, FastRCNNConvFCHead,
    FastRCNNOutputLayers, FCOS, FCOSHead, FPN, GeneralizedRCNN, KRCNNConvDeconvUpsampleHead,
    LastLevelMaxPool, LastLevelP6P7, MaskRCNNConvUpsampleHead, Matcher, RandWire, RetinaNet,
    RetinaNetHead, ROIPooler, RPN, ShapeSpec, StandardROIHeads, StandardRPNHead,
):  # fmt: skip
    LAZY_PART_REGISTRY.register(_part)


def describe_lazily(model: DictConfig) -> str:
    """The JSON for MODEL.LAZY of a LazyConfig's ``model``, without the RandWire's spec.

    Raises:
        ValueError: a part is not registered, or an argument can't be written as JSON; one line that
            names it.
    """
    return no_python(json.dumps(_described(model, "model")))


def _described(node: Any, where: str) -> Any:
    if isinstance(node, DictConfig):
        kind = OmegaConf.get_type(node)
        target = kind if is_dataclass(kind) else node.get("_target_")
        left_out = ["_target_"]
        found = {} if target is None else {"_target_": _part_name(target, where)}
        if found.get("_target_") == RandWire.__name__:
            left_out.append("spec")  # it is in MODEL.RANDWIRE
        keys = [str(key) for key in node if key not in left_out]
        return found | {key: _described(node[key], f"{where}.{key}") for key in keys}
    if isinstance(node, ListConfig | list | tuple):
        return [_described(item, f"{where}.{i}") for i, item in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise ValueError(f"{where} is a {type(node).__name__}, which no file without code can hold")


def _part_name(target: Any, where: str) -> str:
    part: Any = locate(target) if isinstance(target, str) else target
    name = getattr(part, "__name__", type(part).__name__)
    if name not in LAZY_PART_REGISTRY or LAZY_PART_REGISTRY.get(name) is not part:
        raise ValueError(f"{where} calls {brief(name)}, which is not in LAZY_PART_REGISTRY")
    return str(name)


@META_ARCH_REGISTRY.register()
def LazyDetector(cfg: CfgNode) -> nn.Module:
    """The detector that MODEL.LAZY describes, with the RandWire that MODEL.RANDWIRE describes.

    Raises:
        KeyError: it names a part that is not registered.
        ValueError: it describes no detector.
    """
    with prefixed("MODEL.LAZY is no JSON"):
        described = parse_json(cfg.MODEL.LAZY)
    model = instantiate(_with_parts(described, cfg))
    if not isinstance(model, GeneralizedRCNN | DenseDetector):
        raise ValueError(f"MODEL.LAZY describes a {type(model).__name__}, which is no detector")
    return model


def _with_parts(node: Any, cfg: CfgNode) -> Any:
    """A description with classes in place of their names, for Detectron2's ``instantiate``."""
    if isinstance(node, list):
        return [_with_parts(item, cfg) for item in node]
    if not isinstance(node, dict):
        return node
    values = {key: _with_parts(value, cfg) for key, value in node.items()}
    if "_target_" in node:  # a text would be imported
        values["_target_"] = LAZY_PART_REGISTRY.get(str(node["_target_"]))
        if values["_target_"] is RandWire:
            values["spec"] = spec_from_config(cfg)
    return values
