"""A contact sheet of training images: with their labels, and after augmentation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BoxMode, Instances
from matplotlib.figure import Figure

from ..data import training_mapper
from ..data.images.reading import read_rgb
from .detections import _contact_sheet, draw_instances, have_masks


def draw_samples(cfg: CfgNode, dataset_name: str, max_images: int) -> Figure:
    """Draw images with their annotations, and below them their augmented versions.

    The images are spread evenly over the data set; the augmentation is that of a training with this
    config, which uses numpy's global random numbers.

    Args:
        dataset_name: a registered data set with annotations.
        max_images: the largest number of images drawn, at least 1.

    Raises:
        ValueError: an image can't be read; one line.
    """
    records, metadata = DatasetCatalog.get(dataset_name), MetadataCatalog.get(dataset_name)
    count = min(max_images, len(records))
    tiles = []
    for record in (records[i * len(records) // count] for i in range(count)):
        before = np.asarray(read_rgb(record["file_name"], upright=True))
        after, instances = _augment(cfg, record)
        both = (before, record["annotations"]), (after, instances)
        tiles.append([draw_instances(image, own, metadata) for image, own in both])
    return _contact_sheet(tiles, ["labelled", "augmented"])


def _augment(cfg: CfgNode, record: Mapping[str, Any]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A training image (H, W, 3), RGB, and its objects in the form of annotations."""
    own = cfg.clone()
    own.defrost()
    own.MODEL.MASK_ON = have_masks(record["annotations"])
    own.INPUT.MASK_FORMAT = "bitmask"  # for polygons and RLEs alike
    sample = training_mapper(own)(dict(record))
    image = convert_image_to_rgb(sample["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
    return image.astype(np.uint8), _annotations(sample["instances"])


def _annotations(instances: Instances) -> list[dict[str, Any]]:
    found = [
        {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(category)}
        for box, category in zip(instances.gt_boxes.tensor, instances.gt_classes)
    ]
    if instances.has("gt_keypoints"):
        for annotation, points in zip(found, instances.gt_keypoints.tensor):
            annotation["keypoints"] = points.flatten().tolist()
    if instances.has("gt_masks"):
        for annotation, mask in zip(found, instances.gt_masks.tensor.numpy()):
            annotation["segmentation"] = pycocotools.mask.encode(
                np.asfortranarray(mask.astype(np.uint8))
            )
    return found
