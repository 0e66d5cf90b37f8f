"""The classes of a data set that is registered in Detectron2."""

from detectron2.data import Metadata


def category_ids(metadata: Metadata) -> list[int] | None:
    """The data set's own ids of its classes, as COCO has them, in the order of a model's outputs.

    None where the data set has none: then a class's id is its place in that order.
    """
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    return None if contiguous is None else sorted(contiguous, key=contiguous.__getitem__)
