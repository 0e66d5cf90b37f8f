"""The recipe of a classifier: a command line's config, checked."""

import argparse

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..config import classifier_config
from ..data.image_folder import check_image_folders, register_folders
from ..engine import (
    check_best_metric,
    check_device,
    check_model,
    check_solver,
    read_config,
    scale_schedule,
)
from ..modeling import build_network
from .compiling import check_compiler


def load_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line, checked, with the schedule in iterations.

    Raises:
        ValueError: for whatever would make the run fail later, as ``engine.load_config``.
    """
    cfg = read_config(args, classifier_config())
    _check_values(cfg)
    check_solver(cfg)
    check_device(cfg, args)
    train = () if args.eval_only else cfg.DATASETS.TRAIN
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN), ("TEST", cfg.DATASETS.TEST)):
        if not names and not (args.eval_only and key == "TRAIN"):
            raise ValueError(f"DATASETS.{key} is empty")
    register_folders((*train, *cfg.DATASETS.TEST))
    classes = check_image_folders(train, cfg.DATASETS.TEST)
    if len(classes) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        raise ValueError(
            f"MODEL.CLASSIFIER.NUM_CLASSES is {cfg.MODEL.CLASSIFIER.NUM_CLASSES}, but "
            f"{(*train, *cfg.DATASETS.TEST)[0]!r} has {len(classes)} classes"
        )
    if not args.eval_only:
        check_best_metric(cfg)
        cfg = scale_schedule(cfg, sum(len(DatasetCatalog.get(name)) for name in train))
    check_model(cfg, args)
    if cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
        _check_torchvision(cfg)
    if cfg.SOLVER.COMPILE and not args.eval_only:
        check_compiler(cfg)
    cfg.freeze()
    return cfg


def _check_values(cfg: CfgNode) -> None:
    def require(key: str, holds: bool, wanted: str) -> None:
        node = cfg
        for part in key.split("."):
            node = node[part]
        if not holds:
            raise ValueError(f"{key} must be {wanted}; got {node!r}")

    require("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE == "ImageClassifier",
            "'ImageClassifier', as in configs/imagenet; detectors are train_net.py's")  # fmt: skip
    families = ("build_randwire_backbone", "build_resnet_backbone")
    name = cfg.MODEL.BACKBONE.NAME
    torchvisions = bool(cfg.MODEL.CLASSIFIER.TORCHVISION.NAME)
    if not torchvisions:
        require("MODEL.BACKBONE.NAME", name in families, f"one of {', '.join(families)}")
    require("INPUT.FORMAT", cfg.INPUT.FORMAT in ("RGB", "BGR"), "'RGB' or 'BGR'")
    flip = cfg.INPUT.RANDOM_FLIP
    require("INPUT.RANDOM_FLIP", flip in ("horizontal", "none"), "'horizontal' or 'none'")
    area = cfg.INPUT.TRAIN_CROP_AREA
    is_range = len(area) == 2 and 0 < area[0] <= area[1] <= 1
    require("INPUT.TRAIN_CROP_AREA", is_range, "[low, high] within 0 … 1")
    for key in ("TRAIN_CROP_SIZE", "TEST_CROP_SIZE"):
        require(f"INPUT.{key}", cfg.INPUT[key] >= 1, "at least 1")
    require("INPUT.TEST_CROP_RATIO", 0 < cfg.INPUT.TEST_CROP_RATIO <= 1, "within 0 … 1")
    require("INPUT.PCA_LIGHTING", cfg.INPUT.PCA_LIGHTING >= 0, "at least 0")
    operations, magnitude = cfg.INPUT.RAND_AUGMENT.NUM_OPS, cfg.INPUT.RAND_AUGMENT.MAGNITUDE
    require("INPUT.RAND_AUGMENT.NUM_OPS", operations >= 0, "at least 0")
    require("INPUT.RAND_AUGMENT.MAGNITUDE", 0 <= magnitude <= 30, "within 0 … 30")
    for key in ("MIXUP_ALPHA", "CUTMIX_ALPHA"):
        require(f"INPUT.{key}", cfg.INPUT[key] >= 0, "at least 0")
    smoothing, dropout = cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING, cfg.MODEL.CLASSIFIER.DROPOUT
    require("MODEL.CLASSIFIER.LABEL_SMOOTHING", 0 <= smoothing < 1, "within 0 … 1")
    require("MODEL.CLASSIFIER.DROPOUT", 0 <= dropout < 1, "within 0 … 1")
    if torchvisions or name == "build_resnet_backbone":
        why = (
            "torchvision's is in MODEL.CLASSIFIER.TORCHVISION.OPTIONS"
            if torchvisions
            else "Detectron2's ResNet has none"
        )
        require("MODEL.CLASSIFIER.DROPOUT", dropout == 0, f"0: {why}")
        head_relu = cfg.MODEL.CLASSIFIER.HEAD_RELU
        require("MODEL.CLASSIFIER.HEAD_RELU", not head_relu, "False: it is RandWire's layer")
    require("SOLVER.WARMUP_EPOCHS", cfg.SOLVER.WARMUP_EPOCHS >= 0, "at least 0")
    require("TEST.IMS_PER_PROCESS", cfg.TEST.IMS_PER_PROCESS >= 1, "at least 1")
    require("TEST.AUG.ENABLED", not cfg.TEST.AUG.ENABLED, "False: it is for detectors")


def _check_torchvision(cfg: CfgNode) -> None:
    node, number = cfg.MODEL.CLASSIFIER.TORCHVISION, cfg.MODEL.CLASSIFIER.NUM_CLASSES
    sizes = {True: cfg.INPUT.TRAIN_CROP_SIZE, False: cfg.INPUT.TEST_CROP_SIZE}
    with torch.device("meta"):  # without memory or time
        network = build_network(cfg)
        for training, size in sizes.items():
            images = torch.zeros(2, 3, size, size)
            try:
                logits = network.train(training)(images)
            # Whatever its forward may raise for images of a size that it was not built for.
            except Exception as e:
                raise ValueError(
                    f"torchvision's {node.NAME} can't take images of {size}×{size} pixels: "
                    f"{' '.join(str(e).split())}; change INPUT.TRAIN_CROP_SIZE and TEST_CROP_SIZE, "
                    "or MODEL.CLASSIFIER.TORCHVISION.OPTIONS"
                ) from e
            if getattr(logits, "shape", None) != (2, number):
                raise ValueError(
                    f"torchvision's {node.NAME} has more outputs than logits, in training at "
                    "least; leave them out with MODEL.CLASSIFIER.TORCHVISION.OPTIONS "
                    "\"['aux_logits', False]\""
                )
