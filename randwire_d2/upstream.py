"""What PyTorch says of Detectron2's code, or of nothing: for those who wrote it to mend."""

import logging
import warnings

_MESSAGES = (
    ("torch.meshgrid: in an upcoming release", UserWarning),
    ("`torch.cuda.amp.autocast", FutureWarning),  # of Detectron2's AMPTrainer
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
