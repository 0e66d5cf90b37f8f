"""An analysis on disk: a page, its pictures, and its numbers as JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from ..drawing.detections import draw_results, read_results
from ..drawing.errors import (
    plot_class_ap,
    plot_confusion,
    plot_overview,
    plot_precision_recall,
    plot_scores,
)
from ..drawing.style import save_figure
from ..files import atomic_open, check_folder
from ..text import parse_json
from .matching import IOU, KINDS, Task
from .measures import CURVE_IOUS, METRICS, Analysis, ClassResult, Operation, analyze, number
from .page import Section, render
from .source import Source, check_ids, ground_truth

PAGE, NUMBERS = "index.html", "analysis.json"
SHOWN = 8  # images on the contact sheet
_OPERATION = ("precision", "recall", "best score", "F1")


def write_analysis(
    source: Source,
    folder: str | os.PathLike[str] | None = None,
    task: Task = "bbox",
    threshold: float = 0.5,
) -> tuple[Analysis, Path]:
    """Analyse detections, and write the page, its pictures and the numbers into a folder.

    Args:
        source: the detections and their data set.
        folder: a new or empty folder, or one with an earlier analysis of these detections; by
            default ``source.folder``.
        task: ``"bbox"`` or ``"segm"``: whether the IoU is of boxes or of masks.
        threshold: the least score (0 … 1) of the detections, for all counts that need one.

    Returns:
        tuple[Analysis, Path]: the analysis, and the path of the page.

    Raises:
        FileNotFoundError: the detections, or files of the data set, do not exist.
        ValueError: the files are invalid, or do not match each other; or the folder contains
            something else.
    """
    folder = Path(source.folder if folder is None else folder)
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold of scores must lie in 0 … 1; got {threshold:g}")
    _check_folder(folder, source)
    results = read_results(source.results, source.dataset)
    if task == "segm" and not all(result.get("segmentation") for result in results):
        raise ValueError(f"{source.results} holds no masks; analyse its boxes (bbox)")
    truth = ground_truth(source.dataset)
    check_ids(source, truth)
    if task == "segm" and (bare := sum(not a.get("segmentation") for a in truth.anns.values())):
        raise ValueError(
            f"{bare} of {len(truth.anns)} objects of the data set {source.dataset!r} have no mask; "
            "analyse their boxes (bbox)"
        )
    analysis = analyze(truth, results, task, threshold)

    folder.mkdir(parents=True, exist_ok=True)
    # Write the numbers first: by them, ``_check_folder`` recognises an interrupted analysis.
    with atomic_open(folder / NUMBERS) as f:
        json.dump(_numbers(analysis, source, folder), f)
    sections = [
        _overview(analysis, folder),
        _images(analysis, folder, source.dataset, results),
        _confusion(analysis, folder),
        _curves(analysis, folder),
        _scores(analysis, folder),
        _classes(analysis, folder),
    ]
    what = "boxes" if task == "bbox" else "masks"
    title = f"Analysis of {what} in {source.data or source.dataset}"
    cards = {name: number(value) for name, value in analysis.metrics.items()}
    page = render(title, str(source.results), _lead(analysis), cards, sections)
    with atomic_open(folder / PAGE) as f:
        f.write(page)
    return analysis, folder / PAGE


def summary(analysis: Analysis) -> str:
    """The main numbers as text: AP, the most frequent confusions, the classes of lowest AP."""
    row = [number(value) for value in analysis.metrics.values()]
    lines = [tabulate([row], METRICS, disable_numparse=True, stralign="right"), ""]
    lines.append(f"score ≥ {analysis.threshold:g}: {analysis.chosen}")
    if not isnan(analysis.best.threshold):
        lines.append(f"largest F1, score ≥ {analysis.best.threshold:.2f}: {analysis.best}")
    pairs = [f"{a} as {b} ({n})" for a, b, n in analysis.confused_pairs()[:3]]
    lines.append(f"most confused: {', '.join(pairs) or 'none'}")
    lowest = [f"{c.name} ({number(c.metrics['AP'])})" for c in _by_ap(analysis)[:3]]
    return "\n".join([*lines, f"lowest AP: {', '.join(lowest)}"])


def _check_folder(folder: Path, source: Source) -> None:
    check_folder("--output", folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        earlier = parse_json((folder / NUMBERS).read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = None
    if earlier != _relative(source, folder):
        raise ValueError(
            f"{folder} exists, and holds no analysis of {source.results}: name another folder "
            "(--output)"
        )


def _relative(source: Source, folder: Path) -> str:
    # A relative path stays valid if the run is moved together with its analysis.
    return os.path.relpath(source.results.resolve(), folder.resolve())


def _numbers(analysis: Analysis, source: Source, folder: Path) -> Any:
    where = {"dataset": source.dataset, "results": _relative(source, folder)}
    pairs = {"confused_pairs": analysis.confused_pairs()}
    return _plain({**where, **asdict(analysis), **pairs})


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types: arrays become lists, nan becomes None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and isnan(value) else value


# -------------------------------------------------------------------------------------------------
# Sections of the page
# -------------------------------------------------------------------------------------------------


def _lead(analysis: Analysis) -> str:
    return (
        f"{analysis.images} images, {analysis.objects} objects of {len(analysis.classes)} classes, "
        f"{analysis.detections} detections of any score. Below, detections are counted from a "
        f"score of {analysis.threshold:g} on: {analysis.chosen}. "
        f"{_largest_f1(analysis.best)} An object is found by a detection of its class with an IoU "
        f"of at least {IOU:g}. AP and AR are COCO's, over all scores."
    )


def _largest_f1(best: Operation) -> str:
    if isnan(best.threshold):
        return "No score makes F1 larger than 0."
    return f"F1 is largest from {best.threshold:.2f} on: {best}."


def _overview(analysis: Analysis, folder: Path) -> Section:
    sizes = [analysis.metrics[name] for name in ("APs", "APm", "APl")]
    found = ", ".join(f"{kind} {count}" for kind, count in analysis.errors.items())
    return Section(
        "What goes wrong",
        "Each false detection is of the first kind that fits. Small objects have less than 32² "
        "pixels, large ones more than 96².",
        _png(plot_overview(analysis.errors, sizes), folder / "overview.png"),
        f"Errors by kind: {found}. AP of small, medium, large objects: "
        f"{', '.join(map(number, sizes))}.",
        header=("kind of error", "what it is", "how many"),
        rows=[[kind, KINDS[kind], str(count)] for kind, count in analysis.errors.items()],
        words=2,
    )


def _confusion(analysis: Analysis, folder: Path) -> Section:
    pairs = [[a, b, str(count)] for a, b, count in analysis.confused_pairs()[:10]]
    worst = "; ".join(f"{a} as {b} {count} times" for a, b, count in pairs[:3])
    return Section(
        "Confusion matrix",
        "The shade of a cell is its part of the row: blue where the class is right, red where it "
        "is not, grey where there is only a detection or only an object. Detections that found an "
        "object of their class count first; the others may have found one of another.",
        _png(plot_confusion(analysis.confusion, analysis.names), folder / "confusion.png"),
        f"Confusion matrix of {len(analysis.classes)} classes. Most confused: {worst or 'none'}.",
        fit=False,
        header=("class", "found as", "how often"),
        rows=pairs,
        words=2,
    )


def _curves(analysis: Analysis, folder: Path) -> Section:
    figure = plot_precision_recall(analysis.precision, CURVE_IOUS, analysis.names)
    return Section(
        "Precision and recall",
        "COCO's curves: the largest precision at each recall or beyond it, of each class and their "
        "mean. The area below is AP at this IoU.",
        _png(figure, folder / "precision_recall.png"),
        f"Curves of precision over recall. AP50 is {number(analysis.metrics['AP50'])}, AP75 "
        f"{number(analysis.metrics['AP75'])}.",
    )


def _classes(analysis: Analysis, folder: Path) -> Section:
    ap, ap50 = ([c.metrics[name] for c in analysis.classes] for name in ("AP", "AP50"))
    rows = [
        [c.name, str(c.objects), str(c.detections)]
        + [number(value) for value in c.metrics.values()]
        + [number(value, 2) for value in (c.chosen.precision, c.chosen.recall)]
        + [number(value, 2) for value in (c.best.threshold, c.best.f1)]
        for c in [*_by_ap(analysis), *(c for c in analysis.classes if not c.objects)]
    ]
    lowest = ", ".join(f"{c.name} {number(c.metrics['AP'])}" for c in _by_ap(analysis)[:3])
    return Section(
        "Classes",
        "The lowest AP first; classes without objects have none. Detections, precision and recall "
        f"are from a score of {analysis.threshold:g} on; the last columns are the score from which "
        "on the class has its largest F1.",
        _png(plot_class_ap(analysis.names, ap, ap50), folder / "classes.png"),
        f"AP of each class. The lowest: {lowest}.",
        header=("class", "objects", "detections", *METRICS[:6], *_OPERATION),
        rows=rows,
    )


def _scores(analysis: Analysis, folder: Path) -> Section:
    figure = plot_scores(
        analysis.scores, analysis.sweep, analysis.threshold, analysis.best.threshold
    )
    true, false = analysis.scores.sum(axis=1)
    return Section(
        "Scores",
        "Detections that found an object, and those that did not; and what all classes together "
        "would have if detections counted from another score on.",
        _png(figure, folder / "scores.png"),
        f"Histogram of scores: {true} detections are true and {false} false. Precision, recall and "
        f"F1 by threshold. {_largest_f1(analysis.best)}",
    )


def _images(
    analysis: Analysis, folder: Path, dataset: str, results: Sequence[Mapping[str, Any]]
) -> Section:
    worst, png = analysis.worst[:SHOWN], None
    about = (
        f"Of {analysis.images} images, {len(analysis.worst)} have objects that were not found as "
        "what they are, or false detections. "
    )
    if worst:
        try:
            shown = [image.image_id for image in worst]
            figure = draw_results(dataset, results, shown, analysis.threshold)
        except (OSError, ValueError) as e:
            about += f"They can't be drawn: {e}"
        else:  # a full disk, in contrast to a missing image, ends the analysis
            png = _png(figure, folder / "images.png", palette=False)
            about += "Those with the most, in the order of the table:"
    if png is None:
        (folder / "images.png").unlink(missing_ok=True)  # from an earlier analysis
    return Section(
        "Images with the most errors",
        about,
        png,
        f"The {len(worst)} images with the most errors, each with its ground truth above and the "
        "detections below.",
        header=("image", "objects not found", "false detections"),
        rows=[[image.file_name, str(image.not_found), str(image.false)] for image in worst],
    )


def _png(figure: Figure, path: Path, palette: bool = True) -> bytes:
    return save_figure(figure, path, palette).read_bytes()


def _by_ap(analysis: Analysis) -> list[ClassResult]:
    """The classes that have objects, by ascending AP."""
    return sorted((c for c in analysis.classes if c.objects), key=lambda c: c.metrics["AP"])
