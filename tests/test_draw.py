"""Drawings of wirings: everything is drawn once, each time the same, and files are whole."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from randwire_d2.drawing.curves import plot_groups
from randwire_d2.drawing.dag_layout import layout_dag
from randwire_d2.drawing.grid import draw_grid, draw_networks
from randwire_d2.drawing.network import draw_network
from randwire_d2.drawing.style import FORMATS, save_figure
from randwire_d2.wiring import Dag, NetworkGenerator, NetworkSpec, parse_graph, random_graph

SPECS = {
    "regular WS": NetworkGenerator()(1),
    "small WS": NetworkGenerator("small", 78)(2),
    "BA": NetworkGenerator("small", 24, 16, "BA", {"m": 5})(1),
    "ER with isolated nodes": NetworkGenerator("small", 24, 12, "ER", {"p": 0.1})(1),
    "no edges": NetworkGenerator("small", 24, 40, "ER", {"p": 0.0})(1),
    "complete": NetworkGenerator("small", 24, 9, "ER", {"p": 1.0})(1),
    "one node": NetworkGenerator("regular", 24, 1, "ER", {"p": 0.5})(1),
}


@cache
def drawn(name: str) -> Figure:
    """One of ``SPECS``, to be read only."""
    return draw_network(SPECS[name])


def gids(figure: Figure) -> Counter[str]:
    artists = figure.axes[0].get_children()
    return Counter(artist.get_gid() for artist in artists if artist.get_gid())


def expected_gids(name: str, dag: Dag, extra: bool = True) -> Counter[str]:
    nodes: list[object] = [*range(dag.num_nodes)]
    edges: list[tuple[object, object]] = [*dag.edges]
    if extra:
        nodes += ["in", "out"]
        edges += [("in", v) for v in dag.input_nodes] + [(u, "out") for u in dag.output_nodes]
    return Counter(
        [f"{name}-node-{node}" for node in nodes] + [f"{name}-edge-{u}-{v}" for u, v in edges]
    )


@pytest.mark.parametrize("name", SPECS)
def test_every_node_and_edge_is_drawn_once(name: str) -> None:
    """Wrong: a picture that shows another network than the one that is trained."""
    spec: NetworkSpec = SPECS[name]
    expected: Counter[str] = Counter()
    for stage in spec.stages:
        expected += expected_gids(stage.name, stage.dag)
    assert gids(drawn(name)) == expected


@pytest.mark.parametrize("name", SPECS)
def test_the_drawing_says_what_the_network_is_and_stays_on_the_page(name: str) -> None:
    """Wrong: text beyond the page or over another, or a stage without name, channels, stride."""
    spec, figure = SPECS[name], drawn(name)
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    boxes, words = [], []
    for text in figure.axes[0].texts:
        box = text.get_window_extent(renderer)
        assert page.x0 < box.x0 and box.x1 < page.x1 and page.y0 < box.y0 and box.y1 < page.y1
        words.append(text.get_text())
        if text.get_text() and not text.get_text().isdigit():
            boxes.append(box)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    for stage in spec.stages:
        assert stage.name in words
        assert f"{stage.channels} channels, stride {strides[stage.name]}" in words
    assert ("conv1" in words) and ("classifier" in words)
    assert ("res2" in words) and (spec.fingerprint[:12] in words)
    for line in figure.axes[0].lines:
        assert 0 < line.get_xdata()[0] < page.width and 0 < line.get_ydata()[0] < page.height


def dags(most: int = 14) -> st.SearchStrategy[Dag]:
    def with_nodes(n: int) -> st.SearchStrategy[Dag]:
        pairs = [(u, v) for v in range(n) for u in range(v)]
        edges = st.lists(st.sampled_from(pairs), unique=True) if pairs else st.just([])
        return edges.map(lambda e: Dag(n, tuple(e)))

    return st.integers(1, most).flatmap(with_nodes)


@given(dags(), st.booleans())
@settings(max_examples=100)
def test_layout(dag: Dag, extra: bool) -> None:
    """Wrong: nodes on top of each other, edges that go up or end elsewhere, or another layout of
    the same DAG."""
    layout = layout_dag(dag, extra)
    assert layout == layout_dag(dag, extra)
    assert set(layout.nodes) == {*range(dag.num_nodes)} | ({-1, dag.num_nodes} if extra else set())
    for (u, v), route in layout.routes.items():
        ends = layout.nodes[u], layout.nodes[v]
        assert (route[0], route[-1]) == ends
        assert [row for _, row in route] == list(range(ends[0][1], ends[1][1] + 1))
    for node in range(dag.num_nodes):
        above = [layout.nodes[u][1] for u in dag.predecessors[node]]
        assert layout.nodes[node][1] == 1 + max(above, default=0 if extra else -1)
    by_row: dict[float, list[float]] = {}
    for x, row in layout.nodes.values():
        by_row.setdefault(row, []).append(x)
    for xs in by_row.values():
        assert np.all(np.diff(sorted(xs)) > max(layout.nearest, 1) - 0.001)
    assert {row for _, row in layout.nodes.values()} == set(range(layout.rows))
    assert all(0 <= x <= layout.width for route in layout.routes.values() for x, _ in route)


def test_a_planar_dag_is_drawn_without_crossings() -> None:
    """Wrong: an ordering of the rows that does not reduce crossings. The binary tree's indices
    are such that rows in the order of the indices cross."""
    dag = Dag(7, ((0, 1), (0, 2), (1, 4), (1, 6), (2, 3), (2, 5)))
    layout = layout_dag(dag)
    at = {node: x for node, (x, _) in layout.nodes.items()}
    assert (at[1] < at[2]) == (max(at[4], at[6]) < min(at[3], at[5]))


NETWORKS = {
    "regular": [NetworkGenerator()(seed) for seed in (1, 2, 3)],
    "small": [NetworkGenerator("small", 78)(seed) for seed in (1, 2)],
    "ER": [NetworkGenerator("small", 24, 12, "ER", {"p": 0.1})(seed) for seed in (1, 2, 3, 4, 5)],
    "no edges": [SPECS["no edges"]],
    "one node": [SPECS["one node"]],
}


def check_text(figure: Figure) -> list[str]:
    """The words of a page, none of which is beyond it or over another word or a node."""
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    for i, box in enumerate(boxes):
        assert page.x0 < box.x0 and box.x1 < page.x1 and page.y0 < box.y0 and box.y1 < page.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    for x, y, _ in nodes_of(figure).values():
        assert not any(box.contains(x, page.y1 - y) for box in boxes)
    return [text.get_text() for text in figure.axes[0].texts]


def nodes_of(figure: Figure) -> dict[str, tuple[float, float, float]]:
    """x, y and the diameter of each node, in pixels from the upper left corner."""
    return {
        line.get_gid(): (
            line.get_xdata()[0],
            line.get_ydata()[0],
            line.get_markersize() * figure.dpi / 72,
        )
        for line in figure.axes[0].lines
        if line.get_gid()
    }


def span(
    nodes: dict[str, tuple[float, float, float]], begin: str, axis: int
) -> tuple[float, float]:
    at = [node[axis] for gid, node in nodes.items() if gid.startswith(begin)]
    size = max(node[2] for gid, node in nodes.items() if gid.startswith(begin))
    return min(at) - size / 2, max(at) + size / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_side_by_side(name: str) -> None:
    """Wrong: Figure 1 of other networks, stages in another order, a network over the next one, or
    one whose stages are not joined."""
    specs = NETWORKS[name]
    figure = draw_networks(specs, [f"seed {i}" for i in range(len(specs))], "WS(4, 0.75)")
    expected: Counter[str] = Counter()
    for i, spec in enumerate(specs, start=1):
        for stage in spec.stages:
            expected += expected_gids(f"{i}-{stage.name}", stage.dag)
    assert gids(figure) == expected

    words, nodes = check_text(figure), nodes_of(figure)
    assert {"WS(4, 0.75)", *(f"seed {i}" for i in range(len(specs)))} <= set(words)
    for i, layer in enumerate(specs[0].layers):
        assert f"{layer.channels} channels, stride {2 ** (i + 1)}" in words
        assert ("conv1" if layer.name == "stem" else layer.name) in words
    assert words.count("3×3 conv") == len(specs) * len(specs[0].convs)
    assert words.count("image") == words.count("1×1 conv, pool, fc") == len(specs)

    joins = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(joins) == len(specs) * (len(specs[0].layers) + 1)
    right = 0.0
    for i, spec in enumerate(specs, start=1):
        left = span(nodes, f"{i}-", 0)[0]
        assert left > right
        right, bottom = span(nodes, f"{i}-", 0)[1], 0.0
        for stage in spec.stages:
            top, end = span(nodes, f"{i}-{stage.name}-", 1)
            assert top > bottom
            bottom = end
    assert right < figure.bbox.x1


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            ["regular WS", "small WS"],
            "regular with C=109 and sep_conv3x3, small with C=78 and sep_conv3x3",
        ),
        (
            ["BA", "BA, dense"],
            "small with C=24 and conv3x3, small with C=24 and sep_conv3x3",
        ),
        ([], "none"),
    ],
)
def test_networks_that_can_not_lie_side_by_side(names: list[str], found: str) -> None:
    """Wrong: the channels and the operation at the side are those of the first network only."""
    specs = {**SPECS, "BA, dense": replace(SPECS["BA"], node_op="conv3x3")}
    with pytest.raises(ValueError, match=f"one regime, one C and one node_op; got {found}$"):
        draw_networks([specs[name] for name in names], names)


LABELS = ("ER(0)", "ER(0.05)", "ER(0.8)", "BA(1)", "BA(5)", "WS(4, 0)", "WS(4, 0.75)")


def graphs(label: str, num_nodes: int = 32) -> list[Dag]:
    model, params = parse_graph(label)
    return [Dag.from_graph(random_graph(model, num_nodes, seed, **params)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def grid() -> Figure:
    return draw_grid({label: graphs(label) for label in LABELS}, ["seed 1", "seed 2"])


def test_a_grid_of_graphs(grid: Figure) -> None:
    """Wrong: Figure 4 of other graphs, cells over each other or in another order, the extra nodes,
    which the paper leaves out, or nodes that can't be seen."""
    expected: Counter[str] = Counter()
    for i, label in enumerate(LABELS, start=1):
        for j, dag in enumerate(graphs(label), start=1):
            expected += expected_gids(f"{i}-{j}", dag, extra=False)
    assert gids(grid) == expected
    words, nodes = check_text(grid), nodes_of(grid)
    assert {*LABELS, "seed 1", "seed 2", "32 nodes", "64 edges"} <= set(words)
    assert sum(" edge" in word for word in words) == len(LABELS)
    bottom = 0.0
    for i in range(1, len(LABELS) + 1):
        rows = [span(nodes, f"{i}-{j}-", 1) for j in (1, 2)]
        columns = [span(nodes, f"{i}-{j}-", 0) for j in (1, 2)]
        assert min(top for top, _ in rows) > bottom
        assert columns[0][0] > 0 and columns[0][1] < columns[1][0] and columns[1][1] < grid.bbox.x1
        bottom = max(end for _, end in rows)
    assert bottom < grid.bbox.y1
    assert min(size for _, _, size in nodes.values()) > 7


