"""Checkpoints of other layouts, converted and verified by running both networks."""

from .convert import LAYOUTS, Conversion, convert, read_source
from .formats import read_checkpoint
from .target import Target
from .verification import read_image

__all__ = [
    "LAYOUTS",
    "Conversion",
    "Target",
    "convert",
    "read_checkpoint",
    "read_image",
    "read_source",
]
