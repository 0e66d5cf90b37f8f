"""Data sets: those that the project draws itself, folders of images, shards, images by path.

Importing this registers the built-in sets and ImageNet in Detectron2.
"""

from .builtin import make_dataset, register_shapes
from .classification.image_folder import (
    check_image_folders,
    image_folder_classes,
    register_folders,
    register_image_folder,
    register_shards,
)
from .classification.shard_writer import make_shards
from .detection.augmentation import check_jitter, training_mapper
from .detection.by_path import count_images, labelled_images, register_detection_data
from .detection.summary import Look, look
from .formats.layouts import absolute
from .images.patience import PatientMapper
from .paths import existing_path
from .shapes import ClassificationShapesConfig, ShapesConfig

__all__ = [
    "ClassificationShapesConfig",
    "Look",
    "PatientMapper",
    "ShapesConfig",
    "absolute",
    "check_image_folders",
    "check_jitter",
    "count_images",
    "existing_path",
    "image_folder_classes",
    "labelled_images",
    "look",
    "make_dataset",
    "make_shards",
    "register_detection_data",
    "register_folders",
    "register_image_folder",
    "register_shapes",
    "register_shards",
    "training_mapper",
]
