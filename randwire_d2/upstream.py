"""What PyTorch says of Detectron2's code, or of nothing: for those who wrote it to mend; and the
log as Detectron2 sets it up."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGES = (
    ("torch.meshgrid: in an upcoming release", UserWarning),
    # DistributedDataParallel compares strides of dimensions of size 1, too, in which the gradients
    # of 1×1 and depthwise convolutions of channels_last differ from the weights. Where others
    # would, autograd has made the gradients like the weights.
    ("Grad strides do not match bucket view strides", UserWarning),
)


def hush_upstream() -> None:
    """Have none of it printed by this process; on a machine of eight GPUs, eight say the same."""
    for message, category in _MESSAGES:
        warnings.filterwarnings("ignore", message, category)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@contextmanager
def log_of_one_call() -> Iterator[None]:
    """After the block, loggers have the handlers that they have now.

    Detectron2 sets up the log of a process that trains once. In one that goes on, the next training
    would print each line twice, and write it into the folder of the one before, too.
    """
    loggers = [logging.getLogger(name) for name in ("randwire_d2", "detectron2", "fvcore")]
    before = [list(log.handlers) for log in loggers]
    try:
        yield
    finally:
        for log, handlers in zip(loggers, before):
            log.handlers = handlers
        if made := sys.modules.get("detectron2.utils.logger"):
            made.setup_logger.cache_clear()
