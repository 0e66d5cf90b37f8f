"""``save_pretrained`` and ``from_pretrained`` of detectors and classifiers."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from torch import nn

from ...checkpoint import Classes, Wiring, entries_of
from ...config import is_classifier
from ...pretrained import PretrainedFolder, model_card, read_folder, write_folder
from .assembly import assemble

_T = TypeVar("_T", bound="PretrainedModel")


class PretrainedModel:
    """A model from a file, with its config and classes.

    Attributes:
        classifies: whether it is a classifier; the ids of its classes are then 0, 1, …
        stuff_entry: for a panoptic model whose stuff has names, the entry ``STUFF_KEY``.
        keypoint_entry: for a Keypoint R-CNN whose keypoints have names, the entry
            ``KEYPOINTS_KEY``.
        runtime: the runtime that ``deployment.runtime`` chose for it; None for the usual one.
    """

    classifies = False
    runtime: str | None = None
    stuff_entry: dict[str, Any] | None = None
    keypoint_entry: dict[str, Any] | None = None

    def __init__(self, file: str, cfg: CfgNode, model: nn.Module, classes: Classes) -> None:
        self.file, self.cfg, self.model = file, cfg, model
        self.class_names = list(classes.names)
        known = None if self.classifies else classes.ids
        self.category_ids = list(known or range(len(self.class_names)))

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, card: str | None = None, overwrite: bool = False
    ) -> Path:
        """Write weights, config and classes into a folder; a new folder gets its name at the end.

        Args:
            folder: a new or empty folder.
            card: the text of README.md; by default it describes the model. tools/publish_model.py
                writes it from the run's own record.
            overwrite: replace an earlier model in a folder that is not empty.

        Raises:
            ValueError: the folder is not empty or a file, or safetensors is not installed.
        """
        kind = type(self).__name__
        ids = None if self.classifies else self.category_ids
        classes = Classes(self.class_names, ids, self.stuff_entry, self.keypoint_entry)
        entries = entries_of(self.model, self.cfg, classes)
        if card is None:
            wiring = Wiring.in_model(self.model)
            spec = None if wiring is None else wiring.spec
            card = model_card(kind, spec, {"Classes": ", ".join(self.class_names)})
        state = self.model.state_dict()
        return write_folder(folder, kind, state, entries, card=card, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls: type[_T], path_or_repo: str | os.PathLike[str], device: str | None = None
    ) -> _T:
        """The model that ``save_pretrained`` wrote, ready to be called on images.

        Args:
            path_or_repo: its folder, or its repository on the Hugging Face Hub:
                ``owner/name[@revision]`` or ``hf://owner/name[@revision]``.
            device: "cpu" or "cuda:1", say; by default a GPU if there is one.

        Raises:
            ValueError: it can't be found, is damaged or of another kind; one line.
        """
        return cls.from_folder(read_folder(path_or_repo, cls.__name__), device)

    @classmethod
    def from_folder(cls: type[_T], folder: PretrainedFolder, device: str | None = None) -> _T:
        """``from_pretrained`` for a folder that ``read_folder`` has read."""
        file = str(folder.weights)
        cfg, model, classes = assemble(file, folder.checkpoint, device)
        if is_classifier(cfg) != cls.classifies:
            raise ValueError(f"{folder.path}: its config is not that of a {cls.__name__}")
        state = folder.checkpoint["model"]
        kinds = {value.dtype for value in state.values() if value.is_floating_point()}
        if len(kinds) == 1 and kinds != {torch.float32}:  # as it computed when it was saved
            model.to(*kinds).load_state_dict(state)
        return cls(file, cfg, model, classes)
