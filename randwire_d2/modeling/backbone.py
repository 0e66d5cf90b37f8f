"""RandWire as a Detectron2 backbone, and the builders that Detectron2 configs name."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils import comm
from torch import Tensor

from ..config import spec_from_config
from ..wiring import NetworkSpec, StageSpec
from ..wiring.dag import as_integer, as_positive
from ..wiring.network import check_spec
from .fused import Fused
from .fused_stage import RandWireStage
from .node import Init, apply_init
from .pretrained import PretrainedNetwork
from .stage import ConvStage
from .weights import dense_image

EdgeDropScope = Literal["process", "batch"]

logger = logging.getLogger(__name__)


class RandWire(PretrainedNetwork, Backbone):
    """A randomly wired network without its classifier (Table 1), for any image size.

    It is built from a spec, ``RandWire(spec)``, or from a config, ``RandWire(cfg, input_shape)``.
    In a LazyConfig, a generator's call gives the spec:
    ``L(RandWire)(spec=L(L(NetworkGenerator)(channels=109))(seed=1))``.

    Args:
        spec: the symbolic network.
        out_features: any of ``"stem"``, ``"res2"`` … ``"res5"``: strides 2, 4, 8, 16 and 32, the
            paper's conv1 … conv5. Stages after the last of them are not built.
        in_channels: the channels of the images; from a config, as many as MODEL.PIXEL_MEAN has
            values.
        norm: any norm of Detectron2: ``"BN"``, ``"SyncBN"``, ``"FrozenBN"``, ``"GN"``, …
        init: the mode of the convolutions' He initialisation, ``"fan_in"`` or ``"fan_out"``.
        edge_drop_prob: the probability with which a training mini-batch loses one edge whose
            target has input degree > 1 (§4.2, "Regular computation regime": 0.1).
        edge_drop_scope: what a mini-batch is if several processes share a batch. ``"process"``: the
            images of one process; each process draws its own edge. ``"batch"``: the images of all
            processes; all drop the edge that the first one draws. The paper may mean either.
        freeze_at: see ``freeze``.
        relu_features: whether a ReLU is applied to the features, as in a ResNet. Without it, they
            are the outputs of the stages: means of batch norms' outputs. The next stage reads the
            output without the ReLU in either case.
        fused: whether a stage runs as one function of fused operators, in channels_last, with the
            same weights and results as its nodes run one by one. This needs unchanged separable
            convolutions, and batch norms (frozen or not). ``"auto"``: every stage that can, if the
            operators work on the device; the log says which stages do not, and why. ``"on"``: a
            stage that can't raises ValueError. ``"off"``: no stage.
        recompute: whether a fused stage saves half as much for the backward pass and computes the
            rest again.
        cuda_graphs: whether a GPU replays a fused stage as a CUDA graph, after several calls with
            images of one size. The results are the same; the host needs less time.

    Raises:
        ValueError: ``spec`` is no spec; a feature, norm, node operation, init or scope is unknown;
            or a value is out of range.
    """

    @configurable
    def __init__(
        self,
        spec: NetworkSpec,
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
        norm: str = "BN",
        init: Init = "fan_in",
        edge_drop_prob: float = 0.0,
        edge_drop_scope: EdgeDropScope = "process",
        freeze_at: int = 0,
        relu_features: bool = True,
        fused: Fused = "auto",
        recompute: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        check_spec("RandWire is built from", spec)
        names = [layer.name for layer in spec.layers]
        unknown = [name for name in out_features if name not in names]
        if unknown or not out_features:
            raise ValueError(f"out_features must name some of {names}; got {list(out_features)}")
        in_channels = as_positive("in_channels", in_channels)
        if not 0 <= edge_drop_prob <= 1:
            raise ValueError(f"edge_drop_prob must be within 0 … 1; got {edge_drop_prob}")
        for argument, value, known in (
            ("init", init, get_args(Init)),
            ("edge_drop_scope", edge_drop_scope, get_args(EdgeDropScope)),
            ("fused", fused, get_args(Fused)),
        ):
            if value not in known:
                raise ValueError(f"{argument} must be {' or '.join(known)}; got {value!r}")
        self.spec = spec
        self._in_channels = in_channels
        self._norm = norm
        self._frozen = 0
        self.edge_drop_prob = edge_drop_prob
        self.edge_drop_scope = edge_drop_scope
        self.relu_features = relu_features
        self._out_features = [name for name in names if name in out_features]
        self._stage_names = names[: names.index(self._out_features[-1]) + 1]
        self._strides = {}
        self._said: set[tuple[Any, ...]] = set()
        options: Any = {"fused": fused, "recompute": recompute, "cuda_graphs": cuda_graphs}
        layers = [replace(spec.layers[0], in_channels=in_channels), *spec.layers[1:]]
        for layer in layers[: len(self._stage_names)]:
            stage: CNNBlockBase = (
                RandWireStage(layer, spec.node_op, norm, **options)
                if isinstance(layer, StageSpec)
                else ConvStage(layer, norm)
            )
            self.add_module(layer.name, stage)
            self._strides[layer.name] = _largest_stride(stage)
        apply_init(self, init)
        self.freeze(freeze_at)
        self._say_few_groups()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        if "RANDWIRE" not in cfg.MODEL:
            raise ValueError(
                "the config has no MODEL.RANDWIRE: import randwire_d2 before get_cfg() is called, "
                "or call add_randwire_config(cfg) before you merge a file"
            )
        if cfg.MODEL.RANDWIRE.NORM == "FrozenBN" and not cfg.MODEL.WEIGHTS:
            logger.warning(
                "MODEL.RANDWIRE.NORM is FrozenBN and MODEL.WEIGHTS is empty: with batch norms that "
                "were never trained, training diverges. Load weights, or use BN, SyncBN or GN."
            )
        return {
            "spec": spec_from_config(cfg),
            "out_features": cfg.MODEL.RANDWIRE.OUT_FEATURES,
            "in_channels": input_shape.channels,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "relu_features": cfg.MODEL.RANDWIRE.RELU_FEATURES,
            **configured_options(cfg),
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: images (N, in_channels, H, W), of any size.

        Returns:
            dict[str, Tensor]: feature name to (N, C, ceil(H / stride), ceil(W / stride)).
        """
        own = getattr(getattr(self.stem, "conv", None), "in_channels", None)  # may be replaced
        if x.dim() != 4 or (own and not torch.jit.is_tracing() and x.shape[1] != own):
            raise ValueError(
                f"this RandWire takes an input of shape (N, {own or 'C'}, H, W); got "
                f"{tuple(x.shape)}"
            )
        kept = self._draw_kept_edges(x.device) if self.training and self.edge_drop_prob else {}
        features = {}
        for name in self._stage_names:
            stage = getattr(self, name)
            x = stage(x, kept[name]) if name in kept else stage(x)
            if name in self._out_features:
                features[name] = F.relu(x) if self.relu_features else dense_image(x)
        if not torch.compiler.is_compiling():
            self._say_how_stages_ran()
        return features

    def _say_few_groups(self) -> None:
        """Log the groups of GN, unless they are the usual 32."""
        groups = {
            name: norm.num_groups
            for name in self._stage_names
            for norm in getattr(self, name).modules()
            if isinstance(norm, torch.nn.GroupNorm)
        }
        if any(number != 32 for number in groups.values()):
            said = ", ".join(f"{name} {number}" for name, number in groups.items())
            logger.info(f"GN has as many groups, up to 32, as divide the channels: {said}")

    def _say_how_stages_ran(self) -> None:
        """Log how the stages have just run, unless it was said before."""
        found = self._random_graphs().items()
        graphs = {name: s for name, s in found if s.plain_because is not None}  # not compiled
        reasons = tuple(stage.plain_because for stage in graphs.values())
        paddings = {name: stage.padding for name, stage in graphs.items() if stage.padding}
        replayed = [name for name, stage in graphs.items() if stage.graphs.replayed]
        how = reasons, tuple(paddings), tuple(replayed)
        if not reasons or how in self._said:
            return
        self._said.add(how)
        names: dict[str | None, list[str]] = {}
        for name, stage in graphs.items():
            names.setdefault(stage.plain_because, []).append(name)
        said = "; ".join(
            f"{', '.join(group)} {f'node by node, because {reason}' if reason else 'fused'}"
            for reason, group in names.items()
        )
        if paddings:
            said += (
                f"; beside their own, {', '.join(paddings)} have "
                f"{', '.join(map(str, paddings.values()))} channels of zeros, for tensor cores"
            )
        if replayed:
            said += f"; launches of {', '.join(replayed)} are replayed as CUDA graphs"
        failed = any(stage.failed for stage in graphs.values())
        logger.log(logging.WARNING if failed else logging.INFO, f"RandWire runs {said}")

    def _draw_kept_edges(self, device: torch.device) -> dict[str, Tensor]:
        """For each stage that can lose an edge, which edges it keeps; see ``RandWireStage``.

        With probability ``edge_drop_prob``, one edge of the network is dropped, drawn uniformly
        over all stages. (§4.2's "one edge" may also mean one edge of each random graph.) The result
        is a mask, not control flow: otherwise torch.compile would compile a network for each edge.

        The draw comes from torch's CPU generator, whose state a seed or a checkpoint restores. With
        the scope "batch", all processes must call this together, and use the first one's draw.
        """
        droppable = self._count_droppable_edges()
        total = sum(droppable.values())
        if not total:
            return {}
        drops = torch.rand((), device="cpu") < self.edge_drop_prob
        edge = torch.where(drops, torch.randint(total, (), device="cpu"), total)
        # Processes draw even if their draw is not used, so that their dropout is the same with
        # either scope.
        if self.edge_drop_scope == "batch":
            edge = comm.all_gather(edge)[0]
        kept = torch.arange(total, device=device) != edge.to(device, non_blocking=True)
        return dict(zip(droppable, kept.split([*droppable.values()]), strict=True))

    def _count_droppable_edges(self) -> dict[str, int]:
        """For each stage that is trained, how many edges can be dropped. Not cached, because a
        project may freeze stages later."""
        return {
            name: len(stage.plan.learned)
            for name, stage in self._random_graphs().items()
            if any(p.requires_grad for p in stage.parameters())
        }

    def _random_graphs(self) -> dict[str, Any]:
        """The randomly wired stages by name. If a stage was wrapped (for activation checkpointing,
        by FSDP, by torch.compile), this is the wrapper, which forwards the stage's attributes."""
        stages = {name: getattr(self, name) for name in self._stage_names}
        return {name: stage for name, stage in stages.items() if hasattr(stage, "plan")}

    def options(self) -> dict[str, Any]:
        return {
            "out_features": list(self._out_features),
            "in_channels": self._in_channels,
            "norm": self._norm,
            "edge_drop_prob": self.edge_drop_prob,
            "edge_drop_scope": self.edge_drop_scope,
            "freeze_at": self._frozen,
            "relu_features": self.relu_features,
        }

    def freeze(self, freeze_at: int = 0) -> "RandWire":
        """Freeze the first stages: 1 freezes the stem, 2 also res2, and so on; 0 freezes nothing.

        A frozen stage gets no gradients, its batch norms become FrozenBN, and none of its edges is
        dropped. ``freeze_at`` means the same as ``MODEL.BACKBONE.FREEZE_AT`` for Detectron2's
        ResNet: a number larger than that of the stages freezes all, a negative number none.

        Returns:
            RandWire: itself.

        Raises:
            ValueError: it is no integer.
        """
        freeze_at = as_integer("freeze_at", freeze_at)
        for name in self._stage_names[: max(freeze_at, 0)]:
            getattr(self, name).freeze()
        self._frozen = max(self._frozen, freeze_at)
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every feature that ``forward`` returns.

        The strides are those of the convolutions as they are now: a project may have dilated a
        stage.
        """
        shapes, stride = {}, 1
        for layer in self.spec.layers[: len(self._stage_names)]:
            built = self._strides[layer.name]  # when the stage's was 2
            stride = stride * 2 * _largest_stride(getattr(self, layer.name)) // built
            shapes[layer.name] = ShapeSpec(channels=layer.channels, stride=stride)
        return {name: shapes[name] for name in self._out_features}


def _largest_stride(stage: torch.nn.Module) -> int:
    """The largest stride of a stage's modules; 1 if none of them has the attribute ``stride``."""
    # What a stage says of its own stride is what was built; a wrapper around it says the same.
    own = (vars(m).get("stride", 1) for m in stage.modules() if not isinstance(m, CNNBlockBase))
    return max(s if isinstance(s, int) else s[0] for s in own)


