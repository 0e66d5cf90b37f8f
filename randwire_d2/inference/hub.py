"""Whatever ``save_pretrained`` wrote, as what it is."""

import os

from ..devices import device_here
from ..modeling import RandWire, RandWireClassifier
from ..pretrained import read_folder
from .classifier import Classifier
from .detector import Detector


def from_pretrained(
    path_or_repo: str | os.PathLike[str], device: str | None = None
) -> RandWire | RandWireClassifier | Classifier | Detector:
    """The model in a folder, or in a repository of the Hugging Face Hub, in eval mode.

    To train a network that it returns, call its ``train()``.

    Args:
        path_or_repo: a folder that ``save_pretrained`` wrote, ``owner/name[@revision]`` or
            ``hf://owner/name[@revision]``.
        device: such as "cpu" or "cuda:1"; by default a GPU if there is one.

    Raises:
        ValueError: it can't be had, or is damaged; one line.
    """
    folder = read_folder(path_or_repo)
    if folder.kind in ("Classifier", "Detector"):
        model = Classifier if folder.kind == "Classifier" else Detector
        return model.from_folder(folder, device)
    network = RandWire if folder.kind == "RandWire" else RandWireClassifier
    return network.from_folder(folder).to(device_here("device", device))
