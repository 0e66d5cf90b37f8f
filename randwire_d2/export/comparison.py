"""How far an exported graph's outputs are from its model's."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .graphs import DETECTOR, SEM_SEG, Signature

# The largest difference that a written graph may have: of the largest value of a logit or feature;
# of a detection, of its image's longer side in its box, and of its score. Rounding in another order
# gives far less (measured: 1e-6 for a C=109 classifier, up to 1e-4 for detectors nobody trained).
TOLERANCE = 1e-3
_PAIRING = ("pred_boxes", "scores", "pred_classes")


def difference(
    signature: Signature, images: Tensor, expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]
) -> float:
    """The largest difference between two runs of a graph on the same images; see ``TOLERANCE``.

    Detections are paired: their order, where scores are nearly equal, means nothing. One that has
    no partner of its class differs by its whole score; but where both sides have as many as an
    image may have, the last ones may be others, and it differs by its score above the least.
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
    return value if value == value else float("inf")  # NaN is less than nothing


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
    """(n, m): of each pair, the larger difference of box and score; infinite of two classes."""
    boxes = (ours["pred_boxes"][:, None] - theirs["pred_boxes"]).abs().amax(2) / longer_side
    scores = (ours["scores"][:, None] - theirs["scores"]).abs()
    same = ours["pred_classes"][:, None] == theirs["pred_classes"]
    apart = torch.maximum(boxes, scores).nan_to_num(nan=float("inf"))
    return apart.masked_fill(~same, float("inf"))


def _pairs(distances: Tensor) -> list[tuple[int, int]]:
    """The nearest two, then the nearest of the others, and so on, while they are near."""
    free = distances.clone()
    pairs = []
    while free.numel() and (nearest := free.min()) <= 10 * TOLERANCE:
        i, j = divmod(int((free == nearest).flatten().nonzero()[0]), free.shape[1])
        pairs.append((i, j))
        free[i], free[:, j] = float("inf"), float("inf")
    return pairs
