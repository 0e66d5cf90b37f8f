"""Published models: a folder or a repository with weights, config and model card."""

from . import handler  # noqa: F401 (registers hf://)
from .card import model_card
from .folder import PretrainedFolder, is_pretrained, read_folder, write_folder

__all__ = [
    "PretrainedFolder",
    "is_pretrained",
    "model_card",
    "read_folder",
    "write_folder",
]
