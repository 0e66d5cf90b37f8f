"""Wirings in a grid: networks side by side as in Figure 1 of the paper, graphs as in Figure 4."""

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..wiring import ConvSpec, Dag, NetworkSpec, StageSpec
from ..wiring.network import HEAD_CHANNELS
from .dag_layout import layout_dag
from .graph import LEGEND_LINE, count_parts, draw_dag, legend_entries, put_legend
from .network import cost_of
from .style import MARGIN, PALE, Point, page, put_arrow, put_frame, put_text

# Sizes in pixels. The text is large, so that pages can be read at two thirds of their size.
NAMES, NAMES_OF_GRID = 248, 220  # widths of the names at the left, of networks and of graphs
COLUMN, CELL = 336, 316  # widths of a network and of a graph
PAD = 26  # from a graph to the edge of its frame
GAP = 36  # between the layers of a network, for the arrows
PILL = 216, 54  # width and height of a layer without a random graph
HEADING, TEXT, TEXT_LINE = 25, 20, 28  # heights of headings, of text, and of a line of text
STEP = 28  # from row to row of a graph
NODE = 17  # the diameter of a node
LEGEND_ENTRY = 186  # the width of an entry of the legend


def draw_networks(
    specs: Sequence[NetworkSpec], titles: Sequence[str], name: str = "RandWire"
) -> Figure:
    """Draw whole networks side by side, each from the image down to the classifier.

    Stages of the same name have the same height, and are beside each other. The artists' gids are
    those of ``draw_dag`` with the name ``"{i}-{stage}"``, where i counts the networks from 1. The
    same specs give the same picture, to the pixel.

    Args:
        specs: the networks.
        titles: the text above each network.
        name: a text for what the networks share, such as their generator.

    Returns:
        a figure of its own, unknown to pyplot; ``save_figure`` writes it.

    Raises:
        ValueError: the networks differ in regime, C or node_op, or ``specs`` is empty.
    """
    kinds = {f"{spec.regime} with C={spec.channels} and {spec.node_op}" for spec in specs}
    if len(kinds) != 1:
        raise ValueError(
            "networks side by side must have one regime, one C and one node_op; "
            f"got {', '.join(sorted(kinds)) or 'none'}"
        )
    rows = list(zip(*(spec.layers for spec in specs)))
    heights = [_layer_height(layers) for layers in rows]
    head = 4 * TEXT_LINE + 46.0
    body = sum(heights) + len(heights) * GAP + PILL[1]
    figure, ax = _page(NAMES + len(specs) * COLUMN, head + body, extra=True)
    facts = [f"{specs[0].regime} regime", f"C = {specs[0].channels}", specs[0].node_op]
    _put_lines(ax, MARGIN + HEADING / 2, name, facts)
    centres = [MARGIN + NAMES + (i + 0.5) * COLUMN for i in range(len(specs))]
    for x, title, spec in zip(centres, titles, specs, strict=True):
        put_text(ax, x, MARGIN + HEADING / 2, title, size=HEADING, weight="bold")
        for i, line in enumerate(cost_of(spec), start=1):
            put_text(ax, x, MARGIN + HEADING / 2 + TEXT_LINE * i, line, size=TEXT)
        put_text(ax, x, MARGIN + head - GAP - 12, "image", size=TEXT)

    y, stride = MARGIN + head, 1
    leave: list[Point] = [(x, y - GAP) for x in centres]
    for layers, height in zip(rows, heights, strict=True):
        stride *= 2
        title = "conv1" if layers[0].name == "stem" else layers[0].name
        about = [f"{layers[0].channels} channels, stride {stride}"]
        if dags := _dags(layers):
            leave = _stages(ax, leave, centres, y, height, title, dags)
            _put_lines(ax, y + PAD + 4, title, about + count_parts(dags))
        else:
            leave = _pills(ax, leave, centres, y, "3×3 conv")
            _put_lines(ax, y + 13, title, about)
        y += height + GAP
    _put_lines(ax, y + 13, "classifier", [f"{HEAD_CHANNELS} channels"])
    _pills(ax, leave, centres, y, "1×1 conv, pool, fc")
    return figure


