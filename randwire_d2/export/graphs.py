"""The graphs to export: models as functions from a tensor of images to named tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

DETECTOR, CLASSIFIER, BACKBONE = "detector", "classifier", "backbone"
SEM_SEG = "sem_seg"  # a panoptic detector's semantic segmentation


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph.

    Attributes:
        kind: "detector", "classifier" or "backbone".
        outputs: the names of the outputs.
        batched: whether the input is a batch (N, C, H, W), else one image (C, H, W); both float32.
        multiple: height and width must be multiples of it.
        normalised: whether the input must be normalised, else its values are 0 … 255.
        most: the most detections that an image may have; 0 for a classifier or a backbone.
    """

    kind: str
    outputs: tuple[str, ...]
    batched: bool
    multiple: int = 1
    normalised: bool = False
    most: int = 0

    @property
    def input(self) -> str:
        """The name of the input."""
        return "images" if self.batched else "image"

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """The names of all dynamic axes, by input or output."""
        if not self.batched:
            size = {1: "height", 2: "width"}
            found = {n: size if n == SEM_SEG else {0: "detections"} for n in self.outputs}
            return {self.input: size, **found}
        features = {name: {0: "batch"} for name in self.outputs}
        if self.kind == BACKBONE:
            for name, axes in features.items():
                axes |= {2: f"height_{name}", 3: f"width_{name}"}
        return {self.input: {0: "batch", 2: "height", 3: "width"}, **features}


class Graph(nn.Module):
    """A model, in eval mode, as a function from a tensor to a tuple of tensors.

    Attributes:
        signature: the form of this tensor, and the names of the others.
    """

    signature: Signature

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval().requires_grad_(False)


class DetectorGraph(Graph):
    """A detector: from one image (C, H, W), values 0 … 255, to the fields of its instances.

    Boxes are in pixels of the image; masks (n, 1, M, M) are relative to the boxes, not pasted. A
    PanopticFPN also has sem_seg, the logits (classes, H, W) of the semantic segmentation.

    Args:
        model: the detector.
        most: the most detections that an image may have (TEST.DETECTIONS_PER_IMAGE).
        channels: the number of channels of the image.
    """

    def __init__(self, model: nn.Module, most: int, channels: int = 3) -> None:
        super().__init__(model)
        device = next(model.parameters()).device
        with torch.no_grad():
            found = self._outputs(torch.zeros(channels, 64, 64, device=device))
        self.signature = Signature(DETECTOR, tuple(sorted(found)), batched=False, most=most)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # patch_builtin_len is Detectron2's way to count boxes in a trace.
        with patch_builtin_len(), _no_box_of_none(), _some_masks(self.model):
            found = self._outputs(image)
        values: tuple[Any, ...] = tuple(found[name] for name in self.signature.outputs)
        return tuple(value if isinstance(value, Tensor) else value.tensor for value in values)

    def _outputs(self, image: Tensor) -> dict[str, Any]:
        model: Any = self.model
        if not isinstance(model, GeneralizedRCNN):
            return model([{"image": image}])[0]["instances"].get_fields()
        raw = model.inference([{"image": image}], do_postprocess=False)
        if not isinstance(model, PanopticFPN):
            return raw[0].get_fields()
        (instances,), (logits,) = raw
        height, width = image.shape[-2:]  # the logits are those of the padded image
        return {**instances.get_fields(), SEM_SEG: logits[:, :height, :width]}


@contextmanager
def _no_box_of_none() -> Iterator[None]:
    """Patch the NMS to keep no index if there are no boxes. OpenVINO's NonMaxSuppression then gives
    index 0 (seen in 2026.4), which reads stale memory, such as the last image's best box."""
    suppress = box_ops.batched_nms

    def kept(boxes: Tensor, *others: Any) -> Tensor:
        found = suppress(boxes, *others)
        return found[found < boxes.shape[0]]

    box_ops.batched_nms = kept
    try:
        yield
    finally:
        box_ops.batched_nms = suppress


@contextmanager
def _some_masks(model: nn.Module) -> Iterator[None]:
    """Give a mask head with group norms one more region, whose masks are dropped. Without regions,
    ONNX Runtime can't reshape them as torch.onnx writes the norm (seen in 1.32)."""
    head: Any = getattr(getattr(model, "roi_heads", None), "mask_head", None)
    if not isinstance(head, BaseMaskRCNNHead) or not _has_group_norm(head):
        yield
        return
    layers = head.layers
    head.layers = lambda x: layers(torch.cat([x, x.new_zeros((1, *x.shape[1:]))]))[:-1]
    try:
        yield
    finally:
        del head.layers


def _has_group_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.GroupNorm) for module in model.modules())


class ClassifierGraph(Graph):
    """A classifier: from images (N, 3, H, W), values 0 … 255, to logits (N, num_classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.signature = Signature(CLASSIFIER, ("logits",), batched=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model({"image": images}),)


class BackboneGraph(Graph):
    """A backbone, with its FPN if it has one: from normalised images (N, C, H, W) to features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        backbone: Any = model
        self.signature = Signature(
            BACKBONE,
            tuple(backbone.output_shape()),
            batched=True,
            multiple=backbone.size_divisibility or 1,
            normalised=True,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features: Mapping[str, Tensor] = self.model(images)
        return tuple(features[name] for name in self.signature.outputs)
