"""Folding of batch norms into the convolutions before them."""

from collections.abc import Iterator
from typing import Any

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..modeling.classifier import RandWireClassifier
from ..modeling.node import Node, PoolConv, SepConv3x3
from ..modeling.stage import ConvStage

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold the batch norms of RandWire, and of Detectron2's convolutions, into their convolutions.

    The model, which must be in eval mode, is changed in place and computes the same function, apart
    from rounding. Norms of another kind stay, and so do those after a custom node operation, which
    may not end with a convolution.

    Returns:
        int: the number of folded norms.
    """
    pairs = list(_pairs(model))
    for owner, conv, empty in pairs:
        norm = owner.norm
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        owner.norm = empty
    return len(pairs)


def _pairs(model: nn.Module) -> Iterator[tuple[Any, nn.Conv2d, nn.Module | None]]:
    """(module with a batch norm as ``norm``, the convolution before it, what replaces the norm)."""
    for module in model.modules():
        if not isinstance(getattr(module, "norm", None), _NORMS):
            continue
        if isinstance(module, Conv2d):
            yield module, module, None
        elif isinstance(module, (Node, ConvStage, RandWireClassifier)):
            last: Any = module.conv
            if isinstance(last, (SepConv3x3, PoolConv)):
                last = last.pointwise
            # A subclass may change its weight in forward: standardise it, for example.
            if type(last) in (nn.Conv2d, Conv2d) and getattr(last, "activation", None) is None:
                yield module, last, nn.Identity()
