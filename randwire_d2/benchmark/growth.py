"""The growth of a training step's time and memory with the batch, the resolution, N and C."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from ..drawing.style import BLUE, GREEN, GREY, INK, PINK, RED, plots, style_axes
from .comparison import Settings, run
from .models import MODELS, Case
from .timing import Clock

# For each axis of the growth: its values, and its name in the figure.
AXES: dict[str, tuple[tuple[int, ...], str]] = {
    "batch": ((1, 2, 4, 8), "batch (images)"),
    "size": ((96, 128, 160, 224), "height of an image (pixels)"),
    "nodes": ((16, 24, 32, 48), "N (nodes per stage)"),
    "channels": ((54, 78, 109, 154), "C (channels)"),
}
GROWTH_MODELS = ("randwire", "randwire-plain", "resnet50")
# The markers tell the models apart in a print in grey.
LOOKS = {
    "randwire": (BLUE, "o"),
    "randwire-launched": (BLUE, "x"),
    "randwire-recompute": (GREEN, "D"),
    "randwire-plain": (RED, "s"),
    "randwire-compiled": (RED, "x"),
    "resnet50": (INK, "^"),
    "resnext50": (PINK, "v"),
    "resnet50-msra": (GREY, "P"),
}


@dataclass(frozen=True)
class GrowthPoint:
    """The cost of a model's training step at one value of one axis.

    Attributes:
        axis: a name of ``AXES``.
        value: the value on that axis.
        model: a name of ``MODELS``.
        saved, peak: the counted bytes for the whole batch.
        time: the seconds for the whole batch, median over the rounds; None if nothing was timed.
    """

    axis: str
    value: int
    model: str
    saved: int
    peak: int
    time: float | None


def grow(
    case: Case,
    settings: Settings,
    values: Mapping[str, Sequence[int]],
    *,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[GrowthPoint]:
    """Count and time a training step along each axis; the other axes stay as in ``case``.

    Args:
        case: the point that is on every axis.
        settings: see ``run``; its steps are not used.
        values: the values of each axis, by its name in ``AXES``.
        clock, progress: see ``run``.

    Raises:
        ValueError: a model can't be built or run at one of the values; see ``run``.
    """
    training = replace(settings, steps=("training",))
    done = {}
    points = []
    for axis in values:
        for value in values[axis]:
            at = move(case, axis, value)
            if at not in done:  # ``case`` is on every axis
                progress(f"growth: {axis} {value}")
                done[at] = run(at, training, ceilings=False, clock=clock).rows
            for row in done[at]:
                time = statistics.median(row.times) if row.times else None
                points.append(
                    GrowthPoint(axis, value, row.model, row.count.saved, row.count.peak, time)
                )
    return points


def move(case: Case, axis: str, value: int) -> Case:
    """The case with another value on an axis; images keep their aspect ratio."""
    if axis == "batch":
        return replace(case, batch=value)
    if axis == "size":
        return replace(case, height=value, width=round(value * case.width / case.height))
    if axis == "nodes":
        return replace(case, generator=replace(case.generator, num_nodes=value))
    return replace(case, generator=replace(case.generator, channels=value))


def plot_growth(points: Sequence[GrowthPoint], caption: str = "") -> Figure:
    """Plot time above and memory below, with a column for each axis.

    Args:
        points: the result of ``grow``; without times, the upper plots say so.
        caption: text below the figure.
    """
    axes = list(dict.fromkeys(point.axis for point in points))
    models = list(dict.fromkeys(point.model for point in points))
    figure, grid = plots(4 * max(len(axes), 1), 7, 2, max(len(axes), 1), sharey="row")
    timed = any(point.time is not None for point in points)
    for column, axis in enumerate(axes):
        upper, lower = grid[:, column]
        for model in models:
            color, marker = LOOKS[model]
            chosen = sorted(
                (p for p in points if (p.axis, p.model) == (axis, model)), key=lambda p: p.value
            )
            x = [p.value for p in chosen]
            look = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.8}
            seconds = [(p.value, p.time) for p in chosen if p.time is not None]
            if seconds:
                upper.plot(*zip(*seconds), **look)
            # The figure's one legend takes its lines from the first column.
            label = None if column else MODELS[model]
            lower.plot(x, [p.peak / 1e9 for p in chosen], label=label, **look)
            lower.plot(x, [p.saved / 1e9 for p in chosen], **{**look, "linestyle": "--"})
        for ax in (upper, lower):
            ax.set_xlabel(AXES[axis][1], color=INK)
            ax.set_xticks(sorted({p.value for p in points if p.axis == axis}))
            ax.set_xlim(left=0)
            ax.set_ylim(bottom=0)
            style_axes(ax)
        if not timed:
            upper.text(0.5, 0.5, "not measured", transform=upper.transAxes, ha="center", color=INK)
    grid[0, 0].set_ylabel("training step (s)", color=INK)
    grid[1, 0].set_ylabel("memory (GB): peak –, saved - -", color=INK)
    figure.legend(loc="outside upper center", ncols=max(len(models), 1), frameon=False)
    if caption:
        figure.supxlabel(caption, fontsize=9, color=INK)
    return figure
