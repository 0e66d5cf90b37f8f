"""A trained detector: images in, instances and COCO's result records out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    build_augmentation,
    check_image_size,
    convert_PIL_to_numpy,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from ...checkpoint import Classes
from ...data.formats.keypoints import connection_rules
from ...data.images.reading import (
    check_channels,
    check_pixels,
    open_image,
    read_rgb,
    turn_upright,
)
from ...drawing.detections import legible_visualizer
from ...drawing.style import class_palette, literal
from .panoptic import Panoptic, confident, stuff_of, to_coco
from .pretrained import PretrainedModel


class Detector(PretrainedModel):
    """A detector from a checkpoint, called like Detectron2's DefaultPredictor.

    Attributes:
        file: the checkpoint.
        cfg: its config, frozen; MODEL.WEIGHTS is the checkpoint, for Detectron2's own tools.
        model: the Detectron2 meta-architecture, in eval mode.
        class_names: in the order of its outputs.
        category_ids: the ids of these classes in the data set, in the same order.
        stuff: the other classes of a PanopticFPN; else None.
        metadata: names and colours for Detectron2's Visualizer; it is not in MetadataCatalog.
        input_format: "BGR": the detector is called with BGR images, whatever INPUT.FORMAT is.
        least_drawn: the least score of a detection that is drawn by default.
    """

    input_format = "BGR"
    least_drawn = 0.5

    def __init__(self, file: str, cfg: CfgNode, model: nn.Module, classes: Classes) -> None:
        super().__init__(file, cfg, model, classes)
        palette = class_palette(len(self.class_names))
        colors = [[round(255 * c) for c in color] for color in palette]
        names = list(map(literal, self.class_names))
        self.metadata = Metadata(thing_classes=names, thing_colors=colors)
        self.stuff = stuff_of(cfg, self.category_ids, classes.stuff)
        if self.stuff is not None:
            if self.stuff.known:
                self.stuff_entry = {"names": self.stuff.names, "ids": self.stuff.ids}
            names = list(map(literal, self.stuff.names))
            self.metadata.set(stuff_classes=names, stuff_colors=self.stuff.colors)
        keypoints = classes.keypoints
        if cfg.MODEL.KEYPOINT_ON and keypoints is not None:
            self.keypoint_entry = dict(keypoints)
            rules = connection_rules(keypoints["connections"])
            self.metadata.set(
                keypoint_names=list(keypoints["names"]), keypoint_connection_rules=rules
            )
        self._resize = T.AugmentationList(build_augmentation(cfg, is_train=False))

    def __call__(self, image: np.ndarray) -> dict[str, Instances]:
        """Find the objects in one image.

        Args:
            image: (H, W, 3), uint8, BGR, as OpenCV reads it.

        Returns:
            {"instances": Instances} on the model's device, with pred_boxes (N, 4) in pixels of the
            image, scores (N,) and pred_classes (N,); a Mask R-CNN adds pred_masks (N, H, W), a
            Keypoint R-CNN pred_keypoints (N, K, 3): x, y, score. A PanopticFPN also gives sem_seg
            and panoptic_seg, as in Detectron2.
        """
        with torch.no_grad():
            outputs: list[dict[str, Instances]] = self.model([self.prepare(image)])
        return outputs[0]

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Prepare an image (H, W, 3), uint8, BGR, for the model, as in its evaluation.

        Raises:
            ValueError: it is no such image, or PIXEL_MEAN does not fit INPUT.FORMAT; one line.
        """
        check_pixels(image)
        return self._prepare(Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])))

    def _prepare(self, image: Image.Image) -> dict[str, Any]:
        check_channels(self.cfg)
        resized = T.AugInput(convert_PIL_to_numpy(image, self.cfg.INPUT.FORMAT))
        self._resize(resized)
        tensor = torch.from_numpy(np.array(resized.image.transpose(2, 0, 1), order="C"))
        return {"image": tensor, "height": image.height, "width": image.width}

    def read(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read and prepare the image of a data set's record, as Detectron2's test mapper does.

        Raises:
            ValueError: it has more than 8 bits per channel; one line.
            SizeMismatchError: it has another size than the record says.
        """
        with open_image(record["file_name"]) as file:
            image = turn_upright(file).convert("RGB")
        check_image_size({**record}, np.asarray(image))
        others = {k: v for k, v in record.items() if k not in ("annotations", "sem_seg_file_name")}
        return {**others, **self._prepare(image)}

    def picture(self, record: Mapping[str, Any]) -> np.ndarray:
        """The image (H, W, 3), RGB, that ``read`` reads, to draw on."""
        return np.asarray(read_rgb(record["file_name"], upright=True))

    def predict(self, inputs: Sequence[dict[str, Any]]) -> list[Instances]:
        """The instances of each image, on the CPU; see ``outputs``."""
        return [found["instances"] for found in self.outputs(inputs)]

    def outputs(self, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The instances of each image and, from a PanopticFPN, panoptic_seg, on the CPU.

        Images of one size form a batch. Images of different sizes are not batched, because the
        padding that this needs changes the results.

        Args:
            inputs: returned by ``read`` or ``prepare``.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for i, one in enumerate(inputs):
            by_size.setdefault(one["image"].shape, []).append(i)
        found: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for indices in by_size.values():
                outputs = self.model([inputs[i] for i in indices])
                found |= {i: self._on_cpu(output) for i, output in zip(indices, outputs)}
        return [found[i] for i in range(len(inputs))]

    def _on_cpu(self, output: dict[str, Any]) -> dict[str, Any]:
        found = {"instances": output["instances"].to("cpu")}
        if self.stuff is not None:
            pixels, segments = output["panoptic_seg"]
            found["panoptic_seg"] = (pixels.cpu(), segments)
        return found

    def records(self, found: Instances, image_id: int | str) -> list[dict[str, Any]]:
        """Instances as COCO's results, as in COCOEvaluator's coco_instances_results.json."""
        records: list[dict[str, Any]] = instances_to_coco_json(found, image_id)
        for record in records:
            record["category_id"] = self.category_ids[record["category_id"]]
        return records

    def segments(
        self, panoptic: Panoptic, score_threshold: float
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """A PanopticFPN's panoptic_seg as COCO's PNG (H, W, 3), RGB, and segments_info."""
        assert self.stuff is not None
        shown = confident(panoptic, score_threshold)
        return to_coco(shown, self.category_ids, self.stuff.ids)

    def draw(self, image: np.ndarray, found: Instances, score_threshold: float) -> np.ndarray:
        """Draw the instances with at least this score (0 … 1) on an RGB image (H, W, 3).

        A small image is enlarged, so that the names are legible and hide less.
        """
        visualizer = legible_visualizer(image, self.metadata)
        shown = found[found.scores >= score_threshold]
        drawn = visualizer.draw_instance_predictions(shown, jittering=False)
        return np.asarray(drawn.get_image())

    def draw_panoptic(
        self, image: np.ndarray, panoptic: Panoptic, score_threshold: float
    ) -> np.ndarray:
        """Draw a PanopticFPN's panoptic_seg: things with at least this score, and stuff."""
        visualizer = legible_visualizer(image, self.metadata)
        shown = confident(panoptic, score_threshold)
        return np.asarray(visualizer.draw_panoptic_seg_predictions(*shown).get_image())
