"""A trained classifier in int8, as an ONNX file, proved by what both say of the same images."""

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...export import FORMATS, quantise
from ...files import atomic_open, make_folder_of
from ..inputs import find_images
from ..models.classifier import Classifier
from ..models.exported import load_exported
from ..models.loading import find_checkpoint, load_model
from .export import output_format, write_proved

# Of each, as many: calibration needs the range of activations, not their distribution.
MOST_IMAGES = 256
# A file that gives one image in four another class passes a comparison of ten in a quarter of all
# cases, one of a hundred in one of ten thousand.
LEAST_COMPARED = 100
LEAST_EQUAL = 0.9  # the share of images that must be given the same class as by the checkpoint


@dataclass(frozen=True)
class Int8Proof:
    """What is known of a file in int8.

    Attributes:
        images: how many its ranges are from; as many others were given to both.
        equal: the share of these that both gave the same class.
    """

    images: int
    equal: float


def export_int8(
    source: str | os.PathLike[str], output: str | os.PathLike[str], images: Sequence[str]
) -> Int8Proof:
    """Write a trained classifier as an ONNX file in int8, if that gives images the same classes.

    Args:
        source: a checkpoint, or the OUTPUT_DIR of a run.
        output: the file.
        images: files, folders or globs of images like those that it is for. Up to ``MOST_IMAGES``
            of them, drawn at random, calibrate it, as many others are compared: at least
            ``LEAST_COMPARED``.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it can't be exported so, or gives too many images another class; one line.
    """
    written_as = output_format(os.fspath(output), "onnx")
    model = load_model(find_checkpoint(source), "cpu")
    if not isinstance(model, Classifier):
        raise ValueError(f"{model.file} is a detector's file: int8 is for classifiers")
    files = find_images(images, "--calibration")
    number = min(MOST_IMAGES, len(files) // 2)
    if number < LEAST_COMPARED:
        raise ValueError(
            f"--calibration: {len(files)} images are too few to calibrate on one half and to prove "
            f"anything with the other; give at least {2 * LEAST_COMPARED}"
        )
    random.Random(0).shuffle(files)
    calibration, compared = files[:number], files[number : 2 * number]
    said = {"precision": "int8", "calibration_images": str(number)}
    make_folder_of(output)
    with tempfile.TemporaryDirectory() as folder, atomic_open(output, "wb") as file:
        exact = os.path.join(folder, "float.onnx")
        write_proved(model, exact, written_as)
        quantise(exact, file.name, _read(model, calibration), said)
        exported = load_exported(file.name, FORMATS["onnx"], "cpu")
        same = [
            _classes(model.model, images) == _classes(exported.model, images)
            for images in _read(model, compared)
        ]
        equal = sum(same) / number
        if equal < LEAST_EQUAL:
            raise ValueError(
                f"in int8, only {equal:.1%} of {number} images get the same class as before (at "
                f"least {LEAST_EQUAL:.0%} must): nothing was written"
            )
    return Int8Proof(number, equal)


def _read(model: Classifier, files: Sequence[str]) -> Iterator[Tensor]:
    """Images (1, 3, H, W), prepared for the model."""
    for file in files:
        yield model.read({"file_name": file})["image"].float()[None]


def _classes(model: nn.Module, images: Tensor) -> list[int]:
    with torch.no_grad():
        classes: list[int] = model({"image": images}).argmax(1).tolist()
    return classes
