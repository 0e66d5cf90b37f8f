"""tools/draw_wiring.py: each source of a wiring, and each mistake, on a command line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool
from PIL import Image

from randwire_d2 import NetworkGenerator, NetworkSpec, RandWireClassifier
from randwire_d2.checkpoint import WIRING_KEY, RandWireCheckpointer
from randwire_d2.cli import draw_wiring as tool
from randwire_d2.drawing.grid import draw_grid, draw_networks
from randwire_d2.drawing.network import draw_network
from randwire_d2.drawing.style import save_figure
from randwire_d2.wiring import Dag, random_graph

TOOL = ROOT / "tools" / "draw_wiring.py"
CLASSIFIER = str(ROOT / "configs" / "imagenet" / "randwire_c78_100ep.yaml")
DETECTOR = str(ROOT / "configs" / "faster_rcnn_randwire_c109_fpn_1x.yaml")
SMALL = NetworkGenerator("small", 8, 6, "BA", {"m": 2})


@pytest.fixture
def draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., bytes]:
    """Run the tool; the picture that it wrote, and nothing else."""

    def run(*args: object, suffix: str = ".svg") -> bytes:
        output = tmp_path / "new" / f"wiring{suffix}"
        tool.main([*map(str, args), "--output", str(output)])
        assert capsys.readouterr().out == f"Picture: {output}\n"
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        return output.read_bytes()

    return run


@pytest.fixture
def expect(tmp_path: Path) -> Callable[..., bytes]:
    """The picture of these networks."""

    def run(specs: list[NetworkSpec], titles: list[str], *name: str) -> bytes:
        path = save_figure(draw_networks(specs, titles, *name), tmp_path / "expected.svg")
        return path.read_bytes()

    return run


def test_a_classifier_s_config(draw: Callable[..., bytes], expect: Callable[..., bytes]) -> None:
    """Wrong: other networks than the config's, of other seeds, or under other titles."""
    specs = [NetworkGenerator("small", 78)(seed) for seed in (4, 7)]
    drawn = draw("--config-file", CLASSIFIER, "--seeds", "4", "7")
    assert drawn == expect(specs, ["seed 4", "seed 7"], "WS(4, 0.75)")
    u, v = specs[1].stages[0].dag.edges[0]
    assert f'id="2-res3-edge-{u}-{v}"'.encode() in drawn


def test_a_detector_s_config_with_keys(
    draw: Callable[..., bytes], expect: Callable[..., bytes]
) -> None:
    """Wrong: the config's seed is not the default, or the KEY VALUE pairs are not read."""
    keys = ["MODEL.RANDWIRE.NUM_NODES", "9", "MODEL.RANDWIRE.GRAPH", "ER", "MODEL.RANDWIRE.SEED", 3]
    spec = NetworkGenerator("regular", 109, 9, "ER", {"p": 0.2})(3)
    assert draw("--config-file", DETECTOR, *keys) == expect([spec], ["seed 3"], "ER(0.2)")


def test_a_spec_file(
    draw: Callable[..., bytes], expect: Callable[..., bytes], tmp_path: Path
) -> None:
    """Wrong: a spec's file is drawn as something else, directly or as a config's SPEC_FILE."""
    specs = [SMALL(1), SMALL(2)]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, spec in zip(files, specs, strict=True):
        file.write_text(spec.to_json())
    titles = [spec.fingerprint[:12] for spec in specs]
    assert draw("--spec", *files) == expect(specs, titles)
    keys = ["MODEL.RANDWIRE.SPEC_FILE", files[0]]
    assert draw("--config-file", CLASSIFIER, *keys) == expect(specs[:1], titles[:1])


@pytest.mark.parametrize("suffix", [".pdf", ".png", ".svg"])
def test_columns(draw: Callable[..., bytes], tmp_path: Path, suffix: str) -> None:
    """Wrong: --layout columns is not README's page, in any format."""
    spec = tmp_path / "a.json"
    spec.write_text(SMALL(1).to_json())
    expected = save_figure(draw_network(SMALL(1)), tmp_path / f"e{suffix}", palette=True)
    drawn = draw("--spec", spec, "--layout", "columns", suffix=suffix)
    assert drawn == expected.read_bytes()


def test_a_checkpoint(
    draw: Callable[..., bytes], expect: Callable[..., bytes], tmp_path: Path
) -> None:
    """Wrong: the wiring drawn is not the one in the checkpoint, or a run's is not found."""
    model = RandWireClassifier(SMALL(5), num_classes=3)
    RandWireCheckpointer(model, str(tmp_path)).save("model_final")
    expected = expect([SMALL(5)], [SMALL(5).fingerprint[:12]])
    assert draw("--checkpoint", tmp_path / "model_final.pth") == expected
    assert draw("--checkpoint", tmp_path) == expected


