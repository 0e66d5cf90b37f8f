"""Plots of an error analysis: confusion matrix, precision–recall curves, AP, scores."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .style import BLUE, COLORS, DPI, GREEN, GREY, INK, LINE, RED, literal, plots, style_axes

MOST = 100  # the most classes that a picture shows
FEW = len(COLORS)  # fewer classes than this have a colour each; the mean takes one colour
COUNTED = 20  # the most classes of a matrix with numbers in its cells


def plot_confusion(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: a row for each object class, a column for each detected class.

    The shade of a cell is its fraction of the row. If there are more than ``MOST`` classes, those
    with the most confusions are drawn.

    Args:
        counts: (K + 1, K + 1); the last row is for detections without an object, the last column
            for objects that were not found.
        names: the names of the K classes.
    """
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = _with_most(counts)
    rows, labels = [*shown, len(names)], [_short(names[k]) for k in shown]
    cell, size = (0.5, 10) if len(shown) <= COUNTED else (0.17, 8)
    # Room for the names, which are at most 24 letters long.
    letters = max(map(len, [*labels, "nothing there"]))
    side = cell * len(rows) + 0.085 * letters + 0.9
    figure, ((ax,),) = plots(max(side, 4.5), max(side, 4.5))
    part = parts[np.ix_(rows, rows)]
    colors = np.full((*part.shape, 3), to_rgb(RED))
    colors[-1], colors[:, -1] = to_rgb(GREY), to_rgb(GREY)
    np.einsum("iic->ic", colors)[:-1] = to_rgb(BLUE)
    strength = np.sqrt(part)[..., None]  # so that small fractions are visible
    shades = 1 - strength * (1 - colors)
    ax.imshow(shades, interpolation="nearest")
    if len(shown) <= COUNTED:
        for (i, j), count in np.ndenumerate(counts[np.ix_(rows, rows)]):
            if count:
                color = "white" if shades[i, j].mean() < 0.5 else INK
                ax.text(j, i, str(count), ha="center", va="center", size=_fit(count), color=color)
    ax.set_xticks(range(len(rows)), [*labels, "nothing found"], rotation=90, size=size)
    ax.set_yticks(range(len(rows)), [*labels, "nothing there"], size=size)
    ax.set_xticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=LINE, linewidth=0.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_color(LINE)
    ax.set_xlabel("found as", color=INK, size=11, weight="bold")
    ax.set_ylabel("what is there", color=INK, size=11, weight="bold")
    return figure


def plot_precision_recall(
    precision: NDArray[np.float64], ious: Sequence[float], names: Sequence[str]
) -> Figure:
    """Draw precision over recall for each class and the mean, with an axes for each IoU.

    Args:
        precision: (IoUs, R, K), at R equidistant recalls 0 … 1; nan for a class without objects.
    """
    figure, (row,) = plots(6 * len(ious), 5, columns=len(ious), sharey=True)
    recall = np.linspace(0, 1, precision.shape[1])
    for ax, iou, values in zip(row, ious, precision):
        style_axes(ax, f"IoU ≥ {iou:g}")
        there = np.flatnonzero(~np.isnan(values[0]))
        for k, color in zip(there.tolist(), COLORS[1:] if len(there) < FEW else ()):
            # The name last: a legend leaves out what begins with "_".
            label = f"AP {100 * values[:, k].mean():.1f}  {_short(names[k])}"
            ax.plot(recall, values[:, k], color=color, linewidth=1.2, label=label)
        if len(there) >= FEW:
            ax.plot(recall, values[:, there], color=GREY, linewidth=0.6, alpha=0.6)
        if len(there):
            mean = values[:, there].mean(axis=1)
            label = f"AP {100 * mean.mean():.1f}  mean of {len(there)}"
            ax.plot(recall, mean, color=BLUE, linewidth=3, label=label)
            ax.legend(frameon=False, fontsize=9)
        _unit(ax, "recall", "precision")
    return figure


