"""Compare a run's config with the paper's, key by key: was it trained and tested as in the paper?

The paper's recipes are the files in configs/. Before the comparison, learning rate, warm-up and
schedule are scaled to the run's batch, as the trainers scale them.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config import classifier_config, family, flat, is_classifier, merge_config
from ..config_files import get_config_file
from ..engine import scale_schedule
from ..modeling import LazyDetector
from .paper import TABLE_2, TABLE_3, TABLE_4, TABLE_5, Printed

IMAGENET_IMAGES = 1_281_167  # images in an epoch of configs/imagenet

Recipe = dict[str, Any]

# Keys that are not part of a recipe: seeds, paths, speed, and the network, which ``network_name``
# names. (A graph model's parameters are a node of MODEL.RANDWIRE.) SOLVER.REFERENCE_* are left out,
# too: they tell how a schedule is scaled, and the scaled ones are compared.
NO_RECIPE = re.compile(
    r"(.+\.)?(SEED|NUM_WORKERS|EVAL_PERIOD|CHECKPOINT_PERIOD|CHECKPOINTS_TO_KEEP|BEST_METRIC"
    r"|VIS_PERIOD|SHADOW_PERIOD|HANG_TIMEOUT|COMPILE)"
    r"|VERSION|OUTPUT_DIR|CUDNN_BENCHMARK|MODEL\.(WEIGHTS|DEVICE)"
    r"|TEST\.(EXPECTED_RESULTS|IMS_PER_PROCESS|LOSS)|SOLVER\.REFERENCE_(WORLD|BATCH)_SIZE"
    r"|MODEL\.RANDWIRE\.(REGIME|CHANNELS|NUM_NODES|GRAPH|\w+\.\w+|NODE_OP|SPEC|SPEC_FILE)"
    r"|MODEL\.RANDWIRE\.(FUSED|RECOMPUTE|CUDA_GRAPHS)|MODEL\.CLASSIFIER\.TORCHVISION\..+"
)
# Recognised by Detectron2's names: keys that only a test reads (a training computes precise batch
# norms), and keys that only a training reads.
TEST_KEY = re.compile(r"(?!TEST\.PRECISE_BN\.)(.*[._])?TEST([._].*)?")
TRAINING_KEY = re.compile(r"SOLVER\..*|DATALOADER\..*|MODEL\.WEIGHTS|(.*[._])?TRAIN([._].*)?")


# The keys that a LazyConfig's run sets in its config; the others are defaults.
_LAZY_KEY = re.compile(
    r"INPUT\.(FORMAT|\w+_TEST)|MODEL\.(META_ARCHITECTURE|RANDWIRE\..*)|SOLVER\.(IMS_PER_BATCH|MAX_ITER)"
)


# The files in configs/ for the paper's networks: of the classifier, and of the detector on it.
_CONFIGS = {
    "RandWire-WS, C=78": ("imagenet/randwire_c78_250ep.yaml", ""),
    "ResNet-50": ("imagenet/R_50_100ep.yaml", "faster_rcnn_R_50_fpn_1x.yaml"),
    "ResNeXt-50": ("imagenet/X_50_32x4d_100ep.yaml", "faster_rcnn_X_50_32x4d_fpn_1x.yaml"),
    "RandWire-WS, C=109": (
        "imagenet/randwire_c109_100ep.yaml",
        "faster_rcnn_randwire_c109_fpn_1x.yaml",
    ),
    "ResNet-101": ("imagenet/R_101_100ep.yaml", "faster_rcnn_R_101_fpn_1x.yaml"),
    "ResNeXt-101": ("imagenet/X_101_32x4d_100ep.yaml", "faster_rcnn_X_101_32x4d_fpn_1x.yaml"),
    "RandWire-WS, C=154": (
        "imagenet/randwire_c154_100ep.yaml",
        "faster_rcnn_randwire_c154_fpn_1x.yaml",
    ),
}
_CLASSIFIERS, _DETECTORS = {2: TABLE_2, 3: TABLE_3, 4: TABLE_4}, {5: TABLE_5}
# "The same trained networks as in Table 3", on larger images "without retraining".
_OPTIONS = {4: ("INPUT.TEST_CROP_SIZE", 320)}


class Difference(NamedTuple):
    """A key whose value in the run differs from the paper's, with both values."""

    key: str
    here: str
    paper: str


@dataclass(frozen=True)
class Reference:
    """The paper's row of a run's network.

    Attributes:
        table: the number of the table.
        values: the paper's results, in the order of the table.
        differences: the keys in which the run differs from the paper.
        unknown: why the two can't be compared; ``""`` if they can.
    """

    table: int
    values: tuple[str, ...]
    differences: tuple[Difference, ...] = ()
    unknown: str = ""

    @property
    def comparable(self) -> bool:
        """Whether the run was trained and tested as in the paper, so that results compare."""
        return not self.differences and not self.unknown


