"""Checkpoints of other layouts, converted and verified by running both networks."""

from .convert import LAYOUTS, Conversion, convert, read_source, recognise
from .formats import FORMATS, Checkpoint, read_checkpoint, write_checkpoint
from .source import Head, ResNetArch, Source
from .target import Target
from .verification import Verification, default_image, read_image, verify

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "Checkpoint",
    "Conversion",
    "Head",
    "ResNetArch",
    "Source",
    "Target",
    "Verification",
    "convert",
    "default_image",
    "read_checkpoint",
    "read_image",
    "read_source",
    "recognise",
    "verify",
    "write_checkpoint",
]
