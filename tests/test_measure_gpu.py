"""tools/measure_gpu.py: that nothing is lost of what was measured, nor measured twice."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT, refusal

from randwire_d2.benchmark import MODELS, Case, Settings
from randwire_d2.benchmark.markdown import overview
from randwire_d2.cli import measure_gpu as tool

TOOL = "measure_gpu.py"


class Stand:
    """A stand-in for all that is measured, on a clock of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = folder, 0.0
        self.measured: list[str] = []
        self.broken: tuple[str, ...] = ()
        self.minutes: dict[str, float] = {}
        monkeypatch.setattr(tool, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(tool, "check", lambda *_: self.measure("check", works=True))
        monkeypatch.setattr(tool, "compare", self.compare)
        monkeypatch.setattr(tool, "train", lambda *args: self.measure(f"train {args[-1]}"))
        monkeypatch.setattr(tool, "find_tests", lambda: ["tests/test_a.py"])
        monkeypatch.setattr(tool, "run_tests", self.measure)

    def compare(self, case: Case, settings: Settings) -> tuple[str, dict[str, Any]]:
        kind = "detectors" if case.detection else "classifiers"
        amp, form, sizes = settings.amp or "float32", settings.memory_format, case.sizes
        rows = [
            {"model": name, "step": step, "times": [0.003, 0.001, 0.002], "versus_resnet50": versus}
            for step, versus in (("inference", None), ("training", {"median": 0.5}))
            for name in settings.models
        ]
        name = f"{kind} {case.batch} {amp} {form} {sizes} {len(settings.models)}"
        return self.measure(name, rows=rows)

    def measure(self, name: str, **numbers: Any) -> tuple[str, dict[str, Any]]:
        self.measured.append(name)
        self.now += 60 * self.minutes.get(name.split()[0], 1)
        if name.split()[0] in self.broken:
            raise RuntimeError("CUDA error:\nan illegal access")
        return f"| {name} |", {"name": name, **numbers}

    def __call__(self, *options: str) -> list[str]:
        """What a command measured."""
        self.measured = []
        tool.main(["--device", "cpu", "--output", str(self.folder), *options])
        return self.measured

    @property
    def text(self) -> str:
        return (self.folder / "gpu.md").read_text()

    @property
    def parts(self) -> dict[str, Any]:
        return json.loads((self.folder / "gpu.json").read_text())["parts"]


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(tmp_path, monkeypatch)


def test_a_part_that_fails_leaves_the_others(
    stand: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: an hour of measurements is lost or measured twice, a failure is not said or not tried
    again, or the exit status is 0."""
    stand.broken = ("detectors",)
    with pytest.raises(SystemExit) as e:
        stand()
    assert "measure_gpu.py: error: these failed: Detectors, 2 images, mixed" in str(e.value)
    assert "FAILED: RuntimeError: CUDA error: an illegal access" in stand.text
    assert all(f"| classifiers {batch} " in stand.text for batch in (32, 128, 256))
    assert stand.parts["A training, FUSED off"]["numbers"] == {"name": "train off"}
    assert len(stand.parts) == len(tool.comparisons("cpu", quick=False)) + 4

    stand.broken = ()
    assert [name.split()[0] for name in stand()] == ["detectors"] * 3
    assert "Measured before, and kept: Classifiers, batch 128" in capsys.readouterr().err
    assert "FAILED" not in stand.text
    assert stand() == []


def test_a_command_for_some_minutes_and_the_next(
    stand: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a part is begun that would end too late, none is begun, or one is left out; or gpu.md
    has not all, or not in order."""
    first = "classifiers 128 bfloat16 channels_last 1 6"
    stand.minutes, stand.broken = {"classifiers": 4}, ("classifiers",)
    with pytest.raises(SystemExit, match="128, .*; the same command tries them again"):
        stand("--minutes", "8")
    # The next could take four minutes, as the first did.
    assert stand.measured == [first, "detectors 2 bfloat16 channels_last 1 6"]
    said = capsys.readouterr().err
    assert "remain, and the same command goes on with them: Detectors, 2 images of 8" in said

    # Longer than the minutes, but the first.
    stand.minutes = {"detectors": 9}
    with pytest.raises(SystemExit):
        stand("--minutes", "8")
    assert stand.measured == ["detectors 2 bfloat16 channels_last 8 6"]
    stand.minutes, stand.broken = {}, ()
    rest = stand()
    assert rest[-2:] == ["tests/test_a.py", first], "what failed comes after what was never begun"
    assert len(rest) == len(tool.comparisons("cpu", quick=False)) - 2 + 4
    titles = [line[3:] for line in stand.text.splitlines() if line.startswith("## ")]
    assert titles == list(stand.parts) == list(tool.parts("cpu", False, stand.folder))


def test_one_table_has_all_times(stand: Stand) -> None:
    """Wrong: who wants GPUs' times in a document has to write their table; or a model's times are
    in another's column."""
    assert not overview({"The check": {"works": True}}), "a table without rows"
    stand()
    table = stand.text.split("\n\n")[0].splitlines()
    cells = {tuple(line.split("|")[1:3]): line.split("|")[3:-1] for line in table}
    rows = {tuple(map(str.strip, key)): [*map(str.strip, own)] for key, own in cells.items()}
    assert len(rows) == 2 + 2 * len(tool.comparisons("cpu", quick=False))
    names = rows["ms of a step (× ResNet-50)", "step"]
    for title, (_, settings) in tool.comparisons("cpu", quick=False).items():
        for step, shown in (("inference", "2.0"), ("training", "2.0 (0.50)")):
            own = zip(names, rows[title, step], strict=True)
            compared = {MODELS[name] for name in settings.models}
            assert all(cell == (shown if name in compared else "") for name, cell in own)


def test_a_part_that_is_cut_off_is_on_record(stand: Stand) -> None:
    """Wrong: a part that never ends within the time that there is stops all others for good."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tool, "compare", interrupt)
        stand()
    assert "begun, and did not end" in stand.text and len(stand.parts) == 1
    assert stand()[-1].startswith("classifiers 128") and "did not end" not in stand.text


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"code": "abc"}, r"made with another code \(abc; now \w+\): .* with --overwrite"),
        ({"triton": "0.1"}, r"another triton \(0.1; now"),
        ({"device": "NVIDIA H100"}, r"another device \(NVIDIA H100; now"),
        ({"quick": True}, r"another quick \(True; now False\)"),
        ("[]", r"gpu.json is damaged, or of another tool: name another --output"),
        ('{"The check": {}}', r"gpu.json is damaged, or of another tool"),
    ],
)
def test_what_another_machine_or_code_measured_is_not_gone_on_with(
    stand: Stand, content: str | dict[str, Any], error: str
) -> None:
    """Wrong: one table mixes two machines, or says nothing of which it is."""
    path = stand.folder / "gpu.json"
    if isinstance(content, dict):
        made_with = tool.describe("cpu", False) | content
        content = json.dumps({"made with": made_with, "parts": {}})
    path.write_text(content)
    with pytest.raises(SystemExit, match=error):
        stand()
    assert path.read_text() == content and stand.measured == []
    assert len(stand("--overwrite")) == len(stand.parts)


@pytest.mark.slow
def test_the_tests_are_found_and_run_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a file of tests that fail, or can't be imported, is left out or passes."""
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.find_tests() == []
    assert "tests are left out: they need a checkout" in capsys.readouterr().err
    (tmp_path / "tests").mkdir()
    (tmp_path / "setup.py").touch()
    for name, content in {
        "fails": "def test_cuda():\n    assert 1 == 2\ndef test_other():\n    pass",
        "lost": "import none_such",
        "other": "def test_other():\n    pass",
        "passes": "def test_on_cuda():\n    pass\ndef test_other():\n    assert 1 == 2",
    }.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(content)
    files = [f"tests/test_{name}.py" for name in ("fails", "lost", "passes")]
    assert sorted(tool.find_tests()) == files
    fails, lost, passes = map(tool.run_tests, files)
    assert passes[0].startswith("1 passed in") and "error" not in passes[1]
    assert "FAILED tests/test_fails.py::test_cuda" in fails[0] and "1 failed" in fails[1]["error"]
    assert "none_such" in lost[1]["log"] and "1 error" in lost[1]["error"]


def test_tests_that_need_a_gpu_are_found() -> None:
    """Wrong: nobody runs a test that only a GPU can run."""
    needing = r'reason="needs (?:a|two) GPUs?"\)\n(?:@.*\n)*def (\w+)'
    found = [
        (path.name, name)
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(needing, path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 3 and all("cuda" in file + name for file, name in found)


def test_cifar10_is_trained_on_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a GPU's figures are of drawn images alone, or a machine without CIFAR-10 has none."""
    commands: list[list[str]] = []

    def ran(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tool.subprocess, "run", ran)
    metrics = {1: {tool.TOP1: 50.0, "time": 0.1}}
    monkeypatch.setattr(tool.RunFolder, "metrics", lambda self: metrics)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    texts = [tool.train("cuda", False, tmp_path, "on")[0]]
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    texts.append(tool.train("cuda", False, tmp_path, "on")[0])
    configs = ["shapes/randwire_pretrain.yaml", "cifar10/randwire_c53_10ep.yaml"]
    for text, command, config in zip(texts, commands, configs, strict=True):
        assert text.startswith(f"{config}: top-1 50.0%") and config in " ".join(command)


def test_a_process_of_tests_that_dies_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: what crashes a GPU's process counts as passed."""
    died = subprocess.CompletedProcess([], -11, "")
    monkeypatch.setattr(tool, "pytest", lambda *_: died)
    text, numbers = tool.run_tests("tests/test_a.py")
    assert "exit status -11" in text and numbers["error"] == "nothing was printed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(tmp_path: Path) -> None:
    assert "no GPU that PyTorch can use" in refusal(TOOL, log=tmp_path / "log")
