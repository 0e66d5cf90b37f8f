"""The look that every picture has: colours, sizes, text, axes, and files that appear whole."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from PIL import Image

from ..files import atomic_open
from .dag_layout import Point

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's blue and vermillion: apart for every kind of colour vision, and in grey.
BLUE, RED = "#0072B2", "#D55E00"
GREY, INK, PALE, LINE = "#8C96A0", "#1F2933", "#F5F7F9", "#CBD2D9"

WIDTH, DPI = 1600, 100  # pixels; points are 1/72 inch
MARGIN, SIDE, GUTTER = 28, 168, 34  # pixels: around the page, of the side columns, between columns
TITLE = 92  # pixels from a stage's upper edge to its graph
PORT = 26  # pixels from a graph to the extra nodes' outer ends
LEGEND_LINE = 28  # pixels: from entry to entry
POINT = 72 / DPI


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, unknown to pyplot, and its axes, in pixels from the upper left corner."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def plots(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure for plots, unknown to pyplot, of a size in inches; its axes as (rows, columns)."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style_axes(ax: Axes, title: str = "", grid: Literal["both", "x", "y"] = "both") -> None:
    """A title at the left, pale lines behind the data, no box around them."""
    ax.set_title(title, loc="left", color=INK, fontsize=13, weight="bold")
    ax.grid(axis=grid, color=LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def put_card(ax: Axes, x: float, top: float, title: str, lines: Sequence[str]) -> float:
    """A box with a title and lines of text, SIDE wide, centred on x; returns its lower edge."""
    height = 44 + 21 * len(lines)
    put_frame(ax, x - SIDE / 2, top, SIDE, height, "white")
    put_text(ax, x, top + 20, title, size=18, weight="bold")
    for i, line in enumerate(lines):
        put_text(ax, x, top + 46 + 21 * i, line, size=15.5)
    return top + height


def put_legend(
    ax: Axes,
    left: float,
    top: float,
    *,
    extra: bool = True,
    columns: int = 1,
    width: float = 0,
    size: float = 15.5,
) -> None:
    """What the nodes' looks mean; ``width`` is a column's, ``size`` the text's height."""
    entries = [
        ("o", BLUE, BLUE, "input node"),
        ("o", RED, RED, "output node"),
        ("o", BLUE, RED, "both"),
        ("o", GREY, GREY, "node"),
        ("s", BLUE, "white", "stage's input"),
        ("s", RED, "white", "stage's output"),
    ]
    for i, (marker, color, other, text) in enumerate(entries if extra else entries[:4]):
        x, y = left + width * (i % columns), top + LEGEND_LINE * (i // columns)
        square, half = marker == "s", text == "both"
        ax.add_line(
            Line2D(
                [x + 12],
                [y],
                marker=marker,
                markersize=(11 if square else 20) * POINT,
                fillstyle="left" if half else "full",
                markerfacecolor="white" if square else color,
                markerfacecoloralt=other,
                markeredgecolor=color if square else "white",
                markeredgewidth=1.6 if square else 0.0 if half else 0.9,
                linestyle="none",
            )
        )
        put_text(ax, x + 32, y, text, size=size, align="left")


def put_frame(ax: Axes, left: float, top: float, width: float, height: float, face: str) -> None:
    """A rectangle with round corners."""
    radius = 10
    ax.add_patch(
        FancyBboxPatch(
            (left + radius, top + radius),
            width - 2 * radius,
            height - 2 * radius,
            boxstyle=f"round,pad={radius},rounding_size={radius}",
            facecolor=face,
            edgecolor=LINE,
            linewidth=1.2,
            zorder=1,
        )
    )


def put_arrow(ax: Axes, points: Sequence[Point], radius: float = 9) -> None:
    """An arrow along horizontal and vertical lines, with round corners."""
    vertices, codes = [points[0]], [Curve.MOVETO]
    for a, b, c in zip(points, points[1:], points[2:], strict=False):
        vertices += [_towards(b, a, radius), b, _towards(b, c, radius)]
        codes += [Curve.LINETO, Curve.CURVE3, Curve.CURVE3]
    ax.add_patch(
        FancyArrowPatch(
            path=Curve([*vertices, points[-1]], [*codes, Curve.LINETO]),
            arrowstyle="-|>,head_length=5,head_width=3",
            color=INK,
            linewidth=1.5,
            joinstyle="miter",
            zorder=2.5,
        )
    )


def _towards(start: Point, end: Point, distance: float) -> Point:
    """The point at most ``distance`` from start on the way to end."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    part = min(distance / max(abs(dx) + abs(dy), 1e-9), 0.5)
    return start[0] + part * dx, start[1] + part * dy


def put_text(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    weight: str = "normal",
    align: str = "center",
    color: str = INK,
    zorder: float = 3,
) -> None:
    """Text of a height in pixels, in the font that comes with matplotlib."""
    ax.text(
        x,
        y,
        text,
        fontsize=size * POINT,
        fontfamily="DejaVu Sans",
        fontweight=weight,
        color=color,
        horizontalalignment=align,
        verticalalignment="center_baseline" if align == "center" else "center",
        zorder=zorder,
    )


# -------------------------------------------------------------------------------------------------
# Files
# -------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | os.PathLike[str], palette: bool = False) -> Path:
    """Write a figure to a PNG, SVG or PDF file: whole or not at all, the same bytes each time.

    Folders that are missing are made.

    Args:
        palette: of a PNG, keep 256 colours: a third of the size, and the same to the eye where
            there are lines and text, but no photographs.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: its suffix must be one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No dates, and no random ids, which SVG has otherwise.
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    with rc_context({"svg.hashsalt": "randwire_d2"}), atomic_open(path, "wb") as f:
        if palette and suffix == ".png":
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
            image.quantize(256).save(f, "png", optimize=True, dpi=(figure.dpi, figure.dpi))
        else:
            figure.savefig(f, format=suffix[1:], dpi=figure.dpi, metadata=undated)
    return path