def configured_options(cfg: CfgNode) -> dict[str, Any]:
    """The arguments that a backbone and a classifier have in common, as MODEL.RANDWIRE has them."""
    shared = ("NORM", "INIT", "EDGE_DROP_PROB", "EDGE_DROP_SCOPE")
    how = ("FUSED", "RECOMPUTE", "CUDA_GRAPHS")
    return {key.lower(): cfg.MODEL.RANDWIRE[key] for key in (*shared, *how)}


@BACKBONE_REGISTRY.register()
def build_randwire_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RandWire:
    """A plain RandWire from ``cfg.MODEL.RANDWIRE``."""
    backbone = RandWire(cfg, input_shape)
    # Heads adapt to any stride, so DeepLab V3+ and DC5 would train at twice theirs without a word.
    if (dilation := cfg.MODEL.RESNETS.RES5_DILATION) != 1:
        logger.warning(
            f"MODEL.RESNETS.RES5_DILATION is {dilation}, which a RandWire does not read: its res5 "
            "has stride 32. GUIDE.md, In other projects, has a builder that dilates it."
        )
    return backbone


@BACKBONE_REGISTRY.register()
def build_randwire_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RandWire under an FPN with p2 … p6, as Faster, Mask and Cascade R-CNN use it."""
    return _fpn(cfg, RandWire(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_randwire_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RandWire under an FPN with p3 … p7, as RetinaNet uses it."""
    bottom_up = RandWire(cfg, input_shape)
    _check_features(cfg, bottom_up, {*cfg.MODEL.FPN.IN_FEATURES, "res5"})  # p6 is made of res5
    in_channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(in_channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _check_features(cfg: CfgNode, bottom_up: RandWire, read: set[str]) -> None:
    missing = read - set(bottom_up.output_shape())
    if missing:
        raise ValueError(
            f"the FPN (MODEL.FPN.IN_FEATURES {list(cfg.MODEL.FPN.IN_FEATURES)}) reads "
            f"{sorted(missing)}, which MODEL.RANDWIRE.OUT_FEATURES "
            f"({list(bottom_up.output_shape())}) does not hand out"
        )


def _fpn(cfg: CfgNode, bottom_up: RandWire, top_block: torch.nn.Module) -> FPN:
    _check_features(cfg, bottom_up, set(cfg.MODEL.FPN.IN_FEATURES))
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
