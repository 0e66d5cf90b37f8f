"""Hide what users can't act on of other packages' messages, and undo Detectron2's log setup."""

import logging
import sys
import threading
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


_usual_excepthook = threading.excepthook


def hush_upstream() -> None:
    """Hide these warnings in this process; with eight GPUs, eight processes would print them."""
    for message, category in _MESSAGES:
        warnings.filterwarnings("ignore", message, category)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    threading.excepthook = _say_failure_of_thread


def _say_failure_of_thread(args: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, unless it is TensorBoard's, on a full disk, say: the next call of
    its writer raises the error again."""
    tensorboards = type(args.thread).__module__.startswith("tensorboard.")
    if not (tensorboards and issubclass(args.exc_type, OSError)):
        _usual_excepthook(args)


@contextmanager
def log_of_one_call() -> Iterator[None]:
    """Restore the loggers' handlers after the block.

    Detectron2 expects one training per process. In a process with several, the next training would
    print each line twice, and also write it into the folder of the one before.
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
