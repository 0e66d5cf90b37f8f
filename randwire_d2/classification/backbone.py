"""Convert the network of a finished pretraining to a detector's backbone."""

import logging
import os

from detectron2.config import CfgNode

from ..config import family
from ..conversion import convert
from ..runs import RunFolder

DETECTOR = "configs/Base-RCNN-FPN-1x.yaml"  # what a printed command takes the rest from

logger = logging.getLogger(__name__)


def write_backbone(cfg: CfgNode) -> list[str]:
    """Convert a classifier's last checkpoint, verified, to the backbone.pth in its OUTPUT_DIR.

    model_best.pth is not used: the schedule is made for its end, where the rate is 0, and a choice
    by the test images' accuracy would bias that accuracy.

    With SOLVER.EMA the averaged weights, which were evaluated, are converted.

    Args:
        cfg: the config of a training that has ended.

    Returns:
        The tool that fine-tunes a detector with the backbone, and its arguments. If the conversion
        fails, which is logged, the tool and arguments that try it again.
    """
    run = RunFolder(os.path.normpath(cfg.OUTPUT_DIR))
    final, backbone = str(run.final_checkpoint), str(run.backbone)
    resnet = family(cfg) == "RESNETS"
    # The weights don't show it.
    stated = ["MODEL.RESNETS.STRIDE_IN_1X1", str(cfg.MODEL.RESNETS.STRIDE_IN_1X1)] if resnet else []
    try:
        done = convert(final, backbone, options=stated)
    except (ValueError, OSError) as e:
        logger.warning(f"{backbone} was not written: {' '.join(str(e).split())}")
        return ["convert_checkpoint.py", final, backbone, *stated]
    assert done.verification is not None
    differences = ", ".join(f"{k} {v:.1e}" for k, v in done.verification.differences.items())
    logger.info(f"Wrote {backbone}; verified, largest relative differences: {differences}")
    if resnet:
        options = [*done.options, *stated]
    else:  # the file knows the rest
        name = "build_randwire_fpn_backbone"
        options = [*("--config-from-weights", "MODEL.BACKBONE.NAME", name), *done.options[-2:]]
    return ["train_net.py", "--config-file", DETECTOR, *options]
