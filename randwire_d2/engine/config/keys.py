"""What a training's config calls what its messages name."""

from typing import NamedTuple


class Keys(NamedTuple):
    """The keys of a kind of config.

    Attributes:
        skip: the number of steps that are skipped.
        lower: what to do about the gradients.
        metric: what the best checkpoint is best in.
        patience: the number of evaluations without a better one that end a training.
        batch: the images of an iteration.
        rate: the learning rate, ahead of its schedule.
        weights: what a training starts from.
        tool: what trains.
    """

    skip: str
    lower: str
    metric: str
    patience: str
    batch: str
    rate: str
    weights: str
    tool: str


YAML_KEYS = Keys(
    skip="SOLVER.SKIP_NONFINITE",
    lower="lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True",
    metric="SOLVER.BEST_METRIC",
    patience="SOLVER.PATIENCE",
    batch="SOLVER.IMS_PER_BATCH",
    rate="SOLVER.BASE_LR",
    weights="MODEL.WEIGHTS",
    tool="tools/train_net.py",
)
LAZY_KEYS = Keys(
    skip="train.skip_nonfinite",
    lower="lower optimizer.lr",
    metric="train.best_metric",
    patience="train.patience",
    batch="dataloader.train.total_batch_size",
    rate="optimizer.lr",
    weights="train.init_checkpoint",
    tool="tools/lazyconfig_train_net.py",
)

UNSET = -1  # the NUM_CLASSES, or NUM_KEYPOINTS, that neither a file nor the command line has set
