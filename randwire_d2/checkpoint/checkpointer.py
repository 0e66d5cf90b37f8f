"""The checkpointer: its files are complete, run no code, and fit the model that loads them."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import system_error
from ..files import atomic_open, megabytes
from ..runs import RunFolder
from ..weight_files.checksum import checksummed
from ..weight_files.reading import check_state, read_entries
from .entries import (
    Classes,
    Wiring,
    check_wiring,
    compare_preprocessing,
    entries_of,
    find_backbone,
)

# With SOLVER.EMA, a checkpoint has the averaged weights under this key, in the form of "model".
# Evaluations test them.
EMA_KEY = "ema"


class RandWireCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with six guarantees added.

    - A file gets its name only when it is complete, so a killed run resumes from the last complete
      checkpoint.
    - A file has a checksum: if it was damaged later, it is not loaded, and a run resumes from the
      newest undamaged one.
    - Loading a file never runs code in it (``load_checkpoint``): ``.pth`` is loaded with
      ``weights_only``; in Detectron2's ``.pkl``, only arrays and containers are allowed.
    - A checkpoint contains the spec of the model's RandWire, if it has one. The same shapes fit
      many wirings, so loading it into another wiring raises a ValueError that names both
      fingerprints. Other ValueErrors: a classifier whose head differs in its ReLU, a detector whose
      features differ in theirs, and a checkpoint without weights for the backbone.
    - A checkpoint contains the preprocessing of the images. If the model that loads it has another
      one, a warning says so.
    - A checkpoint contains the config and the classes, if they are given: a whole model.

    Args:
        cfg: the config of the model.
        classes: the classes of the model.
        checkpointables: as in Detectron2.

    Attributes:
        newest: the file that this training was resumed from or saved last; "" if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode | None = None,
        classes: Classes | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _AtomicPathManager()
        self._entries = entries_of(self.model, cfg, classes)
        self.newest = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's; if the file can't be written, an earlier one of that name stays.

        Raises:
            OSError: the disk is full, or read-only; one line.
        """
        try:
            super().save(name, **{**kwargs, **self._entries})
        except (OSError, RuntimeError) as e:
            if (error := system_error(e)) is None:
                raise
            free = shutil.disk_usage(self.save_dir).free
            raise OSError(
                f"{os.path.join(self.save_dir, name)}.pth can't be written "
                f"({error.strerror or error}): it needs {megabytes(self.size())}, and "
                f"{megabytes(free)} are free. What was there is left as it was: make room, for "
                "instance by deleting older checkpoints (SOLVER.CHECKPOINTS_TO_KEEP), and go on "
                "with --resume"
            ) from e

    def size(self) -> int:
        """The bytes of a checkpoint's tensors: about its size."""
        states = [part.state_dict() for part in (self.model, *self.checkpointables.values())]
        tensors = [leaf for leaf in tree_leaves(states) if isinstance(leaf, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's, but all processes resume from the checkpoint that the first one finds
        (``RunFolder.last_checkpoint``).

        Raises:
            ValueError: all are damaged, or some processes have none; one line.
        """
        found = comm.all_gather(resume and self.has_checkpoint())
        if lacking := [i for i, has in enumerate(found) if not has and any(found)]:
            raise ValueError(
                f"--resume: {os.path.join(self.save_dir, 'last_checkpoint')} exists for some of "
                f"{len(found)} processes, but not for {', '.join(map(str, lacking))}: all machines "
                "need the same folder as OUTPUT_DIR, or copies of that file and of the checkpoint "
                "that it names"
            )
        if not found[0]:
            return self.load(path, checkpointables=[])
        last, refusal = "", ""
        if comm.is_main_process():
            try:
                last = str(RunFolder(self.save_dir).last_checkpoint)
            except ValueError as e:
                refusal = str(e)
        last, refusal = comm.all_gather((last, refusal))[0]
        if refusal:
            raise ValueError(refusal)
        self.newest = last
        return self.load(last)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        super().tag_last_checkpoint(last_filename_basename)
        self.newest = os.path.join(self.save_dir, last_filename_basename)

    def _torch_load(self, f: str) -> Any:
        return read_entries(f)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):  # Detectron2 would run what is in them
            converted = load_checkpoint(filename)
            if not converted["model"]:  # Detectron2's search for names in it would fail
                raise ValueError(f"{filename!r} holds no weights: save a model's state dict in it")
            return converted
        loaded: dict[str, Any] = super()._load_file(filename)
        check_state(filename, loaded["model"])
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        check_wiring(self.model, checkpoint)
        compare_preprocessing(self.model, checkpoint)
        name, backbone = find_backbone(self.model)
        prefix = f"{name}." if name else ""
        if _is_bare(checkpoint):
            state = checkpoint["model"]
            checkpoint["model"] = {prefix + key: value for key, value in state.items()}
        incompatible = super()._load_model(checkpoint)
        if backbone is not None:
            keys = {prefix + key for key, _ in backbone.named_parameters()}
            if keys.issubset(incompatible.missing_keys):
                raise ValueError(
                    f"the checkpoint has no weight of the RandWire backbone {name!r}: "
                    "it belongs to another network, such as the ResNet whose config this was. "
                    "Set MODEL.WEIGHTS to weights of this backbone, or to '' to start from scratch"
                )
        return incompatible


def _is_bare(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it contains a bare RandWire, as ``RandWire.save_pretrained`` writes it."""
    wiring = Wiring.of(checkpoint)
    if wiring is None:
        return False
    names = {layer.name for layer in wiring.spec.layers}
    return all(key.split(".")[0] in names for key in checkpoint["model"])


def load_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint file, in Detectron2's form, without running code in it.

    Args:
        path: a local file: ``.pkl`` of Detectron2 or the original Detectron, ``.pyth`` of pycls,
            ``.safetensors``, or any file of ``torch.save``.

    Raises:
        ValueError: it is missing, empty, cut off or damaged, contains code, or is no checkpoint;
            one line that names the file and the way out.
    """
    data = read_entries(path)
    if path.endswith(".pyth"):
        check_state(path, data.get("model_state"))
        state = data["model_state"].items()
        weights = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
        data = {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    elif path.endswith(".pkl") and not ("__author__" in data and "model" in data):
        # The Caffe2 layout of the original Detectron: blobs by name, with the solver's state.
        check_state(path, data.get("blobs", data))
        blobs = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        data = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
    elif "model" not in data:
        data = {"model": data}
    check_state(path, data["model"])
    return data


class _AtomicPathManager:
    """Detectron2's PathManager, except that a local file gets its name only when it is complete,
    and a file of ``torch.save`` gets a checksum."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" in mode and "://" not in path:
            return _checksummed_open(path) if path.endswith(".pth") else atomic_open(path, mode)
        return PathManager.open(path, mode, **kwargs)


@contextmanager
def _checksummed_open(path: str) -> Iterator[Any]:
    with atomic_open(path, "wb") as f, checksummed(f) as summed:
        yield summed
