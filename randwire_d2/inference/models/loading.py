"""Load a model from a checkpoint, a run, an exported file, or a folder of ``save_pretrained``."""

import os

from ...checkpoint import load_checkpoint
from ...config import is_classifier
from ...devices import device_here
from ...export import format_of
from ...modeling import RandWire, RandWireClassifier
from ...pretrained import is_pretrained, read_folder
from ...runs import RunFolder
from .assembly import assemble
from .classifier import Classifier
from .detector import Detector
from .exported import load_exported


def load_detector(path: str | os.PathLike[str], device: str | None = None) -> Detector:
    """Load the detector that a training saved, ready to be called on images.

    With SOLVER.EMA, it has the averaged weights, which the training's evaluations tested.

    Args:
        path: one of these: a checkpoint of tools/train_net.py; the OUTPUT_DIR of a run, from which
            model_best.pth is loaded, or else model_final.pth, or else the last checkpoint; a folder
            of ``save_pretrained``, or hf://owner/name[@revision]; a file of tools/export_model.py,
            which runs on the CPU.
        device: "cpu" or "cuda:1", say; by default a GPU if there is one.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file does not contain a complete detector; one line that names the way out.
    """
    model = load_model(path, device)
    if not isinstance(model, Detector):
        raise ValueError(f"{model.file} is a classifier's file: use load_classifier")
    return model


def load_classifier(path: str | os.PathLike[str], device: str | None = None) -> Classifier:
    """Load the classifier that a training saved, ready to be called on images.

    Args:
        path: a checkpoint of tools/pretrain_imagenet.py, or any other source that ``load_detector``
            takes.
        device: as for ``load_detector``.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file contains no complete classifier; one line that names the way out.
    """
    model = load_model(path, device)
    if not isinstance(model, Classifier):
        raise ValueError(f"{model.file} is a detector's file: use load_detector")
    return model


def load_model(path: str | os.PathLike[str], device: str | None = None) -> Detector | Classifier:
    """``load_detector`` or ``load_classifier``, as the config in the file says."""
    file = _find(os.fspath(path))
    if exported_as := format_of(file):
        return load_exported(file, exported_as, device)
    checkpoint = load_checkpoint(file)
    cfg, model, classes = assemble(file, checkpoint, device)
    return (Classifier if is_classifier(cfg) else Detector)(file, cfg, model, classes)


def from_pretrained(
    path_or_repo: str | os.PathLike[str], device: str | None = None
) -> RandWire | RandWireClassifier | Classifier | Detector:
    """Load a model from a folder, or from a repository of the Hugging Face Hub, in eval mode.

    To train the network that this returns, call its ``train()``.

    Args:
        path_or_repo: a folder that ``save_pretrained`` wrote, ``owner/name[@revision]`` or
            ``hf://owner/name[@revision]``.
        device: "cpu" or "cuda:1", say; by default a GPU if there is one.

    Raises:
        ValueError: the model can't be found, or is damaged; one line.
    """
    folder = read_folder(path_or_repo)
    if folder.kind in ("Classifier", "Detector"):
        model = Classifier if folder.kind == "Classifier" else Detector
        return model.from_folder(folder, device)
    network = RandWire if folder.kind == "RandWire" else RandWireClassifier
    return network.from_folder(folder).to(device_here("device", device))


def find_checkpoint(path: str | os.PathLike[str]) -> str:
    """The file that ``load_model`` would load.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no checkpoint but a file of tools/export_model.py; one line.
    """
    file = _find(os.fspath(path))
    if format_of(file):
        raise ValueError(f"{file} is an exported file already; name a checkpoint")
    return file


def _find(path: str) -> str:
    if is_pretrained(path):
        folder = read_folder(path)
        if folder.kind not in ("Classifier", "Detector"):
            raise ValueError(f"{path} holds a {folder.kind}: use randwire_d2.from_pretrained")
        return str(folder.weights)
    if os.path.isdir(path):
        path = str(RunFolder(path).checkpoint())
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} does not exist; name a .pth file, the OUTPUT_DIR of a training, "
            "a folder of save_pretrained, or hf://owner/name"
        )
    return path
