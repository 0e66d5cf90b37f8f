"""A detector that is described as a LazyConfig's calls are, in JSON: names of parts and arguments.

A LazyConfig is Python, and whatever it names is called. Here that is what stands in
``LAZY_PART_REGISTRY``, and nothing is imported: a stranger's checkpoint may hold such a text.
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
What a detector in a checkpoint of a LazyConfig may be made of: it builds modules and does nothing
else, with any arguments. A project's own parts join with a decorator.
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
    """What MODEL.LAZY says of the ``model`` of a LazyConfig, all but the RandWire's spec.

    Raises:
        ValueError: it has a part that is not registered, or an argument that JSON has not; one
            line that names it.
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
    """The detector that MODEL.LAZY describes, on the RandWire that MODEL.RANDWIRE does.

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
