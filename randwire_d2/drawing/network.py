"""A picture of one whole network, with its stages in columns from left to right."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..wiring import NODE_OP_COMPLEXITY_REGISTRY, NetworkSpec, StageSpec, complexity
from ..wiring.network import HEAD_CHANNELS
from .dag_layout import layout_dag
from .graph import count_parts, draw_dag, put_legend
from .style import MARGIN, PALE, Point, page, put_arrow, put_frame, put_text

# Sizes in pixels.
WIDTH = 1600  # of the page
CARD = 168  # the width of a layer without a random graph, and so of the first and last column
GUTTER = 34  # between columns
TITLE = 92  # from the upper edge of a stage to its graph
PORT = 26  # from a graph to the outer ends of its extra nodes


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

    # The first column: the image, the dense convolutions, and the legend.
    x, y, stride = MARGIN + CARD / 2, MARGIN + 12.0, 1
    put_text(ax, x, y, "image", size=16)
    for conv in spec.convs:
        stride *= 2
        title = "conv1" if conv.name == "stem" else conv.name
        lines = ["3×3 conv", f"{conv.channels} channels", f"stride {stride}"]
        put_arrow(ax, [(x, y + 12), (x, y + 40)])
        y = _card(ax, x, y + 40, title, lines)
    leave = [(x + CARD / 2, max(entry, y - 44))]
    put_legend(ax, MARGIN, y + 50)

    # The randomly wired stages.
    left = MARGIN + CARD + GUTTER
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

    # The last column: the facts about the network, and the classifier.
    x = WIDTH - MARGIN - CARD / 2
    _facts(ax, spec, x - CARD / 2, MARGIN + 12)
    lines = ["ReLU, 1×1 conv", f"{HEAD_CHANNELS} channels", "global avg. pool", "fc"]
    top = MARGIN + body - 152
    _card(ax, x, top, "classifier", lines)
    gutter = x - CARD / 2 - GUTTER / 2
    put_arrow(ax, [*leave, (gutter, leave[-1][1]), (gutter, top + 66), (x - CARD / 2, top + 66)])
    return figure


def _card(ax: Axes, x: float, top: float, title: str, lines: Sequence[str]) -> float:
    """Draw a box with a title and lines of text, centred on x; returns its lower edge."""
    height = 44 + 21 * len(lines)
    put_frame(ax, x - CARD / 2, top, CARD, height, "white")
    put_text(ax, x, top + 20, title, size=18, weight="bold")
    for i, line in enumerate(lines):
        put_text(ax, x, top + 46 + 21 * i, line, size=15.5)
    return top + height


def _stage(
    ax: Axes, stage: StageSpec, stride: int, left: float, width: float, height: float
) -> tuple[Point, Point]:
    """Draw a stage in its frame; returns the points of its extra input and output nodes."""
    put_frame(ax, left, MARGIN, width, height, PALE)
    put_text(ax, left + 16, MARGIN + 24, stage.name, size=21, weight="bold", align="left")
    parts = ", ".join(count_parts([stage.dag]))
    about = [parts, f"{stage.channels} channels, stride {stride}"]
    for i, line in enumerate(about):
        put_text(ax, left + 16, MARGIN + 50 + 21 * i, line, size=15.5, align="left")
    start, end = MARGIN + TITLE + PORT, MARGIN + height - 1.7 * PORT
    box = (left + 20, left + width - 20, start, end)
    points = draw_dag(ax, stage.dag, box, name=stage.name)
    return points[-1], points[stage.dag.num_nodes]


def _facts(ax: Axes, spec: NetworkSpec, left: float, top: float) -> None:
    lines = [f"{spec.regime} regime", f"C = {spec.channels}", spec.node_op]
    cost = cost_of(spec)
    lines += [*cost, "(1000 classes, 224²)"] if cost else []
    lines += ["", "fingerprint", spec.fingerprint[:12]]
    put_text(ax, left, top, "RandWire", size=21, weight="bold", align="left")
    for i, line in enumerate(lines):
        put_text(ax, left, top + 28 + 22 * i, line, size=15.5, align="left")


def cost_of(spec: NetworkSpec) -> list[str]:
    """Parameters and FLOPs in two lines; empty if the node op's cost is not registered."""
    if spec.node_op not in NODE_OP_COMPLEXITY_REGISTRY:
        return []
    cost = complexity(spec)
    return [f"{_short(cost.params)} parameters", f"{_short(cost.flops)} FLOPs"]


def _short(count: float) -> str:
    """A count with its unit: 583.21 M, 4.01 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
