"""The parameters, multiply-adds and activations of a network, counted from its spec alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean

from fvcore.common.registry import Registry

from .dag import as_positive
from .network import HEAD_CHANNELS, NetworkGenerator, NetworkSpec, StageSpec, check_spec

NODE_OP_COMPLEXITY_REGISTRY = Registry("NODE_OP_COMPLEXITY")
NODE_OP_COMPLEXITY_REGISTRY.__doc__ = """
The costs of node operations, without their norm. Under the operation's name, a function
``(in_channels, out_channels, height, width) -> Complexity``; height and width are the output's.
"""


@dataclass(frozen=True)
class Complexity:
    """The cost of a network, or of a part of it, for one image.

    Attributes:
        params: learnable parameters, including those of norms and weighted sums.
        flops: multiply-adds of convolutions, fully connected layers, and weighted sums (one per
            element and input edge of a node that has more than one).
        activations: elements in the outputs of convolutions and fully connected layers.
    """

    params: int = 0
    flops: int = 0
    activations: int = 0

    def __add__(self, other: "Complexity") -> "Complexity":
        return Complexity(
            self.params + other.params,
            self.flops + other.flops,
            self.activations + other.activations,
        )


@dataclass(frozen=True)
class NetworkComplexity(Complexity):
    """The cost of a network, and of its parts.

    Attributes:
        stages: the cost of each of ``"stem"``, ``"res2"`` … ``"res5"`` and ``"head"``.
    """

    stages: Mapping[str, Complexity] = field(default_factory=dict)


def complexity(
    spec: NetworkSpec,
    height: int = 224,
    width: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> NetworkComplexity:
    """Count the cost of a spec's classifier for one image of height × width pixels.

    The counts reproduce the FLOPs and parameters of Tables 2 to 4. ``RandWireClassifier(spec,
    num_classes)`` has exactly ``params`` parameters. fvcore's counter finds the same multiply-adds,
    except that it does not count those of the weighted sums.

    Args:
        in_channels: the channels of a backbone's images; a classifier's have 3.

    Raises:
        ValueError: a number is no integer or less than 1, ``spec`` is no spec, or the cost of its
            node operation is not registered.
    """
    check_spec("complexity is counted of", spec)
    height, width = as_positive("height", height), as_positive("width", width)
    num_classes = as_positive("num_classes", num_classes)
    in_channels = as_positive("in_channels", in_channels)
    stages: dict[str, Complexity] = {}
    for conv_spec in spec.convs:
        height, width = halve(height), halve(width)
        stages[conv_spec.name] = conv(3, in_channels, conv_spec.channels, height, width) + norm(
            conv_spec.channels
        )
        in_channels = conv_spec.channels
    for stage in spec.stages:
        height, width = halve(height), halve(width)
        stages[stage.name] = sum(
            node_complexities(stage, spec.node_op, height, width), Complexity()
        )
    stages["head"] = (
        conv(1, spec.stages[-1].channels, HEAD_CHANNELS, height, width)
        + norm(HEAD_CHANNELS)
        + Complexity((HEAD_CHANNELS + 1) * num_classes, HEAD_CHANNELS * num_classes, num_classes)
    )
    total = sum(stages.values(), Complexity())
    return NetworkComplexity(total.params, total.flops, total.activations, stages)


def find_channels(
    generator: NetworkGenerator,
    flops: float,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    height: int = 224,
    width: int = 224,
    num_classes: int = 1000,
) -> int:
    """The C for which a generator's networks come nearest to a number of multiply-adds.

    "We set N=32, and then set C to the nearest integer such that target model complexity is met"
    (§4, "Architecture details").

    Args:
        generator: draws the networks; the search starts at its C.
        flops: the multiply-adds that the networks should have on average over the seeds.
        seeds: the seeds of these networks.
        height, width, num_classes: as for ``complexity``.

    Returns:
        int: C, at least 2; of two that are equally near, the smaller.

    Raises:
        ValueError: there are no seeds, or C = 2 already costs more.
    """
    if not seeds:
        raise ValueError("the multiply-adds are averaged over seeds; got no seeds")
    specs = [generator(seed) for seed in seeds]  # their graphs do not depend on C

    @cache
    def cost(channels: int) -> float:
        drawn = (replace(spec, channels=channels) for spec in specs)
        return mean(complexity(spec, height, width, num_classes).flops for spec in drawn)

    low = 2
    if not cost(low) <= flops < float("inf"):
        raise ValueError(
            f"no C has {flops:,.0f} multiply-adds; the least, C={low}, has {cost(low):,.0f}"
        )
    # Multiply-adds grow about as C², so this is near the result.
    near = int(generator.channels * math.sqrt(flops / cost(generator.channels)))
    low, high, step = max(low, near), max(low, near), 1
    while cost(low) > flops:
        low, step = max(2, low - step), 2 * step
    while cost(high) < flops:
        high, step = high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= flops else (low, middle)
    return low if flops - cost(low) <= cost(high) - flops else high


def node_complexities(stage: StageSpec, node_op: str, height: int, width: int) -> list[Complexity]:
    """The cost of each node of a stage whose output is height × width.

    Raises:
        ValueError: the cost of the operation is not registered.
    """
    if node_op not in NODE_OP_COMPLEXITY_REGISTRY:
        known = sorted(name for name, _ in NODE_OP_COMPLEXITY_REGISTRY)
        raise ValueError(
            f"the complexity of node_op {node_op!r} is unknown; known are {known}; register it in "
            "NODE_OP_COMPLEXITY_REGISTRY"
        )
    op_complexity = NODE_OP_COMPLEXITY_REGISTRY.get(node_op)
    nodes = []
    for predecessors in stage.dag.predecessors:
        in_channels = stage.channels if predecessors else stage.in_channels
        cost = op_complexity(in_channels, stage.channels, height, width) + norm(stage.channels)
        if len(predecessors) > 1:
            weights = len(predecessors)
            cost += Complexity(weights, weights * stage.channels * height * width)
        nodes.append(cost)
    return nodes


def halve(size: int) -> int:
    """The output size of a 3×3 window with stride 2 and padding 1."""
    return (size + 1) // 2


def conv(
    kernel: int, in_channels: int, out_channels: int, height: int, width: int, groups: int = 1
) -> Complexity:
    """The cost of a convolution without bias whose output is height × width."""
    weights = kernel * kernel * (in_channels // groups) * out_channels
    pixels = height * width
    return Complexity(weights, weights * pixels, out_channels * pixels)


def norm(channels: int) -> Complexity:
    """The cost of a batch norm: two parameters per channel, no multiply-adds, since inference can
    fold it into the convolution."""
    return Complexity(params=2 * channels)


@NODE_OP_COMPLEXITY_REGISTRY.register()
def sep_conv3x3(in_channels: int, out_channels: int, height: int, width: int) -> Complexity:
    depthwise = conv(3, in_channels, in_channels, height, width, groups=in_channels)
    return depthwise + conv(1, in_channels, out_channels, height, width)


@NODE_OP_COMPLEXITY_REGISTRY.register()
def conv3x3(in_channels: int, out_channels: int, height: int, width: int) -> Complexity:
    return conv(3, in_channels, out_channels, height, width)


def _pool_conv(in_channels: int, out_channels: int, height: int, width: int) -> Complexity:
    return conv(1, in_channels, out_channels, height, width)


NODE_OP_COMPLEXITY_REGISTRY._do_register("max_pool3x3", _pool_conv)
NODE_OP_COMPLEXITY_REGISTRY._do_register("avg_pool3x3", _pool_conv)
