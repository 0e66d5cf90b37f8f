"""A node of a random graph: weighted sum, then a ReLU-convolution-BN triplet (§3.2, Figure 2)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from fvcore.common.registry import Registry
from torch import Tensor, nn

NODE_OP_REGISTRY = Registry("NODE_OP")
NODE_OP_REGISTRY.__doc__ = """
Node operations: ``(in_channels, out_channels, stride) -> nn.Module`` without bias, norm or
activation, mapping (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).
To count the complexity of your own operation, also register its cost under the same name in
``NODE_OP_COMPLEXITY_REGISTRY``.
"""


# The modes of He's initialisation.
Init = Literal["fan_in", "fan_out"]


def conv2d(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> Conv2d:
    """A convolution without bias, padded so that only the stride changes the size.

    Its weights have He's initialisation with fan-in.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,
    )
    # Only fan-in gives a depthwise convolution the right scale: in torch and pycls, its fan-out
    # counts the outputs of all channels, although a weight contributes only to its own channel.
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv


def apply_init(module: nn.Module, init: Init) -> None:
    """Initialise the convolutions of a module, which ``conv2d`` has built with fan-in.

    Args:
        init: ``"fan_in"``, which leaves the weights as they are, or ``"fan_out"``.
    """
    if init != "fan_in":
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode=init, nonlinearity="relu")


class SepConv3x3(nn.Sequential):
    """3×3 depthwise, then 1×1 convolution, "with no non-linearity in between" (footnote 5)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = conv2d(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise = conv2d(in_channels, out_channels, 1)


class PoolConv(nn.Sequential):
    """3×3 pooling, then 1×1 convolution (§4.1, "Node operations")."""

    def __init__(self, pool: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = pool
        self.pointwise = conv2d(in_channels, out_channels, 1)


@NODE_OP_REGISTRY.register()
def sep_conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return SepConv3x3(in_channels, out_channels, stride)


@NODE_OP_REGISTRY.register()
def conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return conv2d(in_channels, out_channels, 3, stride)


@NODE_OP_REGISTRY.register()
def max_pool3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return PoolConv(nn.MaxPool2d(3, stride, padding=1), in_channels, out_channels)


@NODE_OP_REGISTRY.register()
def avg_pool3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    # The paper says neither that the pool has the stride, nor whether its mean counts the padding.
    # Here, at the border, the mean is over the pixels that exist.
    pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    return PoolConv(pool, in_channels, out_channels)


def build_node_op(name: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Build a registered node operation.

    Raises:
        ValueError: if no operation of that name is registered.
    """
    if name not in NODE_OP_REGISTRY:
        known = sorted(registered for registered, _ in NODE_OP_REGISTRY)
        raise ValueError(
            f"unknown node_op {name!r}; registered are {known}; one of your own needs the script "
            "that registers it (GUIDE.md, A generator of your own)"
        )
    return NODE_OP_REGISTRY.get(name)(in_channels, out_channels, stride)


def build_norm(norm: str, channels: int) -> nn.Module:
    """Any norm of Detectron2's ``get_norm``; ``""`` is no norm.

    For ``"GN"``, the number of groups is the largest, up to 32, that divides the number of
    channels. With 109 channels, a prime number, it is 1, which makes a layer norm.

    Raises:
        ValueError: if Detectron2 does not know the norm.
    """
    if norm == "GN":
        groups = max(g for g in range(1, 33) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    try:
        return get_norm(norm, channels) or nn.Identity()
    except KeyError:
        raise ValueError(
            f"unknown norm {norm!r}; Detectron2 has BN, SyncBN, FrozenBN, GN, LN and others: "
            "see detectron2.layers.get_norm"
        ) from None


class Node(nn.Module):
    """Aggregation and transformation (§3.2). The stage does the distribution.

    Args:
        in_degree: the number of input edges; a node that reads the stage's input has one.
        in_channels, out_channels: channels of its inputs and of its output.
        stride: 2 for a node that reads the stage's input, else 1.
        node_op: a name in ``NODE_OP_REGISTRY``.
        norm: see ``build_norm``.
    """

    def __init__(
        self,
        in_degree: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        node_op: str,
        norm: str,
    ) -> None:
        super().__init__()
        # "Applying sigmoid on unrestricted weights ensures they are positive" (footnote 3).
        # A single input has no weight: a norm that uses the statistics of its input (BN in
        # training, GN) would undo it. FrozenBN would not.
        self.weight = nn.Parameter(torch.zeros(in_degree)) if in_degree > 1 else None
        self.in_degree = in_degree
        self.conv = build_node_op(node_op, in_channels, out_channels, stride)
        self.norm = build_norm(norm, out_channels)

    def forward(self, inputs: Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        """
        Args:
            inputs: one tensor (N, in_channels, H, W) for each input edge.
            kept: (in_degree,), False for each input that is left out of the weighted sum; by
                default all are kept.

        Returns:
            Tensor: (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        return self.norm(self.conv(F.relu(self.aggregate(inputs, kept))))

    def aggregate(self, inputs: Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        """The sum of the inputs, weighted by sigmoid(w)."""
        if self.weight is None:
            return inputs[0]
        weights = torch.sigmoid(self.weight)
        if kept is not None:
            # The weight becomes zero; the sum is not shortened. DistributedDataParallel waits for
            # the gradient of every parameter, so the dropped edge must still give (zero) gradients.
            weights = weights * kept
        # Under autocast the inputs are of lower precision than the weights.
        first, *rest = weights.to(inputs[0].dtype).unbind()
        total = inputs[0] * first
        for x, weight in zip(inputs[1:], rest, strict=True):
            total = torch.addcmul(total, x, weight)
        return total
