"""tools/benchmark.py --runtimes: networks in several runtimes, timed side by side."""

import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_tool

from randwire_d2 import NetworkGenerator
from randwire_d2.benchmark import Case, compare_runtimes, runtimes_to_markdown
from randwire_d2.cli.benchmark import parse_args

TINY = Case(
    batch=2, height=32, width=64, generator=NetworkGenerator("small", channels=4, num_nodes=5)
)
RESNET_BYTES = 4 * 23e6  # its weights, without the classifier


@pytest.mark.slow
def test_every_backbone_is_measured_in_every_runtime() -> None:
    """Wrong: a model or a runtime is left out, a ratio has another reference, or the memory is
    another process's, or leaves out the weights."""
    said: list[str] = []
    rows = compare_runtimes(TINY, ("plain", "onnx"), 1, progress=said.append)
    assert [(row.model, row.runtime) for row in rows] == [
        ("randwire", "eager"), ("randwire", "plain"), ("randwire", "onnx"),
        ("resnet50", "eager"), ("resnet50", "onnx"),
    ]  # fmt: skip
    reference = rows[3]
    assert reference.versus == (1, 1, 1)
    for row in rows:
        assert row.versus.median == row.times[0] / reference.times[0] > 0
        assert (row.peak > RESNET_BYTES) == (row.model == "resnet50")
    assert said[0] == "exporting RandWire" and said[-1] == "timing, 1 rounds"
    table = runtimes_to_markdown(rows, TINY, 1, "the command")
    assert table.startswith("`the command`\n\ndetection backbones") and "batch 2, 32×64" in table
    assert [line.split("|")[2].strip() for line in table.splitlines()[-5:]] == [
        "PyTorch", "PyTorch, node by node", "ONNX Runtime", "PyTorch", "ONNX Runtime",
    ]  # fmt: skip


@pytest.mark.slow
def test_whole_detectors_are_measured_too() -> None:
    """Wrong: the backbone is measured in place of the detector, ResNet-50's in place of RandWire's,
    or nobody is told that an export takes one image after the other."""
    rows = compare_runtimes(TINY, ("onnx",), 1, whole=True)
    assert [(row.model, row.runtime) for row in rows] == [
        ("randwire", "eager"), ("randwire", "onnx"), ("resnet50", "eager"), ("resnet50", "onnx"),
    ]  # fmt: skip
    box_head = 4 * 14e6  # the weights of its two layers
    for row in rows:
        least = box_head + (RESNET_BYTES if row.model == "resnet50" else 0)
        assert row.peak > least
    assert rows[0].peak < rows[2].peak - RESNET_BYTES / 2
    table = runtimes_to_markdown(rows, TINY, 1, "the command", whole=True)
    assert "Faster R-CNNs on detection backbones" in table and "one image after the other" in table


def test_a_missing_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: minutes are spent before a missing package is found."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime"):
        compare_runtimes(TINY, ("onnx",), 1)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Wrong: the option doesn't reach the comparison."""
    said = run_tool(
        ROOT / "tools/benchmark.py", "--batch", 1, "--size", 32, 64, "--channels", 4, "--nodes", 10,
        "--rounds", 1, "--runtimes", "eager", log=tmp_path / "log",
    )  # fmt: skip
    assert "| RandWire  | PyTorch   |" in said and "| ResNet-50 | PyTorch   |" in said


def test_options_of_runtimes_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: an option is passed over without a word."""
    for options in (["--detector"], ["--batch", "1", "8"]):
        with pytest.raises(SystemExit):
            parse_args(options)
        assert "go with --runtimes" in capsys.readouterr().err