def test_a_grid(draw: Callable[..., bytes], tmp_path: Path) -> None:
    """Wrong: another graph than the generator's of that seed, or not the paper's labels."""
    rows = {
        "WS(4, 0.5)": [random_graph("WS", 10, seed, k=4, p=0.5) for seed in (3, 1)],
        "BA(2)": [random_graph("BA", 10, seed, m=2) for seed in (3, 1)],
    }
    dags = {label: [Dag.from_graph(graph) for graph in row] for label, row in rows.items()}
    expected = save_figure(draw_grid(dags, ["seed 3", "seed 1"]), tmp_path / "e.svg")
    drawn = draw("--grid", "WS(4,.5)", " BA(2)", "--seeds", "3", "1", "3", "--nodes", "10")
    assert drawn == expected.read_bytes()


@pytest.mark.slow
def test_the_grid_of_no_generators(draw: Callable[..., bytes]) -> None:
    """Wrong: --grid alone does not draw ER, BA and WS, at 32 nodes, for five seeds."""
    drawn = draw("--grid").decode()
    assert re.findall(r"<!-- ((?:ER|BA|WS)\(.*) -->", drawn) == [
        "ER(0.2)", "ER(0.6)", "BA(1)", "BA(5)", "WS(4, 0)", "WS(4, 0.75)",
    ]  # fmt: skip
    assert len(set(re.findall(r'id="(\d-\d)-node-31"', drawn))) == 6 * 5


def test_there_is_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    """Else one of two sources is silently not drawn."""
    with pytest.raises(SystemExit):
        tool.main(["--grid", "--spec", "a.json", "--output", "a.png"])
    assert "argument --spec: not allowed with argument --grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config-file", CLASSIFIER, "--nodes", "9"], "--nodes is for --grid; a config has its"),
        (
            ["--config-file", CLASSIFIER, "--seeds", "1", "2", "--layout", "columns"],
            "--layout columns draws one network; got 2",
        ),
        (
            ["--config-file", CLASSIFIER, "--seeds", "1", "--", "MODEL.RANDWIRE.SPEC_FILE", "a"],
            "MODEL.RANDWIRE.SPEC_FILE 'a' is one network; leave out --seeds",
        ),
        (["--grid", "WS(4, 0.75"], "a generator is written like WS(4, 0.75); got 'WS(4, 0.75'"),
        (["--grid", "WT(4)"], "unknown graph model 'WT'"),
        (["--grid", "--nodes", "0"], "num_nodes (N) must be at least 1; got 0"),
        (["--grid", "--layout", "stacked"], "--layout is for networks, not --grid"),
        (["--spec", "no.json"], "No such file"),
        (["--spec", "no.json", "--seeds", "1"], "--seeds is for --config-file or --grid"),
        (["--checkpoint", "no.pth"], "'no.pth' is no file"),
        (["--checkpoint", CLASSIFIER], "is no checkpoint: it begins with"),
        (["--checkpoint", "a.pth", "--", "SEED", "1"], "KEY VALUE is for --config-file"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], message: str) -> None:
    """Else a mistake ends in a traceback, or in a picture of something else."""
    split = argv.index("--") if "--" in argv else len(argv)
    with pytest.raises(SystemExit) as stop:
        tool.main([*argv[:split], "--output", str(tmp_path / "a.png"), *argv[split + 1 :]])
    told = str(stop.value.code)
    assert told.startswith("draw_wiring.py: error: ")
    assert message in told
    assert "\n" not in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "does not hold its wiring; draw its config, with --config-file"),
        ({}, "its entry 'randwire' is damaged"),
        ("spec", "its entry 'randwire' is damaged"),
        ({"spec": "{}", "fingerprint": ""}, "the key 'format' is missing"),
    ],
)
def test_checkpoints_without_a_wiring(tmp_path: Path, entry: object, message: str) -> None:
    """Else a checkpoint of a ResNet, or a damaged one, ends in a traceback."""
    data = {"model": {"weight": torch.zeros(1)}}
    torch.save(data if entry is None else {**data, WIRING_KEY: entry}, tmp_path / "a.pth")
    with pytest.raises(SystemExit, match=message):
        tool.main(
            ["--checkpoint", str(tmp_path / "a.pth"), "--output", str(tmp_path / "out" / "a.png")]
        )
    assert not (tmp_path / "out").exists()


def test_the_tool_as_users_run_it(tmp_path: Path) -> None:
    """Wrong: what the tests above call is not what runs."""
    picture, log = tmp_path / "a.png", tmp_path / "log"
    arguments = ["--grid", "BA(1)", "--seeds", 1, "--output", picture]
    assert run_tool(TOOL.name, *arguments, log=log).endswith(f"Picture: {picture}\n")
    with Image.open(picture) as image:
        assert (image.format, image.mode) == ("PNG", "P")
