"""Curves over iterations: the loss and AP of one training, any metrics of groups of trainings."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLUE, COLORS, INK, RED, plots, style_axes

# The content of Detectron2's metrics.json: iteration -> name -> value.
Metrics = Mapping[int, Mapping[str, float]]


def plot_training(metrics: Metrics, title: str, names: Mapping[str, str]) -> Figure:
    """Plot a run's total loss, its validation loss if there is one, and the metrics of its
    evaluations, over its iterations.

    Args:
        metrics: the content of metrics.json.
        title: the title of the metrics' axes, whose values are 0 … 100.
        names: two metrics: label in the plot -> name in metrics.json.
    """
    figure, ((loss_ax, ap_ax),) = plots(12, 4.6, columns=2)

    _over_iterations(loss_ax, "Training loss")
    iterations, losses = series_of(metrics, "total_loss")
    loss_ax.plot(iterations, losses, color=BLUE, alpha=0.3, linewidth=1, label="total loss")
    loss_ax.plot(iterations, _smooth(losses), color=BLUE, linewidth=2, label="smoothed")
    tested, values = series_of(metrics, "val_total_loss")
    if tested:
        loss_ax.plot(tested, values, color=RED, marker="o", markersize=5, label="validation")
    loss_ax.set_ylim(bottom=0)
    if iterations:
        loss_ax.legend(frameon=False)

    _over_iterations(ap_ax, title)
    ap_ax.set_ylim(0, 100)
    ap_ax.sharex(loss_ax)
    for (name, key), color in zip(names.items(), (RED, BLUE), strict=True):
        iterations, values = series_of(metrics, key)
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


def plot_groups(groups: Mapping[str, Sequence[Metrics]], names: Sequence[str]) -> Figure:
    """Plot metrics over the iterations of groups of runs, such as those of several seeds.

    Args:
        groups: from the name of a group to the metrics of its runs.
        names: the names of the metrics; each gets an axes of its own.
    """
    figure, (row,) = plots(6 * len(names), 4.6, columns=len(names))
    for name, ax in zip(names, row, strict=True):
        for (group, runs), color in zip(groups.items(), cycle(COLORS)):
            for i, metrics in enumerate(runs):
                label = None if i else group  # one entry of the legend for each group
                look = {"color": color, "marker": "o", "markersize": 4}
                ax.plot(*series_of(metrics, name), **look, label=label)
        _over_iterations(ax, name)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    return figure


def series_of(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """The iterations at which a metric has a finite value, and these values."""
    points = [
        (i, values[name])
        for i, values in metrics.items()
        if math.isfinite(values.get(name, math.nan))
    ]
    return [i for i, _ in points], [value for _, value in points]


def _over_iterations(ax: Axes, title: str) -> None:
    style_axes(ax, title)
    ax.set_xlabel("iteration", color=INK)


def _smooth(values: Sequence[float]) -> list[float]:
    """For each value, the mean over the tenth of all values around it; over fewer at the ends."""
    half = max(len(values) // 20, 1)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # the same to both sides, or the ends would tilt
        means.append(float(np.mean(values[i - reach : i + reach + 1])))
    return means
