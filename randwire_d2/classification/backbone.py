"""The end of a pretraining: its network as a detector's backbone."""

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

    The last, and not model_best.pth: a schedule is made for its end, where the rate is 0, and to
    choose by the accuracy of the test images would make that no test any more.

    With SOLVER.EMA it is the average, which was evaluated.

    Args:
        cfg: the training's. It has ended.

    Returns:
        the tool that fine-tunes a detector with it, and its arguments; where the conversion fails,
        which is logged, those that try it again.
    """
    run = RunFolder(os.path.normpath(cfg.OUTPUT_DIR))
    final, backbone = str(run.final_checkpoint), str(run.backbone)
    resnet = family(cfg) == "RESNETS"
    # No weight tells it.
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
