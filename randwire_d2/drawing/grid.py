"""Wirings beside each other: networks as in Figure 1 of the paper, graphs as in Figure 4."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..wiring import ConvSpec, Dag, NetworkSpec
from ..wiring.network import HEAD_CHANNELS
from .dag_layout import Point, layout_dag
from .graph import draw_dag
from .networks import cost_of
from .style import (
    LEGEND_LINE,
    MARGIN,
    PALE,
    page,
    put_arrow,
    put_frame,
    put_legend,
    put_text,
)

# All in pixels. The pages are to be read at two thirds of their size, so the text is large.
SIDE, SIDE_OF_GRID = 248, 220  # of the names at the left
COLUMN, CELL = 336, 316  # widths of a network, and of a graph in a grid
PAD = 26  # from a graph to the edge of its frame
GAP = 36  # between the layers of a network, for the arrows
PILL = 216, 54  # a layer that is no random graph
HEADING, TEXT, LINE = 25, 20, 28  # heights of text, and of a line of it
STEP = 28  # from row to row of a graph
NODE = 17  # a node's diameter
LEGEND = 186  # the width of an entry


def draw_networks(
    specs: Sequence[NetworkSpec], titles: Sequence[str], name: str = "RandWire"
) -> Figure:
    """Draw whole networks side by side, each from the image down to the classifier.

    Stages of one name have one height, and lie beside each other. The artists' gids are those of
    ``draw_dag`` with the name ``"{i}-{stage}"``, where i counts the networks from 1. The same specs
    give the same picture, to the pixel.

    Args:
        titles: what is written above each network.
        name: what they have in common, such as their generator.

    Returns:
        a figure of its own, unknown to pyplot; ``save_figure`` writes it.

    Raises:
        ValueError: if the networks differ in regime or C, or there is none.
    """
    kinds = {f"{spec.regime} with C={spec.channels}" for spec in specs}
    if len(kinds) != 1:
        raise ValueError(
            "networks side by side must have one regime and one C; "
            f"got {', '.join(sorted(kinds)) or 'none'}"
        )
    first, costs = specs[0], [cost_of(spec) for spec in specs]
    head = 4 * LINE + 46.0
    heights = [float(PILL[1])] * len(first.convs)
    heights += [max(_height(dags), 2 * PAD + 3 * LINE) for dags in zip(*(s.dags for s in specs))]
    body = sum(heights) + len(heights) * GAP + PILL[1]
    figure, ax = _page(SIDE + len(specs) * COLUMN, head + body, extra=True)
    facts = [f"{first.regime} regime", f"C = {first.channels}", first.node_op]
    _lines(ax, MARGIN + HEADING / 2, name, facts)
    centres = [MARGIN + SIDE + (i + 0.5) * COLUMN for i in range(len(specs))]
    for x, title, cost in zip(centres, titles, costs, strict=True):
        put_text(ax, x, MARGIN + HEADING / 2, title, size=HEADING, weight="bold")
        for i, line in enumerate(cost):
            put_text(ax, x, MARGIN + HEADING / 2 + LINE * (i + 1), line, size=TEXT)
        put_text(ax, x, MARGIN + head - GAP - 12, "image", size=TEXT)

    y, stride = MARGIN + head, 1
    leave: list[Point] = [(x, y - GAP) for x in centres]
    for depth, (layer, height) in enumerate(zip(first.layers, heights, strict=True)):
        stride *= 2
        stage = "conv1" if layer.name == "stem" else layer.name
        about = [f"{layer.channels} channels, stride {stride}"]
        if isinstance(layer, ConvSpec):
            leave = _pills(ax, leave, centres, y, "3×3 conv")
        else:
            dags = [spec.dags[depth - len(spec.convs)] for spec in specs]
            about += _counts(dags)
            put_frame(ax, MARGIN, y, SIDE + len(specs) * COLUMN, height, PALE)
            for i, (x, dag) in enumerate(zip(centres, dags, strict=True)):
                half = COLUMN / 2 - 20
                box = (x - half, x + half, y + PAD, y + height - PAD)
                points = draw_dag(ax, dag, box, f"{i + 1}-{layer.name}", labels=False, largest=NODE)
                (in_x, in_y), (out_x, out_y) = points[-1], points[dag.num_nodes]
                _join(ax, leave[i], (in_x, in_y - 9))
                leave[i] = (out_x, out_y + 8)
        _lines(ax, y + (13 if isinstance(layer, ConvSpec) else PAD + 4), stage, about)
        y += height + GAP
    _lines(ax, y + 13, "classifier", [f"{HEAD_CHANNELS} channels"])
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
    width = SIDE_OF_GRID + len(columns) * CELL
    figure, ax = _page(width, head + sum(heights) + gap * len(heights), extra=False)
    lefts = [MARGIN + SIDE_OF_GRID + i * CELL for i in range(len(columns))]
    for left, name in zip(lefts, columns, strict=True):
        put_text(ax, left + CELL / 2, MARGIN + HEADING / 2, name, size=HEADING, weight="bold")
    y = MARGIN + head
    for i, ((name, dags), height) in enumerate(zip(rows.items(), heights, strict=True)):
        put_frame(ax, MARGIN, y, width, height, PALE)
        _lines(ax, y + PAD + 4, name, _counts(dags))
        for j, (left, dag) in enumerate(zip(lefts, dags, strict=True)):
            # No more than twice the usual step: a graph of few rows lies in the middle.
            room = height - 2 * PAD - 2 * STEP * (layout_dag(dag, extra=False).rows - 1)
            start = y + PAD + max(room, 0) / 2
            box = (left + 24, left + CELL - 24, start, 2 * y + height - start)
            draw_dag(ax, dag, box, f"{i + 1}-{j + 1}", labels=False, extra=False, largest=NODE)
        y += height + gap
    return figure


def _page(width: float, height: float, extra: bool) -> tuple[Figure, Axes]:
    """A page with margins and, below what will be drawn, a legend."""
    columns = min(int(width // LEGEND), 6 if extra else 4)
    lines = -(-(6 if extra else 4) // columns)
    bottom = MARGIN + height + 48
    figure, ax = page(width + 2 * MARGIN, bottom + LEGEND_LINE * lines)
    put_legend(ax, MARGIN, bottom, extra=extra, columns=columns, width=LEGEND, size=TEXT)
    return figure, ax


def _height(dags: Iterable[Dag], extra: bool = True) -> float:
    """The height of a frame around graphs."""
    return STEP * (max(layout_dag(dag, extra).rows for dag in dags) - 1) + 2 * PAD


def _lines(ax: Axes, y: float, heading: str, lines: Sequence[str]) -> None:
    """The text at the left; y is the middle of the first line."""
    put_text(ax, MARGIN + 16, y, heading, size=HEADING, weight="bold", align="left")
    for i, line in enumerate(lines):
        put_text(ax, MARGIN + 16, y + LINE * (i + 1), line, size=TEXT, align="left")


def _pills(
    ax: Axes, leave: Sequence[Point], centres: Sequence[float], y: float, text: str
) -> list[Point]:
    """A layer that is no random graph, in each network; returns where it is left."""
    width, height = PILL
    for start, x in zip(leave, centres, strict=True):
        _join(ax, start, (x, y))
        put_frame(ax, x - width / 2, y, width, height, "white")
        put_text(ax, x, y + height / 2, text, size=TEXT)
    return [(x, y + height) for x in centres]


def _join(ax: Axes, start: Point, end: Point) -> None:
    """An arrow down, and sidewards between the frames."""
    middle = (start[1] + end[1]) / 2 - 4  # the arrow's head needs room
    put_arrow(ax, [start, (start[0], middle), (end[0], middle), end], radius=GAP / 2)


def _counts(dags: Sequence[Dag]) -> list[str]:
    """How many nodes and edges the graphs have: from the fewest to the most."""
    lines = []
    counted = {"node": [dag.num_nodes for dag in dags], "edge": [len(dag.edges) for dag in dags]}
    for what, counts in counted.items():
        low, high = min(counts), max(counts)
        lines.append(f"{low}–{high} {what}s" if low < high else f"{low} {what}{'s' * (low != 1)}")
    return lines
