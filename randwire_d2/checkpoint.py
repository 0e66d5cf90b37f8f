"""Checkpoints that are whole, safe to load, and know their wiring, images, config and classes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager
from torch import nn

from .array_pickle import ArrayUnpickler
from .command import in_users_words
from .config import classifier_config, merge_text, set_spec
from .errors import UnreadableCheckpoint, unreadable_in_one_line
from .files import atomic_open
from .modeling import RandWire, RandWireClassifier
from .pretrained.entries import (
    CATEGORY_IDS_KEY,
    CLASS_NAMES_KEY,
    CONFIG_KEY,
    PREPROCESSING_KEY,
    WIRING_KEY,
    wiring_entry,
)
from .pretrained.safetensors_file import read_safetensors
from .wiring import NetworkSpec

# The key under which it holds, with SOLVER.EMA, the average of the weights, in the form of "model":
# what evaluations test.
EMA_KEY = "ema"

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Preprocessing:
    """What was done to the images that a network was trained on.

    Attributes:
        input_format: the order of the channels, "RGB" or "BGR" (INPUT.FORMAT).
        pixel_mean: subtracted from each channel, whose values are 0 … 255 (MODEL.PIXEL_MEAN).
        pixel_std: each channel is then divided by it (MODEL.PIXEL_STD).
    """

    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        return cls(
            str(values["input_format"]),
            tuple(float(v) for v in values["pixel_mean"]),
            tuple(float(v) for v in values["pixel_std"]),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Preprocessing":
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint: of types that ``weights_only`` loads."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def options(self) -> list[str]:
        """The KEY VALUE pairs that set a config to it."""
        keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
        values = (self.input_format, str(list(self.pixel_mean)), str(list(self.pixel_std)))
        return [text for pair in zip(keys, values) for text in pair]


@dataclass(frozen=True)
class Wiring:
    """The network that a checkpoint's weights belong to.

    Attributes:
        spec: the symbolic network.
        head_relu: whether its classifier has the ReLU of MODEL.CLASSIFIER.HEAD_RELU, which no
            weight tells; None of a network without a classifier, and where it is not known.
    """

    spec: NetworkSpec
    head_relu: bool | None = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Wiring | None":
        """That of a checkpoint, if it holds one.

        Raises:
            ValueError: it is damaged, or its fingerprint is another network's.
        """
        entry = checkpoint.get(WIRING_KEY)
        if entry is None:
            return None
        try:
            spec = NetworkSpec.from_json(entry["spec"], str(entry["fingerprint"]))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"its entry {WIRING_KEY!r} is damaged: {e}") from e
        head_relu = entry.get("head_relu")
        if not isinstance(head_relu, bool | None):
            raise ValueError(f"its entry {WIRING_KEY!r} is damaged: head_relu is {head_relu!r}")
        return cls(spec, head_relu)

    @classmethod
    def in_model(cls, model: nn.Module) -> "Wiring | None":
        """That of the RandWire inside a model; None if the model has none."""
        _, backbone = _find_backbone(model)
        if backbone is None:
            return None
        heads = (m.head_relu for m in model.modules() if isinstance(m, RandWireClassifier))
        return cls(backbone.spec, next(heads, None))

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, under ``WIRING_KEY``."""
        return wiring_entry(self.spec, self.head_relu)


class RandWireCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with five promises added.

    - A file appears under its name only when it is complete, so a killed run resumes from the last
      complete checkpoint.
    - Files are loaded without running code that they contain (``load_checkpoint``): ``.pth`` with
      ``weights_only``, Detectron2's ``.pkl`` with nothing but arrays and containers allowed.
    - A checkpoint holds the spec of the RandWire network in the model, if there is one; loading it
      into another wiring raises a ValueError that names both fingerprints. The same shapes fit many
      wirings, so nothing else would notice. So does loading a classifier into one whose head has
      another ReLU, and loading what has no weight for the backbone.
    - It also holds the preprocessing of the model's images; loading it into a model with another
      one logs a warning.
    - It holds what else makes it a whole model, if that is given: config and class names.

    Args:
        cfg: the config of the model.
        class_names: of the model's classes, in the order of its outputs.
        category_ids: the ids that the data set gives them, where they have any, as COCO's do.
        checkpointables: as Detectron2's.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode | None = None,
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _AtomicPathManager()
        self._entries = entries_of(self.model, cfg, class_names, category_ids)

    def save(self, name: str, **kwargs: Any) -> None:
        super().save(name, **{**kwargs, **self._entries})

    def _torch_load(self, f: str) -> Any:
        if f.endswith(".safetensors"):
            return read_safetensors(f)
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):  # Detectron2 would run what is in them
            return load_checkpoint(filename)
        with unreadable_in_one_line(filename):
            return super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        check_wiring(self.model, checkpoint)
        _compare_preprocessing(self.model, checkpoint)
        name, backbone = _find_backbone(self.model)
        prefix = f"{name}." if name else ""
        if backbone is not None and _is_bare(checkpoint):
            state = checkpoint["model"]
            checkpoint["model"] = {prefix + key: value for key, value in state.items()}
        incompatible = super()._load_model(checkpoint)
        if backbone is not None:
            keys = {prefix + key for key, _ in backbone.named_parameters()}
            if keys.issubset(incompatible.missing_keys):
                raise ValueError(
                    f"the checkpoint holds not one weight of the RandWire backbone {name!r}: "
                    "it belongs to another network, such as the ResNet whose config this was. "
                    "Set MODEL.WEIGHTS to weights of this backbone, or to '' to start without"
                )
        return incompatible


def _find_backbone(model: nn.Module) -> tuple[str, RandWire | None]:
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, RandWire))
    return next(found, ("", None))


