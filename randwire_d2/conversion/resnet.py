"""ResNe(X)t in the layouts of torchvision and Detectron2, also with the names of Caffe2."""

import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torchvision
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck

from ..checkpoint import CONFIG_KEY, PREPROCESSING_KEY, Preprocessing, stored_config
from ..config import family
from .formats import RESNETS_KEY, Checkpoint
from .randwire import DETECTOR, find_prefix
from .source import (
    COUNTERS,
    EPS,
    IMAGENET_RGB,
    Features,
    Keys,
    ResNetArch,
    Source,
    finish,
    preprocessing_of,
)
from .target import Target

TORCHVISION, DETECTRON2 = "torchvision", "detectron2"
PREFIXES = ("", "network.", "backbone.", "backbone.bottom_up.")
_STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
# Detectron2's depths, by the number of blocks of res2 … res5 and whether they are bottlenecks.
DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
# Detectron2's weights with Caffe2's names: ResNets are MSRA's, ResNeXts Facebook's.
MSRA = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
FACEBOOK = Preprocessing("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))


def read_torchvision(
    checkpoint: Checkpoint, target: Target, preprocessing: Preprocessing | None
) -> Source:
    """Read a ResNe(X)t with torchvision's names, which mmdetection gives Caffe's weights, too.

    Args:
        checkpoint: the content of the file.
        target: its config may state other preprocessing and strides than torchvision's.
        preprocessing: that of the images, for a file that does not state it.

    Raises:
        ValueError: if Detectron2 has no such ResNet, or a key is missing or superfluous.
    """
    configured, stride_in_1x1 = target.preprocessing(), target.stated(_STRIDE)
    keys = Keys(checkpoint, TORCHVISION)
    arch = _arch(keys, "conv1.weight", "layer{}.{}.conv{}.weight", 1)
    notes = []
    if arch.DEPTH >= 50:  # the others have no 1×1 convolution
        arch = replace(arch, STRIDE_IN_1X1=bool(stride_in_1x1))
        whose = _whose(stride_in_1x1)
        notes.append(f"SOURCE does not tell its {_STRIDE}: {arch.STRIDE_IN_1X1} is {whose}")
    prepared = preprocessing_of(keys, preprocessing, configured or IMAGENET_RGB)
    if preprocessing is None and PREPROCESSING_KEY not in checkpoint.rest:
        options, whose = " ".join(prepared.options), _whose(configured)
        notes.append(f"SOURCE does not tell how its images were prepared: {options} is {whose}")
    shapes = backbone_shapes(arch)
    names = {ours: _torchvision_name(ours) for ours in shapes}
    weights = {ours: keys(theirs) for ours, theirs in names.items() if theirs in keys}
    _fold_stem_bias(keys, "conv1.bias", weights)
    weights = finish(keys, weights, shapes)
    unused = keys.unused({"classifier head": r"fc\..*", **COUNTERS})

    def features(images: Tensor) -> Features:
        return _torchvision_backbone(arch, checkpoint.state)(images)

    return Source(
        TORCHVISION, arch, weights, len(keys.used), unused, prepared, features, notes
    )  # fmt: skip


def _whose(stated: object) -> str:
    return "assumed, as of torchvision's own" if stated is None else "the config's"


def _torchvision_name(name: str) -> str:
    """torchvision's name of a weight: ``layer1.0.bn1.bias`` for ``res2.0.conv1.norm.bias``."""
    name = name.removeprefix("stem.").replace("shortcut.norm.", "downsample.1.")
    name = name.replace("shortcut.", "downsample.0.")
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    return re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)


def _torchvision_backbone(arch: ResNetArch, state: dict[str, Tensor]) -> nn.Module:
    """torchvision's ResNet without its fc layer, from images to res2 … res5."""
    network = getattr(torchvision.models, f"resnet{arch.DEPTH}")(
        groups=arch.NUM_GROUPS, width_per_group=arch.WIDTH_PER_GROUP
    )
    if arch.STRIDE_IN_1X1:
        for block in network.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    if "conv1.bias" in state:
        network.conv1.bias = nn.Parameter(torch.zeros_like(state["conv1.bias"]))
    backbone = IntermediateLayerGetter(network, {f"layer{i}": f"res{i + 1}" for i in range(1, 5)})
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    return backbone.eval()


