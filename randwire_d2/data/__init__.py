"""Data sets: those that the project draws itself, folders of images, shards, images by path.

Importing this registers the built-in sets and ImageNet in Detectron2.
"""

from .augmentation import check_jitter, training_mapper
from .builtin import make_dataset, register_shapes
from .by_path import count_images, labelled_images, register_detection_data
from .image_folder import (
    check_image_folders,
    image_folder_classes,
    register_folders,
    register_image_folder,
    register_shards,
)
from .layouts import absolute
from .paths import existing_path
from .shapes import ClassificationShapesConfig, ShapesConfig
from .shard_writer import make_shards
from .summary import Look, look

__all__ = [
    "ClassificationShapesConfig",
    "Look",
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