def test_nodes_of_a_grid_stay_apart(grid: Figure) -> None:
    """Wrong: nodes over each other, in dense graphs too."""
    nodes = nodes_of(grid)
    for i in range(1, len(LABELS) + 1):
        for j in (1, 2):
            cell = [node for gid, node in nodes.items() if gid.startswith(f"{i}-{j}-")]
            points, sizes = np.array([node[:2] for node in cell]), [node[2] for node in cell]
            distances = np.linalg.norm(points[:, None] - points, axis=-1)
            assert distances[~np.eye(len(cell), dtype=bool)].min() > max(sizes)


def test_nodes_have_the_colours_of_the_paper(grid: Figure) -> None:
    """Wrong: blue or red on a node that is no input or output of its graph, or not half of each on
    one that is both."""
    one = SPECS["ER with isolated nodes"]
    drawn = [(draw_network(one), stage.name, stage.dag) for stage in one.stages]
    drawn += [(grid, f"{i}-1", graphs(label)[0]) for i, label in enumerate(LABELS, start=1)]
    seen = set()
    for figure, name, dag in drawn:
        lines = {line.get_gid(): line for line in figure.axes[0].lines}
        for node in range(dag.num_nodes):
            line = lines[f"{name}-node-{node}"]
            ends = node in dag.input_nodes, node in dag.output_nodes
            color = "#0072B2" if ends[0] else "#D55E00" if ends[1] else "#8C96A0"
            assert line.get_markerfacecolor() == color
            assert (line.get_fillstyle() == "left") == all(ends)
            assert line.get_markerfacecoloralt() == "#D55E00" or not all(ends)
            seen.add((figure is grid, *ends))
    assert len(seen) == 7  # the network has no node that is neither