def read_detectron2(
    checkpoint: Checkpoint, target: Target, preprocessing: Preprocessing | None
) -> Source:
    """Read a ResNe(X)t with Detectron2's or Caffe2's names.

    Args:
        checkpoint: the content of the file.
        target: its config gives MODEL.RESNETS.STRIDE_IN_1X1, for a file that does not state it.
        preprocessing: that of the images, for a file that does not state it.

    Raises:
        ValueError: if Detectron2 has no such ResNet, a key is missing or superfluous, or stride or
            preprocessing is unknown.
    """
    caffe2 = "conv1_w" in checkpoint.state
    if caffe2:
        if any("_gn_" in name for name in checkpoint.state):
            raise ValueError(f"{checkpoint.path!r} has group norms: only batch norms are converted")
        try:
            renamed, _ = convert_c2_detectron_names(checkpoint.state)
        except (AssertionError, IndexError, ValueError) as e:
            raise ValueError(f"{checkpoint.path!r} has blobs that Detectron2 can't rename") from e
        checkpoint = Checkpoint(checkpoint.path, renamed, checkpoint.rest)
    keys = Keys(checkpoint, DETECTRON2)
    prefix = find_prefix(keys, "stem.conv1.weight", PREFIXES)
    arch = _arch(keys, f"{prefix}stem.conv1.weight", prefix + "res{}.{}.conv{}.weight", 2)
    author = checkpoint.rest.get("__author__")
    default = IMAGENET_RGB if author == "torchvision" else None
    if caffe2:
        default = FACEBOOK if arch.NUM_GROUPS > 1 else MSRA
    stride = _stride_in_1x1(keys, arch, prefix, caffe2, target.stated(_STRIDE))
    arch = replace(arch, STRIDE_IN_1X1=stride)
    weights = _read_weights(keys, arch, prefix, caffe2)
    head = rf"{re.escape(prefix)}(linear|stem\.fc|fc\d*)\..*"
    unused = keys.unused({"classifier head": head, **COUNTERS, **DETECTOR})

    def features(images: Tensor) -> Features:
        # Caffe2's norms have no statistics. A FrozenBN's initial ones, 0 and 1 - eps, do nothing.
        network = _network(arch, "FrozenBN" if caffe2 else "BN").eval()
        own = {k.removeprefix(prefix): v for k, v in keys.state.items() if k.startswith(prefix)}
        expected = network.state_dict()
        network.load_state_dict(expected | {k: v for k, v in own.items() if k in expected})
        if "stem.conv1.bias" in own:
            network.stem.conv1.bias = nn.Parameter(own["stem.conv1.bias"].float())
        return network(images)

    return Source(
        DETECTRON2, arch, weights, len(keys.used), unused,
        preprocessing_of(keys, preprocessing, default), features,
    )  # fmt: skip


def _read_weights(keys: Keys, arch: ResNetArch, prefix: str, caffe2: bool) -> dict[str, Tensor]:
    shapes = backbone_shapes(arch)
    weights = {}
    for name in shapes:
        if re.search(r"\.norm\.running_(mean|var)$", name) and caffe2:
            # Caffe2's batch norms have only scale and shift: these statistics do nothing.
            like = keys(prefix + name.rpartition(".")[0] + ".weight")
            weights[name] = (
                torch.zeros_like(like) if name.endswith("mean") else torch.full_like(like, 1 - EPS)
            )
        elif prefix + name in keys:
            weights[name] = keys(prefix + name)
    _fold_stem_bias(keys, f"{prefix}stem.conv1.bias", weights)
    return finish(keys, weights, shapes)


