"""A trained model as a folder with a card, for the Hugging Face Hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_KEY, PREPROCESSING_KEY, Wiring, load_checkpoint
from ..config import is_classifier
from ..modeling import RandWire
from ..pretrained import PretrainedFolder, model_card
from ..pretrained.entries import WIRING_KEY
from ..runs import RunFolder
from ..text import prefixed
from .models.assembly import assemble
from .models.classifier import Classifier
from .models.detector import Detector
from .models.loading import find_checkpoint
from .record import sections_of

# The prefixes of a backbone's weights in the files of tools/convert_checkpoint.py.
_PREFIXES = ("backbone.bottom_up.", "backbone.")


def publish(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write a model and its card into a folder; a new folder gets its name only when complete.

    Args:
        source: the OUTPUT_DIR of a run, one of its checkpoints, or a converted RandWire backbone.
        folder: a new or an empty folder.
        overwrite: replace an earlier model in a folder that is not empty.

    Raises:
        FileNotFoundError: the source does not exist, or is a folder without a checkpoint.
        ValueError: the source lacks a part of a model, or the folder is not empty; one line.
    """
    file = find_checkpoint(source)
    checkpoint = load_checkpoint(file)
    if CONFIG_KEY not in checkpoint and all(k.startswith("backbone.") for k in checkpoint["model"]):
        return _publish_backbone(file, checkpoint, folder, overwrite)
    cfg, module, classes = assemble(file, checkpoint, "cpu")
    model = (Classifier if is_classifier(cfg) else Detector)(file, cfg, module, classes)
    wiring = Wiring.in_model(module)
    card = model_card(
        type(model).__name__,
        None if wiring is None else wiring.spec,
        sections_of(file, cfg, classes.names, checkpoint.get("iteration")),
    )
    return model.save_pretrained(folder, card=card, overwrite=overwrite)


def _publish_backbone(
    file: str, checkpoint: Mapping[str, Any], folder: str | os.PathLike[str], overwrite: bool
) -> Path:
    if WIRING_KEY not in checkpoint:
        raise ValueError(f"{file} is a backbone without its wiring: only a RandWire is published")
    state = checkpoint["model"]
    prefix = next(p for p in _PREFIXES if all(name.startswith(p) for name in state))
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    norm = _norm_of(state)
    # Apply the checks of loading the published model.
    whole = PretrainedFolder(Path(file), "RandWire", {"norm": norm}, {**checkpoint, "model": state})
    with prefixed(file):
        Wiring.of(checkpoint)
        network = RandWire.from_folder(whole)
    sections: dict[str, Any] = {"Options": network.options()}
    run = RunFolder(os.path.dirname(os.path.abspath(file)))
    if run.backbone.name == os.path.basename(file) and run.config_file.is_file():
        cfg = run.config()
        if is_classifier(cfg):  # its training wrote the file, from the last weights
            last = cfg.SOLVER.MAX_ITER - 1
            record = sections_of(str(run.final_checkpoint), cfg, None, last)
            record["Figures of the classifier that it was trained in"] = record.pop("Figures")
            sections |= record
    card = model_card("RandWire", network.spec, sections)
    return network.save_pretrained(
        folder, preprocessing=checkpoint.get(PREPROCESSING_KEY), card=card, overwrite=overwrite
    )


def _norm_of(state: Mapping[str, Any]) -> str:
    """The norm, recognised by the names of its weights: GN has no running statistics."""
    ends = {name.rsplit(".", 1)[-1] for name in state}
    if "num_batches_tracked" in ends:
        return "BN"
    return "FrozenBN" if "running_mean" in ends else "GN"
