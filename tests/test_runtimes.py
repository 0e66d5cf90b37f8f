"""tools/benchmark.py --runtimes: backbones in several runtimes, timed side by side."""

import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_tool

from randwire_d2 import NetworkGenerator
from randwire_d2.benchmark import Case, compare_runtimes, runtimes_to_markdown

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


def test_wrong_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: minutes are spent before a missing package is found."""
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt'; known are eager, plain"):
        compare_runtimes(TINY, ("tensorrt",), 1)
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
