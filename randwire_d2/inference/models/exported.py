"""An exported file in place of a checkpoint: the same Detector or Classifier, around its graph."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import detector_postprocess
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ... import __version__
from ...checkpoint import (
    CATEGORY_IDS_KEY,
    CLASS_NAMES_KEY,
    CONFIG_KEY,
    KEYPOINTS_KEY,
    STUFF_KEY,
    Classes,
    Preprocessing,
    Wiring,
    portable_config,
    stored_config,
)
from ...config import is_classifier
from ...export import BACKBONE, CLASSIFIER, DETECTOR, SEM_SEG, Format, Run, Signature
from ...text import one_line
from ...weight_files.checksum import DamagedFile
from .classifier import Classifier
from .detector import Detector

OUTPUTS_KEY = "outputs"

logger = logging.getLogger(__name__)


class ExportedDetector(nn.Module):
    """The graph of a detector, called as Detectron2's meta-architectures are.

    Args:
        run: one image (C, H, W) to the fields of its instances.
        fields: their names; sem_seg among them is that of a PanopticFPN.
        combine: its MODEL.PANOPTIC_FPN.COMBINE, by which instances and stuff are made one picture.
    """

    def __init__(self, run: Run, fields: Sequence[str], combine: CfgNode) -> None:
        super().__init__()
        self.run, self.fields, self.combine = run, tuple(fields), combine

    def forward(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Images, as ``Detector.prepare`` gives them, to {"instances": …} of each.

        Of a PanopticFPN also sem_seg and panoptic_seg, as Detectron2's own gives them.
        """
        return [self._found(one) for one in inputs]

    def _found(self, one: Mapping[str, Any]) -> dict[str, Any]:
        size = one["image"].shape[-2:]
        height, width = one.get("height", size[0]), one.get("width", size[1])
        outputs = dict(zip(self.fields, self.run(one["image"].float()), strict=True))
        logits = outputs.pop(SEM_SEG, None)
        found = Instances(tuple(size))
        for name, value in outputs.items():
            found.set(name, Boxes(value) if name.endswith("_boxes") else value)
        instances = detector_postprocess(found, height, width)
        if logits is None:
            return {"instances": instances}
        stuff = sem_seg_postprocess(logits, size, height, width)
        panoptic = combine_semantic_and_instance_outputs(
            instances,
            stuff.argmax(dim=0),
            self.combine.OVERLAP_THRESH,
            self.combine.STUFF_AREA_LIMIT,
            self.combine.INSTANCES_CONFIDENCE_THRESH,
        )
        return {"instances": instances, SEM_SEG: stuff, "panoptic_seg": panoptic}


class ExportedClassifier(nn.Module):
    """The graph of a classifier, called as ``ImageClassifier`` is."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """{"image": (N, 3, H, W), values 0 … 255} to logits (N, num_classes)."""
        (logits,) = self.run(batch["image"].float())
        return logits


# -------------------------------------------------------------------------------------------------
# What a file says about itself
# -------------------------------------------------------------------------------------------------


def describe(
    model: Detector | Classifier, signature: Signature, written_as: Format
) -> dict[str, str]:
    """The metadata of an exported file: text as it is, everything else as JSON.

    kind, version (of randwire_d2), opset, input, outputs, preprocessing, class_names, category_ids,
    stuff, keypoints, fingerprint (of a RandWire's wiring) and config (YAML), from which
    ``load_exported`` makes the model again.
    """
    wiring = Wiring.in_model(model.model)
    values = {
        "input": {
            "name": signature.input,
            "type": "float32",
            "shape": [
                *(["batch"] if signature.batched else []),
                channels_of(model.cfg, signature.normalised),
                "height",
                "width",
            ],
            "multiple_of": signature.multiple,
        },
        OUTPUTS_KEY: signature.outputs,
        "preprocessing": _preprocessing(model.cfg, signature),
        CLASS_NAMES_KEY: model.class_names,
        CATEGORY_IDS_KEY: model.category_ids,
        STUFF_KEY: model.stuff_entry,
        KEYPOINTS_KEY: model.keypoint_entry,
    }
    return {
        "kind": signature.kind,
        "version": __version__,
        "opset": written_as.opset,
        **{key: json.dumps(value) for key, value in values.items()},
        "fingerprint": wiring.spec.fingerprint if wiring else "",
        CONFIG_KEY: portable_config(model.cfg, wiring).dump(),
    }


def channels_of(cfg: CfgNode, normalised: bool) -> int:
    """The channels of the images that a graph takes: one for INPUT.FORMAT L, if the graph itself
    normalises them, by however many values."""
    is_grey = cfg.INPUT.FORMAT == "L" and not normalised
    return 1 if is_grey else len(cfg.MODEL.PIXEL_MEAN)


def _preprocessing(cfg: CfgNode, signature: Signature) -> dict[str, Any]:
    if is_classifier(cfg):
        crop = cfg.INPUT.TEST_CROP_SIZE
        size = {"shorter_side": round(crop / cfg.INPUT.TEST_CROP_RATIO), "center_crop": crop}
    else:
        size = {
            "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
            "longer_side_at_most": cfg.INPUT.MAX_SIZE_TEST,
        }
    done = "before the graph" if signature.normalised else "in the graph"
    return {**size, **Preprocessing.from_config(cfg).to_dict(), "normalisation": done}


def load_exported(file: str, written_as: Format, device: str | None) -> Detector | Classifier:
    """The model in a file of tools/export_model.py; it runs on the CPU.

    Raises:
        ValueError: it is none, is damaged, is a backbone alone, or another device is asked for;
            one line.
    """
    if device not in (None, "cpu"):
        raise ValueError(
            f"device {device!r}: an exported file runs on the CPU here; use its checkpoint there"
        )
    written_as.check()
    try:
        run, metadata = written_as.read(file)
    except Exception as e:  # damaged bytes fail in as many ways as there are bytes
        reason = f"it is {e.what}" if isinstance(e, DamagedFile) else one_line(e, 300)
        raise ValueError(
            f"{file} can't be read as {written_as.name}: {reason}; export it again"
        ) from e
    if written_as.name == "torchscript":  # which may be called .pt, as checkpoints are
        logger.warning(f"{file} is TorchScript, a program, and runs now")
    try:
        kind, cfg = metadata["kind"], stored_config(metadata)
        lists = {
            k: json.loads(metadata[k]) for k in (OUTPUTS_KEY, CLASS_NAMES_KEY, CATEGORY_IDS_KEY)
        }
        # Older versions have neither.
        lists |= {k: json.loads(metadata.get(k, "null")) for k in (STUFF_KEY, KEYPOINTS_KEY)}
        classes = Classes.of(lists)
    except (KeyError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{file} lacks what tools/export_model.py writes into its metadata "
            f"({type(e).__name__}: {e}): export it again"
        ) from e
    if cfg is None or not classes.names or kind not in (DETECTOR, CLASSIFIER):
        what = "a backbone alone" if kind == BACKBONE else f"of the kind {kind!r}"
        raise ValueError(f"{file} is {what}, which finds nothing: export the whole model")
    cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    if kind == CLASSIFIER:
        return Classifier(file, cfg, ExportedClassifier(run).eval(), classes)
    graph = ExportedDetector(run, lists[OUTPUTS_KEY], cfg.MODEL.PANOPTIC_FPN.COMBINE)
    return Detector(file, cfg, graph.eval(), classes)
