"""What a checkpoint holds beside its weights: wiring, images, config and classes."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from detectron2.config import CfgNode, get_cfg
from torch import nn

from ..command import in_users_words
from ..config import classifier_config, is_classifier, merge_text, set_spec
from ..modeling import RandWire, RandWireClassifier
from ..pretrained.entries import (
    CATEGORY_IDS_KEY,
    CLASS_NAMES_KEY,
    CONFIG_KEY,
    KEYPOINTS_KEY,
    PREPROCESSING_KEY,
    STUFF_KEY,
    WIRING_KEY,
    stored_spec,
    wiring_entry,
)
from ..text import brief, one_line
from ..wiring import NetworkSpec

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of the images that a network was trained on.

    Attributes:
        input_format: the channels, such as "RGB" or "L" (INPUT.FORMAT).
        pixel_mean: subtracted from each channel, whose values are 0 … 255 (MODEL.PIXEL_MEAN).
        pixel_std: each channel is then divided by it (MODEL.PIXEL_STD).
    """

    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: it is none; one line.
        """
        try:
            mean, std = (tuple(map(float, values[key])) for key in ("pixel_mean", "pixel_std"))
            found = cls(str(values["input_format"]), mean, std)
            if len(found.input_format) > 20 or not 0 < len(mean) == len(std):
                raise ValueError("it has no means, or not as many as standard deviations")
            if not all(map(math.isfinite, (*mean, *std))):
                raise ValueError("it has numbers that are not finite")
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as e:
            reason = one_line(f"{type(e).__name__}: {e}")
            raise ValueError(f"its entry {PREPROCESSING_KEY!r} is damaged: {reason}") from e
        return found

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
        head_relu: whether its classifier has the ReLU of MODEL.CLASSIFIER.HEAD_RELU, which the
            weights do not show; None if the network has no classifier, or if it is not known.
    """

    spec: NetworkSpec
    head_relu: bool | None = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Wiring | None":
        """The wiring in a checkpoint, if there is one.

        Raises:
            ValueError: it is damaged, or does not fit its fingerprint.
        """
        spec = stored_spec(checkpoint)
        if spec is None:
            return None
        head_relu = checkpoint[WIRING_KEY].get("head_relu")
        if not isinstance(head_relu, bool | None):
            raise ValueError(
                f"its entry {WIRING_KEY!r} is damaged: head_relu is {brief(head_relu)}"
            )
        return cls(spec, head_relu)

    @classmethod
    def in_model(cls, model: nn.Module) -> "Wiring | None":
        """The wiring of the RandWire in a model; None if there is no RandWire."""
        _, backbone = find_backbone(model)
        if backbone is None:
            return None
        heads = (m.head_relu for m in model.modules() if isinstance(m, RandWireClassifier))
        return cls(backbone.spec, next(heads, None))

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, under ``WIRING_KEY``."""
        return wiring_entry(self.spec, self.head_relu)


def find_backbone(model: nn.Module) -> tuple[str, RandWire | None]:
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, RandWire))
    return next(found, ("", None))


class Classes(NamedTuple):
    """The classes of a model.

    Attributes:
        names: in the order of its outputs; empty if they are unknown.
        ids: their ids in the data set, if it has ids, as COCO has.
        stuff: for a panoptic data set, the "names" and "ids" of a semantic segmentation's outputs.
        keypoints: for a data set with keypoints, their "names", and "connections", pairs of names.
    """

    names: list[str]
    ids: list[int] | None = None
    stuff: Mapping[str, Any] | None = None
    keypoints: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Classes":
        """The classes in a checkpoint.

        Raises:
            ValueError: they are damaged; one line.
        """
        stuff = _lists_of(checkpoint, STUFF_KEY, names=str, ids=int)
        if stuff and len(stuff["names"]) != len(stuff["ids"]):
            raise ValueError(f"its entry {STUFF_KEY!r} is damaged: not as many names as ids")
        keypoints = _lists_of(checkpoint, KEYPOINTS_KEY, names=str, connections=list)
        if keypoints and not all(
            len(pair) == 2 and all(name in keypoints["names"] for name in pair)
            for pair in keypoints["connections"]
        ):
            raise ValueError(f"its entry {KEYPOINTS_KEY!r} is damaged: no pairs of its names")
        names = _list_of(str, checkpoint, CLASS_NAMES_KEY) or []
        return cls(names, _list_of(int, checkpoint, CATEGORY_IDS_KEY), stuff, keypoints)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint: of types that ``weights_only`` loads."""
        entries: dict[str, Any] = {}
        if self.names:
            entries[CLASS_NAMES_KEY] = list(map(str, self.names))
        if self.ids is not None:
            entries[CATEGORY_IDS_KEY] = list(map(int, self.ids))
        if self.stuff is not None:
            names, ids = list(map(str, self.stuff["names"])), list(map(int, self.stuff["ids"]))
            entries[STUFF_KEY] = {"names": names, "ids": ids}
        if self.keypoints is not None:
            names = list(map(str, self.keypoints["names"]))
            pairs = [list(map(str, pair)) for pair in self.keypoints["connections"]]
            entries[KEYPOINTS_KEY] = {"names": names, "connections": pairs}
        return entries


