"""Draw a DAG into a part of a page, and the legend of its nodes."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from ..wiring import Dag
from .dag_layout import layout_dag
from .style import BLUE, GREY, INK, PIXEL, RED, Point, put_text

# Text of the legend -> (is_input, is_output, is_extra) of the node beside it.
LEGEND = {
    "input node": (True, False, False),
    "output node": (False, True, False),
    "both": (True, True, False),
    "node": (False, False, False),
    "stage's input": (True, False, True),
    "stage's output": (False, True, True),
}
LEGEND_LINE = 28  # pixels from one line of the legend to the next


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
        name: the prefix of the artists' gids.
        labels: write the nodes' indices into them, if there is room.
        extra: draw the extra input and output nodes of §3.2, too.
        largest: the largest diameter of a node in pixels.

    Returns:
        node -> its point (x, y); the extra input and output nodes are -1 and N.
    """
    left, right, start, end = box
    layout = layout_dag(dag, extra)
    unit = min((right - left) / max(layout.width, 1.0), 64.0)
    step = (end - start) / max(layout.rows - 1, 1)
    indent = left + (right - left - unit * layout.width) / 2
    diameter = min(largest, 0.86 * unit * layout.nearest)
    if layout.rows > 1:
        diameter = min(diameter, 0.62 * abs(step))

    def at(x: float, row: int) -> Point:
        return indent + unit * x, start + step * row

    nodes = {node: at(*place) for node, place in layout.nodes.items()}
    routes = {edge: [at(*place) for place in route] for edge, route in layout.routes.items()}
    _draw_edges(ax, dag, routes, name)
    _draw_nodes(ax, dag, nodes, name, diameter, labels)
    return nodes


def _draw_edges(
    ax: Axes, dag: Dag, routes: Mapping[tuple[int, int], Sequence[Point]], name: str
) -> None:
    """Draw the edges as curves; the extra nodes' edges are dashed, in the colour of the node."""
    thin = min(1.0, (64 / max(len(dag.edges), 1)) ** 0.5)  # many edges are fainter
    for (u, v), route in routes.items():
        is_extra = u == -1 or v == dag.num_nodes
        # Long edges fade: there are many, and the eye follows them by their ends.
        alpha = max(0.8 - 0.055 * (len(route) - 2), 0.38 * thin)
        ax.add_patch(
            PathPatch(
                _smooth(route),
                gid=f"{name}-edge-{_label(dag, u)}-{_label(dag, v)}",
                facecolor="none",
                edgecolor=INK if not is_extra else BLUE if u == -1 else RED,
                alpha=alpha,
                linewidth=1.0 if is_extra else 1.25 * max(thin, 0.6),
                linestyle=(0, (2.5, 1.8)) if is_extra else "solid",
                capstyle="round",
                zorder=2,
            )
        )


def _draw_nodes(
    ax: Axes, dag: Dag, nodes: Mapping[int, Point], name: str, diameter: float, labels: bool
) -> None:
    for node, (x, y) in nodes.items():
        is_extra = node in (-1, dag.num_nodes)
        mark = _node_mark(
            (x, y),
            diameter=(0.5 if is_extra else 1.0) * diameter,
            is_input=node == -1 or node in dag.input_nodes,
            is_output=node == dag.num_nodes or node in dag.output_nodes,
            is_extra=is_extra,
        )
        mark.set(gid=f"{name}-node-{_label(dag, node)}", zorder=3)
        ax.add_line(mark)
        if labels and not is_extra and diameter >= 15:
            size = 0.5 * diameter
            put_text(ax, x, y, str(node), size, weight="bold", color="white", zorder=4)


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
    """Draw the legend of the nodes' marks.

    Args:
        left, top: the upper left corner in pixels.
        extra: explain the extra nodes, too.
        columns: the number of entries in a line.
        width: the width of an entry in pixels.
        size: the height of the text in pixels.
    """
    for i, (text, role) in enumerate(legend_entries(extra).items()):
        is_input, is_output, is_extra = role
        x, y = left + width * (i % columns), top + LEGEND_LINE * (i // columns)
        diameter = 11 if is_extra else 20
        ax.add_line(_node_mark((x + 12, y), diameter, is_input, is_output, is_extra))
        put_text(ax, x + 32, y, text, size=size, align="left")


def legend_entries(extra: bool) -> dict[str, tuple[bool, bool, bool]]:
    """The entries of ``LEGEND`` that a picture with or without the extra nodes needs."""
    return {text: role for text, role in LEGEND.items() if extra or not role[2]}


def _node_mark(
    at: Point, diameter: float, is_input: bool, is_output: bool, is_extra: bool
) -> Line2D:
    """The mark of a node, a disc, or of an extra node, an empty square; diameter in pixels."""
    color = BLUE if is_input else RED if is_output else GREY
    is_both = is_input and is_output
    return Line2D(
        [at[0]],
        [at[1]],
        marker="s" if is_extra else "o",
        markersize=diameter * PIXEL,
        fillstyle="left" if is_both else "full",
        markerfacecolor="white" if is_extra else color,
        markerfacecoloralt=RED,
        markeredgecolor=color if is_extra else "white",
        # A rim around each half would run through the middle of the disc.
        markeredgewidth=1.6 if is_extra else 0.0 if is_both else 0.9,
        linestyle="none",
    )


def count_parts(dags: Sequence[Dag]) -> list[str]:
    """Lines with the numbers of nodes and edges of the graphs, each from fewest to most."""
    lines = []
    counted = {"node": [dag.num_nodes for dag in dags], "edge": [len(dag.edges) for dag in dags]}
    for what, counts in counted.items():
        low, high = min(counts), max(counts)
        lines.append(f"{low}–{high} {what}s" if low < high else f"{low} {what}{'s' * (low != 1)}")
    return lines


def _label(dag: Dag, node: int) -> str:
    return {-1: "in", dag.num_nodes: "out"}.get(node, str(node))


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
