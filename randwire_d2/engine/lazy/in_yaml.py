"""Translate a LazyConfig to YAML's keys, for code that both kinds of trainings share, and for tools
that read a finished run."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...checkpoint import find_preprocessing
from ...config import detector_config, flat, forget_other_generators, set_spec
from ...data.formats.layouts import absolute
from ...data.images.patience import PatientMapper
from ...modeling import LazyDetector, RandWire, describe_lazily

# A LazyConfig's detector finds keypoints only if KEYPOINTS is set; _FLIPS has the images' flips.
KEYPOINTS = "model.roi_heads.keypoint_in_features"
_FLIPS = "dataloader.train.mapper.augmentations"

# LazyConfig's key -> YAML's key.
_KEYS = {
    "dataloader.train.mapper.instance_mask_format": "INPUT.MASK_FORMAT",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.amp.precision": "SOLVER.AMP.PRECISION",
    "train.best_metric": "SOLVER.BEST_METRIC",
    "train.checkpointer.max_to_keep": "SOLVER.CHECKPOINTS_TO_KEEP",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    "train.data": "DATASETS.PATH",
    "train.data_val": "DATASETS.PATH_VAL",
    "train.device": "MODEL.DEVICE",
    "train.ema.decay": "SOLVER.EMA.DECAY",
    "train.eval_loss": "TEST.LOSS",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.hang_timeout": "SOLVER.HANG_TIMEOUT",
    "train.hold_back": "DATASETS.HOLD_BACK",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.output_dir": "OUTPUT_DIR",
    "train.patience": "SOLVER.PATIENCE",
    "train.precise_bn.enabled": "TEST.PRECISE_BN.ENABLED",
    "train.precise_bn.num_iter": "TEST.PRECISE_BN.NUM_ITER",
    "train.seed": "SEED",
    "train.shadow_period": "SOLVER.SHADOW_PERIOD",
    "train.skip_nonfinite": "SOLVER.SKIP_NONFINITE",
}


def yaml_config(cfg: DictConfig) -> CfgNode:
    """Translate a LazyConfig's schedule, evaluations, checkpoints, folder and data sets, but not
    its detector, learning rate or augmentation. No value is checked."""
    own = detector_config()
    forget_other_generators(own)
    for lazy, key in _KEYS.items():
        if (value := OmegaConf.select(cfg, lazy)) is not None:
            *nodes, name = key.split(".")
            reduce(getitem, nodes, own)[name] = value
    node = own.DATASETS
    node.PATH, node.PATH_VAL = absolute(node.PATH), absolute(node.PATH_VAL)
    node.TRAIN = tuple(datasets_of(cfg, "train"))
    tests = datasets_of(cfg, "test")  # one evaluator can't give metrics for several sets
    node.TEST = tuple(tests) if len(tests) == 1 else ()
    own.MODEL.KEYPOINT_ON = OmegaConf.select(cfg, KEYPOINTS) is not None
    flips = [target_of(call) is RandomFlip for call in OmegaConf.select(cfg, _FLIPS) or ()]
    own.INPUT.RANDOM_FLIP = "horizontal" if any(flips) else "none"
    return own


def check_types(cfg: DictConfig) -> None:
    """
    Raises:
        ValueError: a value has another type than its key in YAML; one line.
    """
    defaults = dict(flat(detector_config()))
    for lazy, key in _KEYS.items():
        value, kind = OmegaConf.select(cfg, lazy), type(defaults[key])
        allowed = (float, int) if kind is float else (kind,)
        if value is not None and type(value) not in allowed:
            raise ValueError(f"{lazy} must be of type {kind.__name__}; got {value!r}")


def datasets_of(cfg: DictConfig, split: str) -> list[str]:
    """The names of the data sets of a LazyConfig's ``dataloader.train`` or ``dataloader.test``."""
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=())
    if not isinstance(names, Sequence) or names == []:
        raise ValueError(f"dataloader.{split}.dataset.names must name data sets; got {names!r}")
    return [names] if isinstance(names, str) else list(names)


