"""Build and check the config of a classifier's command line."""

import argparse
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config import classifier_config
from ..data.classification.image_folder import check_image_folders, register_folders
from ..data.classification.listing import count_listed, list_anew, take_listings
from ..engine import (
    check_best_metric,
    check_continuation,
    check_device,
    check_model,
    check_output,
    check_solver,
    read_config,
    scale_schedule,
)
from ..engine.config.checks import check_processes
from ..engine.config.limits import LIMITS as ENGINE_LIMITS
from ..engine.config.limits import Limit, at_least, check_limits, one_of, within
from ..engine.config.schedule import scale_to_processes
from ..engine.processes.torchrun import made_once
from ..text import one_line
from .compiling import check_compiler

_IS_RANGE = Limit(
    lambda area: len(area) == 2 and 0 < area[0] <= area[1] <= 1, "[low, high] within 0 … 1"
)
_OF_RGB = Limit(
    lambda values: len(values) == 3, "three values: a classifier's images have 3 channels"
)
LIMITS = {
    **ENGINE_LIMITS,
    "DATASETS.HOLD_BACK": Limit(
        lambda share: share == 0, "0: it is for detectors; name a folder in DATASETS.TEST"
    ),
    "INPUT.CUTMIX_ALPHA": at_least(0),
    "INPUT.FORMAT": one_of("RGB", "BGR"),
    "INPUT.MIXUP_ALPHA": at_least(0),
    "INPUT.PCA_LIGHTING": at_least(0),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "none"),
    "INPUT.RAND_AUGMENT.MAGNITUDE": within(0, 30),
    "INPUT.RAND_AUGMENT.NUM_OPS": at_least(0),
    "INPUT.TEST_CROP_RATIO": Limit(lambda ratio: 0 < ratio <= 1, "within 0 … 1, and above 0"),
    "INPUT.TEST_CROP_SIZE": at_least(1),
    "INPUT.TRAIN_CROP_AREA": _IS_RANGE,
    "INPUT.TRAIN_CROP_SIZE": at_least(1),
    "MODEL.CLASSIFIER.DROPOUT": within(0, 1, open_end=True),
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": within(0, 1, open_end=True),
    "MODEL.META_ARCHITECTURE": Limit(
        lambda name: name == "ImageClassifier",
        "'ImageClassifier', as in configs/imagenet; detectors are train_net.py's",
    ),
    "MODEL.PIXEL_MEAN": _OF_RGB,
    "MODEL.PIXEL_STD": _OF_RGB,
    "SOLVER.WARMUP_EPOCHS": at_least(0),
    "TEST.AUG.ENABLED": Limit(lambda enabled: not enabled, "False: it is for detectors"),
    "TEST.IMS_PER_PROCESS": at_least(1),
}
_RANDWIRES_RELU = Limit(lambda head_relu: not head_relu, "False: it is RandWire's layer")
BACKBONE_LIMITS = {
    "MODEL.BACKBONE.NAME": one_of("build_randwire_backbone", "build_resnet_backbone")
}
RESNET_LIMITS = {
    "MODEL.CLASSIFIER.DROPOUT": Limit(lambda p: p == 0, "0: Detectron2's ResNet has none"),
    "MODEL.CLASSIFIER.HEAD_RELU": _RANDWIRES_RELU,
}
TORCHVISION_LIMITS = {
    "MODEL.CLASSIFIER.DROPOUT": Limit(
        lambda p: p == 0, "0: torchvision's is in MODEL.CLASSIFIER.TORCHVISION.OPTIONS"
    ),
    "MODEL.CLASSIFIER.HEAD_RELU": _RANDWIRES_RELU,
}


def load_config(args: argparse.Namespace) -> CfgNode:
    """Build and check the frozen config of a command line, with the schedule in iterations.

    Raises:
        ValueError: something would make the run fail later; see ``engine.load_config``.
    """
    cfg = read_config(args, classifier_config())
    check_limits(cfg, LIMITS)
    if cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
        check_limits(cfg, TORCHVISION_LIMITS)
    else:
        check_limits(cfg, BACKBONE_LIMITS)
        if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
            check_limits(cfg, RESNET_LIMITS)
    check_solver(cfg)
    check_device(cfg, args)
    check_output("OUTPUT_DIR", cfg.OUTPUT_DIR, args, cfg.MODEL.WEIGHTS)
    check_continuation(cfg, args)
    train = () if args.eval_only else cfg.DATASETS.TRAIN
    for key in ("TEST",) if args.eval_only else ("TRAIN", "TEST"):
        if not cfg.DATASETS[key]:
            raise ValueError(f"DATASETS.{key} is empty")
    folders = (*train, *cfg.DATASETS.TEST)
    register_folders(folders)
    classes = made_once("classes", partial(check_image_folders, train, cfg.DATASETS.TEST))
    if len(classes) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        raise ValueError(
            f"MODEL.CLASSIFIER.NUM_CLASSES is {cfg.MODEL.CLASSIFIER.NUM_CLASSES}, but "
            f"{folders[0]!r} has {len(classes)} classes"
        )
    if not args.eval_only:
        check_best_metric(cfg)
    made_once("listings", partial(list_anew, folders), take_listings)
    if not args.eval_only:
        cfg = scale_schedule(cfg, sum(count_listed()[name] for name in train))
        cfg = scale_to_processes(cfg, check_processes(args)[0])
    model = check_model(cfg, args, classes)
    if cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
        _check_torchvision(cfg, model.network)
    if cfg.SOLVER.COMPILE and not args.eval_only:
        check_compiler(cfg)
    cfg.freeze()
    return cfg


def _check_torchvision(cfg: CfgNode, network: Any) -> None:
    node, number = cfg.MODEL.CLASSIFIER.TORCHVISION, cfg.MODEL.CLASSIFIER.NUM_CLASSES
    sizes = {True: cfg.INPUT.TRAIN_CROP_SIZE, False: cfg.INPUT.TEST_CROP_SIZE}
    with torch.device("meta"):  # as the network
        for training, size in sizes.items():
            images = torch.zeros(2, 3, size, size)
            try:
                logits = network.train(training)(images)
            # Whatever its forward may raise for images of a size that it was not built for.
            except Exception as e:
                raise ValueError(
                    f"torchvision's {node.NAME} can't take images of {size}×{size} pixels: "
                    f"{one_line(e, 300)}; change INPUT.TRAIN_CROP_SIZE and TEST_CROP_SIZE, "
                    "or MODEL.CLASSIFIER.TORCHVISION.OPTIONS"
                ) from e
            if getattr(logits, "shape", None) != (2, number):
                raise ValueError(
                    f"torchvision's {node.NAME} has more outputs than logits, at least in "
                    "training; leave out the others with MODEL.CLASSIFIER.TORCHVISION.OPTIONS "
                    "\"['aux_logits', False]\""
                )
