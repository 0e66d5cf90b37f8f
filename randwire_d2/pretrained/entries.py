"""What a checkpoint holds beside its weights, by its keys."""

from collections.abc import Mapping
from typing import Any

from ..wiring import NetworkSpec

# Its Wiring: {"spec": JSON, "fingerprint": sha256}, and of a classifier {"head_relu": bool}.
WIRING_KEY = "randwire"
PREPROCESSING_KEY = "preprocessing"  # its Preprocessing, as a dict
CONFIG_KEY = "config"  # that of its training, the YAML of ``portable_config``
CLASS_NAMES_KEY = "class_names"  # a list, in the order of the outputs
CATEGORY_IDS_KEY = "category_ids"  # those that the data set gives these classes, in the same order
# Of a panoptic data set, the classes of stuff in the order of the outputs for them: {"names": a
# list, "ids": those that the data set gives them}.
STUFF_KEY = "stuff"
# Of a data set with keypoints, {"names": a list, "connections": pairs of names that a line joins in
# pictures}.
KEYPOINTS_KEY = "keypoints"


def wiring_entry(spec: NetworkSpec, head_relu: bool | None = None) -> dict[str, Any]:
    """What is under ``WIRING_KEY``; ``head_relu`` is None of a network without a classifier."""
    entry = {"spec": spec.to_json(), "fingerprint": spec.fingerprint}
    return entry if head_relu is None else {**entry, "head_relu": head_relu}


def stored_spec(entries: Mapping[str, Any]) -> NetworkSpec | None:
    """The network under ``WIRING_KEY``, if it is there.

    Raises:
        ValueError: it is damaged, or its fingerprint is another network's.
    """
    entry = entries.get(WIRING_KEY)
    if entry is None:
        return None
    try:
        return NetworkSpec.from_json(entry["spec"], str(entry["fingerprint"]))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"its entry {WIRING_KEY!r} is damaged: {e}") from e
