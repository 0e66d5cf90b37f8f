"""Contact sheets: images of a data set with their ground truth, and with detections."""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from .. import data  # noqa: F401 (registers the built-in data sets)
from ..data.formats.rle import rle_fault
from ..data.images.reading import read_rgb
from ..text import brief, parse_json
from .style import INK, class_palette, literal, page

TILE = 320  # pixels: the longer side of an image
GAP = 8  # pixels between images
STRIP = 32  # pixels for the text at the left
COLUMNS = 4  # at most
IMAGES = 8  # at most
LEGIBLE = 480  # pixels: about the smallest longer side of a single picture


def legible_visualizer(image: np.ndarray, metadata: Metadata | None = None) -> Visualizer:
    """Detectron2's Visualizer on an RGB image (H, W, 3), which enlarges a small image; with the
    colours of the metadata, if it has any."""
    scale = max(1, round(LEGIBLE / max(image.shape)))
    mode = ColorMode.IMAGE if metadata is None else ColorMode.SEGMENTATION
    return Visualizer(image, metadata, scale, mode, font_size_scale=1.4)


def draw_detections(dataset_name: str, results_json_path: str | os.PathLike[str]) -> Figure:
    """Draw a contact sheet: images with their ground truth, and below them with the detections.

    The images are spread evenly over the data set, with or without detections; detections have a
    score of at least 0.5. Masks are drawn in tiles where every instance has one.

    Args:
        dataset_name: a data set with ground truth, registered in Detectron2.
        results_json_path: the coco_instances_results.json that COCOEvaluator wrote for it.

    Raises:
        FileNotFoundError: the results do not exist.
        ValueError: the file contains no results, or those of another data set; the data set is not
            registered, or has no images; or an image can't be read.
    """
    results = read_results(results_json_path, dataset_name)
    ids = [record["image_id"] for record in DatasetCatalog.get(dataset_name)]
    if not ids:
        raise ValueError(f"the data set {dataset_name!r} has no images to draw; name another")
    count = min(IMAGES, len(ids))
    shown = [ids[i * len(ids) // count] for i in range(count)]
    return draw_results(dataset_name, results, shown, 0.5)


def draw_results(
    dataset_name: str,
    results: Sequence[Mapping[str, Any]],
    image_ids: Sequence[Any],
    score_threshold: float,
) -> Figure:
    """Draw a contact sheet as ``draw_detections`` does, of given results on given images.

    Args:
        dataset_name: a data set with ground truth, registered in Detectron2.
        results: the results, as from ``read_results``.
        image_ids: the ids of the images, in the order of the tiles.
        score_threshold: the least score (0 … 1) of the detections drawn.

    Raises:
        ValueError: an image can't be read; one line.
    """
    by_id = {record["image_id"]: record for record in DatasetCatalog.get(dataset_name)}
    metadata = MetadataCatalog.get(dataset_name)
    detections = _by_image(results, metadata)
    with_masks, with_keypoints = any(map(_has_mask, results)), any(map(_has_points, results))
    tiles = []
    for record in (by_id[image] for image in image_ids):
        found = [d for d in detections[record["image_id"]] if d["score"] >= score_threshold]
        image = np.asarray(read_rgb(record["file_name"], upright=True))
        tiles.append(
            [
                draw_instances(image, instances, metadata, with_masks, with_keypoints)
                for instances in (record.get("annotations", []), found)
            ]
        )
    return _contact_sheet(tiles, ["ground truth", f"detections, score ≥ {score_threshold:g}"])


def read_results(path: str | os.PathLike[str], dataset_name: str) -> list[dict[str, Any]]:
    """Read detections in COCO's results format, with the data set's own category ids.

    Args:
        path: the coco_instances_results.json that COCOEvaluator wrote.
        dataset_name: the data set of the detections, registered in Detectron2.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it contains something else, an invalid box, score or mask, or results for
            another data set; or the data set is not registered; one line.
    """
    if dataset_name not in DatasetCatalog:
        raise ValueError(f"no data set {dataset_name!r} is registered in DatasetCatalog")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected was the coco_instances_results.json that "
            "COCOEvaluator writes: evaluate first (tools/train_net.py)"
        )
    images = {record["image_id"]: record for record in DatasetCatalog.get(dataset_name)}
    metadata = MetadataCatalog.get(dataset_name)
    known = metadata.get("thing_dataset_id_to_contiguous_id")
    if known is None:
        known = range(len(metadata.get("thing_classes", ())))
    try:
        results = parse_json(path.read_text())
        if not isinstance(results, list):
            raise TypeError(f"it holds a {type(results).__name__}, no list")
        for place, result in enumerate(results):
            image, category = result["image_id"], result["category_id"]
            _check_numbers(place, result["bbox"], result["score"])
            if image not in images:
                raise ValueError(f"image_id {image} is not in {dataset_name!r}")
            if category not in known:
                raise ValueError(f"category_id {category} is not in {dataset_name!r}")
            if _has_mask(result):
                _check_mask(place, result["segmentation"], images[image])
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} is not what COCOEvaluator writes: {e!r}") from e
    except ValueError as e:
        raise ValueError(f"{path}: {e}; mend the file, or evaluate this data set first") from e
    return results


