"""Drawings of networks: every stage's random graph, after Figures 1 and 4 of the paper."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from PIL import Image

from ..files import atomic_open
from .complexity import NODE_OP_COMPLEXITY_REGISTRY, complexity
from .dag import Dag
from .layout import Point, layout_dag
from .network import HEAD_CHANNELS, NetworkSpec, StageSpec

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


# -----------------------------------------------------------------------------
# Drawing
# -----------------------------------------------------------------------------


def draw_dag(
    ax: Axes,
    dag: Dag,
    box: tuple[float, float, float, float],
    name: str = "dag",
    labels: bool = True,
    extra: bool = True,
    largest: float = 24,
) -> dict[int, Point]:
    """Draw a DAG into a part of an axes.

    Input nodes are blue, output nodes red, and nodes that are both half and half. Every node and
    edge is one artist, with the gid ``"{name}-node-{i}"`` or ``"{name}-edge-{u}-{v}"``; the extra
    nodes are ``"in"`` and ``"out"`` there.

    Args:
        box: (left, right, input end, output end) in data units; the data flow from the input end
            to the output end. One data unit must be one pixel of the figure.
        name: what the artists' gids begin with.
        labels: write the nodes' indices into them, where there is room.
        extra: draw the extra input and output nodes, too.
        largest: a node's diameter in pixels, where there is room for it.

    Returns:
        the points (x, y) of the nodes; those of the extra ones are called -1 and N.
    """
    left, right, start, end = box
    layout = layout_dag(dag, extra)
    unit = min((right - left) / max(layout.width, 1.0), 64.0)
    step = (end - start) / max(layout.rows - 1, 1)
    indent = left + (right - left - unit * layout.width) / 2
    size = min(largest, 0.86 * unit * layout.nearest)
    if layout.rows > 1:
        size = min(size, 0.62 * abs(step))
    thin = min(1.0, (64 / max(len(dag.edges), 1)) ** 0.5)  # where there are very many edges

    def at(point: Point) -> Point:
        return indent + unit * point[0], start + step * point[1]

    def label(node: int) -> str:
        return {-1: "in", dag.num_nodes: "out"}.get(node, str(node))

    for (u, v), route in layout.routes.items():
        is_extra = u == -1 or v == dag.num_nodes
        # Long edges fade: there are many, and the eye follows them by their ends.
        alpha = max(0.8 - 0.055 * (len(route) - 2), 0.38 * thin)
        ax.add_patch(
            PathPatch(
                _smooth([at(point) for point in route]),
                gid=f"{name}-edge-{label(u)}-{label(v)}",
                facecolor="none",
                edgecolor=INK if not is_extra else BLUE if u == -1 else RED,
                alpha=alpha,
                linewidth=1.0 if is_extra else 1.25 * max(thin, 0.6),
                linestyle=(0, (2.5, 1.8)) if is_extra else "solid",
                capstyle="round",
                zorder=2,
            )
        )
    for node, point in layout.nodes.items():
        is_extra = node in (-1, dag.num_nodes)
        is_input = node == -1 or (not is_extra and not dag.predecessors[node])
        is_output = node == dag.num_nodes or (not is_extra and not dag.successors[node])
        face = BLUE if is_input else RED if is_output else GREY
        x, y = at(point)
        ax.add_line(
            Line2D(
                [x],
                [y],
                gid=f"{name}-node-{label(node)}",
                marker="s" if is_extra else "o",
                markersize=(0.5 if is_extra else 1.0) * size * POINT,
                fillstyle="left" if is_input and is_output else "full",
                markerfacecolor="white" if is_extra else face,
                markerfacecoloralt=RED,
                markeredgecolor=face if is_extra else "white",
                # No rim on a half: it would run through the middle.
                markeredgewidth=1.6 if is_extra else 0.0 if is_input and is_output else 0.9,
                linestyle="none",
                zorder=3,
            )
        )
        if labels and not is_extra and size >= 15:
            put_text(ax, x, y, str(node), size=0.5 * size, color="white", weight="bold", zorder=4)
    return {node: at(point) for node, point in layout.nodes.items()}


def _smooth(points: Sequence[Point]) -> Curve:
    """A Catmull-Rom spline through the points, as Bézier curves."""
    vertices = [points[0]]
    for i in range(len(points) - 1):
        before, a, b, after = (points[max(0, min(j, len(points) - 1))] for j in range(i - 1, i + 3))
        vertices += [
            (a[0] + (b[0] - before[0]) / 6, a[1] + (b[1] - before[1]) / 6),
            (b[0] - (after[0] - a[0]) / 6, b[1] - (after[1] - a[1]) / 6),
            b,
        ]
    return Curve(vertices, [Curve.MOVETO] + [Curve.CURVE4] * (len(vertices) - 1))


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, unknown to pyplot, and its axes, in pixels from the upper left corner."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def draw_network(spec: NetworkSpec) -> Figure:
    """Draw a whole network, from the image to the classifier, 1600 pixels wide.

    Each randomly wired stage is a column whose data flow downwards; a node's row is the length of
    the longest path to it. The same spec gives the same picture, to the pixel.

    Returns:
        a figure of its own, unknown to pyplot; ``save_figure`` writes it.
    """
    layouts = [layout_dag(stage.dag) for stage in spec.stages]
    entry = MARGIN + TITLE + PORT  # where the data enter each stage
    longest = max(layout.rows for layout in layouts)
    body = TITLE + 2 * PORT + min(max(52 * (longest - 1), 380), 1400)
    height = body + 2 * MARGIN
    figure, ax = page(WIDTH, height)

    # The left column: the image, the dense convolutions, and the legend.
    x, y, stride = MARGIN + SIDE / 2, MARGIN + 12.0, 1
    put_text(ax, x, y, "image", size=16)
    for conv in spec.convs:
        stride *= 2
        title = "conv1" if conv.name == "stem" else conv.name
        lines = ["3×3 conv", f"{conv.channels} channels", f"stride {stride}"]
        put_arrow(ax, [(x, y + 12), (x, y + 40)])
        y = put_card(ax, x, y + 40, title, lines)
    leave = [(x + SIDE / 2, max(entry, y - 44))]
    put_legend(ax, MARGIN, y + 50)

    # The randomly wired stages.
    left = MARGIN + SIDE + GUTTER
    shares = [max(layout.width, 1.0) ** 0.5 for layout in layouts]
    shares = [max(share, 0.85 * max(shares)) for share in shares]  # room for the text above
    room = (WIDTH - 2 * left - (len(layouts) - 1) * GUTTER) / sum(shares)
    for stage, share in zip(spec.stages, shares, strict=True):
        stride *= 2
        (in_x, in_y), (out_x, out_y) = _stage(ax, stage, stride, left, share * room, body)
        gutter = left - GUTTER / 2
        left += share * room + GUTTER
        put_arrow(ax, [*leave, (gutter, leave[-1][1]), (gutter, in_y), (in_x - 8, in_y)])
        leave = [(out_x, out_y + 8), (out_x, out_y + PORT)]

    # The right column: what the network is, and the classifier.
    x = WIDTH - MARGIN - SIDE / 2
    _facts(ax, spec, x - SIDE / 2, MARGIN + 12)
    lines = ["ReLU, 1×1 conv", f"{HEAD_CHANNELS} channels", "global avg. pool", "fc"]
    top = MARGIN + body - 152
    put_card(ax, x, top, "classifier", lines)
    gutter = x - SIDE / 2 - GUTTER / 2
    put_arrow(ax, [*leave, (gutter, leave[-1][1]), (gutter, top + 66), (x - SIDE / 2, top + 66)])
    return figure


def _stage(
    ax: Axes, stage: StageSpec, stride: int, left: float, width: float, height: float
) -> tuple[Point, Point]:
    """One stage in its frame; returns where its extra input and output nodes are."""
    put_frame(ax, left, MARGIN, width, height, PALE)
    nodes, edges = stage.dag.num_nodes, len(stage.dag.edges)
    put_text(ax, left + 16, MARGIN + 24, stage.name, size=21, weight="bold", align="left")
    about = [
        f"{nodes} node{'s' * (nodes != 1)}, {edges} edge{'s' * (edges != 1)}",
        f"{stage.channels} channels, stride {stride}",
    ]
    for i, line in enumerate(about):
        put_text(ax, left + 16, MARGIN + 50 + 21 * i, line, size=15.5, align="left")
    start, end = MARGIN + TITLE + PORT, MARGIN + height - 1.7 * PORT
    box = (left + 20, left + width - 20, start, end)
    points = draw_dag(ax, stage.dag, box, name=stage.name)
    return points[-1], points[nodes]


def put_card(ax: Axes, x: float, top: float, title: str, lines: Sequence[str]) -> float:
    """A box with a title and lines of text, SIDE wide, centred on x; returns its lower edge."""
    height = 44 + 21 * len(lines)
    put_frame(ax, x - SIDE / 2, top, SIDE, height, "white")
    put_text(ax, x, top + 20, title, size=18, weight="bold")
    for i, line in enumerate(lines):
        put_text(ax, x, top + 46 + 21 * i, line, size=15.5)
    return top + height


def _facts(ax: Axes, spec: NetworkSpec, left: float, top: float) -> None:
    lines = [f"{spec.regime} regime", f"C = {spec.channels}", spec.node_op]
    cost = cost_of(spec)
    lines += [*cost, "(1000 classes, 224²)"] if cost else []
    lines += ["", "fingerprint", spec.fingerprint[:12]]
    put_text(ax, left, top, "RandWire", size=21, weight="bold", align="left")
    for i, line in enumerate(lines):
        put_text(ax, left, top + 28 + 22 * i, line, size=15.5, align="left")


def cost_of(spec: NetworkSpec) -> list[str]:
    """Parameters and FLOPs in two lines; none for a project's own node op that has no count."""
    if spec.node_op not in NODE_OP_COMPLEXITY_REGISTRY:
        return []
    cost = complexity(spec)
    return [f"{_short(cost.params)} parameters", f"{_short(cost.flops)} FLOPs"]


def _short(count: float) -> str:
    """A count with its unit: 583.21 M, 4.01 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


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


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


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
