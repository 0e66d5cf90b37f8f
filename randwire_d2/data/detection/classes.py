"""The classes of a data set that is registered in Detectron2."""

from typing import Any

from detectron2.data import Metadata, MetadataCatalog


def category_ids(metadata: Metadata) -> list[int] | None:
    """The data set's own ids of its classes, as COCO has them, in the order of a model's outputs.

    None where the data set has none: then a class's id is its place in that order.
    """
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    return None if contiguous is None else sorted(contiguous, key=contiguous.__getitem__)


def class_entries(dataset_name: str) -> dict[str, Any]:
    """What a detector's checkpoint holds of a data set's classes: names and ids, of stuff too, and
    keypoints.

    A COCO file's are known once it is loaded.
    """
    metadata = MetadataCatalog.get(dataset_name)
    return {
        "class_names": metadata.get("thing_classes"),
        "category_ids": category_ids(metadata),
        "stuff": stuff_entry(metadata),
        "keypoints": keypoint_entry(metadata),
    }


def stuff_entry(metadata: Metadata) -> dict[str, Any] | None:
    """Names and ids of a data set's stuff, in the order of a semantic segmentation's outputs.

    None where it has no stuff, or no ids of it.
    """
    names = metadata.get("stuff_classes", [])
    contiguous = metadata.get("stuff_dataset_id_to_contiguous_id", {})
    if not names or len(names) != len(contiguous):
        return None
    return {"names": list(names), "ids": sorted(contiguous, key=contiguous.__getitem__)}


def keypoint_entry(metadata: Metadata) -> dict[str, Any] | None:
    """Names of a data set's keypoints, and pairs of names that a line joins; None of none."""
    names = metadata.get("keypoint_names")
    rules = metadata.get("keypoint_connection_rules", ())
    return {"names": list(names), "connections": [list(r[:2]) for r in rules]} if names else None
