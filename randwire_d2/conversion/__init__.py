"""Checkpoints of other layouts, converted for Detectron2 and verified by running both networks."""

from .convert import LAYOUTS, Conversion, convert, read_source, recognise
from .detector import Config, Verification, default_image, read_image, verify
from .formats import FORMATS, Checkpoint, read_checkpoint, write_checkpoint
from .source import ResNetArch, Source

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "Checkpoint",
    "Config",
    "Conversion",
    "ResNetArch",
    "Source",
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
