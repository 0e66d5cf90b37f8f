"""The valid values of config keys, which Detectron2 itself would only check during a run."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from torch import nn

from ...config import flat
from ...data.images.patience import INPUT_FORMATS
from .keypoints import check_named


class Limit(NamedTuple):
    """A condition on a value, and its description for a message, to follow "must be"."""

    is_true: Callable[[Any], bool]
    wanted: str

    def holds(self, value: Any) -> bool:
        try:
            return self.is_true(value)
        except TypeError:  # yacs does not check the types of a list's elements
            return False


def at_least(least: float) -> Limit:
    return Limit(lambda value: least <= value < math.inf, f"at least {least}")


def within(least: float, most: float, *, open_end: bool = False) -> Limit:
    return Limit(
        lambda value: least <= value <= most and not (open_end and value == most),
        f"within {least} … {most}" + (f", and less than {most}" if open_end else ""),
    )


def one_of(*values: str) -> Limit:
    return Limit(lambda value: value in values, f"one of {', '.join(values)}")


def each(limit: Limit) -> Limit:
    """A limit for each value of a list, which must have at least one."""
    return Limit(
        lambda values: len(values) > 0 and all(map(limit.holds, values)),
        f"a list in which each is {limit.wanted}",
    )


POSITIVE = Limit(lambda value: 0 < value < math.inf, "greater than 0, and finite")
_FINITE = Limit(math.isfinite, "finite")
_NONE_OR_0 = Limit(lambda value: value is None or 0 <= value < math.inf, "None, or at least 0")
_INCREASING = Limit(
    lambda steps: all(0 < a < b for a, b in zip(steps, [*steps[1:], math.inf])),
    "iterations above 0, in increasing order",
)

_LOSSES = one_of("smooth_l1", "giou", "diou", "ciou")
_RESULTS = Limit(
    lambda rows: all(len(row) == 4 and math.isfinite(row[2] + row[3]) for row in rows),
    "a list of [task, metric, value, tolerance]",
)

# The limits for trainings and evaluations.
LIMITS = {
    "SEED": Limit(lambda seed: seed < 2**32, "less than 2**32, which is numpy's limit"),
    "DATALOADER.NUM_WORKERS": at_least(0),
    "INPUT.FORMAT": one_of(*INPUT_FORMATS),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TEST": at_least(0),
    "INPUT.MAX_SIZE_TEST": at_least(1),
    "MODEL.FPN.OUT_CHANNELS": at_least(1),
    "MODEL.PIXEL_MEAN": each(_FINITE),
    "MODEL.PIXEL_STD": each(POSITIVE),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": within(0, 1),
    "MODEL.RPN.NMS_THRESH": within(0, 1),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": at_least(1),
    "MODEL.RPN.POST_NMS_TOPK_TEST": at_least(1),
    "TEST.AUG.MAX_SIZE": at_least(1),
    "TEST.AUG.MIN_SIZES": each(at_least(1)),
    "TEST.DETECTIONS_PER_IMAGE": at_least(-1),
    "TEST.EXPECTED_RESULTS": _RESULTS,
}
TRAINING_LIMITS = {
    "DATALOADER.SAMPLER_TRAIN": one_of(
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "DATALOADER.REPEAT_THRESHOLD": at_least(0),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MAX_SIZE_TRAIN": at_least(1),
    "INPUT.MIN_SIZE_TRAIN": each(at_least(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "MODEL.BACKBONE.FREEZE_AT": at_least(0),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _LOSSES,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _LOSSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": within(0, 1),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.RPN.POSITIVE_FRACTION": within(0, 1),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": at_least(1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": at_least(1),
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": at_least(0),
    "SOLVER.BIAS_LR_FACTOR": at_least(0),
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.CHECKPOINTS_TO_KEEP": at_least(0),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Limit(lambda value: value > 0, "greater than 0"),
    "SOLVER.EMA.DECAY": within(0, 1, open_end=True),
    "SOLVER.EPOCHS": at_least(0),
    "SOLVER.GAMMA": POSITIVE,
    "SOLVER.HANG_TIMEOUT": at_least(0),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.MAX_ITER": at_least(1),
    "SOLVER.MOMENTUM": within(0, 1, open_end=True),
    "SOLVER.NUM_DECAYS": at_least(1),
    "SOLVER.PATIENCE": at_least(0),
    "SOLVER.REFERENCE_BATCH_SIZE": at_least(1),
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0),
    "SOLVER.SHADOW_PERIOD": at_least(0),
    "SOLVER.SKIP_NONFINITE": at_least(0),
    "SOLVER.STEPS": _INCREASING,
    "SOLVER.WARMUP_FACTOR": within(0, 1),
    "SOLVER.WARMUP_ITERS": at_least(0),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_BIAS": _NONE_OR_0,
    "SOLVER.WEIGHT_DECAY_NORM": _NONE_OR_0,
    "TEST.EVAL_PERIOD": at_least(0),
    "TEST.PRECISE_BN.NUM_ITER": at_least(1),
    "VIS_PERIOD": at_least(0),
}


def check_limits(cfg: CfgNode, limits: Mapping[str, Limit]) -> None:
    """
    Raises:
        ValueError: the value of a key is out of its limits; one line.
    """
    values = dict(flat(cfg))
    for key, limit in limits.items():
        if not limit.holds(values[key]):
            raise ValueError(f"{key} must be {limit.wanted}; got {values[key]!r}")


def check_augmented_test(cfg: CfgNode, model: nn.Module) -> None:
    """
    Raises:
        ValueError: Detectron2's evaluation with test-time augmentation, which comes last, would
            fail with this model; one line.
    """
    boxes = isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN)
    node = cfg.MODEL
    if cfg.TEST.AUG.ENABLED and (not boxes or node.KEYPOINT_ON or node.LOAD_PROPOSALS):
        raise ValueError(
            "TEST.AUG.ENABLED must be False: Detectron2's test-time augmentation is for an R-CNN "
            f"of boxes and masks, not for {node.META_ARCHITECTURE} with KEYPOINT_ON "
            f"{node.KEYPOINT_ON} and LOAD_PROPOSALS {node.LOAD_PROPOSALS}"
        )


def check_images(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: keys of a detector's training images contradict each other; one line.
    """
    node = cfg.INPUT
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(node.MIN_SIZE_TRAIN) != 2:
        raise ValueError(
            "INPUT.MIN_SIZE_TRAIN must be two sizes, as MIN_SIZE_TRAIN_SAMPLING is range; got "
            f"{node.MIN_SIZE_TRAIN}"
        )
    most = 1 if node.CROP.TYPE.startswith("relative") else math.inf
    if len(node.CROP.SIZE) != 2 or not all(0 < size <= most for size in node.CROP.SIZE):
        raise ValueError(
            f"INPUT.CROP.SIZE must be two sizes above 0, and at most {most}, as CROP.TYPE is "
            f"{node.CROP.TYPE}; got {list(node.CROP.SIZE)}"
        )
    files, names = cfg.DATASETS.PROPOSAL_FILES_TRAIN, cfg.DATASETS.TRAIN
    if cfg.MODEL.LOAD_PROPOSALS and len(files) != len(names):
        raise ValueError(
            f"DATASETS.PROPOSAL_FILES_TRAIN must be a file for each of DATASETS.TRAIN {names}, as "
            f"MODEL.LOAD_PROPOSALS is True; got {files}"
        )
    for name in names if cfg.MODEL.KEYPOINT_ON else ():
        check_named(name, name)
