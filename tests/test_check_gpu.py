"""tools/check_gpu.py, on a CPU: each examination is a process of its own, as on a GPU."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import refusal, run_tool
from recording import StandIn
from torch import Tensor

from randwire_d2.benchmark import health
from randwire_d2.cli import check_gpu
from randwire_d2.modeling import cuda_graphs, graph_function, stage_graphs, weights
from randwire_d2.ops import native, probe

TOOL = "check_gpu.py"


@pytest.mark.slow
def test_a_device_that_works(tmp_path: Path) -> None:
    """Wrong: something is not examined, or the report can't be attached to a bug report."""
    options = ["--device", "cpu", "--channels", 12, "--batch", 2, "--output", tmp_path / "r.json"]
    said = run_tool(TOOL, *options, log=tmp_path / "log")
    assert "The fast path works." in said and "times as fast as node by node" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["works"] and torch.__version__ in report["environment"]
    assert report["operators"]["float32"]["errors"].keys() == set(probe.OPERATORS)
    assert report["stage"].keys() == set(health.DTYPES)
    assert "sanitizer" not in said, "CUDA's examines no CPU"
    assert report["stage"]["float32"]["seconds"].keys() == {"training", "inference"}
    assert report["compiler"].keys() >= {"compiler", "Python.h", "cache can be written"}


@pytest.mark.parametrize("part", health.PARTS)
def test_what_a_training_does_without_is_said(part: str) -> None:
    """Wrong: who is told that a training goes on sees it stop."""
    report = {one: {"float32": {"skipped": "here"}} for one in health.PARTS}
    assert health.summary(report)[-1] == "The fast path works."
    report[part] = {"float32": {"error": "off by 2"}}
    assert health.summary(report)[-1] == f"Not all works, so {health.PARTS[part]}."


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_check(tmp_path: Path) -> None:
    assert "no GPU that PyTorch can use" in refusal(TOOL, log=tmp_path / "log")


def test_a_wrong_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a report that says "works" of kernels that do not."""

    def wrong(*arguments: Any) -> Any:
        return 1.01 * native.weighted_sum(*arguments)

    monkeypatch.setattr(torch.ops.randwire, "weighted_sum", wrong)
    with pytest.raises(probe.Mismatch, match="weighted_sum, result 0, of 1 inputs of 6 channels"):
        health.examine_operators(torch.device("cpu"), torch.float32, 6)


@pytest.mark.parametrize("part", ["stage", "graphs"])
def test_stages_are_examined_with_what_a_stage_hands_on(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a report that says "works" of ways that no training takes: stages that make their
    images' channels of zeros themselves."""
    zeros = []

    def note(x: Tensor, padding: int) -> Tensor:
        zeros.append(weights.zeros_of(x))
        return weights.wider_image(x, padding)

    monkeypatch.setattr(graph_function, "wider_image", note)
    monkeypatch.setattr(cuda_graphs, "recorder", StandIn())
    monkeypatch.setattr(health, "_GRAPH_SIZES", (8,))
    monkeypatch.setattr(health, "_SIZE", 8)
    with weights.as_on_cuda():
        getattr(health, f"examine_{part}")(torch.device("cpu"), torch.float32, 6, 2)
    assert zeros and set(zeros) == {2}


def test_graphs_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a report that says "works" of graphs that there are not, or that compute another
    thing."""
    stand_in = StandIn()
    monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
    for module in (health, stage_graphs):
        monkeypatch.setattr(module, "LATER_CALLS", 3)
    monkeypatch.setattr(health, "_GRAPH_SIZES", (8, 6))
    found = health.examine_graphs(torch.device("cpu"), torch.float32, 6, 2)
    assert found == {"errors": {"output": 0, "gradients": 0, "statistics": 0}}
    assert stand_in.recorded == 2
    monkeypatch.setattr(cuda_graphs.Graph, "_check", lambda *_: None)
    for wrong in (1.01, float("nan")):
        stand_in.broken = lambda result, wrong=wrong: result.mul_(wrong)
        with pytest.raises(RuntimeError, match="a replay's output at .* is off by (0.01|nan)"):
            health.examine_graphs(torch.device("cpu"), torch.float32, 6, 2)
    monkeypatch.setattr(stand_in, "record", mock.Mock(side_effect=OSError("a driver")))
    with pytest.raises(RuntimeError, match="no CUDA graph was made: a driver"):
        health.examine_graphs(torch.device("cpu"), torch.float32, 6, 2)


@pytest.mark.parametrize(
    ("child", "error"),
    [
        ("import os; os.kill(os.getpid(), 11)", "(SIGSEGV)"),
        ("raise OSError('no compiler')", "OSError: no compiler (exit status 1)"),
    ],
)
def test_a_process_that_dies_is_an_outcome(
    child: str, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wrong: the tool dies with what it examines, or says what failed only once all has ended."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nexec python3 -c "{child}"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(health.sys, "executable", str(stand_in))
    said: list[str] = []
    report = health.examine("cpu", 6, 2, said.append)
    assert said[0] == "operators in float32 ..." and error in said[1]
    assert not report["works"]
    assert all(error in found["error"] for found in report["operators"].values())


def test_a_gpu_that_is_not_there_is_not_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the fast path is said to fail, on a machine with fewer GPUs, after a minute."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(check_gpu, "examine", mock.Mock(side_effect=AssertionError))
    with pytest.raises(SystemExit, match="--device is 'cuda:8', but torch sees 8 GPUs here"):
        check_gpu.main(["--device", "cuda:8"])


def test_a_sanitizer_sees_each_tensors_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: what a kernel reads behind a tensor is PyTorch's own block of 2 MiB, or another
    tensor, and no error."""
    seen = []

    def elsewhere(prefix: Sequence[str], part: str, *arguments: object) -> dict[str, Any]:
        seen.append((*prefix[1:3], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")))
        return {"errors": {"all": 0}}

    monkeypatch.setattr(health, "_elsewhere", elsewhere)
    monkeypatch.setattr(health.shutil, "which", lambda name: name)
    health.examine("cuda")
    assert set(seen) == {(None,), *(("--tool", tool, "1") for tool in health.SANITIZERS)}


@pytest.mark.slow
def test_kernels_can_be_inspected_without_a_gpu(tmp_path: Path) -> None:
    """Wrong: the tool compiles something else than it is asked for, or reads no numbers."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    options = ["--operators", "weighted_sum", "--inputs", 2, "--channels", 5, "--capability", 80]
    *_, row = run_tool("inspect_kernels.py", *options, log=tmp_path / "log").splitlines()
    channels, inputs, operator, kernel, registers, *_, instructions, waits, per_element = (
        cell.strip() for cell in row.strip("|").split("|")
    )
    assert (channels, inputs, operator) == ("5", "2", "weighted_sum")
    assert kernel == "_weighted_sum_kernel"
    assert 8 < int(registers) <= 255 and int(instructions) > 50 and waits == "0"
    # A tile of 2048 elements, and 4 warps; there is no loop.
    assert float(per_element) == pytest.approx(int(instructions) / 16, rel=1e-4)
