"""The classifier as a Detectron2 meta-architecture: preprocessing, network, loss."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.transforms import v2

from ..config import spec_from_config
from ..text import one_line
from .backbone import configured_options
from .classifier import RandWireClassifier


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A classifier of raw images (values 0 … 255) that returns losses or logits.

    Args:
        network: (N, 3, H, W) to logits (N, num_classes), or to a dict that contains only these, as
            Detectron2's ResNet returns.
        input_format: the order of the images' channels, "RGB" or "BGR".
        pixel_mean: subtracted from each channel, whose values are 0 … 255.
        pixel_std: each channel is then divided by it.
        label_smoothing: the part of the target that is spread over all classes.
        mix: mixes the images and labels of a training batch, such as torchvision's MixUp:
            (N, 3, H, W) and (N,) to images of the same shape and targets (N, num_classes). It draws
            from torch's CPU generator, whose state a seed or a checkpoint restores.

    Attributes:
        train_top1: the accuracy of the last training batch in per cent, a tensor on the device; to
            read it waits for the device. For a mixed image, the class with the largest part counts.
            None before the first batch.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    train_top1: Tensor | None

    @configurable
    def __init__(
        self,
        network: nn.Module,
        *,
        input_format: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        label_smoothing: float = 0.0,
        mix: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.input_format = input_format
        self.label_smoothing = label_smoothing
        self.mix = mix
        self.train_top1 = None
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "network": build_network(cfg),
            "input_format": cfg.INPUT.FORMAT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "label_smoothing": cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING,
            "mix": _mix(cfg),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise images (N, 3, H, W) of any type, values 0 … 255, for the network."""
        images = images.to(self.device, non_blocking=True)
        return (images - self.pixel_mean) / self.pixel_std

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor] | Tensor:
        """
        Args:
            batch: "image": see ``preprocess``; in training "label": (N,).

        Returns:
            In training {"loss_cls": the mean cross entropy}, else logits (N, num_classes).
        """
        images = self.preprocess(batch["image"])
        if not self.training:
            return self._logits(images)
        labels = batch["label"].to(self.device, non_blocking=True)
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            labels = targets.argmax(1)
        logits = self._logits(images)
        self.train_top1 = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return self.losses(logits, targets)

    def _logits(self, images: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():  # a program's sizes would be limited by the layout
            # Convolutions keep their input's layout; this is the faster one, on a CPU, too.
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.network(images)
        if isinstance(logits, dict):
            (logits,) = logits.values()
        return logits

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"loss_cls": the mean cross entropy} of logits (N, num_classes) and labels (N,), or the
        parts of all classes (N, num_classes)."""
        return {"loss_cls": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


def _mix(cfg: CfgNode) -> nn.Module | None:
    alphas = {v2.MixUp: cfg.INPUT.MIXUP_ALPHA, v2.CutMix: cfg.INPUT.CUTMIX_ALPHA}
    number = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    with torch.device("cpu"):  # a network that is built on "meta", to be checked, mixes nothing
        mixes = [kind(alpha=alpha, num_classes=number) for kind, alpha in alphas.items() if alpha]
    return v2.RandomChoice(mixes) if mixes else None


def build_network(cfg: CfgNode) -> nn.Module:
    """The network of a classifier's config.

    If MODEL.CLASSIFIER.TORCHVISION has a NAME, it is torchvision's network of that name. Otherwise
    MODEL.BACKBONE.NAME chooses a RandWireClassifier or Detectron2's ResNet.

    Raises:
        ValueError: the config describes no network.
    """
    num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    if cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
        return _torchvision(cfg.MODEL.CLASSIFIER.TORCHVISION, num_classes)
    if cfg.MODEL.BACKBONE.NAME == "build_randwire_backbone":
        return RandWireClassifier(
            spec_from_config(cfg),
            num_classes,
            head_relu=cfg.MODEL.CLASSIFIER.HEAD_RELU,
            dropout=cfg.MODEL.CLASSIFIER.DROPOUT,
            **configured_options(cfg),
        )
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
    for block in (block for stage in backbone.stages for block in stage):
        # As in the recipe of Table 3's ResNets (Goyal et al., 2017, §5.1): each block starts as the
        # identity.
        last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
        nn.init.zeros_(last.norm.weight)
    return ResNet(backbone.stem, backbone.stages, num_classes)


def _torchvision(node: CfgNode, num_classes: int) -> nn.Module:
    # Of other kinds of models, some would download their backbone.
    known = list_models(module=torchvision.models)
    if node.NAME not in known:
        near = " or ".join(map(repr, get_close_matches(node.NAME, known)))
        raise ValueError(
            f"MODEL.CLASSIFIER.TORCHVISION.NAME: torchvision has no classifier {node.NAME!r}; "
            + (f"did you mean {near}?" if near else "torchvision.models.list_models() names all")
        )
    options = node.OPTIONS
    try:
        named = dict(zip(options[::2], options[1::2], strict=True))
        return get_model(node.NAME, weights=None, num_classes=num_classes, **named)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"MODEL.CLASSIFIER.TORCHVISION.OPTIONS: {node.NAME} can't be built with {options}, "
            f"which are names, each before its value: {one_line(e, 300)}"
        ) from e
