"""Data sets: those that the project draws itself, and folders of images as data sets.

Importing this registers the built-in sets and ImageNet in Detectron2.
"""

from .builtin import make_dataset, register_shapes
from .image_folder import (
    check_image_folders,
    image_folder_classes,
    register_folders,
    register_image_folder,
)
from .paths import existing_path
from .shapes import ClassificationShapesConfig, ShapesConfig

__all__ = [
    "ClassificationShapesConfig",
    "ShapesConfig",
    "check_image_folders",
    "existing_path",
    "image_folder_classes",
    "make_dataset",
    "register_folders",
    "register_image_folder",
    "register_shapes",
]
