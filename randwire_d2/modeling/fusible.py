"""When a stage's nodes may run as one function of fused operators: if nobody has changed them."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .fused import uses_batch
from .node import Node, SepConv3x3

EXPORTING = "the model is traced or exported"

_NO_PARAMETER = (
    "a weight is no parameter of its convolution, as with pruning, with DataParallel, or with "
    "FullyShardedDataParallel without use_orig_params"
)

# The classes whose ``forward`` a project may replace for all modules at once.
_KINDS = (Node, SepConv3x3, Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_METHODS = (
    *((kind, "forward", kind.forward) for kind in _KINDS),
    (Node, "aggregate", Node.aggregate),
)

ConvSettings = tuple[tuple[Any, ...], ...]  # of a node's two convolutions


def conv_settings(node: Any) -> ConvSettings:
    """The settings of a node's two convolutions; empty for another node operation."""
    return tuple(map(_settings_of, node.conv)) if type(node.conv) is SepConv3x3 else ()


def _settings_of(conv: nn.Module) -> tuple[Any, ...]:
    own = conv.__dict__  # not operator.itemgetter, into which torch.compile can't look
    return (
        own["_parameters"]["weight"].shape,  # kernels take it for granted
        own["kernel_size"],
        own["stride"],
        own["padding"],
        own["dilation"],
        own["groups"],
        own["padding_mode"],
        own["norm"],
        own["activation"],
    )


def why_not(nodes: Sequence[nn.Module], built: Sequence[ConvSettings]) -> str:
    """Why ``run_fused`` would not compute what these nodes compute; empty if it would.

    It needs separable convolutions with the settings of ``built``, and batch norms, frozen or not,
    that all have the same settings. It would not call hooks or a replaced ``forward``, so there
    must be none. Tracing, exporting and torch.func need torch's own operators.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return EXPORTING
    if reason := _why_not_one_function():
        return reason
    for node, settings_built in zip(nodes, built, strict=True):
        if reason := _why_not(node, settings_built):
            return reason
    norms: list[Any] = [node._modules["norm"] for node in nodes]
    if len(set(map(_kind, norms))) > 1:
        return "some of the norms are in another mode, or have another momentum or eps"
    if uses_batch(norms[0]) and norms[0].eps == 0:
        return "the eps of the norms is 0, and channels of zeros, which vary by 0, would be NaN"
    return ""


def _why_not_one_function() -> str:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation asks for each operation's derivative"
    for kind, name, built in _METHODS:
        if getattr(kind, name) is not built:
            return f"somebody replaced the {name} of {kind.__name__}"
    return "all modules have a hook" if _has_any_global_hook() else ""


def _why_not(node: nn.Module, built: ConvSettings) -> str:
    if type(node) is not Node:
        return f"a node is a {type(node).__name__}"
    # As dictionaries, since nn.Module takes its time to find an attribute.
    norm: Any = node._modules["norm"]
    both = node._modules["conv"]
    if type(both) is not SepConv3x3:
        return f"the node operation is {type(both).__name__}, not SepConv3x3"
    convs: Any = both._modules.values()
    for conv in convs:
        if type(conv) is not Conv2d or conv._parameters["bias"] is not None or conv._modules:
            return "somebody changed a convolution"
        # Otherwise ``parameters()`` would not find the weight, and no gradient be asked for it.
        if conv._parameters.get("weight") is None:
            return _NO_PARAMETER
    if tuple(map(_settings_of, convs)) != built:
        return "somebody changed a convolution"
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        own, running = norm._parameters, norm._buffers
        # Without a momentum, the running statistics are cumulative averages.
        if (
            norm.momentum is None
            or not norm.track_running_stats
            or own.get("weight") is None
            or own.get("bias") is None
            or running.get("running_mean") is None
            or running.get("running_var") is None
            or running.get("num_batches_tracked") is None
        ):
            return f"a {type(norm).__name__} is without weights, running statistics or momentum"
        if type(norm) is nn.SyncBatchNorm and torch.compiler.is_compiling():
            return "the norm is SyncBatchNorm, whose messages torch.compile does not know"
    elif type(norm) is not FrozenBatchNorm2d:
        return f"the norm is {type(norm).__name__}, not BN, SyncBN or FrozenBN"
    # Of its tensors, not num_features: kernels would read behind their end.
    weight = norm._parameters.get("weight", norm._buffers.get("weight"))
    if weight is None or weight.numel() != both._modules["pointwise"].out_channels:
        return "a norm has other channels than its convolution"
    weights, inputs = node._parameters.get("weight"), node.in_degree
    if inputs > 1 and (weights is None or weights.shape != (inputs,)):
        return "somebody replaced the weights of a Node's sum"
    if inputs == 1 and weights is not None:
        return "somebody gave a Node with a single input a weight"
    if "aggregate" in node.__dict__:
        return "somebody replaced the weighted sum of a Node"
    for module in (node, both, *convs, norm):
        own = module.__dict__
        if "forward" in own:
            return f"somebody replaced the forward of a {type(module).__name__}"
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return f"a {type(module).__name__} has a hook"
    return ""


def _kind(norm: Any) -> tuple[Any, ...]:
    """The type of a norm, and what ``settings`` depends on, read in a fifth of its time."""
    own = norm.__dict__
    return type(norm), own["training"], own["eps"], own.get("momentum"), own.get("process_group")
