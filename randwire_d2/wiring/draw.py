"""Drawings of networks: every stage's random graph, after Figures 1 and 4 of the paper."""

import os
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from ..files import atomic_open
from .complexity import NODE_OP_COMPLEXITY_REGISTRY, complexity
from .dag import Dag
from .network import HEAD_CHANNELS, NetworkSpec, StageSpec

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's blue and vermillion: apart for every kind of colour vision, and in grey.
BLUE, RED = "#0072B2", "#D55E00"
GREY, INK, PALE, LINE = "#8C96A0", "#1F2933", "#F5F7F9", "#CBD2D9"

WIDTH, DPI = 1600, 100  # pixels; points are 1/72 inch
MARGIN, SIDE, GUTTER = 28, 168, 34  # pixels: around the page, of the side columns, between columns
TITLE = 92  # pixels from a stage's upper edge to its graph
PORT = 26  # pixels from a graph to the extra nodes' outer ends
POINT = 72 / DPI

Point = tuple[float, float]


# -----------------------------------------------------------------------------
# Layout: Sugiyama's layers, as in Graphviz's dot.
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class DagLayout:
    """Where a DAG's nodes and edges lie.

    The row of a node is the number of nodes on the longest path that ends in it. The extra input
    node, here -1, is alone in row 0, and the extra output node, here N, in the last row.

    Attributes:
        nodes: (x, row) of every node, and of -1 and N; x starts at 0, and two nodes of a row are
            at least 1 apart.
        routes: for every edge, those of the extra nodes included, the points it runs through:
            one in each row from its source to its target.
        width: the largest x.
        rows: the number of rows.
    """

    nodes: dict[int, Point]
    routes: dict[tuple[int, int], list[Point]]
    width: float
    rows: int


@lru_cache(maxsize=64)  # a network asks twice for each stage, and has stages with one wiring
def layout_dag(dag: Dag) -> DagLayout:
    """Lay out a DAG in rows, with few crossings and straight edges; the same DAG, the same layout.

    An edge that skips rows gets a bend in each of them, which keeps it away from the nodes there.
    """
    source, sink = -1, dag.num_nodes
    row = {source: 0}
    for node in range(dag.num_nodes):
        row[node] = 1 + max((row[u] for u in dag.predecessors[node]), default=0)
    row[sink] = 1 + max(row.values())
    edges = [(source, v) for v in dag.input_nodes]
    edges += [*dag.edges, *((u, sink) for u in dag.output_nodes)]

    # Items are nodes first, then bends; `above` and `below` are their neighbours one row away.
    items = [source, *range(dag.num_nodes), sink]
    item_row = [row[node] for node in items]
    above: list[list[int]] = [[] for _ in items]
    below: list[list[int]] = [[] for _ in items]
    chains = {}
    for u, v in edges:
        chain = [u + 1]
        for r in range(row[u] + 1, row[v]):
            chain.append(len(item_row))
            item_row.append(r)
            above.append([])
            below.append([])
        chain.append(v + 1)
        for upper, lower in zip(chain, chain[1:], strict=False):
            below[upper].append(lower)
            above[lower].append(upper)
        chains[u, v] = chain

    rows: list[list[int]] = [[] for _ in range(row[sink] + 1)]
    for item, r in enumerate(item_row):
        rows[r].append(item)
    rows = _order(rows, above, below)
    x = _place(rows, above, below, len(items))
    return DagLayout(
        nodes={node: (x[node + 1], r) for node, r in row.items()},
        routes={edge: [(x[i], item_row[i]) for i in chain] for edge, chain in chains.items()},
        width=max(x),
        rows=len(rows),
    )