def plot_class_ap(names: Sequence[str], ap: Sequence[float], ap50: Sequence[float]) -> Figure:
    """Draw the AP and AP50 of each class that has objects, the lowest first.

    Args:
        ap, ap50: the values of the classes, 0 … 100; nan without objects. If there are more than
            ``MOST`` classes, those of the lowest AP are drawn.
    """
    order = [int(k) for k in np.argsort(ap, kind="stable") if not np.isnan(ap[k])][:MOST]
    figure, ((ax,),) = plots(9, max(2, 0.2 * len(order) + 0.8))
    style_axes(ax, grid="x")
    rows = range(len(order))
    ax.barh(rows, [ap[k] for k in order], color=BLUE, height=0.7, label="AP")
    ax.plot([ap50[k] for k in order], rows, "o", color=RED, markersize=4, label="AP50")
    ax.set_yticks(rows, [_short(names[k]) for k in order], size=9)
    ax.set_ylim(max(len(order), 1) - 0.4, -0.6)
    ax.set_xlim(0, 101)
    if order:  # to the right of the axes, away from bars and dots
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_scores(
    scores: NDArray[np.int64], sweep: NDArray[np.float64], threshold: float, best: float
) -> Figure:
    """Draw histograms of true and false detections by score, and precision, recall and F1 by
    threshold.

    Args:
        scores: the numbers of true and false detections, (2, bins of equal width in 0 … 1).
        sweep: precision, recall and F1 at T equidistant thresholds 0 … 1, (T, 3).
        threshold: the threshold of the analysis.
        best: the threshold with the largest F1; nan if there is none.
    """
    figure, ((left, right),) = plots(12, 4.6, columns=2)
    style_axes(left, "Scores of the detections")
    edges = np.linspace(0, 1, scores.shape[1] + 1)
    for name, counts, color in zip(("true", "false"), scores, (BLUE, RED)):
        left.stairs(counts, edges, fill=True, color=color, alpha=0.25)
        left.stairs(counts, edges, color=color, linewidth=2, label=f"{name}: {counts.sum()}")
    # False detections of low scores are often a hundred times as many as the rest.
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=0)
    left.set_xlim(0, 1)
    left.set_xlabel("score", color=INK)
    left.set_ylabel("detections", color=INK)

    style_axes(right, "At each threshold of the score")
    for name, values, color in zip(("precision", "recall", "F1"), sweep.T, (BLUE, RED, GREEN)):
        right.plot(np.linspace(0, 1, len(values)), values, color=color, linewidth=2, label=name)
    _unit(right, "threshold", "")
    for ax in (left, right):
        chosen = f"threshold, {threshold:g}"
        ax.axvline(threshold, color=INK, linewidth=1, linestyle="--", label=chosen)
        if not np.isnan(best):
            ax.axvline(best, color=GREEN, linestyle=":", label=f"largest F1, {best:.2f}")
        ax.legend(frameon=False, fontsize=9)
    return figure


def plot_overview(errors: Mapping[str, int], sizes: Sequence[float]) -> Figure:
    """Draw the number of errors of each kind, and the AP by size.

    Args:
        errors: kind -> number.
        sizes: the AP of small, medium and large objects, 0 … 100; nan if there are none.
    """
    figure, ((left, right),) = plots(12, 3.4, columns=2, width_ratios=(2, 1))
    style_axes(left, "Errors by kind", grid="x")
    bars = left.barh(list(errors), list(errors.values()), color=RED, height=0.65)
    left.bar_label(bars, padding=4, color=INK)
    left.invert_yaxis()
    left.set_xlim(0, 1.1 * max(*errors.values(), 1))

    style_axes(right, "AP by size of the objects", grid="y")
    bars = right.bar(["small", "medium", "large"], np.nan_to_num(sizes), color=BLUE, width=0.6)
    labels = ["no objects" if np.isnan(size) else f"{size:.1f}" for size in sizes]
    right.bar_label(bars, labels, color=INK)
    right.set_ylim(0, 105)
    return figure


def _with_most(counts: NDArray[np.int64]) -> list[int]:
    """The indices of all classes, or of the ``MOST`` most confused ones, ascending."""
    wrong = counts[:-1, :-1] * (1 - np.eye(len(counts) - 1, dtype=int))
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")
    return sorted(order[:MOST].tolist())


def _fit(count: int) -> float:
    """The font size that fits a number into a cell."""
    return min(10, 0.5 * DPI * 0.72 / (0.75 * len(str(count)) + 0.8))


def _short(name: str) -> str:
    return literal(name if len(name) <= 24 else f"{name[:23]}…")


def _unit(ax: Axes, x: str, y: str) -> None:
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