def target_of(call: Any) -> Any:
    """The target of a LazyCall; None for anything else."""
    target = call.get("_target_") if isinstance(call, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def finds_coco_metrics(cfg: DictConfig) -> bool:
    """Whether a LazyConfig's evaluator is Detectron2's COCOEvaluator."""
    return target_of(OmegaConf.select(cfg, "dataloader.evaluator")) is COCOEvaluator


def mask_key(cfg: DictConfig) -> str:
    """The key without which a LazyConfig's detector finds no masks."""
    heads = OmegaConf.select(cfg, "model.roi_heads")
    keys = heads.keys() if isinstance(heads, DictConfig) else ()
    is_c4 = "mask_head" in keys and "mask_in_features" not in keys  # Res5ROIHeads
    return f"model.roi_heads.{'mask_head' if is_c4 else 'mask_in_features'}"


@contextmanager
def in_lazy_words(masks: str = "") -> Iterator[None]:
    """Replace YAML's keys by the LazyConfig's in ValueErrors of the block.

    Args:
        masks: the ``mask_key``, if errors may name it.
    """
    try:
        yield
    except ValueError as e:
        said = str(e)
        said = said.replace("MODEL.MASK_ON False", f"{masks}=null")
        said = said.replace("MODEL.KEYPOINT_ON False", f"{KEYPOINTS}=null")
        said = said.replace("set INPUT.RANDOM_FLIP none", f"take RandomFlip out of {_FLIPS}")
        for lazy, key in _KEYS.items():
            said = re.sub(rf"\b(add|set|with) {re.escape(key)} ", rf"\1 {lazy}=", said)
            said = re.sub(rf"(?<![\w.]){re.escape(key)}\b", lazy, said)
        raise ValueError(said) from e


def add_tasks(own: CfgNode, model: nn.Module) -> None:
    """Set MASK_ON and KEYPOINT_ON of a config to the tasks of a detector."""
    heads = getattr(model, "roi_heads", None)
    own.MODEL.MASK_ON = bool(getattr(heads, "mask_on", False))
    own.MODEL.KEYPOINT_ON = bool(getattr(heads, "keypoint_on", False))


def add_detector(own: CfgNode, cfg: DictConfig, model: nn.Module) -> CfgNode:
    """Add a LazyConfig's detector and the preprocessing of its tests to a copy of a config, from
    which, with a checkpoint's weights, the model can be built.

    Args:
        own: the return value of ``yaml_config``.
        model: the model that the LazyConfig builds.

    Raises:
        ValueError: YAML's keys can't express the model or its preprocessing; one line.
    """
    if not isinstance(model, GeneralizedRCNN | DenseDetector):
        raise ValueError(f"model is a {type(model).__name__}, which is no detector of Detectron2's")
    described = own.clone()
    described.MODEL.META_ARCHITECTURE = LazyDetector.__name__
    described.MODEL.LAZY = describe_lazily(cfg.model)
    backbones = [m for m in model.modules() if isinstance(m, RandWire)]
    if len(backbones) != 1:
        raise ValueError(f"model has {len(backbones)} RandWires, not one")
    options = backbones[0].options()
    described.MODEL.BACKBONE.NAME = "build_randwire_backbone"
    described.MODEL.BACKBONE.FREEZE_AT = options.pop("freeze_at")
    del options["in_channels"]  # it is in MODEL.LAZY, and YAML has no key for it
    described.MODEL.RANDWIRE.update({key.upper(): value for key, value in options.items()})
    set_spec(described, backbones[0].spec)
    add_tasks(described, model)
    number = getattr(model, "roi_heads", model).num_classes
    described.MODEL.ROI_HEADS.NUM_CLASSES = described.MODEL.RETINANET.NUM_CLASSES = number
    predictors = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
    most = predictors[-1].test_topk_per_image if predictors else model.max_detections_per_image
    described.TEST.DETECTIONS_PER_IMAGE = most
    if not hasattr(model, "input_format"):  # Detectron2's FCOS
        model.input_format = OmegaConf.select(cfg, "dataloader.test.mapper.image_format")
    preprocessing = find_preprocessing(model)
    assert preprocessing is not None
    described.merge_from_list(preprocessing.options)
    _add_test_images(described, OmegaConf.select(cfg, "dataloader.test.mapper"))
    return described


def _add_test_images(described: CfgNode, mapper: Any) -> None:
    if target_of(mapper) not in (DatasetMapper, PatientMapper):
        raise ValueError("dataloader.test.mapper is not Detectron2's DatasetMapper")
    resizes = list(mapper.augmentations)
    if len(resizes) != 1 or target_of(resizes[0]) is not ResizeShortestEdge:
        raise ValueError("dataloader.test.mapper.augmentations is not one ResizeShortestEdge")
    others = set(map(str, resizes[0])) - {"_target_", "short_edge_length", "max_size"}
    size = resizes[0].short_edge_length
    if others or not isinstance(size, int):
        raise ValueError(
            "dataloader.test.mapper.augmentations.0 is not of one short_edge_length, and max_size"
        )
    node = described.INPUT
    node.FORMAT, node.MIN_SIZE_TEST = str(mapper.image_format), size
    node.MAX_SIZE_TEST = resizes[0].get("max_size", sys.maxsize)
