"""Pictures of finished training runs: curves, detections, wirings, and groups of runs compared."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from tabulate import tabulate

from . import data  # noqa: F401 (registers the built-in data set)
from .config import add_randwire_config, spec_from_config
from .wiring.draw import BLUE, INK, LINE, RED, draw_network, save_figure

DPI = 100
TILE, GAP, STRIP, COLUMNS = 320, 8, 32, 4  # of the contact sheet; all but the last in pixels

Metrics = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Report:
    """What ``write_report`` found and wrote.

    Attributes:
        ap: the last evaluation's box AP (0 … 100), averaged over IoU 0.5 … 0.95.
        ap50: the same at IoU 0.5.
        pictures: the files written.
    """

    ap: float
    ap50: float
    pictures: tuple[Path, ...]


def write_report(run_dir: str | os.PathLike[str], picture_dir: str | os.PathLike[str]) -> Report:
    """Draw detections.png, training.png and, of a RandWire, wiring.png of a run.

    Args:
        run_dir: the OUTPUT_DIR of a training that has ended.
        picture_dir: where the pictures go.

    Raises:
        FileNotFoundError: a file that a finished run has is missing.
        ValueError: a file does not hold what it should.
    """
    run_dir, picture_dir = Path(run_dir), Path(picture_dir)
    cfg = get_cfg()
    add_randwire_config(cfg)
    cfg.merge_from_file(str(_existing(run_dir / "config.yaml", "OUTPUT_DIR of a training")))
    evaluations = [
        values
        for _, values in sorted(read_metrics(run_dir / "metrics.json").items())
        if "bbox/AP" in values
    ]
    if not evaluations:
        raise ValueError(
            f"{run_dir / 'metrics.json'} holds no evaluation (bbox/AP): the training has not "
            "ended; let it, with tools/train_net.py --resume"
        )
    results = run_dir / "inference" / "coco_instances_results.json"
    figures = {
        "detections.png": draw_detections(cfg.DATASETS.TEST[-1], results),
        "training.png": plot_training(run_dir / "metrics.json"),
    }
    if "randwire" in cfg.MODEL.BACKBONE.NAME:
        figures["wiring.png"] = draw_network(spec_from_config(cfg))
    pictures = tuple(save_figure(figure, picture_dir / name) for name, figure in figures.items())
    return Report(evaluations[-1]["bbox/AP"], evaluations[-1]["bbox/AP50"], pictures)


def _existing(path: str | os.PathLike[str], what: str) -> Path:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{os.fspath(path)} does not exist; expected was the {what}: train and evaluate first "
            "(tools/train_net.py), or name another folder"
        )
    return Path(path)


# -------------------------------------------------------------------------------------------------
# Curves
# -------------------------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike[str]) -> Metrics:
    """Read the metrics.json of Detectron2's JSONWriter: iteration -> name -> value.

    A run that was killed and resumed goes back some iterations; what it wrote of them before does
    not count. Nor does a line that the kill cut off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of this format, or empty.
    """
    path = _existing(path, "metrics.json of a training")
    metrics: Metrics = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            iteration = values.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # cut off
        if metrics and iteration < next(reversed(metrics)):
            metrics = {i: kept for i, kept in metrics.items() if i < iteration}
        metrics.setdefault(iteration, {}).update(values)
    if not metrics:
        raise ValueError(f"{path} holds no line of Detectron2's metrics.json: train first")
    return metrics


def plot_training(metrics_json_path: str | os.PathLike[str]) -> Figure:
    """Plot the total loss, and box AP and AP50, over the iterations of a run.

    Raises:
        FileNotFoundError, ValueError: as ``read_metrics``.
    """
    metrics = read_metrics(metrics_json_path)
    figure = Figure(figsize=(12, 4.6), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    loss_ax, ap_ax = figure.subplots(1, 2)

    _axes(loss_ax, "Training loss")
    iterations, losses = _series(metrics, "total_loss")
    loss_ax.plot(iterations, losses, color=BLUE, alpha=0.3, linewidth=1, label="total loss")
    loss_ax.plot(iterations, _smooth(losses), color=BLUE, linewidth=2, label="smoothed")
    loss_ax.set_ylim(bottom=0)
    if iterations:
        loss_ax.legend(frameon=False)

    _axes(ap_ax, "Box AP on the validation set")
    ap_ax.set_ylim(0, 100)
    ap_ax.sharex(loss_ax)
    for name, color in (("AP50", RED), ("AP", BLUE)):
        iterations, values = _series(metrics, f"bbox/{name}")
        ap_ax.plot(iterations, values, color=color, marker="o", markersize=5, linewidth=2)
        if iterations:
            ap_ax.annotate(
                f"{name} {values[-1]:.1f}",
                (iterations[-1], values[-1]),
                (-4, 8),
                textcoords="offset points",
                ha="right",
                color=color,
                weight="bold",
            )
    if not iterations:
        ap_ax.text(0.5, 0.5, "no evaluation yet", transform=ap_ax.transAxes, ha="center")
    return figure


@dataclass(frozen=True)
class Comparison:
    """What ``write_comparison`` found and wrote.

    Attributes:
        table: a line per group, each metric's mean ± sample standard deviation over its runs.
        picture: the metrics of all runs over their iterations.
    """

    table: str
    picture: Path


def write_comparison(
    groups: Mapping[str, Sequence[str | os.PathLike[str]]],
    names: Sequence[str],
    picture: str | os.PathLike[str],
) -> Comparison:
    """Compare groups of runs, such as those of several seeds, by their last evaluations.

    Args:
        groups: a name to the OUTPUT_DIRs of its runs, at least two.
        names: the metrics, as in metrics.json.
        picture: the file to draw into.

    Raises:
        FileNotFoundError, ValueError: as ``read_metrics``, or a run without an evaluation.
    """
    figure = Figure(figsize=(6 * len(names), 4.6), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0]))
    rows = []
    for (group, folders), color in zip(groups.items(), (BLUE, RED, INK, LINE)):
        runs = [read_metrics(Path(folder, "metrics.json")) for folder in folders]
        row = [group, str(len(runs))]
        for name, ax in axes.items():
            last = []
            for folder, metrics in zip(folders, runs):
                iterations, values = _series(metrics, name)
                if not values:
                    raise ValueError(f"{os.fspath(folder)} holds no evaluation ({name})")
                last.append(values[-1])
                label = group if len(last) == 1 else None
                ax.plot(iterations, values, color=color, marker="o", markersize=4, label=label)
            row.append(
                f"{mean(last):.1f} ± {stdev(last):.1f} ({', '.join(f'{v:.1f}' for v in last)})"
            )
        rows.append(row)
    for name, ax in axes.items():
        _axes(ax, name)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    table = tabulate(rows, ["", "runs", *names], tablefmt="pipe")
    return Comparison(table, save_figure(figure, picture))


def _axes(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", color=INK, fontsize=13, weight="bold")
    ax.set_xlabel("iteration", color=INK)
    ax.grid(color=LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """The iterations at which a finite value was written, and the values."""
    points = [
        (i, values[name])
        for i, values in metrics.items()
        if math.isfinite(values.get(name, math.nan))
    ]
    return [i for i, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a tenth of all values around each; over fewer at the ends."""
    half = max(len(values) // 20, 1)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # the same to both sides, or the ends would tilt
        means.append(float(np.mean(values[i - reach : i + reach + 1])))
    return means


# -------------------------------------------------------------------------------------------------
# Detections
# -------------------------------------------------------------------------------------------------


def draw_detections(
    dataset_name: str,
    results_json_path: str | os.PathLike[str],
    max_images: int = 8,
    score_threshold: float = 0.5,
) -> Figure:
    """Draw a contact sheet: images of a data set with their ground truth, below with detections.

    The images are spread evenly over the data set, whatever was found in them. Masks are drawn if
    the results have them.

    Args:
        dataset_name: a data set registered in Detectron2, with ground truth.
        results_json_path: the coco_instances_results.json that COCOEvaluator wrote for it.
        max_images: how many images at most.
        score_threshold: the least score (0 … 1) of the detections drawn.

    Raises:
        FileNotFoundError: the results do not exist.
        ValueError: they are no such file, or of another data set; or no such data set is
            registered; or max_images is less than 1.
    """
    if max_images < 1:
        raise ValueError(f"max_images must be at least 1; got {max_images}")
    if dataset_name not in DatasetCatalog:
        raise ValueError(f"no data set {dataset_name!r} is registered in DatasetCatalog")
    path = _existing(results_json_path, "coco_instances_results.json that COCOEvaluator writes")
    records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    detections = _read_detections(path, dataset_name, records, metadata)
    has_masks = any("segmentation" in d for found in detections.values() for d in found)

    count = min(max_images, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    columns = min(count, COLUMNS)
    bands = math.ceil(count / columns)
    width = STRIP + columns * (TILE + GAP)
    height = GAP + bands * (2 * TILE + 3 * GAP)
    sheet = np.full((height, width, 3), 255, np.uint8)
    for i, record in enumerate(chosen):
        left = STRIP + (i % columns) * (TILE + GAP)
        top = GAP + (i // columns) * (2 * TILE + 3 * GAP)
        found = [d for d in detections[record["image_id"]] if d["score"] >= score_threshold]
        for instances, y in ((record["annotations"], top), (found, top + TILE + GAP)):
            tile = _draw_instances(record["file_name"], instances, metadata, has_masks)
            sheet[y : y + tile.shape[0], left : left + tile.shape[1]] = tile

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    ax.imshow(sheet, extent=(0, width, height, 0), interpolation="nearest")
    for band in range(bands):
        for row, title in enumerate(("ground truth", f"detections, score ≥ {score_threshold:g}")):
            middle = GAP + band * (2 * TILE + 3 * GAP) + row * (TILE + GAP) + TILE / 2
            ax.text(
                STRIP / 2, middle, title, rotation=90, ha="center", va="center", color=INK, size=12
            )
    return figure


def _read_detections(
    path: Path, dataset_name: str, records: Sequence[Mapping], metadata: Metadata
) -> dict[Any, list[dict[str, Any]]]:
    """The detections of each image, with contiguous category ids and boxes as in Detectron2."""
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    detections: dict[Any, list[dict[str, Any]]] = {record["image_id"]: [] for record in records}
    try:
        for result in json.loads(path.read_text()):
            image, category = result["image_id"], result["category_id"]
            if image not in detections:
                raise ValueError(f"image_id {image} is not in {dataset_name!r}")
            if contiguous is not None and category not in contiguous:
                raise ValueError(f"category_id {category} is not in {dataset_name!r}")
            if contiguous is not None:  # the file has the data set's own ids, as COCO wants them
                category = contiguous[category]
            boxed = {"category_id": category, "bbox_mode": BoxMode.XYWH_ABS}
            detections[image].append({**result, **boxed})
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} is not what COCOEvaluator writes: {e!r}") from e
    except ValueError as e:
        raise ValueError(f"{path}: {e}; evaluate this data set first") from e
    return detections


def _draw_instances(
    file_name: str, instances: Sequence[Mapping[str, Any]], metadata: Metadata, has_masks: bool
) -> np.ndarray:
    """An image with instances, as RGB (H, W, 3) within a tile."""
    image = read_image(file_name, "RGB")
    # The Visualizer rounds the size up; a pixel less keeps it within the tile.
    scale = (TILE - 1) / max(image.shape[:2])
    visualizer = Visualizer(image, metadata, scale=scale, font_size_scale=1.4)
    classes = [instance["category_id"] for instance in instances]
    names = metadata.get("thing_classes") or [str(i) for i in range(max(classes, default=0) + 1)]
    colors = metadata.get("thing_colors")
    if colors:
        palette = [tuple(channel / 255 for channel in color) for color in colors]
    else:  # bright, and far apart for any number of classes: hues by the golden ratio
        palette = [tuple(hsv_to_rgb((i * 0.618 % 1, 0.6, 1))) for i in range(len(names))]
    drawn = visualizer.overlay_instances(
        boxes=np.array(
            [BoxMode.convert(i["bbox"], i["bbox_mode"], BoxMode.XYXY_ABS) for i in instances]
        ).reshape(-1, 4),
        labels=[
            names[c] + (f" {i['score']:.0%}" if "score" in i else "")
            for c, i in zip(classes, instances, strict=True)
        ],
        masks=[i["segmentation"] for i in instances] if has_masks else None,
        # One color for each class: what differs between the rows is what the detector got wrong.
        assigned_colors=[palette[c] for c in classes],
    )
    # Boxes must show on any background, and labels end within the image.
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
