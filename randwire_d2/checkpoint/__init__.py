"""Checkpoints: complete files, safe to load, with wiring, preprocessing, config and classes."""

from ..pretrained.entries import (
    CATEGORY_IDS_KEY,
    CLASS_NAMES_KEY,
    CONFIG_KEY,
    KEYPOINTS_KEY,
    PREPROCESSING_KEY,
    STUFF_KEY,
    WIRING_KEY,
)
from .checkpointer import EMA_KEY, RandWireCheckpointer, load_checkpoint
from .entries import (
    Classes,
    Preprocessing,
    Wiring,
    check_wiring,
    entries_of,
    find_preprocessing,
    portable_config,
    stored_config,
)

__all__ = [
    "CATEGORY_IDS_KEY",
    "CLASS_NAMES_KEY",
    "CONFIG_KEY",
    "EMA_KEY",
    "KEYPOINTS_KEY",
    "PREPROCESSING_KEY",
    "STUFF_KEY",
    "WIRING_KEY",
    "Classes",
    "Preprocessing",
    "RandWireCheckpointer",
    "Wiring",
    "check_wiring",
    "entries_of",
    "find_preprocessing",
    "load_checkpoint",
    "portable_config",
    "stored_config",
]
