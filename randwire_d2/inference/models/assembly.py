"""From what a checkpoint holds to a model that can be called."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ...checkpoint import (
    EMA_KEY,
    Classes,
    Wiring,
    check_wiring,
    stored_config,
)
from ...config import is_classifier, set_spec
from ...data.detection.classes import category_ids, thing_classes
from ...devices import device_here
from ...modeling.on_meta import build_on_meta
from ...runs import RunFolder
from ...text import brief, one_line, prefixed
from ...weight_files.reading import check_state

_SPARE = 1 << 28  # bytes that a model may take while it is built, beside twice its weights'


def assemble(
    file: str, checkpoint: Mapping[str, Any], device: str | None
) -> tuple[CfgNode, nn.Module, Classes]:
    """The config, frozen, the model in eval mode, and its classes.

    Args:
        file: where the checkpoint lies.
        checkpoint: what it holds.
        device: as of ``load_detector``.

    Raises:
        ValueError: it is no whole model; one line.
    """
    state = checkpoint.get(EMA_KEY, checkpoint["model"])
    check_state(file, state)
    with prefixed(file):
        cfg = _config(file, checkpoint)
        cfg.MODEL.WEIGHTS = os.path.abspath(file)
        cfg.MODEL.DEVICE = device_here("device", device)
        cfg.freeze()
        # Without memory, or much more than the weights have: a config of some bytes can describe
        # any number of them.
        most = _SPARE + 2 * sum(value.nbytes for value in state.values())
        _check_weights(_build(cfg, partial(build_on_meta, most=most)).state_dict(), state)
        model = _build(cfg).to(cfg.MODEL.DEVICE)
        check_wiring(model, checkpoint)
        _load_strictly(model, state)
        classes = _classes(cfg, checkpoint)
    return cfg, model.eval(), classes


def _config(file: str, checkpoint: Mapping[str, Any]) -> CfgNode:
    """That in the checkpoint; of an older one, that of the run in whose folder it lies."""
    if cfg := stored_config(checkpoint):
        return cfg
    names = list(checkpoint["model"])
    if names and all(name.startswith("backbone.") for name in names):
        raise ValueError(
            "it is a backbone without heads, as tools/convert_checkpoint.py writes it: train a "
            "detector that starts from it, with tools/train_net.py and it as MODEL.WEIGHTS"
        )
    run = RunFolder(os.path.dirname(file))
    if not run.config_file.is_file():
        raise ValueError(
            "it holds no config, as checkpoints of older versions and of other projects do not: "
            "put the config.yaml of its run into the folder that it lies in"
        )
    cfg = run.config()
    if wiring := Wiring.of(checkpoint):
        set_spec(cfg, wiring.spec)
    return cfg


def _build(
    cfg: CfgNode, how: Callable[[Callable[[], nn.Module]], nn.Module] = lambda build: build()
) -> nn.Module:
    if cfg.MODEL.META_ARCHITECTURE in ("ProposalNetwork", "SemanticSegmentor"):
        raise ValueError(f"a {cfg.MODEL.META_ARCHITECTURE} finds no instances of classes")
    try:
        return how(lambda: META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg))
    # KeyError: of a registry; the others: of values that no constructor expects.
    except (
        LookupError, AssertionError, AttributeError, TypeError, ArithmeticError, RuntimeError
    ) as e:  # fmt: skip
        reason = one_line(e.args[0] if e.args else type(e).__name__)
        raise ValueError(
            f"its config's model can't be built ({reason}); import what registers its parts first"
        ) from e


def _check_weights(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    different = sorted(set(ours) ^ set(theirs))
    missing = len(set(ours) - set(theirs))
    if different:
        raise ValueError(
            f"its weights are not those of its config's model: {missing} weights of the model are "
            f"missing, {len(different) - missing} are none of it, such as {brief(different[0])}"
        )
    for name, value in ours.items():
        if tuple(value.shape) != tuple(theirs[name].shape):
            raise ValueError(
                f"its weights are not those of its config's model: {name!r} is "
                f"{tuple(theirs[name].shape)}, the model's {tuple(value.shape)}"
            )


def _load_strictly(model: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as e:
        reason = one_line(e, 300)
        raise ValueError(f"its weights are not those of its config's model: {reason}") from e


def _classes(cfg: CfgNode, checkpoint: Mapping[str, Any]) -> Classes:
    """The checkpoint's; of an older one, those of its data set if that is known."""
    names, ids, stuff, keypoints = Classes.of(checkpoint)
    if not names and cfg.DATASETS.TRAIN and cfg.DATASETS.TRAIN[0] in MetadataCatalog.list():
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        with suppress(ValueError):  # its files may not be on this machine
            names = metadata.get("classes") if is_classifier(cfg) else thing_classes(metadata.name)
        ids = category_ids(metadata)
    number = _num_classes(cfg)
    names = list(names or ())[:number]
    names += [f"class {i}" for i in range(len(names), number)]
    ids = ids if ids is not None and len(ids) == number else None
    return Classes(names, ids, stuff, keypoints)


def _num_classes(cfg: CfgNode) -> int:
    if is_classifier(cfg):
        return int(cfg.MODEL.CLASSIFIER.NUM_CLASSES)
    retina = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS")
    return int(cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES)
