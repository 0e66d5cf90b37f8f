"""The keypoints of a config's data, which determine NUM_KEYPOINTS and the evaluation's sigmas."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

from ...data import count_images, labelled_images
from ...text import brief
from .keys import UNSET

# The default sigma of a keypoint, amid those of COCO, 0.025 (eyes) to 0.107 (hips). For an object
# with the area s², a keypoint with an error of d pixels has the similarity exp(-d² / 8s²sigma²).
SIGMA = 0.05
_WITHOUT = "train without keypoints, MODEL.KEYPOINT_ON False"


def check_keypoints(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: MODEL.KEYPOINT_ON can't be trained on the data set of DATASETS.PATH; one line.
    """
    splits = {name: labelled_images(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    first, *_ = splits.values()
    for name, split in splits.items():
        own = split.keypoints
        check_named(name, split.source, own.why)
        if own.names != first.keypoints.names:
            raise ValueError(
                f"{first.source!r} and {split.source!r} have different keypoints: "
                f"{brief(first.keypoints.names)}, and {brief(own.names)}; give both the same"
            )
        if not count_images(name, min_keypoints=1):
            raise ValueError(f"{split.source!r}: not one of its keypoints is labelled; {_WITHOUT}")
    if first.keypoints.flips is None and cfg.INPUT.RANDOM_FLIP != "none":
        raise ValueError(
            f"{first.source!r}: which of its keypoints change places in a mirror image isn't known "
            f"from their names {brief(first.keypoints.names)}; set INPUT.RANDOM_FLIP none, or name "
            "them by left and right (in YOLO's data.yaml: flip_idx)"
        )


def check_named(name: str, source: str, why: str = "") -> None:
    """
    Args:
        name: a registered data set.
        source, why: its name in the message, and the reason for missing keypoints.

    Raises:
        ValueError: the data set has no keypoints; one line.
    """
    if not keypoint_names(name):
        raise ValueError(f"{source!r} has no keypoint_names{why}; {_WITHOUT}")


def settle_keypoints(cfg: CfgNode, default: int, names: Sequence[str]) -> None:
    """Set NUM_KEYPOINTS to the number of the data's keypoints, and KEYPOINT_OKS_SIGMAS if they are
    not COCO's, unless the user has set them.

    Args:
        default: the default of NUM_KEYPOINTS.
        names: the names of the registered data sets, at least one.

    Raises:
        ValueError: NUM_KEYPOINTS or KEYPOINT_OKS_SIGMAS contradicts the data, the data sets differ,
            pairs of left and right keypoints are unknown, or RANDOM_FLIP is vertical, where
            Detectron2 does not swap them; one line.
    """
    if cfg.MODEL.KEYPOINT_ON:
        _check_metadata(cfg, names)
    node = cfg.MODEL.ROI_KEYPOINT_HEAD
    of_data = keypoint_names(names[0]) if cfg.MODEL.KEYPOINT_ON else []
    number = len(of_data)
    if node.NUM_KEYPOINTS == UNSET:
        node.NUM_KEYPOINTS = number or default
    elif number and number != node.NUM_KEYPOINTS:
        raise ValueError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {node.NUM_KEYPOINTS}, but {names[0]!r} has "
            f"{number} ({brief(of_data)}); leave the key out, and the number follows from the data"
        )
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    if not sigmas:
        cfg.TEST.KEYPOINT_OKS_SIGMAS = default_sigmas(of_data)
    elif number and len(sigmas) != number:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS must be {number}, one for each keypoint of {names[0]!r}; "
            f"got {len(sigmas)}"
        )


def _check_metadata(cfg: CfgNode, names: Sequence[str]) -> None:
    first, *others = [(name, points) for name in names if (points := keypoint_names(name))] or [
        (names[0], [])
    ]
    for name, points in others:
        if points != first[1]:
            raise ValueError(
                f"{first[0]!r} and {name!r} have different keypoint_names: {brief(first[1])}, and "
                f"{brief(points)}; give both the same"
            )
    for name in cfg.DATASETS.TRAIN if first[1] else ():  # Detectron2's mapper reads these alone
        pairs = MetadataCatalog.get(name).get("keypoint_flip_map")
        if pairs is None:
            raise ValueError(
                f"{name!r} has no keypoint_flip_map, the pairs of keypoints that change places in "
                "a mirror image: add it to its metadata, () if there are none"
            )
        if unknown := [point for pair in pairs for point in pair if point not in first[1]]:
            raise ValueError(
                f"{name!r} has a keypoint_flip_map with {unknown[0]!r}, which is none of its "
                f"keypoint_names {brief(first[1])}: correct its metadata"
            )
        if pairs and cfg.INPUT.RANDOM_FLIP == "vertical":
            raise ValueError(
                "INPUT.RANDOM_FLIP is vertical, and Detectron2 makes left keypoints right ones "
                f"({brief(pairs[0])} of {name!r}) in horizontal flips alone: set horizontal or none"
            )


def keypoint_names(name: str) -> list[str]:
    """The names of a registered data set's keypoints; none if it has none."""
    return list(MetadataCatalog.get(name).get("keypoint_names") or [])


def default_sigmas(names: Sequence[str]) -> list[float]:
    """A sigma for each keypoint; none for COCO's keypoints, for which pycocotools has its own."""
    return [] if tuple(names) == COCO_PERSON_KEYPOINT_NAMES else [SIGMA] * len(names)