def read_recipe(cfg: CfgNode) -> Recipe:
    """The keys on which a run's result depends, with their values."""
    # Keys that have no effect because of another key.
    unread = [f"MODEL.{node}." for node in ("RANDWIRE", "RESNETS") if node != family(cfg)]
    if "Cosine" in cfg.SOLVER.LR_SCHEDULER_NAME:
        unread += ["SOLVER.STEPS", "SOLVER.GAMMA"]
    if not cfg.SOLVER.AMP.ENABLED:
        unread += ["SOLVER.AMP.PRECISION"]
    recipe = {
        key: value
        for key, value in flat(cfg)
        if not NO_RECIPE.fullmatch(key) and not key.startswith(tuple(unread))
    }
    if cfg.MODEL.LAZY:
        recipe = {key: value for key, value in recipe.items() if _LAZY_KEY.fullmatch(key)}
        recipe["MODEL.LAZY"] = hashlib.sha256(cfg.MODEL.LAZY.encode()).hexdigest()[:12]
        # Optimizer, schedule and augmentation are unknown: they may be those of this run alone.
        recipe["SOLVER.LAZY"] = cfg.OUTPUT_DIR
    # Record only whether there are weights: each seed may have its own.
    return {**recipe, "MODEL.WEIGHTS": "given" if cfg.MODEL.WEIGHTS else "none"}


def join_recipes(training: Recipe, test: Recipe) -> Recipe:
    """The recipe of an evaluation: its training's recipe, with the test's own test keys."""
    recipe = {}
    for key, trained in training.items():
        value = test.get(key, trained)
        if TEST_KEY.fullmatch(key):
            recipe[key] = value
        elif TRAINING_KEY.fullmatch(key) or _same(value, trained):
            recipe[key] = trained
        else:  # training and test both read it, such as INPUT.FORMAT
            recipe[key] = f"{trained}, tested with {value}"
    return recipe


def find_reference(network: str, recipe: Recipe) -> Reference | None:
    """The paper's row of a network, the one that differs least if there are several; None if none.

    Args:
        network: the paper's name of the network.
        recipe: the recipe of the run, with the training's SOLVER.IMS_PER_BATCH.

    Raises:
        ValueError: the paper's schedule can't be scaled to this batch.
    """
    batch = recipe["SOLVER.IMS_PER_BATCH"]
    if batch < 1:
        raise ValueError(f"SOLVER.IMS_PER_BATCH must be at least 1; got {batch}")
    classifies = recipe["MODEL.META_ARCHITECTURE"] == "ImageClassifier"
    references = [
        _compare(table, row, recipe)
        for table, rows in (_CLASSIFIERS if classifies else _DETECTORS).items()
        for row in rows
        if row.network == network and network in _CONFIGS
    ]
    return min(references, key=lambda reference: len(reference.differences), default=None)


def _compare(table: int, row: Printed, recipe: Recipe) -> Reference:
    if recipe["MODEL.META_ARCHITECTURE"] == LazyDetector.__name__:
        reason = "its recipe is in a LazyConfig, which is Python and not read"
        return Reference(table, row.accuracies, unknown=reason)
    config = _CONFIGS[row.network][table in _DETECTORS]
    wanted = _paper_recipe(config, _OPTIONS.get(table, ()), recipe["SOLVER.IMS_PER_BATCH"])
    differences = tuple(
        Difference(key, str(recipe.get(key, "not read")), str(wanted.get(key, "not read")))
        for key in sorted({*recipe, *wanted})
        if key not in recipe or key not in wanted or not _same(recipe[key], wanted[key])
    )
    return Reference(table, row.accuracies, differences)


@lru_cache(maxsize=64)  # a config takes a while to read
def _paper_recipe(config: str, options: tuple[Any, ...], batch: int) -> Recipe:
    cfg = classifier_config()
    merge_config(cfg, get_config_file(config), options)
    classifies = is_classifier(cfg)
    recipe = read_recipe(_scale(cfg, batch))
    # Detectors are "fine-tuned from the networks in Table 3", so the user must give weights.
    return {**recipe, "MODEL.WEIGHTS": "none" if classifies else "given"}


def _scale(cfg: CfgNode, batch: int) -> CfgNode:
    """A copy of a config whose schedule is scaled to another batch, as the trainers do it."""
    cfg = cfg.clone()
    cfg.defrost()
    if is_classifier(cfg):
        cfg.SOLVER.IMS_PER_BATCH = batch
        return scale_schedule(cfg, IMAGENET_IMAGES)
    # Detectron2 scales linearly with the number of GPUs: take one image per GPU.
    cfg.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.IMS_PER_BATCH
    return DefaultTrainer.auto_scale_workers(cfg, batch)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b)
    return bool(a == b)
