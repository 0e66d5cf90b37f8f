"""The augmentation of a detector's training images: Detectron2's, or large-scale jitter."""

import detectron2.data.transforms as T
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from ..images.patience import PatientMapper


def training_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper, with INPUT.LSJ in place of its resizing.

    The jitter is that of Detectron2's new_baselines: resize, crop or pad, flip; where there are
    masks, boxes are drawn anew around what a crop leaves of them.

    Raises:
        ValueError: see ``check_jitter``.
    """
    check_jitter(cfg)
    options = DatasetMapper.from_config(cfg, is_train=True)
    if size := cfg.INPUT.LSJ.SIZE:
        _, *flips = options["augmentations"]
        options["augmentations"] = [
            T.ResizeScale(*cfg.INPUT.LSJ.SCALES, size, size),
            T.FixedSizeCrop((size, size)),
            *flips,
        ]
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    return PatientMapper(**options)


def check_jitter(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: INPUT.LSJ has a value that no image can take; one line.
    """
    size, scales = cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.SCALES
    if size < 0:
        raise ValueError(f"INPUT.LSJ.SIZE is a number of pixels, or 0 for none; got {size}")
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise ValueError(
            "INPUT.LSJ.SCALES are the smallest and the largest scale, both above 0, such as "
            f"[0.1, 2.0]; got {list(scales)}"
        )
    if size and cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            f"INPUT.LSJ.SIZE {size} crops images in a way of its own; set INPUT.CROP.ENABLED "
            "False, or INPUT.LSJ.SIZE 0"
        )
