"""The classes of a data set that is registered in Detectron2."""

from collections.abc import Mapping
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ...text import one_line


def category_ids(metadata: Metadata) -> list[int] | None:
    """The data set's own class ids, such as COCO's, in the order of a model's outputs.

    None if the data set has no ids; then a class's id is its index in the outputs.
    """
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    return None if contiguous is None else _in_order(contiguous)


def _in_order(contiguous: Mapping[int, int]) -> list[int]:
    """The data set's id of each index; of several ids with the same index, the first."""
    ids: dict[int, int] = {}
    for given, index in contiguous.items():
        ids.setdefault(index, given)
    return [ids[index] for index in sorted(ids)]


def thing_classes(name: str) -> list[str]:
    """The classes of a registered data set; none if it names none.

    A set whose metadata has a COCO file but no classes is read, because Detectron2's reader then
    adds the classes to the metadata.

    Raises:
        ValueError: the data set can't be read; one line.
    """
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes") and metadata.get("json_file"):
        try:
            DatasetCatalog.get(name)
        except (KeyError, TypeError, AssertionError, OSError) as e:
            raise ValueError(f"{name!r} can't be read: {one_line(e, 500)}") from e
    return list(metadata.get("thing_classes") or [])


def class_entries(dataset_name: str) -> dict[str, Any]:
    """A data set's classes, as the fields of ``checkpoint.Classes``.

    The classes of a COCO file are known only after the file was loaded.
    """
    metadata = MetadataCatalog.get(dataset_name)
    return {
        "names": metadata.get("thing_classes", []),
        "ids": category_ids(metadata),
        "stuff": stuff_entry(metadata),
        "keypoints": keypoint_entry(metadata),
    }


def stuff_entry(metadata: Metadata) -> dict[str, Any] | None:
    """Names and ids of a data set's stuff, in the order of a semantic segmentation's outputs.

    None if it has no stuff classes, or not an id for each; several may have the same index.
    """
    names = metadata.get("stuff_classes", [])
    contiguous = metadata.get("stuff_dataset_id_to_contiguous_id", {})
    if not names or set(contiguous.values()) != set(range(len(names))):
        return None
    return {"names": list(names), "ids": _in_order(contiguous)}


def keypoint_entry(metadata: Metadata) -> dict[str, Any] | None:
    """Names of a data set's keypoints, and pairs that a line joins; None without keypoints."""
    names = metadata.get("keypoint_names")
    rules = metadata.get("keypoint_connection_rules", ())
    return {"names": list(names), "connections": [list(r[:2]) for r in rules]} if names else None
