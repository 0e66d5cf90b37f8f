"""The costs of a network's parts: a classifier's from its spec, any other model's with fvcore."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import FPN, Backbone, ROIHeads, build_model
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from ..config import is_classifier, spec_from_config
from ..modeling import RandWireStage
from ..modeling.image_classifier import build_network
from ..text import one_line
from ..wiring import Complexity, NetworkSpec, StageSpec, complexity

# fvcore's names of convolutions, fc layers and matrix products.
ATTENTION = "scaled_dot_product_attention"  # fvcore has no formula for it; ``_attention`` is ours
COUNTED = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "einsum", ATTENTION)
LEARNED = (nn.modules.conv._ConvNd, nn.Linear)
# With these keys, as many proposals and detections as the config allows reach the heads.
KEEP_ALL = (
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0),
)


@dataclass(frozen=True)
class Part:
    """A stage of a network, or a part of a detector.

    Attributes:
        name: the name of the stage, or of a module of the built model.
        cost: its cost for one image.
        output: (height, width) of its output, if this is one feature map.
        channels: the channels of its output.
        nodes, edges: the size of its random graph, if it has one.
        rois: the number of regions it is computed for, if it works by region.
    """

    name: str
    cost: Complexity
    output: tuple[int, int] | None = None
    channels: int | None = None
    nodes: int | None = None
    edges: int | None = None
    rois: int | None = None


def total_cost(parts: Iterable[Part]) -> Complexity:
    """The cost of all parts together."""
    return sum((part.cost for part in parts), Complexity())


def default_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) of a config's test images. A detector's vary: here the shorter side and 5/3
    of it, rounded up to multiples of 32, which is 800 × 1344 in the paper's setting."""
    if is_classifier(cfg):
        return cfg.INPUT.TEST_CROP_SIZE, cfg.INPUT.TEST_CROP_SIZE
    shorter = cfg.INPUT.MIN_SIZE_TEST or 800  # with 0, images are not resized
    longer = min(cfg.INPUT.MAX_SIZE_TEST, shorter * 5 // 3)
    return -(-shorter // 32) * 32, -(-longer // 32) * 32


def network_parts(cfg: CfgNode, height: int, width: int) -> list[Part]:
    """The parts of a config's network, with their costs for one image of height × width pixels.

    Raises:
        ValueError: the config describes no network.
    """
    if not is_classifier(cfg):
        return detector_parts(cfg, height, width)
    name = cfg.MODEL.BACKBONE.NAME
    if cfg.MODEL.CLASSIFIER.TORCHVISION.NAME or name == "build_resnet_backbone":
        return module_parts(build_network(cfg), torch.zeros(1, 3, height, width))
    if name == "build_randwire_backbone":
        return spec_parts(spec_from_config(cfg), height, width, cfg.MODEL.CLASSIFIER.NUM_CLASSES)
    raise ValueError(f"a classifier has a plain RandWire or ResNet; got {name!r}")


def spec_parts(spec: NetworkSpec, height: int, width: int, num_classes: int) -> list[Part]:
    """The rows of Table 1, for the classifier of a spec."""
    costs = complexity(spec, height, width, num_classes).stages
    parts = []
    for i, layer in enumerate(spec.layers):
        stride = 2 ** (i + 1)
        output = (-(-height // stride), -(-width // stride))
        dag = layer.dag if isinstance(layer, StageSpec) else None
        graph = (dag.num_nodes, len(dag.edges)) if dag else (None, None)
        parts.append(Part(layer.name, costs[layer.name], output, layer.channels, *graph))
    return [*parts, Part("head", costs["head"], (1, 1), num_classes)]


def detector_parts(cfg: CfgNode, height: int, width: int) -> list[Part]:
    """The parts of a detector at test time, for one image of height × width pixels.

    The cost of the heads grows with the number of proposals and detections: here, as many as the
    config allows (MODEL.RPN.POST_NMS_TOPK_TEST, TEST.DETECTIONS_PER_IMAGE).

    Raises:
        ValueError: Detectron2 can't build the model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *KEEP_ALL])
    # The file is not read; without one, a RandWire with FrozenBN would warn about training.
    cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS or "zeros"
    try:
        model = build_model(cfg)
    except (KeyError, AssertionError) as e:  # from a registry, or from Detectron2's own checks
        raise ValueError(f"the model can't be built: {one_line(e, 300)}") from e
    image = torch.zeros(len(cfg.MODEL.PIXEL_MEAN), height, width)
    return module_parts(model, [{"image": image}])


def module_parts(model: nn.Module, inputs: Any) -> list[Part]:
    """The parts of a built model in eval mode, counted while it runs on a CPU.

    Multiply-adds are fvcore's count of convolutions, fc layers and matrix products, plus RandWire's
    weighted sums, which fvcore does not count. Activations are the outputs of convolutions and fc
    layers. Parameters are fvcore's count, plus those of frozen norms.

    Args:
        model: its weights are set to 0, so that an untrained deep network does not overflow.
        inputs: the argument of its forward, for one image.
    """
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    seen = _run(model, inputs)
    parts, rest = [], seen.cost("")
    for title, names in _divide(model):
        cost = total_cost(Part(name, seen.cost(name)) for name in names)
        if cost == Complexity():  # images' means, anchors, pooling
            continue
        rest = _minus(rest, cost)
        parts.append(_part(seen, title, names, cost))
    return parts if rest == Complexity() else [*parts, Part("others", rest)]


@dataclass(frozen=True)
class _Run:
    """The record of one forward pass of a model.

    Attributes:
        modules: all modules, by name; the model is ``""``.
        shapes: the shapes of the output tensors of each module, in the order of the calls.
        operators: fvcore's multiply-adds of each module with its children, by operator.
        params: the parameters of each module with its children.
    """

    modules: dict[str, nn.Module]
    shapes: dict[str, list[tuple[int, ...]]]
    operators: Mapping[str, Mapping[str, float]]
    params: Mapping[str, int]

    def cost(self, name: str) -> Complexity:
        """The cost of a module with its children."""
        flops = sum(self.operators[name].get(operator, 0) for operator in COUNTED)
        activations = 0
        for inner, module in self.modules.items():
            if name not in _owners(inner):
                continue
            for shape in self.shapes[inner]:
                elements = torch.Size(shape).numel()
                if isinstance(module, LEARNED):
                    activations += elements
                elif isinstance(module, RandWireStage):
                    flops += elements * sum(len(p) for p in module.plan.predecessors if len(p) > 1)
        return Complexity(self.params[name], int(flops), activations)


def _run(model: nn.Module, inputs: Any) -> _Run:
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[name].append(tuple(int(n) for n in output.shape))

    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_forward_hook(partial(record, name))
    with warnings.catch_warnings(), _attention_in_parts():
        warnings.simplefilter("ignore")  # the tracer's warnings
        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(f"aten::{ATTENTION}", _attention)
        # FlopCountAnalysis wraps the model into an adapter, as its only child.
        operators = {
            name.removeprefix("model").removeprefix("."): counts
            for name, counts in analysis.by_module_and_operator().items()
            if name
        }
    params = parameter_count(model)
    for name, module in modules.items():
        if isinstance(module, FrozenBatchNorm2d):  # its parameters are buffers
            for owner in _owners(name):
                params[owner] += 2 * module.num_features
    return _Run(modules, shapes, operators, params)


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    query, key, value = map(get_shape, inputs[:3])
    return torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Disable PyTorch's fused operator for an attention layer, which fvcore counts as 0."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _part(seen: _Run, title: str, names: Sequence[str], cost: Complexity) -> Part:
    module, shapes = seen.modules[names[0]], seen.shapes[names[0]]
    output = shapes[0] if len(names) == 1 and len(shapes) == 1 else ()
    inside = (n for n in seen.modules if set(_owners(n)) & set(names) and seen.shapes[n])
    images = next((seen.shapes[n][0][0] for n in inside), 1)
    predecessors = module.plan.predecessors if isinstance(module, RandWireStage) else None
    return Part(
        title,
        cost,
        output=(output[2], output[3]) if len(output) == 4 else None,
        channels=output[1] if len(output) > 1 else None,
        nodes=len(predecessors) if predecessors else None,
        edges=sum(map(len, predecessors)) if predecessors else None,
        rois=images if images > 1 else None,
    )


def _owners(name: str) -> list[str]:
    """The names of a module and its parents: ``"a.b"`` → ``["", "a", "a.b"]``."""
    words = name.split(".") if name else []
    return [".".join(words[:i]) for i in range(len(words) + 1)]


def _minus(a: Complexity, b: Complexity) -> Complexity:
    return Complexity(a.params - b.params, a.flops - b.flops, a.activations - b.activations)


def _divide(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the parts to count separately, each with its modules' names, in the data's order."""
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    if isinstance(module, FPN):
        bottom_up = f"{prefix}bottom_up"
        yield from _divide(module.bottom_up, f"{bottom_up}.")
        yield f"{prefix}fpn", [name for name, _ in children if name != bottom_up]
        return
    for name, child in children:
        if isinstance(child, (Backbone, ROIHeads)):
            yield from _divide(child, f"{name}.")
        else:
            yield name, [name]
