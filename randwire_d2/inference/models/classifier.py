"""A trained classifier: images in, probabilities and the best classes out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor, nn

from ...checkpoint import Classes
from ...data.images.reading import center_crop, check_pixels, order_channels, read_rgb
from ...drawing.detections import legible_visualizer
from ...drawing.style import literal
from .pretrained import PretrainedModel

TOP = 5  # classes that are reported of an image


class Classifier(PretrainedModel):
    """A classifier from a checkpoint.

    Attributes:
        file: the checkpoint.
        cfg: its config, frozen.
        model: the ``ImageClassifier``, in eval mode.
        class_names: in the order of its outputs.
        category_ids: the positions in that order: 0, 1, …
        least_drawn: the least probability of a class that is drawn by default.
    """

    least_drawn = 0.0
    classifies = True

    def __init__(self, file: str, cfg: CfgNode, model: nn.Module, classes: Classes) -> None:
        super().__init__(file, cfg, model, classes)
        self._crop = center_crop(cfg.INPUT.TEST_CROP_SIZE, cfg.INPUT.TEST_CROP_RATIO)

    def __call__(self, image: np.ndarray) -> Tensor:
        """The probability of each class (K,), on the CPU.

        Args:
            image: (H, W, 3), uint8, BGR, as OpenCV reads it.
        """
        return self.predict([self.prepare(image)])[0]

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Prepare an image (H, W, 3), uint8, BGR, for ``predict``, as in the model's evaluation.

        Raises:
            ValueError: it is no such image; one line.
        """
        check_pixels(image)
        return self._prepare(Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])))

    def read(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read and prepare the image of a record.

        An image with a label, from a data set, is read as in evaluations: its EXIF is ignored. Any
        other image is rotated as its EXIF says, as OpenCV does.

        Raises:
            ValueError: it can't be read.
        """
        return {**record, **self._prepare(_open(record))}

    def picture(self, record: Mapping[str, Any]) -> np.ndarray:
        """The image (H, W, 3), RGB, that ``read`` reads, to draw on."""
        return np.asarray(_open(record))

    def _prepare(self, image: Image.Image) -> dict[str, Any]:
        tensor = order_channels(self._crop(image), self.cfg.INPUT.FORMAT)
        return {"image": tensor, "height": image.height, "width": image.width}

    def predict(self, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The probabilities (K,) of each image, on the CPU."""
        with torch.no_grad():
            logits = self.model({"image": torch.stack([i["image"] for i in inputs])})
        return list(logits.softmax(dim=1).cpu())

    def records(self, found: Tensor, image_id: int | str) -> list[dict[str, Any]]:
        """The five most probable classes, best first: image_id, category_id and score."""
        scores, classes = found.topk(min(TOP, len(found)))
        return [
            {"image_id": image_id, "category_id": category, "score": score}
            for score, category in zip(scores.tolist(), classes.tolist())
        ]

    def draw(self, image: np.ndarray, found: Tensor, score_threshold: float) -> np.ndarray:
        """Write the best classes with at least this score (0 … 1), up to five, on an RGB image."""
        visualizer = legible_visualizer(image)
        size = visualizer._default_font_size
        shown = [r for r in self.records(found, 0) if r["score"] >= score_threshold]
        for line, record in enumerate(shown):
            name = literal(self.class_names[record["category_id"]])
            text = f"{name} {record['score']:.0%}"
            visualizer.draw_text(
                text, (2, 2 + 1.6 * size * line), font_size=size, horizontal_alignment="left"
            )
        return np.asarray(visualizer.output.get_image())


def _open(record: Mapping[str, Any]) -> Image.Image:
    return read_rgb(record["file_name"], upright="label" not in record)
