"""tools/check_matrix.py: which environments, what it runs in them, and what it says. No pip."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/check_matrix.py as a module; ``tools`` itself is never imported by name."""
    path = ROOT / "tools/check_matrix.py"
    spec = importlib.util.spec_from_file_location("randwire_d2_matrix", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_the_lowest_environment_has_every_lower_bound(matrix: ModuleType) -> None:
    """Wrong: a bound that no environment tries."""
    bounds = re.findall(r'"([\w-]+)[>~]=([\w.]+)[",]', (ROOT / "setup.py").read_text())
    assert len(bounds) > 20
    assert {f"{name}=={version}" for name, version in bounds if name != "setuptools"} == set(
        matrix.environments()["lowest"].packages
    )


@pytest.fixture
def made(matrix: ModuleType, tmp_path: Path) -> Path:
    """An environment that is there already: this one's Python."""
    folder = tmp_path / "python3.11"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (folder / "complete").touch()
    return folder


def test_failures_are_named_and_counted(
    matrix: ModuleType, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Wrong: an environment passes in which a test fails, or one that can't be had is left out."""
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_absent(): pytest.skip('no GPU')\n"
    )
    monkeypatch.setattr(matrix, "TESTS", ["-q", "-p", "no:cacheprovider", str(tests)])
    with pytest.raises(SystemExit) as ended:
        matrix.main(["python3.11", "upstream", "--folder", str(tmp_path)])
    assert ended.value.code == 1
    first, second = json.loads((tmp_path / "matrix.json").read_text())
    assert first["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert [name.split("::")[1] for name in first["failed"]] == ["test_bad"]
    assert first["versions"]["torch"]
    assert "--detectron2" in second["problem"]
    lines = (tmp_path / "matrix.md").read_text().splitlines()
    assert "1 passed, 1 failed, 1 skipped; " in lines[2] and "not run: no source" in lines[3]
    assert capsys.readouterr().out.splitlines() == lines[2:]


def test_a_python_that_is_not_there(matrix: ModuleType, tmp_path: Path) -> None:
    """Wrong: a traceback, or a folder that looks like an environment."""
    outcome = matrix.check("old", matrix.Environment("2.1"), tmp_path / "old")
    assert outcome.problem == "no python2.1 on the PATH"
    assert not list(tmp_path.iterdir())
