"""A plain reference RandWire, written from the paper's sentences; tests compare every other
implementation with it.

Nothing here comes from ``randwire_d2.modeling``, and nothing is fast or fused. The operations are
elementary, such as slices, products, sums and ReLUs, so autograd's gradients are a reference, too.

Interface (stable; fast paths are tested against it):

    result = backbone(spec, state, images, train=True)      # result.features["res2"], …
    result = classifier(spec, state, images, train=True)    # and result.logits
    result.running["res3.nodes.0.norm.running_mean"]        # after the step, in train mode

``state`` maps the names of a ``state_dict`` to tensors, of any dtype; tensors that require
gradients get them. The names, for a part such as ``res3`` (a classifier's ``state`` has all of
them below ``backbone.``, beside ``conv.weight``, ``norm.*``, ``fc.weight`` and ``fc.bias``):

    stem.conv.weight                          conv1, and res2 of the small regime
    res3.nodes.7.weight                       w of node 7, one per input edge in ascending order
                                              of the predecessor; only where there are several
    res3.nodes.7.conv.depthwise.weight        sep_conv3x3
    res3.nodes.7.conv.pointwise.weight        sep_conv3x3, max_pool3x3, avg_pool3x3
    res3.nodes.7.conv.weight                  conv3x3
    stem.norm.*, res3.nodes.7.norm.*          weight, bias, running_mean, running_var
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from randwire_d2.wiring import NetworkSpec, StageSpec

EPS = 1e-5
MOMENTUM = 0.1

Edge = tuple[str, int, int]  # (stage, u, v)
State = Mapping[str, Tensor]


@dataclass
class Result:
    """The outputs of a forward pass, and the running statistics after it.

    Attributes:
        features: the output (N, C, H, W) of every part: ``"stem"``, ``"res2"`` … ``"res5"``.
        running: the running statistics after the pass, by their names in ``state``; only of norms
            that used batch statistics.
        logits: (N, num_classes); only from ``classifier``.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    running: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


def backbone(
    spec: NetworkSpec,
    state: State,
    images: Tensor,
    *,
    train: bool,
    dropped: Edge | None = None,
    frozen: Collection[str] = (),
    prefix: str = "",
) -> Result:
    """Compute every feature of a network.

    Args:
        spec: the symbolic network.
        state: see the module's docstring.
        images: (N, 3, H, W).
        train: whether norms use the statistics of the batch.
        dropped: the edge (stage, u, v) to take out of the graph.
        frozen: the parts, such as ``"stem"``, whose norms always use running statistics.
        prefix: the prefix of the names in ``state``.
    """
    result = Result()
    x = images
    # "For conv1 and/or conv2 we use a single convolutional layer for simplicity with multiple
    # random graphs following."
    for conv in spec.convs:
        # Table 1: "We use conv to denote a ReLU-Conv-BN triplet (expect conv1 is Conv-BN)."
        if conv.name != "stem":
            x = F.relu(x)
        # "The change of the output size implies a stride of 2 (omitted in table) in the
        # convolutions that are right after the input of each stage."
        name = f"{prefix}{conv.name}"
        x = dense(x, state[f"{name}.conv.weight"], stride=2)
        x = batch_norm(x, state, f"{name}.norm", train and conv.name not in frozen, result)
        result.features[conv.name] = x
    for stage in spec.stages:
        # "One random graph represents one stage, and it is connected to its preceding/succeeding
        # stage by its unique input/output node."
        drop = dropped[1:] if dropped is not None and dropped[0] == stage.name else None
        stage_train = train and stage.name not in frozen
        name = f"{prefix}{stage.name}"
        x = graph(stage, spec.node_op, state, name, x, stage_train, drop, result)
        result.features[stage.name] = x
    return result


def classifier(
    spec: NetworkSpec,
    state: State,
    images: Tensor,
    *,
    train: bool,
    dropped: Edge | None = None,
    head_relu: bool = False,
) -> Result:
    """Compute a network with its classifier; like ``backbone``, without dropout.

    With ``head_relu``, which the paper does not mention, a ReLU precedes the global average pool.
    """
    result = backbone(spec, state, images, train=train, dropped=dropped, prefix="backbone.")
    # Table 1: "1×1 conv, 1280-d / global average pool, 1000-d fc"; a conv is ReLU-Conv-BN.
    x = F.relu(result.features["res5"])
    x = dense(x, state["conv.weight"], stride=1)
    x = batch_norm(x, state, "norm", train, result)
    x = F.relu(x) if head_relu else x
    x = x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
    result.logits = x @ state["fc.weight"].T + state["fc.bias"]
    return result