def _check_numbers(place: int, box: Any, score: Any) -> None:
    """Refuse an invalid box or score.

    Args:
        place: the index of their result in the file, from 0.
    """
    boxed = isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))
    if not boxed or min(box[2:]) < 0:
        raise ValueError(
            f"the bbox of result {place} is {brief(box)}, and must be four finite numbers: x, y, "
            "width, height, the last two at least 0"
        )
    if not _is_finite(score) or not 0 <= score <= 1:
        raise ValueError(
            f"the score of result {place} is {brief(score)}, and must lie in 0 … 1: divide per "
            "cent by 100"
        )


def _check_mask(place: int, mask: Any, image: Mapping[str, Any]) -> None:
    if reason := rle_fault(mask):
        raise ValueError(
            f"the segmentation of result {place} is {brief(mask)}, and must be a mask as "
            f"pycocotools.mask.encode makes one: {reason}"
        )
    size = [image.get("height"), image.get("width")]
    if None not in size and mask["size"] != size:
        raise ValueError(
            f"the segmentation of result {place} is of {mask['size'][0]} × {mask['size'][1]} "
            f"pixels (height × width), and its image of {size[0]} × {size[1]}"
        )


def _is_finite(value: Any) -> bool:
    # math.isfinite raises an error for very large integers, which JSON allows.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _contact_sheet(tiles: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Lay out tiles in bands of up to four columns.

    Args:
        tiles: the tiles (H, W, 3) of each column from top to bottom.
        titles: the texts beside the rows of each band.
    """
    columns = min(len(tiles), COLUMNS)
    bands = math.ceil(len(tiles) / columns)
    band_height = len(titles) * (TILE + GAP) + GAP
    width, height = STRIP + columns * (TILE + GAP), GAP + bands * band_height
    sheet = np.full((height, width, 3), 255, np.uint8)
    for i, column in enumerate(tiles):
        left = STRIP + (i % columns) * (TILE + GAP)
        for row, tile in enumerate(column):
            top = GAP + (i // columns) * band_height + row * (TILE + GAP)
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile

    figure, ax = page(width, height)
    ax.imshow(sheet, extent=(0, width, height, 0), interpolation="nearest")
    for band in range(bands):
        for row, title in enumerate(titles):
            middle = GAP + band * band_height + row * (TILE + GAP) + TILE / 2
            ax.text(
                STRIP / 2, middle, title, rotation=90, ha="center", va="center", color=INK, size=12
            )
    return figure


def _by_image(results: Sequence[Mapping], metadata: Metadata) -> dict[Any, list[dict[str, Any]]]:
    """The results of each image by its id, in the form of Detectron2's annotations."""
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    detections: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        category = result["category_id"]
        if contiguous is not None:  # COCO's results have the data set's own ids
            category = contiguous[category]
        boxed = {"category_id": category, "bbox_mode": BoxMode.XYWH_ABS}
        detections[result["image_id"]].append({**result, **boxed})
    return detections


def have_masks(instances: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are instances, as annotations or results, and each of them has a mask."""
    return bool(instances) and all(map(_has_mask, instances))


def _has_points(instance: Mapping[str, Any]) -> bool:
    return bool(instance.get("keypoints"))


def _has_mask(instance: Mapping[str, Any]) -> bool:
    return bool(instance.get("segmentation"))


def draw_instances(
    image: np.ndarray,
    instances: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    with_masks: bool = True,
    with_keypoints: bool = True,
) -> np.ndarray:
    """Draw instances, in the form of Detectron2's annotations, on an image.

    Args:
        image: RGB, (H, W, 3).
        with_masks: whether to draw masks, if every instance has one.
        with_keypoints: whether to draw keypoints, if every instance has some.

    Returns:
        RGB (H, W, 3), no larger than a tile.
    """
    # The Visualizer rounds the size up; a pixel less keeps it within the tile.
    scale = (TILE - 1) / max(image.shape[:2])
    visualizer = Visualizer(image, metadata, scale=scale, font_size_scale=1.4)
    classes = [instance["category_id"] for instance in instances]
    names = metadata.get("thing_classes") or [str(i) for i in range(max(classes, default=0) + 1)]
    colors = metadata.get("thing_colors")
    if colors:
        palette = [tuple(channel / 255 for channel in color) for color in colors]
    else:
        palette = class_palette(len(names))
    with_masks = with_masks and have_masks(instances)
    points = []
    if with_keypoints and all(map(_has_points, instances)):
        points = [instance["keypoints"] for instance in instances]
    drawn = visualizer.overlay_instances(
        boxes=np.array(
            [BoxMode.convert(i["bbox"], i["bbox_mode"], BoxMode.XYXY_ABS) for i in instances]
        ).reshape(-1, 4),
        labels=[
            literal(names[c]) + (f" {i['score']:.0%}" if "score" in i else "")
            for c, i in zip(classes, instances, strict=True)
        ],
        masks=[i["segmentation"] for i in instances] if with_masks else None,
        keypoints=np.reshape(points, (len(points), -1, 3)) if points else None,
        # With one color for each class, the rows differ where the detector is wrong.
        assigned_colors=[palette[c] for c in classes],
    )
    # Make boxes visible on any background, and move labels that run out of the image back into it.
    for patch in drawn.ax.patches:
        if isinstance(patch, Rectangle):
            patch.set(
                alpha=1, linewidth=2, path_effects=[withStroke(linewidth=4, foreground="black")]
            )
    renderer = drawn.canvas.get_renderer()
    for text in drawn.ax.texts:
        beyond = text.get_window_extent(renderer).x1 + 3 - drawn.canvas.get_width_height()[0]
        text.set_x(text.get_position()[0] - max(beyond, 0) / scale)
    return drawn.get_image()[:TILE, :TILE]
