"""The difference between the outputs of an exported graph and of its model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .graphs import DETECTOR, SEM_SEG, Signature

# The largest difference allowed: for logits and features, relative to their largest value; for a
# box, relative to the image's longer side; for a score, absolute. Rounding in another order gives
# far less (measured: 1e-6 for a C=109 classifier, up to 1e-4 for untrained detectors).
TOLERANCE = 1e-3
_PAIRING = ("pred_boxes", "scores", "pred_classes")


def difference(
    signature: Signature, images: Tensor, expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]
) -> float:
    """The largest difference between two runs of a graph on the same images; see ``TOLERANCE``.

    Detections are paired by distance, as the order of nearly equal scores is arbitrary. The
    difference of a detection without a partner of its class is its score. If both runs have the
    most detections that an image may have, the last ones may be others: then it is its score minus
    the lowest score.
    """
    if signature.kind != DETECTOR:
        return max(_of_tensors(a, b) for a, b in zip(expected, actual, strict=True))
    ours, theirs = (dict(zip(signature.outputs, run, strict=True)) for run in (expected, actual))
    whole = 0.0
    if SEM_SEG in ours:
        whole = _of_tensors(ours.pop(SEM_SEG), theirs.pop(SEM_SEG))
    return max(whole, _of_detections(ours, theirs, max(images.shape[-2:]), signature.most))


def _of_tensors(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return _finite(((expected - actual).abs().max() / scale).item())


def _finite(value: float) -> float:
    return value if value == value else float("inf")  # NaN would compare as no difference


def _of_detections(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], longer_side: float, most: int
) -> float:
    distances = _distances(ours, theirs, longer_side)
    pairs = _pairs(distances)
    largest = max((distances[i, j].item() for i, j in pairs), default=0.0)
    rows, columns = [i for i, _ in pairs], [j for _, j in pairs]
    for name in ours.keys() - set(_PAIRING) if pairs else ():
        largest = max(largest, _of_tensors(ours[name][rows], theirs[name][columns]))
    full = len(ours["scores"]) == len(theirs["scores"]) == most
    for scores, taken in ((ours["scores"], rows), (theirs["scores"], columns)):
        alone = [i for i in range(len(scores)) if i not in taken]
        if alone:
            least = scores.min() if full else 0
            largest = max(largest, _finite((scores[alone].max() - least).item()))
    return largest


def _distances(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], longer_side: float
) -> Tensor:
    """(n, m): for each pair, the larger difference of box and score; infinite across classes."""
    boxes = (ours["pred_boxes"][:, None] - theirs["pred_boxes"]).abs().amax(2) / longer_side
    scores = (ours["scores"][:, None] - theirs["scores"]).abs()
    same = ours["pred_classes"][:, None] == theirs["pred_classes"]
    apart = torch.maximum(boxes, scores).nan_to_num(nan=float("inf"))
    return apart.masked_fill(~same, float("inf"))


def _pairs(distances: Tensor) -> list[tuple[int, int]]:
    """Greedy matching: the nearest two, then the nearest of the rest, up to 10 × TOLERANCE."""
    free = distances.clone()
    pairs = []
    while free.numel() and (nearest := free.min()) <= 10 * TOLERANCE:
        i, j = divmod(int((free == nearest).flatten().nonzero()[0]), free.shape[1])
        pairs.append((i, j))
        free[i], free[:, j] = float("inf"), float("inf")
    return pairs
