"""Verification: run a model with the converted weights, and compare with the original network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import PREPROCESSING_KEY, Preprocessing, RandWireCheckpointer
from ..data.builtin import draw_image
from ..data.images.reading import read_rgb
from ..data.shapes import ShapesConfig
from ..modeling import ImageClassifier
from ..text import prefixed
from .source import STAGES, Features, Source, some
from .target import PREFIXES, Target

TOLERANCE = 1e-4  # relative to a stage's largest absolute value
SIZE = 128  # pixels; a multiple of every stride, so that nothing is padded or resized
LARGEST = 512  # pixels; of a larger image, the middle is used


@dataclass(frozen=True)
class Verification:
    """The result of loading a converted file into a detector or a classifier and running it.

    Attributes:
        differences: for each stage, and ``"logits"``, the largest absolute difference between
            model and source network, relative to the latter's largest absolute value.
        loaded: the number of the file's keys that the model loaded.
        missing: the number of keys, by part, of the detector's parts that the file lacks.
        left: the number of keys, by stage, of the stages that the detector's backbone lacks.
    """

    differences: dict[str, float]
    loaded: int
    missing: dict[str, int]
    left: dict[str, int]


class _Checkpointer(RandWireCheckpointer):
    """This project's checkpointer; it records the keys that did not fit instead of logging them."""

    incompatible: Any = None
    keys = 0

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = super()._load_file(filename)
        data.pop(PREPROCESSING_KEY, None)  # a wrong one must fail in the comparison, not warn
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.keys = len(checkpoint["model"])
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        pass  # ``_explain`` accepts or refuses these keys


def verify(path: str, source: Source, target: Target, image: np.ndarray) -> Verification:
    """Load a converted file into the target's model and compare its features with the source's.

    Args:
        path: the converted file.
        source: the original network.
        target: the target, after ``Target.fit``.
        image: (H, W, 3), uint8, RGB, as ``default_image`` or ``read_image`` returns it.

    Raises:
        ValueError: if the model can't be built, keys remain unexplained, or a stage or the logits
            differ.
    """
    cfg = target.cfg.clone()
    cfg.MODEL.WEIGHTS = path
    try:
        model = build_model(cfg).eval()
    except (AssertionError, KeyError, ValueError, TypeError) as e:
        raise ValueError(
            f"the config's {cfg.MODEL.META_ARCHITECTURE} can't be built on MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} ({type(e).__name__}: {e})"
        ) from e
    backbone = _backbone(model, target)
    checkpointer = _Checkpointer(model)
    checkpointer.load(path)
    missing, left = _explain(checkpointer.incompatible, PREFIXES[target.to], backbone)
    with torch.no_grad():
        try:
            expected = source.features(source.prepare(image))
            if source.head is not None:
                expected["logits"] = source.head.logits(expected["res5"])
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"the source network can't be computed: {reason}") from e
        found = _features(model, backbone, cfg.INPUT.FORMAT, image)
    differences = _compare(expected, found, source, cfg)
    return Verification(differences, checkpointer.keys - sum(left.values()), missing, left)


def _backbone(model: nn.Module, target: Target) -> nn.Module:
    if isinstance(model, ImageClassifier):
        return model.network.get_submodule("backbone")
    name = f"MODEL.BACKBONE.NAME {target.cfg.MODEL.BACKBONE.NAME}"
    backbone = getattr(model, "backbone", None)
    if backbone is None or not hasattr(model, "preprocess_image"):
        raise ValueError(
            f"a {type(model).__name__} has no backbone with preprocessing to compare; verify "
            "with the config of another detector"
        )
    if hasattr(backbone, "bottom_up") != (target.to == "fpn"):
        other = "bare" if target.to == "fpn" else "fpn"
        raise ValueError(
            f"--to {target.to}, but {name} is {'no' if target.to == 'fpn' else 'an'} FPN: "
            f"choose --to {other} or another config"
        )
    return backbone.bottom_up if target.to == "fpn" else backbone


