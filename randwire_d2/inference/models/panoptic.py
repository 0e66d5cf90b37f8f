"""Panoptic segmentation: the stuff that a PanopticFPN tells apart, and COCO's format of it all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from torch import Tensor

from ...data.detection.classes import stuff_entry
from ...drawing.style import class_palette

# As Detectron2 gives it: a segment's id for each pixel (H, W), and what the segments are.
Panoptic = tuple[Tensor, list[dict[str, Any]]]


@dataclass(frozen=True)
class Stuff:
    """The classes of a semantic segmentation, in the order of its outputs.

    Attributes:
        names: the first is that of all things, which the instances tell apart.
        ids: those that the data set gives them.
        colors: (R, G, B) of each, 0 … 255.
        known: whether the checkpoint or the data set told them.
    """

    names: list[str]
    ids: list[int]
    colors: list[list[int]]
    known: bool


def stuff_of(
    cfg: CfgNode, thing_ids: Sequence[int], stored: Mapping[str, Any] | None
) -> Stuff | None:
    """The stuff of the data set that a model was trained on; None if the model is not panoptic.

    Args:
        thing_ids: those that the data set gives things; stuff of an unknown one gets the next.
        stored: what the checkpoint has under ``STUFF_KEY``. Without it, as in files of others, the
            data set tells if it is registered.
    """
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
        return None
    number = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    palette = [[round(255 * c) for c in color] for color in class_palette(number)]
    name = next(iter(cfg.DATASETS.TRAIN), "")
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else Metadata()
    entry = stored or stuff_entry(metadata)
    if entry is not None and len(entry["names"]) == number:
        same = entry["names"] == metadata.get("stuff_classes")
        colors = metadata.get("stuff_colors", palette) if same else palette
        return Stuff(entry["names"], entry["ids"], colors, known=True)
    names = ["things", *(f"stuff {i}" for i in range(1, number))]
    first = max(thing_ids, default=0) + 1
    return Stuff(names, [0, *range(first, first + number - 1)], palette, known=False)


def confident(panoptic: Panoptic, least: float) -> Panoptic:
    """Without the things of a lower score; stuff has none."""
    pixels, segments = panoptic
    return pixels, [one for one in segments if one.get("score", 1) >= least]


def to_coco(
    panoptic: Panoptic, thing_ids: Sequence[int], stuff_ids: Sequence[int]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """COCO's PNG (H, W, 3), RGB, and its segments_info.

    A pixel is of the segment R + 256 G + 256² B, as panopticapi has it; 0 is no segment's.
    """
    pixels, segments = panoptic[0].numpy(), panoptic[1]
    pixels = np.where(np.isin(pixels, [one["id"] for one in segments]), pixels, 0)
    there = set(np.unique(pixels).tolist())
    infos = [
        {
            "id": one["id"],
            "category_id": (thing_ids if one["isthing"] else stuff_ids)[one["category_id"]],
            **({"score": one["score"]} if "score" in one else {}),
        }
        for one in segments
        if one["id"] in there
    ]
    rgb = np.stack([pixels >> shift & 255 for shift in (0, 8, 16)], axis=-1)
    return rgb.astype(np.uint8), infos


def coco_categories(things: Mapping[int, str], stuff: Stuff) -> list[dict[str, Any]]:
    """The categories of COCO's panoptic files; of things, names by id."""
    found = [(i, name, 1) for i, name in things.items()]
    found += [(i, name, 0) for i, name in zip(stuff.ids[1:], stuff.names[1:])]
    return [{"id": i, "name": name, "isthing": isthing} for i, name, isthing in found]