def _is_bare(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it is a RandWire's own, as its ``save_pretrained`` writes it, in no other model."""
    wiring = Wiring.of(checkpoint)
    if wiring is None:
        return False
    names = {layer.name for layer in wiring.spec.layers}
    return all(key.split(".")[0] in names for key in checkpoint["model"])


def entries_of(
    model: nn.Module,
    cfg: CfgNode | None = None,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What a checkpoint of a model holds beside its weights; of types that ``weights_only`` loads.

    Args: as of ``RandWireCheckpointer``.
    """
    entries: dict[str, Any] = {}
    wiring, preprocessing = Wiring.in_model(model), find_preprocessing(model)
    if wiring is not None:
        entries[WIRING_KEY] = wiring.to_dict()
    if preprocessing is not None:
        entries[PREPROCESSING_KEY] = preprocessing.to_dict()
    if cfg is not None:
        entries[CONFIG_KEY] = portable_config(cfg, wiring).dump()
    if class_names is not None:
        entries[CLASS_NAMES_KEY] = list(map(str, class_names))
    if category_ids is not None:
        entries[CATEGORY_IDS_KEY] = list(map(int, category_ids))
    return entries


def check_wiring(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another wiring than the model's, or of another head.

    Raises:
        ValueError: if both know their wiring and the two differ; it names both fingerprints. Or if
            both know the ReLU of their classifiers' heads and one has none.
    """
    ours, theirs = Wiring.in_model(model), Wiring.of(checkpoint)
    if ours is None or theirs is None:
        return
    if theirs.spec != ours.spec:
        raise ValueError(
            f"the checkpoint's network has the fingerprint {theirs.spec.fingerprint}, the model's "
            f"{ours.spec.fingerprint}: weights of one wiring mean nothing in another. Build the "
            "checkpoint's own network with --config-from-weights, or convert a checkpoint of the "
            f"config's with {in_users_words('tools/convert_checkpoint.py')}."
        )
    if None not in (ours.head_relu, theirs.head_relu) and ours.head_relu != theirs.head_relu:
        raise ValueError(
            f"the checkpoint's classifier was trained with MODEL.CLASSIFIER.HEAD_RELU "
            f"{theirs.head_relu}, the config says {ours.head_relu}: the same weights give other "
            f"logits. Set MODEL.CLASSIFIER.HEAD_RELU {theirs.head_relu}, or add "
            "--config-from-weights"
        )


def find_preprocessing(model: nn.Module) -> Preprocessing | None:
    """The preprocessing of a Detectron2 meta-architecture; None of any other module."""
    try:
        buffers: tuple[Any, Any] = model.pixel_mean, model.pixel_std
        input_format = model.input_format
    except AttributeError:
        return None
    # As few digits as name the float32: what the config said.
    mean, std = (tuple(float(str(v)) for v in b.cpu().numpy().ravel()) for b in buffers)
    return Preprocessing(str(input_format), mean, std)


def _compare_preprocessing(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    ours, theirs = find_preprocessing(model), checkpoint.get(PREPROCESSING_KEY)
    if ours is None or theirs is None:
        return
    theirs = Preprocessing.from_dict(theirs)
    if ours != theirs:
        logger.warning(
            f"The checkpoint was trained with {' '.join(theirs.options)}, but the config says "
            f"{' '.join(ours.options)}: its features fit other images than the model will get. "
            "Unless that is meant, add --config-from-weights, or those keys."
        )


def portable_config(cfg: CfgNode, wiring: Wiring | None = None) -> CfgNode:
    """A config without the files of the machine that trained with it; a copy.

    MODEL.WEIGHTS is empty, OUTPUT_DIR is Detectron2's default, and a network in a SPEC_FILE is in
    SPEC. What DATASETS says stays: it tells what the model was trained on, and nothing reads it
    but who asks for that data set.

    Args:
        wiring: of the model.
    """
    own = cfg.clone()
    own.defrost()
    own.MODEL.WEIGHTS = ""
    own.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    if wiring is not None and own.MODEL.RANDWIRE.SPEC_FILE:
        own.MODEL.RANDWIRE.SPEC_FILE = ""
        set_spec(own, wiring.spec)
    return own


def stored_config(checkpoint: Mapping[str, Any]) -> CfgNode | None:
    """The config that a checkpoint holds, if it holds one, with the checkpoint's own wiring.

    It may be a stranger's: no tag in it runs code, and ``portable_config`` is applied again.

    Raises:
        ValueError: it is damaged, or none of this project's; one line.
    """
    text = checkpoint.get(CONFIG_KEY)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"its entry {CONFIG_KEY!r} is damaged: a {type(text).__name__}")
    cfg = classifier_config()
    merge_text(cfg, text, f"its entry {CONFIG_KEY!r}")
    if wiring := Wiring.of(checkpoint):
        set_spec(cfg, wiring.spec)  # not what a seed draws here: that may be another
    return portable_config(cfg, wiring)


def stored_class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The class names that a checkpoint holds, if it holds any.

    Raises:
        ValueError: they are damaged; one line.
    """
    return _list_of(str, checkpoint, CLASS_NAMES_KEY)


def stored_category_ids(checkpoint: Mapping[str, Any]) -> list[int] | None:
    """The ids that the data set gave the classes, if a checkpoint holds any.

    Raises:
        ValueError: they are damaged; one line.
    """
    return _list_of(int, checkpoint, CATEGORY_IDS_KEY)


def _list_of(kind: type[_T], checkpoint: Mapping[str, Any], key: str) -> list[_T] | None:
    values = checkpoint.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its entry {key!r} is damaged: no list of {kind.__name__}")
    return values


def load_checkpoint(path: str) -> dict[str, Any]:
    """What a checkpoint file holds, in Detectron2's form, without running code that it contains.

    Args:
        path: of a local file: ``.pkl`` of Detectron2 or the original Detectron, ``.pyth`` of pycls,
            ``.safetensors``, else what ``torch.save`` wrote.

    Raises:
        OSError: it can't be read.
        UnreadableCheckpoint: it is damaged, cut off, no checkpoint, or holds code; one line.
        MissingLibrary: safetensors is not installed.
    """
    with unreadable_in_one_line(path):
        checkpoint = _load(path)
    if not isinstance(checkpoint["model"], Mapping):
        raise UnreadableCheckpoint(f"{path!r} holds no weights (an entry 'model')")
    return checkpoint


def _load(path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    if path.endswith(".pkl"):
        with PathManager.open(path, "rb") as f:
            data = ArrayUnpickler(f, encoding="latin1").load()
        if "__author__" in data and "model" in data:
            return data
        # The Caffe2 layout of the original Detectron: blobs by name, with the solver's state.
        blobs = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
    data = torch.load(path, map_location="cpu", weights_only=True)
    if path.endswith(".pyth"):
        state = data["model_state"].items()
        weights = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    return data if "model" in data else {"model": data}


class _AtomicPathManager:
    """Detectron2's PathManager, except that local files it opens for writing appear whole."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" in mode and "://" not in path:
            return atomic_open(path, mode)
        return PathManager.open(path, mode, **kwargs)