def graph(
    stage: StageSpec,
    node_op: str,
    state: State,
    name: str,
    x: Tensor,
    train: bool,
    dropped: tuple[int, int] | None,
    result: Result,
) -> Tensor:
    """Compute a stage, which is one random graph."""
    sent: list[Tensor] = []
    # Edges point "from the smaller-index node to the larger-index one": this order is topological.
    for v in range(stage.dag.num_nodes):
        sources = sorted(source for source, target in stage.dag.edges if target == v)
        node_name = f"{name}.nodes.{v}"
        if sources:
            # "Aggregation: The input data (from one or more edges) to a node are combined via a
            # weighted sum; the weights are learnable and positive." "Applying sigmoid on
            # unrestricted weights ensures they are positive."
            terms = []
            for i, u in enumerate(sources):
                # "for each training mini-batch, we randomly remove one edge"
                if (u, v) == dropped:
                    continue
                if len(sources) == 1:  # DESIGN.md: a single input edge has no weight
                    terms.append(sent[u])
                else:
                    terms.append(sent[u] * torch.sigmoid(state[f"{node_name}.weight"][i]))
            data = torch.stack(terms).sum(dim=0)
            stride = 1
        else:
            # "This is the unique input node that sends out the same copy of input data to all
            # original input nodes." "For all nodes that are directly connected to the input node,
            # their transformations are modified to have a stride of 2."
            data = x
            stride = 2
        # "Transformation: The aggregated data is processed by a transformation defined as a
        # ReLU-convolution-BN triplet."
        data = F.relu(data)
        data = convolution(data, node_op, state, f"{node_name}.conv", stride)
        data = batch_norm(data, state, f"{node_name}.norm", train, result)
        # "Distribution: The same copy of the transformed data is sent out by the output edges."
        sent.append(data)
    # "This is the unique output node; we have it compute the (unweighted) average from all
    # original output nodes." An output node is one without any output edge.
    outputs = [
        sent[u]
        for u in range(stage.dag.num_nodes)
        if not any(source == u for source, _ in stage.dag.edges)
    ]
    return torch.stack(outputs).sum(dim=0) / len(outputs)


def convolution(x: Tensor, node_op: str, state: State, name: str, stride: int) -> Tensor:
    """Compute one of the four operations of §4.1, "Node operations"."""
    if node_op == "conv3x3":  # "3×3 (regular) convolution"
        return dense(x, state[f"{name}.weight"], stride)
    if node_op == "sep_conv3x3":
        # "a 3×3 separable convolution is a 3×3 depth-wise convolution followed by a 1×1
        # convolution, with no non-linearity in between"
        weight = state[f"{name}.depthwise.weight"]  # (C, 1, 3, 3)
        x = sum(
            window * weight[:, 0, i, j, None, None]
            for (i, j), window in windows(x, 3, stride, fill=0)
        )
    elif node_op == "max_pool3x3":  # "3×3 max-/average-pooling followed by a 1×1 convolution"
        x = torch.stack([w for _, w in windows(x, 3, stride, fill=-torch.inf)]).amax(dim=0)
    elif node_op == "avg_pool3x3":  # the mean over the pixels that exist
        total = sum(window for _, window in windows(x, 3, stride, fill=0))
        count = sum(window for _, window in windows(torch.ones_like(x), 3, stride, fill=0))
        x = total / count
    else:
        raise ValueError(f"the oracle does not know {node_op!r}")
    return dense(x, state[f"{name}.pointwise.weight"], stride=1)


def dense(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A convolution without bias, with weight (out, in, k, k) and zero padding k // 2."""
    return sum(
        torch.einsum("oc,nchw->nohw", weight[:, :, i, j], window)
        for (i, j), window in windows(x, weight.shape[-1], stride, fill=0)
    )


def windows(
    x: Tensor, kernel: int, stride: int, fill: float
) -> list[tuple[tuple[int, int], Tensor]]:
    """For each position (i, j) in a kernel × kernel window, every output pixel's input there."""
    height, width = x.shape[-2:]
    radius = kernel // 2
    padded = F.pad(x, (radius,) * 4, value=fill)
    return [
        ((i, j), padded[:, :, i : i + height : stride, j : j + width : stride])
        for i in range(kernel)
        for j in range(kernel)
    ]


def batch_norm(x: Tensor, state: State, name: str, train: bool, result: Result) -> Tensor:
    """Ioffe and Szegedy's batch normalization, [17] in the paper."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if train:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        batch_mean = x.sum(dim=(0, 2, 3)) / count
        batch_var = ((x - batch_mean[:, None, None]) ** 2).sum(dim=(0, 2, 3)) / count
        with torch.no_grad():  # the running variance is the unbiased one
            result.running[f"{name}.running_mean"] = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean
            result.running[f"{name}.running_var"] = (
                1 - MOMENTUM
            ) * var + MOMENTUM * batch_var * count / (count - 1)
        mean, var = batch_mean, batch_var
    normal = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + EPS)
    return normal * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
