"""The recipe of a classifier: its schedule in iterations, and a command line's config, checked."""

import argparse

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer

from ..config import classifier_config
from ..data.image_folder import check_image_folders, register_folders
from ..engine import check_best_metric, check_device, check_model, read_config


def scale_schedule(cfg: CfgNode, num_images: int) -> CfgNode:
    """The config with its schedule in iterations of IMS_PER_BATCH images, and EPOCHS 0.

    Args:
        cfg: one with ``SOLVER.EPOCHS`` and the other keys for ``SOLVER.REFERENCE_BATCH_SIZE``.
        num_images: the images in an epoch.

    Raises:
        ValueError: the warm-up that a larger batch needs is not shorter than the training.
    """
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE
    images = cfg.SOLVER.EPOCHS * num_images
    if not images:
        return cfg
    scaled = cfg.clone()
    scaled.defrost()
    solver = scaled.SOLVER
    if batch > reference and not solver.WARMUP_ITERS:
        _warm_up(solver, num_images)
    # Detectron2's linear scaling is by the number of GPUs: here, of one image each.
    solver.REFERENCE_WORLD_SIZE = solver.IMS_PER_BATCH = reference
    solver.MAX_ITER = images // reference
    scaled.freeze()
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    scaled.defrost()
    scaled.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    scaled.SOLVER.REFERENCE_BATCH_SIZE = batch
    scaled.SOLVER.MAX_ITER = -(-images // batch)
    scaled.SOLVER.EPOCHS = 0
    return scaled


def _warm_up(solver: CfgNode, num_images: int) -> None:
    """Goyal et al. (2017, §2.2): from the reference's rate to that of the batch, iteration by
    iteration, in a few epochs."""
    epochs = solver.WARMUP_EPOCHS
    if epochs >= solver.EPOCHS:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is larger than REFERENCE_BATCH_SIZE "
            f"{solver.REFERENCE_BATCH_SIZE}, so its rate needs a warm-up, but SOLVER.WARMUP_EPOCHS "
            f"{epochs} is not less than EPOCHS {solver.EPOCHS}; set a smaller one, or 0 for none"
        )
    solver.WARMUP_ITERS = round(epochs * num_images / solver.REFERENCE_BATCH_SIZE)
    solver.WARMUP_FACTOR = solver.REFERENCE_BATCH_SIZE / solver.IMS_PER_BATCH
    solver.WARMUP_METHOD = "linear"


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
    register_folders((*train, *cfg.DATASETS.TEST))
    classes = check_image_folders(train, cfg.DATASETS.TEST)
    if len(classes) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        raise ValueError(
            f"MODEL.CLASSIFIER.NUM_CLASSES is {cfg.MODEL.CLASSIFIER.NUM_CLASSES}, but "
            f"{(*train, *cfg.DATASETS.TEST)[0]!r} has {len(classes)} classes"
        )
    if not args.eval_only:
        check_best_metric(cfg)
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
    require("INPUT.PCA_LIGHTING", cfg.INPUT.PCA_LIGHTING >= 0, "at least 0")
    smoothing, dropout = cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING, cfg.MODEL.CLASSIFIER.DROPOUT
    require("MODEL.CLASSIFIER.LABEL_SMOOTHING", 0 <= smoothing < 1, "within 0 … 1")
    require("MODEL.CLASSIFIER.DROPOUT", 0 <= dropout < 1, "within 0 … 1")
    if name == "build_resnet_backbone":
        require("MODEL.CLASSIFIER.DROPOUT", dropout == 0, "0: Detectron2's ResNet has none")
        head_relu = cfg.MODEL.CLASSIFIER.HEAD_RELU
        require("MODEL.CLASSIFIER.HEAD_RELU", not head_relu, "False: a ResNet has no such layer")
    require("SOLVER.EPOCHS", cfg.SOLVER.EPOCHS >= 0, "at least 0")
    require("SOLVER.WARMUP_EPOCHS", cfg.SOLVER.WARMUP_EPOCHS >= 0, "at least 0")
    require("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH >= 1, "at least 1")
    require("SOLVER.REFERENCE_BATCH_SIZE", cfg.SOLVER.REFERENCE_BATCH_SIZE >= 1, "at least 1")
    require("TEST.IMS_PER_PROCESS", cfg.TEST.IMS_PER_PROCESS >= 1, "at least 1")
    require("TEST.AUG.ENABLED", not cfg.TEST.AUG.ENABLED, "False: it is for detectors")
