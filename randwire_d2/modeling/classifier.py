"""The image classifier of Table 1: RandWire and its last row."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..wiring import NetworkSpec
from ..wiring.dag import as_positive
from ..wiring.network import HEAD_CHANNELS, check_spec
from .backbone import EdgeDropScope, RandWire
from .fused import Fused
from .node import Init, apply_init, build_norm, conv2d
from .pretrained import PretrainedNetwork


class RandWireClassifier(PretrainedNetwork, nn.Module):
    """A randomly wired network with its classifier, for images of three channels.

    The head is ReLU, 1×1 conv to 1280 channels, BN, global average pool, dropout, fc. The loss
    applies the softmax. Table 1 has no ReLU between BN and pool; ``head_relu`` adds one. The
    network has exactly ``complexity(spec, num_classes=num_classes).params`` parameters.

    Args:
        spec: the symbolic network.
        num_classes: the number of classes.
        norm: any norm of Detectron2.
        init: see ``RandWire``.
        head_relu: whether a ReLU follows the norm of the 1280 channels.
        dropout: its probability, before the fc layer; by default the paper's 0.2 in the regular
            regime, else 0.
        edge_drop_prob: see ``RandWire``; by default the paper's 0.1 in the regular regime, else 0.
        edge_drop_scope, fused, recompute, cuda_graphs: see ``RandWire``.

    Raises:
        ValueError: as ``RandWire``, or num_classes or dropout is out of range.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        num_classes: int = 1000,
        *,
        norm: str = "BN",
        init: Init = "fan_in",
        head_relu: bool = False,
        dropout: float | None = None,
        edge_drop_prob: float | None = None,
        edge_drop_scope: EdgeDropScope = "process",
        fused: Fused = "auto",
        recompute: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        check_spec("RandWireClassifier is built from", spec)
        self.spec = spec
        num_classes = as_positive("num_classes", num_classes)
        regular = spec.regime == "regular"
        if dropout is None:
            dropout = 0.2 if regular else 0.0
        if edge_drop_prob is None:
            edge_drop_prob = 0.1 if regular else 0.0
        self.backbone = RandWire(
            spec,
            out_features=("res5",),
            norm=norm,
            init=init,
            edge_drop_prob=edge_drop_prob,
            edge_drop_scope=edge_drop_scope,
            relu_features=False,  # the head begins with one
            fused=fused,
            recompute=recompute,
            cuda_graphs=cuda_graphs,
        )
        self.conv = conv2d(spec.stages[-1].channels, HEAD_CHANNELS, 1)
        apply_init(self.conv, init)
        self.norm = build_norm(norm, HEAD_CHANNELS)
        self.head_relu = head_relu
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(HEAD_CHANNELS, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def options(self) -> dict[str, Any]:
        shared = ("norm", "edge_drop_prob", "edge_drop_scope")
        return {
            "num_classes": self.fc.out_features,
            "head_relu": self.head_relu,
            "dropout": self.dropout.p,
            **{key: value for key, value in self.backbone.options().items() if key in shared},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        return self.head(self.backbone(x)["res5"])

    def head(self, x: Tensor) -> Tensor:
        """Only the head: res5 (N, C, H, W) to logits (N, num_classes)."""
        x = self.norm(self.conv(F.relu(x)))
        if self.head_relu:
            x = F.relu(x)
        return self.fc(self.dropout(x.mean(dim=(2, 3))))