def _explain(
    incompatible: Any, prefix: str, backbone: nn.Module
) -> tuple[dict[str, int], dict[str, int]]:
    """``Verification.missing`` and ``.left``; a ValueError for any other key that does not fit."""
    built = {name for name, _ in backbone.named_children()}
    missing: dict[str, int] = {}
    left: dict[str, int] = {}
    unexplained = [f"{key} (shape)" for key, *_ in incompatible.incorrect_shapes]
    for key in incompatible.missing_keys:
        if key.startswith(prefix):
            unexplained.append(f"{key} (missing)")
        else:
            part = "FPN" if key.startswith("backbone.") else key.split(".")[0]
            missing[part] = missing.get(part, 0) + 1
    for key in incompatible.unexpected_keys:
        stage = key.removeprefix(prefix).split(".")[0]
        if stage in STAGES and stage not in built:
            left[stage] = left.get(stage, 0) + 1
        else:
            unexplained.append(f"{key} (unused)")
    if unexplained:
        raise ValueError(
            f"verification failed: {len(unexplained)} keys do not fit the config's model: "
            f"{some(unexplained)}"
        )
    return missing, left


def _features(model: Any, backbone: nn.Module, input_format: str, image: np.ndarray) -> Features:
    """res2 … res5, and a classifier's logits, for an image that is prepared as in Detectron2.

    The features are the stages' outputs, with or without MODEL.RANDWIRE.RELU_FEATURES.
    """
    pixels = convert_PIL_to_numpy(Image.fromarray(image), input_format)
    tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32))
    features: Features = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: features.update({name: output})

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in backbone.named_children()
        if name in STAGES
    ]
    if isinstance(model, ImageClassifier):
        features["logits"] = model({"image": tensor[None]})
    else:
        height, width = image.shape[:2]
        images = model.preprocess_image([{"image": tensor, "height": height, "width": width}])
        backbone(images.tensor)
    for handle in handles:
        handle.remove()
    return features


def _compare(expected: Features, found: Features, source: Source, cfg: CfgNode) -> dict[str, float]:
    differences = {}
    for stage, feature in expected.items():
        size = feature.abs().max().item()
        over, dims = ("class", (1,)) if stage == "logits" else ("pixel", (2, 3))
        spread = (feature - feature.mean(dim=dims, keepdim=True)).abs().max().item()
        if not feature.isfinite().all() or spread <= 1e-6 * size:
            raise ValueError(
                f"verification failed: the source network's own {stage} is "
                f"{f'the same at every {over}' if np.isfinite(size) else 'not finite'} (largest "
                f"value {size:.3g}), which proves nothing: were these weights trained?"
            )
        if stage in found:
            if found[stage].shape != feature.shape:
                raise ValueError(
                    f"verification failed: {stage} is {tuple(found[stage].shape)} in the config's "
                    f"model, {tuple(feature.shape)} in the source network"
                )
            differences[stage] = (found[stage] - feature).abs().max().item() / size
    if not all(difference <= TOLERANCE for difference in differences.values()):
        numbers = ", ".join(f"{stage} by {value:.2g}" for stage, value in differences.items())
        raise ValueError(
            f"verification failed: the config's model differs from the source network, "
            f"{numbers} of their largest value (allowed: {TOLERANCE:g})"
            + _preprocessing_mismatch(source.preprocessing, cfg)
        )
    return differences


def _preprocessing_mismatch(source: Preprocessing, cfg: CfgNode) -> str:
    ours, theirs = source.options, Preprocessing.from_config(cfg).options
    wrong = [
        f"{key} is {found}, the source's {wanted}"
        for key, wanted, found in zip(ours[::2], ours[1::2], theirs[1::2])
        if wanted != found
    ]
    return "; in the config " + ", ".join(wrong) if wrong else ""


def default_image() -> np.ndarray:
    """The first validation image of the built-in data set: (128, 128, 3), uint8, RGB."""
    return draw_image(ShapesConfig(image_size=SIZE), "val", 0).image


def read_image(path: str) -> np.ndarray:
    """Read an image's middle: (H, W, 3), uint8, RGB; H and W are multiples of 32, at most 512.

    Raises:
        ValueError: if it can't be read or is smaller than 64×64 pixels.
    """
    with prefixed("--image"):
        image = np.asarray(read_rgb(path))
    sizes = [min(size, LARGEST) // 32 * 32 for size in image.shape[:2]]
    if min(sizes) < 64:
        raise ValueError(f"--image {path!r} must be at least 64×64; it is {image.shape[1::-1]}")
    top, left = ((full - size) // 2 for full, size in zip(image.shape, sizes))
    return np.ascontiguousarray(image[top : top + sizes[0], left : left + sizes[1]])
