"""Drawings of wirings: everything is drawn once, each time the same, and files are whole."""

from collections import Counter
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from randwire_d2.wiring import Dag, NetworkGenerator, NetworkSpec
from randwire_d2.wiring.draw import FORMATS, draw_network, layout_dag, save_figure

SPECS = {
    "regular WS": NetworkGenerator()(1),
    "small WS": NetworkGenerator("small", 78)(2),
    "BA": NetworkGenerator("small", 24, 16, "BA", {"m": 5})(1),
    "ER with isolated nodes": NetworkGenerator("small", 24, 12, "ER", {"p": 0.1})(1),
    "no edges": NetworkGenerator("small", 24, 40, "ER", {"p": 0.0})(1),
    "complete": NetworkGenerator("small", 24, 9, "ER", {"p": 1.0})(1),
    "one node": NetworkGenerator("regular", 24, 1, "ER", {"p": 0.5})(1),
}


def gids(figure: Figure) -> Counter[str]:
    artists = figure.axes[0].get_children()
    return Counter(artist.get_gid() for artist in artists if artist.get_gid())


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()


@pytest.mark.parametrize("name", SPECS)
def test_every_node_and_edge_is_drawn_once(name: str) -> None:
    """Wrong: a picture that shows another network than the one that is trained."""
    spec: NetworkSpec = SPECS[name]
    expected: list[str] = []
    for stage in spec.stages:
        nodes = [*range(stage.dag.num_nodes), "in", "out"]
        edges = [
            *stage.dag.edges,
            *(("in", v) for v in stage.dag.input_nodes),
            *((u, "out") for u in stage.dag.output_nodes),
        ]
        expected += [f"{stage.name}-node-{node}" for node in nodes]
        expected += [f"{stage.name}-edge-{u}-{v}" for u, v in edges]
    assert gids(draw_network(spec)) == Counter(expected)


def test_input_nodes_are_blue_output_nodes_red_and_both_half_and_half() -> None:
    """Wrong: the colors of the paper's Figures 1 and 4 on other nodes."""
    spec = SPECS["ER with isolated nodes"]
    looks = {
        line.get_gid(): (line.get_markerfacecolor(), line.get_markerfacecoloralt(), line)
        for line in draw_network(spec).axes[0].lines
    }
    seen = Counter()
    for stage in spec.stages:
        for node in range(stage.dag.num_nodes):
            face, other, line = looks[f"{stage.name}-node-{node}"]
            roles = (node in stage.dag.input_nodes, node in stage.dag.output_nodes)
            seen[roles] += 1
            assert (line.get_fillstyle() == "left") == (roles == (True, True))
            if roles[0]:
                assert face == "#0072B2"
            elif roles[1]:
                assert face == "#D55E00"
            if roles == (True, True):
                assert other == "#D55E00"
    assert seen[True, True] and seen[True, False] and seen[False, True]


@pytest.mark.parametrize("name", SPECS)
def test_the_drawing_says_what_the_network_is_and_stays_on_the_page(name: str) -> None:
    """Wrong: text beyond the page or over another, or a stage without name, channels, stride."""
    spec = SPECS[name]
    figure = draw_network(spec)
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
        assert 0 < line.get_xdata()[0] < 1600 and 0 < line.get_ydata()[0] < page.height


def dags(most: int = 14) -> st.SearchStrategy[Dag]:
    def with_nodes(n: int) -> st.SearchStrategy[Dag]:
        pairs = [(u, v) for v in range(n) for u in range(v)]
        edges = st.lists(st.sampled_from(pairs), unique=True) if pairs else st.just([])
        return edges.map(lambda e: Dag(n, tuple(e)))

    return st.integers(1, most).flatmap(with_nodes)


@given(dags())
@settings(max_examples=60)
def test_layout(dag: Dag) -> None:
    """Wrong: nodes on top of each other, edges that go up or end elsewhere, or another layout of
    the same DAG."""
    layout = layout_dag(dag)
    assert layout == layout_dag(dag)
    for (u, v), route in layout.routes.items():
        ends = layout.nodes[u], layout.nodes[v]
        assert (route[0], route[-1]) == ends
        assert [row for _, row in route] == list(range(ends[0][1], ends[1][1] + 1))
    for node in range(dag.num_nodes):
        above = [layout.nodes[u][1] for u in dag.predecessors[node]]
        assert layout.nodes[node][1] == 1 + max(above, default=0)
    by_row: dict[float, list[float]] = {}
    for x, row in layout.nodes.values():
        by_row.setdefault(row, []).append(x)
    for xs in by_row.values():
        assert np.all(np.diff(sorted(xs)) > 0.999)


def test_a_planar_dag_is_drawn_without_crossings() -> None:
    """Wrong: an ordering of the rows that does not reduce crossings. The binary tree's indices
    are such that rows in the order of the indices cross."""
    dag = Dag(7, ((0, 1), (0, 2), (1, 4), (1, 6), (2, 3), (2, 5)))
    layout = layout_dag(dag)
    at = {node: x for node, (x, _) in layout.nodes.items()}
    assert (at[1] < at[2]) == (max(at[4], at[6]) < min(at[3], at[5]))


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_file_each_time(tmp_path: Path, suffix: str) -> None:
    """Wrong: a date or a random id in the file, or a drawing that depends on what came before."""
    spec = SPECS["ER with isolated nodes"]
    first = save_figure(draw_network(spec), tmp_path / f"a{suffix}")
    draw_network(SPECS["small WS"])
    second = save_figure(draw_network(spec), tmp_path / "made" / f"b{suffix}")
    assert first.read_bytes() == second.read_bytes()
    other = save_figure(draw_network(NetworkGenerator("small", 24, 12)(2)), tmp_path / f"c{suffix}")
    assert other.read_bytes() != first.read_bytes()


def test_the_readme_picture_has_its_size(tmp_path: Path) -> None:
    """Wrong: a picture too heavy for a README, or not the pixels that were laid out."""
    figure = draw_network(SPECS["regular WS"])
    assert pixels(figure).shape[1] == 1600
    assert save_figure(figure, tmp_path / "a.png").stat().st_size < 600_000


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


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path, name: str) -> None:
    """Wrong: an error from deep within matplotlib, or a file of another format than its name."""
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        save_figure(draw_network(SPECS["one node"]), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_pyplot_stays_untouched() -> None:
    """Wrong: drawing opens windows, or changes the figures of the program that calls it."""
    before = matplotlib.pyplot.get_fignums(), matplotlib.rcParams["svg.hashsalt"]
    draw_network(SPECS["one node"])
    assert (matplotlib.pyplot.get_fignums(), matplotlib.rcParams["svg.hashsalt"]) == before
