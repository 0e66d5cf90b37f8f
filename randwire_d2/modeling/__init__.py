"""Networks built from specs. Importing this registers them in Detectron2."""

from .backbone import (
    RandWire,
    build_randwire_backbone,
    build_randwire_fpn_backbone,
    build_randwire_retinanet_fpn_backbone,
)
from .classifier import RandWireClassifier
from .fused_stage import RandWireStage
from .image_classifier import ImageClassifier
from .lazy_detector import LAZY_PART_REGISTRY, LazyDetector, describe_lazily
from .node import NODE_OP_REGISTRY, Node

__all__ = [
    "LAZY_PART_REGISTRY",
    "NODE_OP_REGISTRY",
    "ImageClassifier",
    "LazyDetector",
    "Node",
    "RandWire",
    "RandWireClassifier",
    "RandWireStage",
    "build_randwire_backbone",
    "build_randwire_fpn_backbone",
    "build_randwire_retinanet_fpn_backbone",
    "describe_lazily",
]