def draw_grid(rows: Mapping[str, Sequence[Dag]], columns: Sequence[str]) -> Figure:
    """Draw graphs in a grid, without their extra nodes: generators × seeds, as in Figure 4.

    The artists' gids are those of ``draw_dag`` with the name ``"{row}-{column}"``, both from 1. The
    same graphs give the same picture, to the pixel.

    Args:
        rows: the graphs of each row, one for each column, under the row's name.
        columns: the names of the columns.

    Returns:
        a figure of its own, unknown to pyplot; ``save_figure`` writes it.
    """
    heights = [min(max(_height(dags, extra=False), 220), 580) for dags in rows.values()]
    head, gap = 2.0 * HEADING, 16
    width = NAMES_OF_GRID + len(columns) * CELL
    figure, ax = _page(width, head + sum(heights) + gap * len(heights), extra=False)
    lefts = [MARGIN + NAMES_OF_GRID + i * CELL for i in range(len(columns))]
    for left, name in zip(lefts, columns, strict=True):
        put_text(ax, left + CELL / 2, MARGIN + HEADING / 2, name, size=HEADING, weight="bold")
    y = MARGIN + head
    for i, ((name, dags), height) in enumerate(zip(rows.items(), heights, strict=True)):
        put_frame(ax, MARGIN, y, width, height, PALE)
        _put_lines(ax, y + PAD + 4, name, count_parts(dags))
        for j, (left, dag) in enumerate(zip(lefts, dags, strict=True)):
            # At most twice the usual step between rows: a graph of few rows is centred.
            room = height - 2 * PAD - 2 * STEP * (layout_dag(dag, extra=False).rows - 1)
            start = y + PAD + max(room, 0) / 2
            box = (left + 24, left + CELL - 24, start, 2 * y + height - start)
            draw_dag(ax, dag, box, f"{i + 1}-{j + 1}", labels=False, extra=False, largest=NODE)
        y += height + gap
    return figure


def _page(width: float, height: float, extra: bool) -> tuple[Figure, Axes]:
    """A page for a drawing of this size, with margins around it and a legend below."""
    entries = len(legend_entries(extra))
    columns = min(int(width // LEGEND_ENTRY), entries)
    bottom = MARGIN + height + 48
    figure, ax = page(width + 2 * MARGIN, bottom + LEGEND_LINE * math.ceil(entries / columns))
    put_legend(ax, MARGIN, bottom, extra=extra, columns=columns, width=LEGEND_ENTRY, size=TEXT)
    return figure, ax


def _dags(layers: Iterable[ConvSpec | StageSpec]) -> list[Dag]:
    """The graphs of a layer in several networks; empty if the layer has no random graph."""
    return [layer.dag for layer in layers if isinstance(layer, StageSpec)]


def _layer_height(layers: Iterable[ConvSpec | StageSpec]) -> float:
    dags = _dags(layers)
    return max(_height(dags), 2 * PAD + 3 * TEXT_LINE) if dags else PILL[1]


def _height(dags: Iterable[Dag], extra: bool = True) -> float:
    """The height of a frame around graphs."""
    return STEP * (max(layout_dag(dag, extra).rows for dag in dags) - 1) + 2 * PAD


def _put_lines(ax: Axes, y: float, heading: str, lines: Sequence[str]) -> None:
    """Write a heading and lines below it at the left; y is the middle of the heading."""
    put_text(ax, MARGIN + 16, y, heading, size=HEADING, weight="bold", align="left")
    for i, line in enumerate(lines):
        put_text(ax, MARGIN + 16, y + TEXT_LINE * (i + 1), line, size=TEXT, align="left")


def _stages(
    ax: Axes,
    leave: Sequence[Point],
    centres: Sequence[float],
    y: float,
    height: float,
    name: str,
    dags: Sequence[Dag],
) -> list[Point]:
    """Draw a stage of each network and the arrows into it; returns the points of its outputs."""
    put_frame(ax, MARGIN, y, NAMES + len(dags) * COLUMN, height, PALE)
    left = []
    for i, (start, x, dag) in enumerate(zip(leave, centres, dags, strict=True), start=1):
        half = COLUMN / 2 - 20
        box = (x - half, x + half, y + PAD, y + height - PAD)
        points = draw_dag(ax, dag, box, f"{i}-{name}", labels=False, largest=NODE)
        (in_x, in_y), (out_x, out_y) = points[-1], points[dag.num_nodes]
        _join(ax, start, (in_x, in_y - 9))
        left.append((out_x, out_y + 8))
    return left


def _pills(
    ax: Axes, leave: Sequence[Point], centres: Sequence[float], y: float, text: str
) -> list[Point]:
    """Draw another layer of each network and the arrows into it; returns its output points."""
    width, height = PILL
    for start, x in zip(leave, centres, strict=True):
        _join(ax, start, (x, y))
        put_frame(ax, x - width / 2, y, width, height, "white")
        put_text(ax, x, y + height / 2, text, size=TEXT)
    return [(x, y + height) for x in centres]


def _join(ax: Axes, start: Point, end: Point) -> None:
    """Draw an arrow that goes down, and sideways between the frames."""
    middle = (start[1] + end[1]) / 2 - 4  # the arrow's head needs room
    put_arrow(ax, [start, (start[0], middle), (end[0], middle), end], radius=GAP / 2)