def _fold_stem_bias(keys: Keys, name: str, weights: dict[str, Tensor]) -> None:
    """Fold the bias of MSRA's stem, which Detectron2's stem lacks, into its norm's mean."""
    mean = weights.get("stem.conv1.norm.running_mean")
    if name in keys and mean is not None:
        bias = keys(name)
        if bias.shape != mean.shape:
            shapes = f"{tuple(bias.shape)}, its norm {tuple(mean.shape)}"
            raise keys.error(f"{name} has the shape {shapes}")
        weights["stem.conv1.norm.running_mean"] = mean - bias


def _stride_in_1x1(
    keys: Keys, arch: ResNetArch, prefix: str, caffe2: bool, given: bool | None
) -> bool:
    """STRIDE_IN_1X1 as the file states it; else as its author always has it; else ``given``."""
    rest = keys.checkpoint.rest
    stated: bool | None = None
    if RESNETS_KEY in rest:
        try:
            stated = bool(rest[RESNETS_KEY]["STRIDE_IN_1X1"])
        except (KeyError, TypeError) as e:
            raise keys.error(f"its entry {RESNETS_KEY!r} is damaged: {e!r}") from e
    elif arch.DEPTH < 50:
        stated = False  # basic blocks have no 1×1 convolution: the key has no effect
    elif caffe2:
        stated = arch.NUM_GROUPS == 1
    elif rest.get("__author__") == "torchvision":
        stated = False
    elif CONFIG_KEY in rest:
        with suppress(ValueError):  # another project's config
            cfg = stored_config(rest)
            if cfg is not None and family(cfg) == "RESNETS":
                stated = cfg.MODEL.RESNETS.STRIDE_IN_1X1
    elif given is None and prefix == "network." and PREPROCESSING_KEY in rest:
        stated = False  # an older version wrote the file, with a config of configs/imagenet
    if stated is None and given is None:
        raise keys.error(
            "the weights do not tell where its bottlenecks have their stride; say so with "
            f"{_STRIDE} True or False (MSRA's: True; torchvision's: False)"
        )
    return bool(given) if stated is None else stated


def _arch(keys: Keys, stem: str, conv: str, first: int) -> ResNetArch:
    """The architecture, from the weights' shapes. They do not show STRIDE_IN_1X1: it is False.

    Args:
        stem: the name of the stem's weight.
        conv: the name of a block's weight, with ``{}`` for stage, block and convolution.
        first: the number of the first stage.
    """
    stem_channels = len(keys(stem))
    pattern = re.escape(conv).replace(r"\{\}", "{}")
    blocks = tuple(
        keys.indices(pattern.format(stage, r"(\d+)", 1) + "$") for stage in range(first, first + 4)
    )
    bottleneck = conv.format(first, 0, 3) in keys
    if (blocks, bottleneck) not in DEPTHS:
        raise keys.error(
            f"Detectron2's ResNets have the depths {sorted(DEPTHS.values())}; this one has "
            f"{' + '.join(map(str, blocks))} {'bottlenecks' if bottleneck else 'basic blocks'}"
        )
    middle = keys(conv.format(first, 0, 2))
    last = keys(conv.format(first, 0, 3 if bottleneck else 2))
    groups = middle.shape[0] // max(middle.shape[1], 1)
    return ResNetArch(
        DEPTH=DEPTHS[blocks, bottleneck],
        NUM_GROUPS=groups,
        WIDTH_PER_GROUP=middle.shape[0] // max(groups, 1),
        STEM_OUT_CHANNELS=stem_channels,
        RES2_OUT_CHANNELS=len(last),
        STRIDE_IN_1X1=False,
    )


def backbone_shapes(arch: ResNetArch) -> dict[str, torch.Size]:
    """The names and shapes of a bare backbone's weights."""
    with torch.device("meta"):
        network = _network(arch, "FrozenBN")
    return {name: value.shape for name, value in network.state_dict().items()}


def _network(arch: ResNetArch, norm: str) -> Any:
    cfg: CfgNode = get_cfg()
    cfg.MODEL.RESNETS.update(vars(arch))
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))
