"""The keys of a checkpoint's entries beside the weights."""

from collections.abc import Mapping
from typing import Any

from ..wiring import NetworkSpec

# The Wiring: {"spec": JSON, "fingerprint": sha256}; a classifier's also has "head_relu": bool.
WIRING_KEY = "randwire"
PREPROCESSING_KEY = "preprocessing"  # the Preprocessing, as a dict
CONFIG_KEY = "config"  # the training's config, the YAML of ``portable_config``
CLASS_NAMES_KEY = "class_names"  # a list, in the order of the outputs
CATEGORY_IDS_KEY = "category_ids"  # the ids of these classes in the data set, in the same order
# For a panoptic data set, the stuff classes in the order of their outputs: {"names": a list, "ids":
# their ids in the data set}.
STUFF_KEY = "stuff"
# For a data set with keypoints, {"names": a list, "connections": pairs of names that pictures join
# by lines}.
KEYPOINTS_KEY = "keypoints"


def wiring_entry(spec: NetworkSpec, head_relu: bool | None = None) -> dict[str, Any]:
    """The entry for ``WIRING_KEY``; ``head_relu`` is None for a network without a classifier."""
    entry = {"spec": spec.to_json(), "fingerprint": spec.fingerprint}
    return entry if head_relu is None else {**entry, "head_relu": head_relu}


def stored_spec(entries: Mapping[str, Any]) -> NetworkSpec | None:
    """The network under ``WIRING_KEY``; None if there is none.

    Raises:
        ValueError: it is damaged, or does not match its fingerprint.
    """
    entry = entries.get(WIRING_KEY)
    if entry is None:
        return None
    try:
        return NetworkSpec.from_json(entry["spec"], str(entry["fingerprint"]))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"its entry {WIRING_KEY!r} is damaged: {e}") from e
