"""Models that travel: a folder or a repository with weights, config and model card."""

from .card import model_card
from .folder import KINDS, PretrainedFolder, is_pretrained, read_folder, write_folder
from .handler import HubHandler

__all__ = [
    "KINDS",
    "HubHandler",
    "PretrainedFolder",
    "is_pretrained",
    "model_card",
    "read_folder",
    "write_folder",
]
