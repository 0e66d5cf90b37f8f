"""Data sets: the built-in sets, folders of images, tar shards, and detection data given by path.

Importing this registers the built-in sets and ImageNet in Detectron2.
"""

from . import builtin  # noqa: F401 (registers the sets)
from .classification.image_folder import register_folders
from .detection.augmentation import check_jitter, training_mapper
from .detection.by_path import count_images, labelled_images, register_detection_data
from .detection.summary import Look, look
from .formats.layouts import absolute
from .images.patience import PatientMapper
from .paths import existing_path

__all__ = [
    "Look",
    "PatientMapper",
    "absolute",
    "check_jitter",
    "count_images",
    "existing_path",
    "labelled_images",
    "look",
    "register_detection_data",
    "register_folders",
    "training_mapper",
]
