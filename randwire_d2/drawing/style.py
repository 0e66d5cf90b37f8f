"""The common parts of all pictures: colours, pages, axes, frames, arrows, text, and saving."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from PIL import Image

from ..files import atomic_open, check_file

Point = tuple[float, float]  # (x, y) on a page

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's palette: its colours are distinct for every kind of colour vision.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE = "#56B4E9", "#E69F00"
GREY, INK, PALE, LINE = "#8C96A0", "#1F2933", "#F5F7F9", "#CBD2D9"
COLORS = (BLUE, RED, GREEN, PINK, GREY, SKY, ORANGE, INK)  # for groups and series

DPI = 100
PIXEL = 72 / DPI  # in points, matplotlib's unit for text and markers
MARGIN = 28  # pixels around a page


def class_palette(number: int) -> list[tuple[float, float, float]]:
    """A bright RGB colour (0 … 1) for each class; the golden ratio keeps any number far apart."""
    return [tuple(hsv_to_rgb((i * 0.618 % 1, 0.6, 1)).tolist()) for i in range(number)]


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, unknown to pyplot; its axes count pixels from the upper left corner."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def plots(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure for plots, unknown to pyplot, and its axes as an array (rows, columns).

    Args:
        width, height: the size of the figure in inches.
        options: for ``Figure.subplots``.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style_axes(ax: Axes, title: str = "", grid: Literal["both", "x", "y"] = "both") -> None:
    """Put the title at the left, draw pale lines behind the data, and leave out the box."""
    ax.set_title(title, loc="left", color=INK, fontsize=13, weight="bold")
    ax.grid(axis=grid, color=LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def put_frame(ax: Axes, left: float, top: float, width: float, height: float, face: str) -> None:
    """Draw a rectangle with round corners."""
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
    """Draw an arrow along horizontal and vertical lines from point to point, with round corners."""
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


def literal(text: str) -> str:
    """Escape a text for matplotlib, which would read a formula between two $."""
    return text.replace("$", r"\$")


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
    """Write text whose height is ``size`` pixels, in the font that comes with matplotlib."""
    ax.text(
        x,
        y,
        text,
        fontsize=size * PIXEL,
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


def check_format(path: str | os.PathLike[str], name: str) -> None:
    """Refuse a file that ``save_figure`` can't write, before the work for its picture is done.

    Args:
        name: the user's name for the path, such as ``"--output"``.

    Raises:
        ValueError: the suffix is none of ``FORMATS``, or the file can't be written there.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{name} must end in one of {', '.join(FORMATS)}; got {os.fspath(path)}")
    check_file(name, path)


def save_figure(figure: Figure, path: str | os.PathLike[str], palette: bool = False) -> Path:
    """Write a figure to a PNG, SVG or PDF file, atomically; the same figure gives the same bytes.

    Missing folders are created.

    Args:
        path: a path that ``check_format`` accepts.
        palette: keep only 256 colours in a PNG file. Lines and text look the same in a third of
            the size; photographs do not.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Otherwise SVG and PDF would contain the date, and SVG random ids.
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
