"""The names of config keys in messages, for YAML configs and for LazyConfigs."""

from typing import NamedTuple


class Keys(NamedTuple):
    """The names of keys in a kind of config.

    Attributes:
        skip: the number of non-finite steps in a row that are skipped.
        lower: advice for gradients that are too large.
        metric: the metric of the best checkpoint.
        patience: the number of evaluations without improvement that ends a training.
        batch: the images of an iteration.
        rate: the learning rate, before the schedule's factor.
        weights: the weights that a training starts from.
        tool: the training tool.
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

UNSET = -1  # a NUM_CLASSES or NUM_KEYPOINTS that neither a file nor the command line has set