def _order(
    rows: list[list[int]], above: list[list[int]], below: list[list[int]]
) -> list[list[int]]:
    """Order the items of each row by the mean position of their neighbours, down and up in turn,
    swap neighbours where that saves crossings, and keep the best order seen."""
    position = [0.0] * len(above)

    def number(items: list[int]) -> None:
        for i, item in enumerate(items):
            position[item] = i

    def saved(a: int, b: int) -> int:
        """The crossings saved by swapping a with b, the item to its right."""
        total = 0
        for side in (above, below):
            for p in (position[n] for n in side[a]):
                for q in (position[n] for n in side[b]):
                    total += (p > q) - (p < q)
        return total

    for items in rows:
        number(items)
    best, fewest = rows, _crossings(rows, below, position)
    rows = [list(items) for items in rows]
    for sweep in range(24):
        downwards = sweep % 2 == 0
        side = above if downwards else below
        for items in rows if downwards else reversed(rows):
            centre = {
                i: sum(position[n] for n in side[i]) / len(side[i]) if side[i] else position[i]
                for i in items
            }
            items.sort(key=lambda i: (centre[i], position[i]))
            number(items)
        for items in rows:
            for i in range(len(items) - 1):
                if saved(items[i], items[i + 1]) > 0:
                    items[i], items[i + 1] = items[i + 1], items[i]
                    number(items)
        crossings = _crossings(rows, below, position)
        if crossings < fewest:
            best, fewest = [list(items) for items in rows], crossings
    return best


def _crossings(rows: list[list[int]], below: list[list[int]], position: list[float]) -> int:
    total = 0
    for items in rows:
        seen: list[float] = []
        for item in items:
            ends = [position[n] for n in below[item]]
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _place(
    rows: list[list[int]], above: list[list[int]], below: list[list[int]], num_nodes: int
) -> list[float]:
    """The x of every item: near its neighbours, in the given order, not too near to the next."""
    x = [0.0] * len(above)
    # Where very many edges run side by side they move together, or the nodes would become dots.
    bends = max(sum(item >= num_nodes for item in items) for items in rows)
    narrow = max(0.07, min(0.18, 2.5 / max(bends, 1)))
    room = [0.5 if item < num_nodes else narrow for item in range(len(x))]
    for items in rows:
        _space(items, x, [1.0] * len(items), room)
    for sweep in range(40):
        for items in rows if sweep % 2 == 0 else reversed(rows):
            weights = []
            for item in items:
                # Between two bends an edge should be straight; between nodes it matters less.
                pulls = [
                    ((1 + 2 * (item >= num_nodes)) * (1 + 2 * (n >= num_nodes)), x[n])
                    for n in above[item] + below[item]
                ]
                weights.append(float(sum(weight for weight, _ in pulls)))
                x[item] = sum(weight * at for weight, at in pulls) / weights[-1]
            _space(items, x, weights, room)
    left = min(x)
    return [at - left for at in x]


def _space(items: list[int], x: list[float], weights: list[float], room: list[float]) -> None:
    """Move the items of a row apart, as little as possible in the weighted sum of squares.

    Isotonic regression: blocks of items that touch are merged until no two overlap.
    """
    blocks: list[list[float]] = []  # [weight, mean of x - offset, number of items]
    offsets, offset = [], 0.0
    for item, weight in zip(items, weights, strict=True):
        offset += room[item]
        offsets.append(offset)
        blocks.append([weight, x[item] - offset, 1])
        offset += room[item]
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            w, mean, count = blocks.pop()
            last = blocks[-1]
            last[1] = (last[0] * last[1] + w * mean) / (last[0] + w)
            last[0] += w
            last[2] += count
    means = [mean for _, mean, count in blocks for _ in range(int(count))]
    for item, mean, at in zip(items, means, offsets, strict=True):
        x[item] = mean + at


# -----------------------------------------------------------------------------
# Drawing
# -----------------------------------------------------------------------------