def test_every_group_of_runs_is_drawn() -> None:
    """Wrong: a group that is left out, or looks like another, when there are more than a few."""
    groups = {f"group {i}": [{1: {"AP": i}, 2: {"AP": i + 1}}] for i in range(6)}
    (ax,) = plot_groups(groups, ["AP"]).axes
    assert [list(line.get_ydata()) for line in ax.lines] == [[i, i + 1] for i in range(6)]
    assert len({line.get_color() for line in ax.lines}) == 6
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(groups)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_file_each_time(tmp_path: Path, suffix: str) -> None:
    """Wrong: a date or a random id in the file, or a drawing, a palette or an order of artists that
    depends on what came before."""
    files = set()
    for draw, palette in (
        (lambda: draw_network(SPECS["ER with isolated nodes"]), False),
        (lambda: draw_networks(NETWORKS["ER"][:2], ["a", "b"]), True),
        (lambda: draw_grid({"BA(1)": graphs("BA(1)")}, ["a", "b"]), True),
    ):
        first = save_figure(draw(), tmp_path / f"a{suffix}", palette).read_bytes()
        draw_network(SPECS["BA"])
        second = save_figure(draw(), tmp_path / "made" / f"b{suffix}", palette).read_bytes()
        assert first == second
        files.add(first)
    assert len(files) == 3


