"""Proof by running: the converted file in a detector of Detectron2's, beside the source network."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import PREPROCESSING_KEY, Preprocessing, RandWireCheckpointer
from ..config import add_randwire_config, merge_in_one_line, spec_from_config
from ..data.builtin import draw_image
from ..data.shapes import ShapesConfig
from ..wiring import NetworkSpec
from .formats import _read_safetensors
from .source import STAGES, Features, ResNetArch, Source

PREFIXES = {"fpn": "backbone.bottom_up.", "bare": "backbone."}
TOLERANCE = 1e-4  # of a stage's largest absolute value
SIZE = 128  # pixels; a multiple of every stride, so that nothing is padded or resized
LARGEST = 512  # pixels of each side of a user's image; the rest is cut off

# The builders of the two families that stand for each other.
_BUILDERS = {
    "build_resnet_backbone": "build_randwire_backbone",
    "build_resnet_fpn_backbone": "build_randwire_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_randwire_retinanet_fpn_backbone",
}
# The least that makes a Faster R-CNN of either backbone; recipes lie in configs/.
_DETECTORS: dict[str, list[Any]] = {
    "fpn": [
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES", list(STAGES),
        "MODEL.FPN.IN_FEATURES", list(STAGES),
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    ],
    "bare": [
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES", list(STAGES),
        "MODEL.RPN.IN_FEATURES", ["res5"],
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES", ["res5"],
    ],
}  # fmt: skip
_BOX_HEAD = [
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
]  # fmt: skip


class Config:
    """The config of the detector, and which of its keys the user set.

    Args:
        config_file: the user's; without one, a Faster R-CNN on the backbone.
        options: the user's KEY VALUE pairs.
        to: ``"fpn"`` or ``"bare"``, for a config that names no backbone.

    Raises:
        ValueError: for a missing file, an unknown key, or a value of the wrong type.
    """

    def __init__(self, config_file: str | None, options: Sequence[str], to: str) -> None:
        if len(options) % 2:
            raise ValueError(f"options come as pairs KEY VALUE; got {' '.join(options)!r}")
        self.to = to
        self.config_file = config_file
        self.cfg = get_cfg()
        add_randwire_config(self.cfg)
        self.explicit = set(options[::2])
        if config_file is None:
            self.cfg.merge_from_list([*_DETECTORS[to], *_BOX_HEAD])
        else:
            if not os.path.isfile(config_file):
                raise ValueError(f"--config-file {config_file!r} does not exist")
            merge_in_one_line(config_file, lambda: self.cfg.merge_from_file(config_file))
            # As merge_from_file has just read it: Detectron2's own RetinaNet configs have tags.
            stated = self.cfg.load_yaml_with_base(config_file, allow_unsafe=True)
            self.explicit |= set(_keys(stated))
        merge_in_one_line("the command line", lambda: self.cfg.merge_from_list(list(options)))
        self.cfg.MODEL.DEVICE = "cpu"

    def spec(self) -> NetworkSpec:
        """The network that the user described.

        Raises:
            ValueError: if no key of MODEL.RANDWIRE was set: the default is nobody's word.
        """
        if not any(key.startswith("MODEL.RANDWIRE.") for key in self.explicit):
            raise ValueError(
                "the checkpoint does not hold its wiring; name it with MODEL.RANDWIRE.SPEC_FILE "
                "FILE, or with the keys it was drawn from, such as MODEL.RANDWIRE.SEED"
            )
        return spec_from_config(self.cfg)

    def stride_in_1x1(self) -> bool | None:
        """What the user says of MODEL.RESNETS.STRIDE_IN_1X1, if anything."""
        key = "MODEL.RESNETS.STRIDE_IN_1X1"
        return self.cfg.MODEL.RESNETS.STRIDE_IN_1X1 if key in self.explicit else None

    def graph_config(self) -> dict[str, Any]:
        """MODEL.RANDWIRE's graphs, named as JiaminRen's training config names them."""
        node = self.cfg.MODEL.RANDWIRE
        if node.GRAPH not in ("ER", "BA", "WS"):
            raise ValueError(f"MODEL.RANDWIRE.GRAPH {node.GRAPH!r} is none of ER, BA, WS")
        return {"graph_model": node.GRAPH, "seed": node.SEED, **node[node.GRAPH]}

    def fit(self, source: Source, spec_file: str) -> list[str]:
        """Set what the source determines and the user did not.

        Args:
            source: the converted network.
            spec_file: the name of a file with its spec, for a wiring that no keys draw.

        Returns:
            list[str]: the KEY VALUE pairs that a training with the result needs.

        Raises:
            ValueError: if the user's config describes another network; it names the keys.
        """
        architecture: dict[str, Any]
        if isinstance(source.network, ResNetArch):
            architecture = {f"MODEL.RESNETS.{k}": v for k, v in vars(source.network).items()}
        else:
            architecture = self._randwire_keys(source.network)
        self._refuse_contradictions(source, architecture)
        name = self._backbone_name(isinstance(source.network, NetworkSpec))
        pairs: list[str] = ["MODEL.BACKBONE.NAME", name]
        if isinstance(source.network, NetworkSpec):
            self.cfg.merge_from_list(
                [text for pair in architecture.items() for text in map(str, pair)]
            )
            node = self.cfg.MODEL.RANDWIRE
            if node.SPEC_FILE or not self._draws(source.network):
                architecture = {"MODEL.RANDWIRE.SPEC_FILE": node.SPEC_FILE or spec_file}
            else:
                params = node.get(node.GRAPH, {})  # a graph model without parameters has none
                graph = [(f"{node.GRAPH}.{k}", v) for k, v in params.items()]
                for key, value in [("GRAPH", node.GRAPH), *graph, ("SEED", node.SEED)]:
                    architecture[f"MODEL.RANDWIRE.{key}"] = value
        pairs += [text for pair in architecture.items() for text in map(str, pair)]
        self.cfg.merge_from_list(pairs)
        # What a config file leaves to Detectron2's defaults holds too: it will be trained so.
        options = source.preprocessing.options
        for key, value in zip(options[::2], options[1::2]):
            if self.config_file is None and key not in self.explicit:
                self.cfg.merge_from_list([key, value])
        return pairs + options

    def _draws(self, spec: NetworkSpec) -> bool:
        try:
            return spec_from_config(self.cfg) == spec
        except ValueError:  # its graph model knows no graph of so few nodes
            return False

    @staticmethod
    def _randwire_keys(spec: NetworkSpec) -> dict[str, Any]:
        return {
            "MODEL.RANDWIRE.REGIME": spec.regime,
            "MODEL.RANDWIRE.CHANNELS": spec.channels,
            "MODEL.RANDWIRE.NODE_OP": spec.node_op,
            "MODEL.RANDWIRE.NUM_NODES": spec.dags[-1].num_nodes,
        }

    def _refuse_contradictions(self, source: Source, architecture: dict[str, Any]) -> None:
        node = self.cfg.MODEL.RANDWIRE
        wrong = []
        if isinstance(source.network, NetworkSpec) and node.SPEC_FILE:
            spec = spec_from_config(self.cfg)
            if spec != source.network:
                theirs = {**self._randwire_keys(spec), "fingerprint": spec.fingerprint}
                ours = {**architecture, "fingerprint": source.network.fingerprint}
                wrong = [(k, theirs[k], v) for k, v in ours.items() if theirs[k] != v]
        else:
            for key, value in architecture.items():
                stated: Any = self.cfg
                for part in key.split("."):
                    stated = stated[part]
                # A wiring that no keys draw may have any number of nodes.
                if key in self.explicit and stated != value and not key.endswith("NUM_NODES"):
                    wrong.append((key, stated, value))
        if wrong:
            raise ValueError(
                "the config describes another network than the checkpoint holds: "
                + "; ".join(f"{key} is {a}, the checkpoint's {b}" for key, a, b in wrong)
            )

    def _backbone_name(self, randwire: bool) -> str:
        name = self.cfg.MODEL.BACKBONE.NAME
        if "MODEL.BACKBONE.NAME" not in self.explicit:
            name = f"build_resnet_{'fpn_' if self.to == 'fpn' else ''}backbone"
        table = _BUILDERS if randwire else {v: k for k, v in _BUILDERS.items()}
        return table.get(name, name)


def _keys(node: Any, prefix: str = "") -> list[str]:
    return [
        key
        for name, value in node.items()
        for key in (
            _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
        )
    ]


@dataclass(frozen=True)
class Verification:
    """What a detector made of a converted file.

    Attributes:
        differences: stage to the largest absolute difference between its feature in the detector
            and in the source network, in units of the latter's largest absolute value.
        loaded: the number of keys that the detector took.
        missing: which parts of the detector start anew, and how many keys they have.
        left: stages in the file that the detector's backbone does not build, and their keys.
    """

    differences: dict[str, float]
    loaded: int
    missing: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)


class _Checkpointer(RandWireCheckpointer):
    """Detectron2's checkpointer, as this project has it; it keeps which keys did not fit."""

    incompatible: Any = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        safetensors = filename.endswith(".safetensors")
        data = _read_safetensors(filename) if safetensors else super()._load_file(filename)
        data.pop(PREPROCESSING_KEY, None)  # a wrong one shall fail, by its numbers, not warn
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        pass  # they are explained or refused here