def draw_dag(
    ax: Axes,
    dag: Dag,
    box: tuple[float, float, float, float],
    name: str = "dag",
    labels: bool = True,
) -> tuple[Point, Point]:
    """Draw a DAG with its extra input and output nodes into a part of an axes.

    Input nodes are blue, output nodes red, and nodes that are both half and half. Every node and
    edge is one artist, with the gid ``"{name}-node-{i}"`` or ``"{name}-edge-{u}-{v}"``; the extra
    nodes are ``"in"`` and ``"out"`` there.

    Args:
        box: (left, right, input end, output end) in data units; the data flow from the input end
            to the output end. One data unit must be one pixel of the figure.
        name: what the artists' gids begin with.
        labels: write the nodes' indices into them, where there is room.

    Returns:
        the points (x, y) of the extra input and output nodes.
    """
    left, right, start, end = box
    layout = layout_dag(dag)
    unit = min((right - left) / max(layout.width, 1.0), 64.0)
    step = (end - start) / (layout.rows - 1)
    indent = left + (right - left - unit * layout.width) / 2
    size = min(24.0, 0.86 * unit, 0.62 * abs(step))  # a node's diameter in pixels

    def at(point: Point) -> Point:
        return indent + unit * point[0], start + step * point[1]

    def label(node: int) -> str:
        return {-1: "in", dag.num_nodes: "out"}.get(node, str(node))

    for (u, v), route in layout.routes.items():
        extra = u == -1 or v == dag.num_nodes
        # Long edges fade: there are many, and the eye follows them by their ends.
        alpha = max(0.8 - 0.055 * (len(route) - 2), 0.38)
        ax.add_patch(
            PathPatch(
                _smooth([at(point) for point in route]),
                gid=f"{name}-edge-{label(u)}-{label(v)}",
                facecolor="none",
                edgecolor=INK if not extra else BLUE if u == -1 else RED,
                alpha=alpha,
                linewidth=1.0 if extra else 1.25,
                linestyle=(0, (2.5, 1.8)) if extra else "solid",
                capstyle="round",
                zorder=2,
            )
        )
    for node, point in layout.nodes.items():
        extra = node in (-1, dag.num_nodes)
        is_input = node == -1 or (not extra and not dag.predecessors[node])
        is_output = node == dag.num_nodes or (not extra and not dag.successors[node])
        face = BLUE if is_input else RED if is_output else GREY
        x, y = at(point)
        ax.add_line(
            Line2D(
                [x],
                [y],
                gid=f"{name}-node-{label(node)}",
                marker="s" if extra else "o",
                markersize=(0.5 if extra else 1.0) * size * POINT,
                fillstyle="left" if is_input and is_output else "full",
                markerfacecolor="white" if extra else face,
                markerfacecoloralt=RED,
                markeredgecolor=face if extra else "white",
                # No rim on a half: it would run through the middle.
                markeredgewidth=1.6 if extra else 0.0 if is_input and is_output else 0.9,
                linestyle="none",
                zorder=3,
            )
        )
        if labels and not extra and size >= 15:
            _text(ax, x, y, str(node), size=0.5 * size, color="white", weight="bold", zorder=4)
    return at(layout.nodes[-1]), at(layout.nodes[dag.num_nodes])


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
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")

    # The left column: the image, the dense convolutions, and the legend.
    x, y, stride = MARGIN + SIDE / 2, MARGIN + 12.0, 1
    _text(ax, x, y, "image", size=16)
    for conv in spec.convs:
        stride *= 2
        title = "conv1" if conv.name == "stem" else conv.name
        lines = ["3×3 conv", f"{conv.channels} channels", f"stride {stride}"]
        _arrow(ax, [(x, y + 12), (x, y + 40)])
        y = _card(ax, x, y + 40, title, lines)
    leave = [(x + SIDE / 2, max(entry, y - 44))]
    _legend(ax, MARGIN, y + 50)

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
        _arrow(ax, [*leave, (gutter, leave[-1][1]), (gutter, in_y), (in_x - 8, in_y)])
        leave = [(out_x, out_y + 8), (out_x, out_y + PORT)]

    # The right column: what the network is, and the classifier.
    x = WIDTH - MARGIN - SIDE / 2
    _facts(ax, spec, x - SIDE / 2, MARGIN + 12)
    lines = ["ReLU, 1×1 conv", f"{HEAD_CHANNELS} channels", "global avg. pool", "fc"]
    top = MARGIN + body - 152
    _card(ax, x, top, "classifier", lines)
    gutter = x - SIDE / 2 - GUTTER / 2
    _arrow(ax, [*leave, (gutter, leave[-1][1]), (gutter, top + 66), (x - SIDE / 2, top + 66)])
    return figure


