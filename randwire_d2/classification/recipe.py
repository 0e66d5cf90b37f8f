"""The recipe of a classifier: its schedule in iterations, and a command line's config, checked."""

import argparse

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer

from ..config import classifier_config
from ..data.image_folder import check_image_folders
from ..engine import check_device, check_model, read_config


def scale_schedule(cfg: CfgNode, num_images: int) -> CfgNode:
    """The config with its schedule in iterations of IMS_PER_BATCH images, and EPOCHS 0.

    Args:
        cfg: one with ``SOLVER.EPOCHS`` and the other keys for ``SOLVER.REFERENCE_BATCH_SIZE``.
        num_images: the images in an epoch.
    """
    batch, epochs = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.EPOCHS
    if not epochs:
        return cfg
    reference = cfg.SOLVER.REFERENCE_BATCH_SIZE
    scaled = cfg.clone()
    scaled.defrost()
    # Detectron2's linear scaling is by the number of GPUs: here, of one image each.
    scaled.SOLVER.REFERENCE_WORLD_SIZE = scaled.SOLVER.IMS_PER_BATCH = reference
    scaled.freeze()
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    scaled.defrost()
    scaled.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    scaled.SOLVER.REFERENCE_BATCH_SIZE = batch
    scaled.SOLVER.MAX_ITER = -(-epochs * num_images // batch)
    scaled.SOLVER.EPOCHS = 0
    return scaled


def load_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line, checked, with the schedule in iterations.

    Raises:
        ValueError: for whatever would make the run fail later, as ``engine.load_config``.
    """
    cfg = read_config(args, classifier_config())
    _check_values(cfg)
    check_device(cfg, args)
    train = () if args.eval_only else cfg.DATASETS.TRAIN
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN), ("TEST", cfg.DATASETS.TEST)):
        if not names and not (args.eval_only and key == "TRAIN"):
            raise ValueError(f"DATASETS.{key} is empty")
    classes = check_image_folders(train, cfg.DATASETS.TEST)
    if len(classes) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        raise ValueError(
            f"MODEL.CLASSIFIER.NUM_CLASSES is {cfg.MODEL.CLASSIFIER.NUM_CLASSES}, but "
            f"{(*train, *cfg.DATASETS.TEST)[0]!r} has {len(classes)} classes"
        )
    if not args.eval_only and cfg.SOLVER.EPOCHS:
        cfg = scale_schedule(cfg, sum(len(DatasetCatalog.get(name)) for name in train))
    check_model(cfg, args)
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
    smoothing, dropout = cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING, cfg.MODEL.CLASSIFIER.DROPOUT
    require("MODEL.CLASSIFIER.LABEL_SMOOTHING", 0 <= smoothing < 1, "within 0 … 1")
    require("MODEL.CLASSIFIER.DROPOUT", 0 <= dropout < 1, "within 0 … 1")
    if name == "build_resnet_backbone":
        require("MODEL.CLASSIFIER.DROPOUT", dropout == 0, "0: Detectron2's ResNet has none")
        head_relu = cfg.MODEL.CLASSIFIER.HEAD_RELU
        require("MODEL.CLASSIFIER.HEAD_RELU", not head_relu, "False: a ResNet has no such layer")
    require("SOLVER.EPOCHS", cfg.SOLVER.EPOCHS >= 0, "at least 0")
    require("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH >= 1, "at least 1")
    require("SOLVER.REFERENCE_BATCH_SIZE", cfg.SOLVER.REFERENCE_BATCH_SIZE >= 1, "at least 1")
    require("TEST.IMS_PER_PROCESS", cfg.TEST.IMS_PER_PROCESS >= 1, "at least 1")
    require("TEST.AUG.ENABLED", not cfg.TEST.AUG.ENABLED, "False: it is for detectors")