def test_a_palette_keeps_the_picture(tmp_path: Path) -> None:
    """Wrong: a small file whose colours or lines are others."""
    figure = draw_networks(NETWORKS["ER"][:2], ["a", "b"])
    full = save_figure(figure, tmp_path / "full.png")
    small = save_figure(figure, tmp_path / "small.png", palette=True)
    assert small.stat().st_size < 0.5 * full.stat().st_size
    with Image.open(full) as a, Image.open(small) as b:
        assert b.info["dpi"] == pytest.approx(a.info["dpi"])
        images = [np.asarray(image.convert("RGB")).astype(int) for image in (a, b)]
    assert np.abs(images[0] - images[1]).mean() < 0.5


def test_a_failure_leaves_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: half a picture, or a temporary file, after a full disk or a Ctrl-C."""
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    figure = draw_network(SPECS["one node"])

    def fail(file, **kwargs) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        save_figure(figure, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"before"


def test_pyplot_stays_untouched() -> None:
    """Wrong: drawing opens windows, or changes the figures of the program that calls it."""
    before = matplotlib.pyplot.get_fignums(), matplotlib.rcParams["svg.hashsalt"]
    draw_network(SPECS["one node"])
    assert (matplotlib.pyplot.get_fignums(), matplotlib.rcParams["svg.hashsalt"]) == before
