"""Checkpoints that are whole, safe to load, and know the wiring that they belong to."""

import collections
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from .files import atomic_open
from .modeling import RandWire
from .wiring import NetworkSpec

# The key under which a checkpoint holds its wiring: {"spec": JSON, "fingerprint": sha256}.
WIRING_KEY = "randwire"


class RandWireCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with three promises added.

    - A file appears under its name only when it is complete, so a killed run resumes from the last
      complete checkpoint.
    - Files are loaded without running code that they contain: ``.pth`` with ``weights_only``,
      Detectron2's ``.pkl`` with nothing but arrays and containers allowed.
    - A checkpoint holds the spec of the RandWire network in the model, if there is one; loading it
      into another wiring raises a ValueError that names both fingerprints. The same shapes fit many
      wirings, so nothing else would notice. So does loading what has no weight for the backbone.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any) -> None:
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _AtomicPathManager()

    def save(self, name: str, **kwargs: Any) -> None:
        spec = find_spec(self.model)
        if spec is not None:
            kwargs[WIRING_KEY] = {"spec": spec.to_json(), "fingerprint": spec.fingerprint}
        super().save(name, **kwargs)

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        with PathManager.open(filename, "rb") as f:
            data = _ArrayUnpickler(f, encoding="latin1").load()
        if "__author__" in data and "model" in data:
            return data
        # The Caffe2 layout of the original Detectron: blobs by name, with the solver's state.
        blobs = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        check_wiring(self.model, checkpoint)
        incompatible = super()._load_model(checkpoint)
        name, backbone = _find_backbone(self.model)
        if backbone is not None:
            prefix = f"{name}." if name else ""
            keys = {prefix + key for key, _ in backbone.named_parameters()}
            if keys.issubset(incompatible.missing_keys):
                raise ValueError(
                    f"the checkpoint holds not one weight of the RandWire backbone {name!r}: "
                    "it belongs to another network, such as the ResNet whose config this was. "
                    "Set MODEL.WEIGHTS to weights of this backbone, or to '' to start without"
                )
        return incompatible


def find_spec(model: nn.Module) -> NetworkSpec | None:
    """The spec of the RandWire backbone inside a model; None if the model has none."""
    _, backbone = _find_backbone(model)
    return None if backbone is None else backbone.spec


def _find_backbone(model: nn.Module) -> tuple[str, RandWire | None]:
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, RandWire))
    return next(found, ("", None))


def check_wiring(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another wiring than the model's.

    Raises:
        ValueError: if both know their wiring and the two differ; it names both fingerprints.
    """
    spec = find_spec(model)
    wiring = checkpoint.get(WIRING_KEY)
    if spec is None or wiring is None or wiring["fingerprint"] == spec.fingerprint:
        return
    raise ValueError(
        f"the checkpoint's network has the fingerprint {wiring['fingerprint']}, the model's "
        f"{spec.fingerprint}: weights of one wiring mean nothing in another. Write the "
        f"checkpoint's own spec (its {WIRING_KEY!r} entry, key 'spec') to a file and set "
        "MODEL.RANDWIRE.SPEC_FILE to it, or set the MODEL.RANDWIRE keys it was trained with."
    )


class _AtomicPathManager:
    """Detectron2's PathManager, except that local files it opens for writing appear whole."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" in mode and "://" not in path:
            return atomic_open(path, mode)
        return PathManager.open(path, mode, **kwargs)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays in plain containers; anything else in it could run code."""

    # numpy has moved its reconstruction functions between modules; files keep the old names.
    _ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{
            (f"numpy.{package}.multiarray", name): example.__reduce__()[0]
            for package in ("core", "_core")
            for name, example in (("_reconstruct", np.empty(0)), ("scalar", np.float32()))
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: a .pkl checkpoint may hold only arrays"
            ) from None