def verify(path: str, source: Source, config: Config, image: np.ndarray) -> Verification:
    """Load a converted file into the config's detector and compare its features with the source's.

    Args:
        path: the converted file.
        source: its network, in the original layout.
        config: after ``Config.fit``.
        image: (H, W, 3), uint8, RGB, as ``default_image`` or ``read_image`` returns it.

    Raises:
        ValueError: if the detector can't be built, keys remain unexplained, or a stage differs.
    """
    cfg = config.cfg.clone()
    cfg.MODEL.WEIGHTS = path
    try:
        detector = build_model(cfg).eval()
    except (AssertionError, KeyError, ValueError, TypeError) as e:
        raise ValueError(
            f"the config's detector can't be built on MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} ({type(e).__name__}: {e})"
        ) from e
    prefix = PREFIXES[config.to]
    backbone = _backbone(detector, config)
    total = len(detector.state_dict())
    checkpointer = _Checkpointer(detector)
    checkpointer.load(path)
    missing, left = _explain(checkpointer.incompatible, prefix, backbone)
    with torch.no_grad():
        try:
            expected = source.features(source.prepare(image))
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"the source network can't be computed: {reason}") from e
        found = _features(detector, backbone, cfg.INPUT.FORMAT, image)
    differences = _compare(expected, found, source, cfg)
    return Verification(differences, total - sum(missing.values()), missing, left)