def entries_of(
    model: nn.Module, cfg: CfgNode | None = None, classes: Classes | None = None
) -> dict[str, Any]:
    """The entries of a model's checkpoint besides weights, in types that ``weights_only`` loads.

    Args:
        cfg: the config of the model.
        classes: the classes of the model.
    """
    entries: dict[str, Any] = {}
    wiring, preprocessing = Wiring.in_model(model), find_preprocessing(model)
    if wiring is not None:
        entries[WIRING_KEY] = wiring.to_dict()
    if preprocessing is not None:
        entries[PREPROCESSING_KEY] = preprocessing.to_dict()
    if cfg is not None:
        entries[CONFIG_KEY] = portable_config(cfg, wiring).dump()
    return entries | (classes.to_dict() if classes is not None else {})


def check_wiring(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that has another wiring, another head or other features than the model.

    Also refuse one for images with another number of channels, if the first convolution is frozen.
    What model or checkpoint does not say is not compared.

    Raises:
        ValueError: the wirings differ (it names both fingerprints); or only one of the two has a
            ReLU in its classifier's head, or after its detector's features; or the frozen
            convolution would keep its random weights.
    """
    ours, theirs = Wiring.in_model(model), Wiring.of(checkpoint)
    prefix, backbone = find_backbone(model)
    if ours is None or theirs is None or backbone is None:
        return
    if theirs.spec != ours.spec:
        raise ValueError(
            f"the checkpoint's network has the fingerprint {theirs.spec.fingerprint}, the model's "
            f"{ours.spec.fingerprint}: weights of one wiring mean nothing in another. Build the "
            "checkpoint's own network with --config-from-weights (YAML configs only), or convert a "
            "checkpoint of the config's network with "
            f"{in_users_words('tools/convert_checkpoint.py')}."
        )
    _check_stem(prefix, backbone, checkpoint)
    if None not in (ours.head_relu, theirs.head_relu) and ours.head_relu != theirs.head_relu:
        raise ValueError(
            f"the checkpoint's classifier was trained with MODEL.CLASSIFIER.HEAD_RELU "
            f"{theirs.head_relu}, the config says {ours.head_relu}: the same weights give other "
            f"logits. Set MODEL.CLASSIFIER.HEAD_RELU {theirs.head_relu}, or add "
            "--config-from-weights"
        )
    if ours.head_relu is None:
        _check_features(backbone, checkpoint)


def _check_stem(prefix: str, backbone: RandWire, checkpoint: Mapping[str, Any]) -> None:
    """If the convolution is trained, it starts from random weights, and Detectron2 warns."""
    own = dict(backbone.named_parameters()).get("stem.conv.weight")  # unless it was replaced
    if own is None or own.requires_grad:
        return
    weights, name = checkpoint["model"], f"{prefix}.stem.conv.weight"
    if name not in weights:  # but under another model's name, which Detectron2 may match
        name = next((n for n in weights if n.endswith("stem.conv.weight")), "")
    if name and (value := weights[name]).shape != own.shape:
        raise ValueError(
            f"{name} has the shape {tuple(own.shape)}, but {tuple(value.shape)} in the checkpoint, "
            "whose images had other channels: it is frozen, and would keep its random values. "
            "Train on images like the checkpoint's (--config-from-weights; INPUT.FORMAT RGB also "
            "reads grey files), or set MODEL.BACKBONE.FREEZE_AT 0 (freeze_at of a LazyConfig's "
            "RandWire)"
        )


def _check_features(backbone: RandWire, checkpoint: Mapping[str, Any]) -> None:
    try:
        cfg = stored_config(checkpoint)
    except ValueError:  # a project's own keys, say; a tool that needs the config reports it
        return
    if cfg is None or is_classifier(cfg):
        return
    theirs = cfg.MODEL.RANDWIRE.RELU_FEATURES
    if backbone.relu_features != theirs:
        raise ValueError(
            f"the checkpoint's detector was trained with MODEL.RANDWIRE.RELU_FEATURES {theirs}, "
            f"the model has {backbone.relu_features}: the same weights find other objects. Set "
            f"MODEL.RANDWIRE.RELU_FEATURES {theirs}, or in a LazyConfig RandWire's argument, "
            f"such as model.backbone.bottom_up.relu_features={theirs}"
        )


def find_preprocessing(model: nn.Module) -> Preprocessing | None:
    """The preprocessing of a Detectron2 meta-architecture; None of any other module."""
    try:
        buffers: tuple[Any, Any] = model.pixel_mean, model.pixel_std
        input_format = model.input_format
    except AttributeError:
        return None
    # As few digits as name the float32: what the config said.
    mean, std = (tuple(float(str(v)) for v in b.float().cpu().numpy().ravel()) for b in buffers)
    return Preprocessing(str(input_format), mean, std)


def compare_preprocessing(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
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
    """A copy of a config without paths of the machine that trained with it.

    MODEL.WEIGHTS becomes empty, OUTPUT_DIR becomes Detectron2's default, and the network of a
    SPEC_FILE moves to SPEC. DATASETS stays: it tells what the model was trained on.

    Args:
        wiring: that of the model.
    """
    own = cfg.clone()
    own.defrost()
    own.MODEL.WEIGHTS = ""
    own.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    if own.MODEL.RANDWIRE.SPEC_FILE:  # which may be a URL
        own.MODEL.RANDWIRE.SPEC_FILE = ""
        if wiring is not None:
            set_spec(own, wiring.spec)
    return own


def stored_config(checkpoint: Mapping[str, Any]) -> CfgNode | None:
    """The config in a checkpoint, if there is one, with the checkpoint's own wiring.

    It may come from a stranger: no YAML tag in it runs code, and ``portable_config`` is applied.

    Raises:
        ValueError: it is damaged, or not a config of this project; one line.
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


def _lists_of(checkpoint: Mapping[str, Any], key: str, **kinds: type) -> dict[str, Any] | None:
    """The dict of lists, each of a type, that a checkpoint holds under a key, if it does."""
    entry = checkpoint.get(key)
    if entry is None:
        return None
    if isinstance(entry, dict):
        lists: dict[str, Any] = {n: _list_of(kind, entry, n) for n, kind in kinds.items()}
        if lists["names"] and None not in lists.values():
            return lists
    raise ValueError(f"its entry {key!r} is damaged: {' or '.join(kinds)} are missing")


def _list_of(kind: type[_T], checkpoint: Mapping[str, Any], key: str) -> list[_T] | None:
    values = checkpoint.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its entry {key!r} is damaged: no list of {kind.__name__}")
    return values
