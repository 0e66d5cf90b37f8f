"""A trained model as a file for other runtimes, proved by running both."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import is_classifier
from ...export import (
    DETECTOR,
    FORMATS,
    RUNTIMES,
    TOLERANCE,
    BackboneGraph,
    ClassifierGraph,
    DetectorGraph,
    Format,
    Graph,
    Run,
    difference,
    fold_batch_norms,
)
from ...files import atomic_open, check_file, make_folder_of
from ...text import one_line
from ..inputs import find_images
from ..models.classifier import Classifier
from ..models.detector import Detector
from ..models.exported import channels_of, describe
from ..models.loading import find_checkpoint, load_model

PARTS = ("whole", "backbone")


@dataclass(frozen=True)
class Proof:
    """What was compared before an exported file got its name.

    Attributes:
        difference: the largest; see ``export.TOLERANCE``.
        shapes: of the images that both ran on.
        detections: how many of them were compared; 0 of what detects nothing.
        folded: batch norms that are in the convolutions now.
    """

    difference: float
    shapes: tuple[tuple[int, ...], ...]
    detections: int
    folded: int


def export_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format_name: str | None = None,
    *,
    part: str = "whole",
    images: Sequence[str] = (),
) -> Proof:
    """Write a trained model as a graph of dynamic sizes, if that computes what the model does.

    Args:
        source: a checkpoint, or the OUTPUT_DIR of a run.
        output: the file.
        format_name: "onnx", "torchscript" or "torch"; by default the one of ``output``'s suffix.
        part: "whole", or "backbone": with its FPN if it has one, for images that were normalised.
        images: files, folders or globs of images on which a whole model is compared, too.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it can't be exported so, or the graph computes something else; one line.
    """
    written_as = output_format(os.fspath(output), format_name)
    file = find_checkpoint(source)
    files = find_images(images, "--images")
    model = load_model(file, "cpu")
    own = []
    for path in files:
        try:
            own.append(model.read({"file_name": path})["image"])
        except (OSError, ValueError) as e:
            raise ValueError(f"--images {path}: {one_line(e, 300)}") from e
    return write_proved(model, os.fspath(output), written_as, part=part, images=own)


def write_proved(
    model: Detector | Classifier,
    output: str,
    written_as: Format,
    *,
    part: str = "whole",
    images: Sequence[Tensor] = (),
    runtimes: Sequence[str] = (),
) -> Proof:
    """``export_model`` of a model that is loaded.

    Args:
        images: (C, H, W) each, prepared for the model.
        runtimes: names of ``export.RUNTIMES``, which must compute the same.
    """
    if part == "whole" and model.cfg.MODEL.KEYPOINT_ON and written_as.name == "onnx":
        raise ValueError(
            "a keypoint detector can't be written as .onnx, which has no operators for how its "
            "heatmaps are read; write .ts"
        )
    original = _graph(model, part)
    folded = copy.deepcopy(original)
    norms = fold_batch_norms(folded)
    example, *others = _images(model, original, images)
    make_folder_of(output)
    with atomic_open(output, "wb") as file:
        metadata = describe(model, original.signature, written_as)
        _write(written_as, folded, example, metadata, file)
        runs = {name: RUNTIMES[name](file.name) for name in runtimes}
        runs = runs or {written_as.name: written_as.read(file.name)[0]}
        proof = _prove(original, runs, others, norms)
        if original.signature.kind == DETECTOR and not proof.detections:
            raise ValueError(
                "the model found nothing in the images on which the graph is compared with it; "
                "name some that show its objects with --images"
            )
    return proof


def output_format(output: str, name: str | None) -> Format:
    """The format of a file that is to be written.

    Raises:
        ValueError: its suffix is another, a package is missing, or it can't lie there; one line.
    """
    for known in FORMATS.values():
        if output.lower().endswith(known.suffixes) and name in (None, known.name):
            known.check()
            check_file("OUTPUT", output)
            return known
    suffixes = [s for f in FORMATS.values() if name in (None, f.name) for s in f.suffixes]
    what = f"the format {name}" if name else "an exported file"
    raise ValueError(f"OUTPUT {output!r}: the name of {what} ends in {' or '.join(suffixes)}")


def _graph(model: Detector | Classifier, part: str) -> Graph:
    if part not in PARTS:
        raise ValueError(f"the part must be {' or '.join(PARTS)}; got {part!r}")
    if part == "whole":
        if isinstance(model, Classifier):
            return ClassifierGraph(model.model)
        channels = channels_of(model.cfg, normalised=False)
        return DetectorGraph(model.model, model.cfg.TEST.DETECTIONS_PER_IMAGE, channels)
    owner: Any = model.model if isinstance(model, Detector) else model.model.network
    backbone = getattr(owner, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"--part backbone: a {type(owner).__name__} has no backbone of its own")
    return BackboneGraph(backbone)


def _write(
    written_as: Format, graph: Graph, example: Tensor, metadata: dict[str, str], file: IO[bytes]
) -> None:
    try:
        written_as.write(graph, example, metadata, file)
    except Exception as e:  # the tracers have many kinds for what they do not know
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise ValueError(
            f"this {graph.signature.kind} can't be written as {written_as.suffixes[0]}: {reason}"
        ) from e
    file.flush()


# -------------------------------------------------------------------------------------------------
# The proof
# -------------------------------------------------------------------------------------------------


def _images(
    model: Detector | Classifier, graph: Graph, prepared: Sequence[Tensor]
) -> Iterator[Tensor]:
    """An example to trace, then what to compare on: other sizes, other numbers, other images."""
    signature, cfg = graph.signature, model.cfg
    side = cfg.INPUT.TEST_CROP_SIZE if is_classifier(cfg) else cfg.INPUT.MIN_SIZE_TEST or 800
    short, middle, long = (
        -(-size // signature.multiple) * signature.multiple
        for size in (side, side * 4 // 3, side * 3 // 2)
    )
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, long, short), (1, short, middle), (2, middle, short), (1, short, short))
    channels = channels_of(cfg, signature.normalised)
    for number, height, width in sizes:
        images = _noise(number, channels, height, width, generator)
        if signature.normalised:
            mean, std = (
                torch.tensor(v).view(-1, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
            )
            images = (images - mean) / std
        yield images if signature.batched else images[0]
    for image in prepared:
        yield image.float()[None] if signature.batched else image.float()


def _noise(
    number: int, channels: int, height: int, width: int, generator: torch.Generator
) -> Tensor:
    """Images (N, C, H, W), 0 … 255, with something in them at every scale."""
    images = torch.zeros(number, channels, height, width)
    for cell in (64, 16, 4, 1):
        size = (-(-height // cell), -(-width // cell))
        coarse = torch.rand(number, channels, *size, generator=generator)
        images += F.interpolate(coarse, size=(height, width), mode="nearest")
    return (images * 255 / 4).round()


def _prove(
    original: Graph, runs: Mapping[str, Run], images: Sequence[Tensor], folded: int
) -> Proof:
    largest, detections = 0.0, 0
    for one in images:
        with torch.no_grad():
            expected = original(one)
        for name, run in runs.items():
            own = difference(original.signature, one, expected, run(one))
            if own > TOLERANCE:
                raise ValueError(
                    f"the exported graph differs from the model by {own:.3g} (at most "
                    f"{TOLERANCE:g}) on images of the shape {tuple(one.shape)}, in {name}: nothing "
                    "was written"
                )
            largest = max(largest, own)
        if original.signature.kind == DETECTOR:
            detections += len(expected[0])
    return Proof(largest, tuple(tuple(one.shape) for one in images), detections, folded)
