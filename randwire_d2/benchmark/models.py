"""The networks of a comparison, and the work of a step."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from torch import Tensor, nn
from torchvision.models import get_model

from ..modeling import RandWire, RandWireClassifier
from ..wiring import NetworkGenerator

MODELS = {
    "randwire": "RandWire",
    "randwire-launched": "RandWire, without CUDA graphs",
    "randwire-recompute": "RandWire, recompute",
    "randwire-plain": "RandWire, plain",
    "randwire-compiled": "RandWire, plain, compiled",
    "resnet50": "ResNet-50",
    "resnext50": "ResNeXt-50",
    "resnet50-msra": "ResNet-50, MSRA",
}
REFERENCE = "resnet50"
STEPS = ("inference", "training")
CLASSES = 1000

# The options of the RandWires.
RANDWIRE_OPTIONS: dict[str, dict[str, Any]] = {
    "randwire": {"fused": "on"},
    "randwire-launched": {"fused": "on", "cuda_graphs": False},
    "randwire-recompute": {"fused": "on", "recompute": True},
    "randwire-plain": {"fused": "off"},
    "randwire-compiled": {"fused": "off"},
}
COMPILED = ("randwire-compiled",)  # compiled by torch.compile, after counting
# Options of Detectron2's ResNets. MSRA's models have the stride in the first 1×1 convolution of a
# block, which is Detectron2's default; torchvision's and this project's configs have it in the 3×3.
RESNET_OPTIONS: dict[str, dict[str, Any]] = {
    "resnet50": {"STRIDE_IN_1X1": False},
    "resnet50-msra": {"STRIDE_IN_1X1": True},
    "resnext50": {"STRIDE_IN_1X1": False, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4},
}


@dataclass(frozen=True)
class Case:
    """The subject of a comparison: the work of a step, and the RandWire.

    Attributes:
        batch: the number of images.
        height, width: the size of an image in pixels.
        detection: compare the backbones of detectors (res2 … res5, FrozenBN, FREEZE_AT 2), whose
            loss is the sum of their features; else classifiers, whose loss is the cross entropy.
        generator: the generator of the RandWire.
        seed: the seed of the RandWire.
        classes: the number of classes of a classifier.
        sizes: how many image sizes the timed steps have in turn, as with a detector's images: each
            is 32 pixels narrower than the one before. Counts are for the first size.

    Raises:
        ValueError: the batch, the height, the width, the number of sizes or the smallest width is
            less than 1.
    """

    batch: int = 8
    height: int = 224
    width: int = 224
    detection: bool = False
    generator: NetworkGenerator = field(default_factory=NetworkGenerator)
    seed: int = 1
    classes: int = CLASSES
    sizes: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width", "sizes"):
            if getattr(self, name) < 1:
                raise ValueError(f"the {name} must be at least 1; got {getattr(self, name)}")
        if self.width <= 32 * (self.sizes - 1):
            raise ValueError(
                f"{self.sizes} sizes, each 32 pixels narrower, need images wider than "
                f"{32 * (self.sizes - 1)}; got {self.width}"
            )

    def __str__(self) -> str:
        generator = self.generator
        params = ", ".join(f"{value:g}" for value in generator.graph_params.values())
        task = "detection backbones, FrozenBN, FREEZE_AT 2" if self.detection else "classifiers"
        narrower = f" and {self.sizes - 1} narrower sizes in turn" if self.sizes > 1 else ""
        return (
            f"{task}; RandWire: {generator.regime} regime, C={generator.channels}, "
            f"N={generator.num_nodes}, {generator.graph}({params}), seed {self.seed}; "
            f"batch {self.batch}, {self.height}×{self.width}{narrower}"
        )

    def make_inputs(
        self,
        device: str | torch.device = "cpu",
        memory_format: torch.memory_format = torch.preserve_format,
        narrower: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) of noise and labels (N,); ``narrower`` is the index of the size."""
        width = self.width - 32 * narrower
        images = torch.randn(self.batch, 3, self.height, width, device=device)
        labels = torch.arange(self.batch, device=device) % self.classes
        # `to`, unlike `contiguous`, accepts torch.preserve_format.
        return images.to(memory_format=memory_format), labels


def build(name: str, case: Case) -> nn.Module:
    """Build a model with random weights.

    A RandWire drops no edges, because each would change the work of the step in its own way.

    Args:
        name: a name of ``MODELS``; "resnet50-msra" is only a detector's.

    Raises:
        ValueError: there is no such model, or the RandWire can't be drawn.
    """
    names = [known for known in MODELS if case.detection or known != "resnet50-msra"]
    if name not in names:
        task = "detection" if case.detection else "classification"
        raise ValueError(f"no model {name!r} for {task}; there are {', '.join(names)}")
    if name in RANDWIRE_OPTIONS:
        spec = case.generator(case.seed)
        options = RANDWIRE_OPTIONS[name]
        if case.detection:
            # Without a ReLU on the features, as in the measurements of EXPERIMENTS.md.
            return RandWire(spec, norm="FrozenBN", freeze_at=2, relu_features=False, **options)
        return RandWireClassifier(spec, case.classes, edge_drop_prob=0.0, **options)
    if case.detection:
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.FREEZE_AT = 2
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RESNETS.update(RESNET_OPTIONS[name])
        return build_resnet_backbone(cfg, ShapeSpec(channels=3))
    name = {"resnext50": "resnext50_32x4d"}.get(name, name)  # torchvision's
    return get_model(name, weights=None, num_classes=case.classes)


def forward(
    model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype | None = None
) -> Tensor | dict[str, Tensor]:
    """Run a model; returns the loss in training mode, else the model's output.

    Args:
        amp: the lower type of automatic mixed precision; None disables it.
    """
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        outputs = model(images)
        if not model.training:
            return outputs
        if isinstance(outputs, dict):
            return torch.stack([feature.sum() for feature in outputs.values()]).sum()
        return F.cross_entropy(outputs, labels)
