"""This project's own layout: checkpoints of a classifier, a bare backbone or a detector."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoint import Preprocessing, Wiring
from ..modeling import RandWire
from ..wiring import NetworkSpec
from .formats import Checkpoint
from .head import read_head
from .source import COUNTERS, Features, Keys, Source, finish, preprocessing_of
from .target import Target

LAYOUT = "randwire"
PREFIXES = ("", "backbone.", "network.backbone.", "backbone.bottom_up.")
DETECTOR = {
    "FPN": r"(backbone\.)?(fpn_|top_block\.).*",
    "detector's heads": r"(proposal_generator|roi_heads|head|sem_seg_head|anchor_generator"
    r"|box_head|mask_head|cls_score|bbox_pred)\..*",  # the last ones are Caffe2's
    "preprocessing, which has its own entry": r"pixel_(mean|std)",
}


def find_prefix(keys: Keys, first: str, prefixes: tuple[str, ...]) -> str:
    """The prefix of a backbone's names, recognised by the name of its first weight."""
    found = [key.removesuffix(first) for key in keys.state if re.search(rf"(^|\.){first}$", key)]
    if len(found) != 1 or found[0] not in prefixes:
        raise keys.error(
            f"{first!r} must occur once, after one of the prefixes {list(prefixes)}; "
            f"found are {found}"
        )
    return found[0]


def read(checkpoint: Checkpoint, target: Target, preprocessing: Preprocessing | None) -> Source:
    """Read a RandWire of this project.

    Args:
        checkpoint: the content of the file.
        target: its config gives what the file does not state: the wiring, and whether the
            classifier has a ReLU before its pool.
        preprocessing: that of the images, for a file that does not state it.

    Raises:
        ValueError: if the weights do not fit the wiring, or wiring or preprocessing is unknown.
    """
    keys = Keys(checkpoint, LAYOUT)
    prefix = find_prefix(keys, "stem.conv.weight", PREFIXES)
    wiring = _wiring(keys)
    spec = target.spec() if wiring is None else wiring.spec
    shapes = backbone_shapes(spec)
    weights = {name: keys(prefix + name) for name in shapes if prefix + name in keys}
    weights = finish(keys, weights, shapes)
    before = prefix.removesuffix("backbone.")
    head, notes = None, []
    if target.with_head:
        head_relu = None if wiring is None else wiring.head_relu
        if head_relu is None:
            head_relu = bool(target.stated("MODEL.CLASSIFIER.HEAD_RELU"))
            notes = [f"SOURCE does not tell its MODEL.CLASSIFIER.HEAD_RELU: {head_relu} is assumed"]
        names = {part: f"{before}{part}" for part in ("conv", "norm", "fc")}
        head = read_head(keys, spec.stages[-1].channels, **names, relu=head_relu)
    classifier = rf"{re.escape(before)}(conv|norm|fc)\..*"
    unused = keys.unused({**COUNTERS, "classifier head": classifier, **DETECTOR})
    return Source(
        layout=LAYOUT,
        network=spec,
        weights=weights,
        used=len(keys.used),
        unused=unused,
        preprocessing=preprocessing_of(keys, preprocessing, None),
        features=_features(spec, checkpoint.state, prefix),
        notes=notes,
        head=head,
    )


def _wiring(keys: Keys) -> Wiring | None:
    try:
        return Wiring.of(keys.checkpoint.rest)
    except ValueError as e:
        raise keys.error(str(e)) from e


def backbone_shapes(spec: NetworkSpec) -> dict[str, torch.Size]:
    """The names and shapes of a bare backbone's weights."""
    with torch.device("meta"):
        backbone = RandWire(spec, norm="FrozenBN")
    return {name: value.shape for name, value in backbone.state_dict().items()}


def _features(
    spec: NetworkSpec, state: dict[str, Tensor], prefix: str
) -> Callable[[Tensor], Features]:
    def compute(images: Tensor) -> Features:
        backbone = RandWire(spec, norm="BN", relu_features=False).eval()
        names = [key for key in state if key.startswith(prefix)]
        own = {name.removeprefix(prefix): state[name] for name in names}
        backbone.load_state_dict({k: v for k, v in own.items() if k in backbone.state_dict()})
        return backbone(images)

    return compute