def _backbone(detector: nn.Module, config: Config) -> nn.Module:
    name = f"MODEL.BACKBONE.NAME {config.cfg.MODEL.BACKBONE.NAME}"
    backbone = getattr(detector, "backbone", None)
    if backbone is None or not hasattr(detector, "preprocess_image"):
        raise ValueError(
            f"a {type(detector).__name__} has no backbone with preprocessing to compare; verify "
            "with the config of another detector"
        )
    if hasattr(backbone, "bottom_up") != (config.to == "fpn"):
        other = "bare" if config.to == "fpn" else "fpn"
        raise ValueError(
            f"--to {config.to}, but {name} is {'no' if config.to == 'fpn' else 'an'} FPN: "
            f"choose --to {other} or another config"
        )
    return backbone.bottom_up if config.to == "fpn" else backbone


def _explain(
    incompatible: Any, prefix: str, backbone: nn.Module
) -> tuple[dict[str, int], dict[str, int]]:
    """The parts of the detector that start anew, the stages that it lacks; nothing else may be."""
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
            f"verification failed: {len(unexplained)} keys do not fit the config's detector: "
            + ", ".join(unexplained[:4])
            + (", …" if len(unexplained) > 4 else "")
        )
    return missing, left


def _features(detector: Any, backbone: nn.Module, input_format: str, image: np.ndarray) -> Features:
    """res2 … res5 of the detector, for an image read and prepared as Detectron2 does it."""
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
    height, width = image.shape[:2]
    images = detector.preprocess_image([{"image": tensor, "height": height, "width": width}])
    backbone(images.tensor)
    for handle in handles:
        handle.remove()
    return features


def _compare(expected: Features, found: Features, source: Source, cfg: CfgNode) -> dict[str, float]:
    differences = {}
    for stage, feature in expected.items():
        size = feature.abs().max().item()
        spread = (feature - feature.mean(dim=(2, 3), keepdim=True)).abs().max().item()
        if not feature.isfinite().all() or spread <= 1e-6 * size:
            raise ValueError(
                f"verification failed: the source network's own {stage} is "
                f"{'the same at every pixel' if np.isfinite(size) else 'not finite'} (largest "
                f"value {size:.3g}), which proves nothing: were these weights trained?"
            )
        if stage in found:
            if found[stage].shape != feature.shape:
                raise ValueError(
                    f"verification failed: {stage} is {tuple(found[stage].shape)} in the detector, "
                    f"{tuple(feature.shape)} in the source network"
                )
            differences[stage] = (found[stage] - feature).abs().max().item() / size
    if not all(difference <= TOLERANCE for difference in differences.values()):
        numbers = ", ".join(f"{stage} by {value:.2g}" for stage, value in differences.items())
        raise ValueError(
            f"verification failed: the detector's features differ from the source network's, "
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
    """An image of the built-in data set: (128, 128, 3), uint8, RGB."""
    return draw_image(ShapesConfig(image_size=SIZE), "val", 0).image


def read_image(path: str) -> np.ndarray:
    """An image's middle, in sizes that are multiples of every stride: (H, W, 3), uint8, RGB.

    Raises:
        ValueError: if it can't be read or is too small.
    """
    try:
        with PathManager.open(path, "rb") as f:
            image = convert_PIL_to_numpy(Image.open(f), "RGB")
    except (OSError, ValueError) as e:
        raise ValueError(f"--image {path!r} can't be read: {e}") from e
    sizes = [min(size, LARGEST) // 32 * 32 for size in image.shape[:2]]
    if min(sizes) < 64:
        raise ValueError(f"--image {path!r} must be at least 64×64; it is {image.shape[1::-1]}")
    top, left = ((full - size) // 2 for full, size in zip(image.shape, sizes))
    return np.ascontiguousarray(image[top : top + sizes[0], left : left + sizes[1]])