def _stage(
    ax: Axes, stage: StageSpec, stride: int, left: float, width: float, height: float
) -> tuple[Point, Point]:
    """One stage in its frame; returns where its extra input and output nodes are."""
    _frame(ax, left, MARGIN, width, height, PALE)
    nodes, edges = stage.dag.num_nodes, len(stage.dag.edges)
    _text(ax, left + 16, MARGIN + 24, stage.name, size=21, weight="bold", align="left")
    about = [
        f"{nodes} node{'s' * (nodes != 1)}, {edges} edge{'s' * (edges != 1)}",
        f"{stage.channels} channels, stride {stride}",
    ]
    for i, line in enumerate(about):
        _text(ax, left + 16, MARGIN + 50 + 21 * i, line, size=15.5, align="left")
    start, end = MARGIN + TITLE + PORT, MARGIN + height - 1.7 * PORT
    box = (left + 20, left + width - 20, start, end)
    return draw_dag(ax, stage.dag, box, name=stage.name)


def _card(ax: Axes, x: float, top: float, title: str, lines: Sequence[str]) -> float:
    """A box with a title and lines of text, SIDE wide, centred on x; returns its lower edge."""
    height = 44 + 21 * len(lines)
    _frame(ax, x - SIDE / 2, top, SIDE, height, "white")
    _text(ax, x, top + 20, title, size=18, weight="bold")
    for i, line in enumerate(lines):
        _text(ax, x, top + 46 + 21 * i, line, size=15.5)
    return top + height


def _facts(ax: Axes, spec: NetworkSpec, left: float, top: float) -> None:
    lines = [f"{spec.regime} regime", f"C = {spec.channels}", spec.node_op]
    if spec.node_op in NODE_OP_COMPLEXITY_REGISTRY:  # a project's own may have no count
        cost = complexity(spec)
        lines += [f"{_short(cost.params)} parameters", f"{_short(cost.flops)} FLOPs"]
        lines += ["(1000 classes, 224²)"]
    lines += ["", "fingerprint", spec.fingerprint[:12]]
    _text(ax, left, top, "RandWire", size=21, weight="bold", align="left")
    for i, line in enumerate(lines):
        _text(ax, left, top + 28 + 22 * i, line, size=15.5, align="left")


def _short(count: float) -> str:
    """A count with its unit: 583.21 M, 4.01 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _legend(ax: Axes, left: float, top: float) -> None:
    entries = [
        ("o", BLUE, BLUE, "input node"),
        ("o", RED, RED, "output node"),
        ("o", BLUE, RED, "both"),
        ("o", GREY, GREY, "node"),
        ("s", BLUE, "white", "stage's input"),
        ("s", RED, "white", "stage's output"),
    ]
    for i, (marker, color, other, text) in enumerate(entries):
        y = top + 28 * i
        extra, half = marker == "s", text == "both"
        ax.add_line(
            Line2D(
                [left + 12],
                [y],
                marker=marker,
                markersize=(11 if extra else 20) * POINT,
                fillstyle="left" if half else "full",
                markerfacecolor="white" if extra else color,
                markerfacecoloralt=other,
                markeredgecolor=color if extra else "white",
                markeredgewidth=1.6 if extra else 0.0 if half else 0.9,
                linestyle="none",
            )
        )
        _text(ax, left + 32, y, text, size=15.5, align="left")


def _frame(ax: Axes, left: float, top: float, width: float, height: float, face: str) -> None:
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


def _arrow(ax: Axes, points: Sequence[Point], radius: float = 9) -> None:
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


def _text(
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


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a PNG, SVG or PDF file: whole or not at all, the same bytes each time.

    Folders that are missing are made.

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
        figure.savefig(f, format=suffix[1:], dpi=figure.dpi, metadata=undated)
    return path
