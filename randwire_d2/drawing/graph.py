"""A random graph drawn into a part of a page: input nodes, output nodes, edges."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from ..wiring import Dag
from .dag_layout import Point, layout_dag
from .style import BLUE, GREY, INK, POINT, RED, put_text


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
