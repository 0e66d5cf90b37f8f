"""tools/measure_gpu.py: that nothing is lost of what was measured."""

import json
from pathlib import Path

import pytest
import torch
from helpers import refusal

from randwire_d2.benchmark import Case, Settings
from randwire_d2.cli import measure_gpu as tool

TOOL = "measure_gpu.py"


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: an hour of measurements is lost, a failure is not said, or the exit status is 0."""

    def compare(case: Case, settings: Settings) -> tuple[str, object]:
        # What is there already is on disk.
        assert "The check" in json.loads((tmp_path / "gpu.json").read_text())
        if case.detection:
            raise RuntimeError("CUDA error:\nan illegal access")
        return f"| batch {case.batch} |", {"batch": case.batch}

    monkeypatch.setattr(tool, "check", lambda device, quick: ("it works", {"works": True}))
    monkeypatch.setattr(tool, "compare", compare)
    monkeypatch.setattr(tool, "train", lambda *_: ("top-1 80%", {"top1": 80.0}))
    with pytest.raises(SystemExit) as e:
        tool.main(["--device", "cpu", "--output", str(tmp_path)])
    assert "measure_gpu.py: error: these failed: Detectors, 2 images, float32; Det" in str(e.value)
    text = (tmp_path / "gpu.md").read_text()
    assert "FAILED: RuntimeError: CUDA error: an illegal access" in text
    assert all(f"| batch {batch} |" in text for batch in (32, 128, 256))
    numbers = json.loads((tmp_path / "gpu.json").read_text())
    assert numbers["A training, FUSED off"] == {"top1": 80.0}
    assert len(numbers) == len(tool.comparisons("cpu", quick=False)) + 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(tmp_path: Path) -> None:
    assert "no GPU that PyTorch can use" in refusal(TOOL, log=tmp_path / "log")
