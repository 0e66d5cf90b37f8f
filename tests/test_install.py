"""tools/install.py: what it would install, from where, and what it says. No network, no pip."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
WHEEL_METADATA = """Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Requires-Dist: yacs>=0.1.8
Requires-Dist: numpy<2
Requires-Dist: omegaconf<2.4,>=2.1
Requires-Dist: timm; extra == "all"
"""
WHEEL_RECORD = """detectron2/__init__.py,,
detectron2/_C.cpython-310-x86_64-linux-gnu.so,,
sal_detectron2-0.7.2.dist-info/METADATA,,
tools/train_net.py,,
"""


def load_installer() -> ModuleType:
    """Runs tools/install.py as a module; `tools` itself is never imported by name."""
    spec = importlib.util.spec_from_file_location("randwire_d2_install", ROOT / "tools/install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeRun:
    """Stands for `run`: notes each command, fails on those it is told to, unpacks a tiny wheel."""

    def __init__(self, **failures: str) -> None:
        """Takes, by the kind of a command (see `kind`), the output with which it fails."""
        self.failures = failures
        self.commands: list[list[str]] = []
        self.constraints: list[list[str]] = []

    @staticmethod
    def kind(command: list[str]) -> str:
        text = " ".join(command)
        if "pip" not in command:
            if "torchvision" in text:
                return "use_torchvision"
            return "ask_github" if "urlopen" in text else "import_detectron2"
        if "uninstall" in command:
            return "uninstall"
        if "--target" in command:
            return "wheel"
        return "upstream" if "github.com" in text else "install"

    @property
    def kinds(self) -> list[str]:
        return [self.kind(command) for command in self.commands]

    def __call__(self, command: list[str], echo: bool = True) -> str:
        self.commands.append(command)
        kind = self.kind(command)
        if kind in self.failures:
            raise subprocess.CalledProcessError(1, command, self.failures[kind])
        if "-c" in command and kind in ("install", "upstream"):
            self.constraints.append(Path(command[command.index("-c") + 1]).read_text().split("\n"))
        if kind == "wheel":
            self.unpack(Path(command[command.index("--target") + 1]))
        return ""

    @staticmethod
    def unpack(target: Path) -> None:
        files = {
            "detectron2/__init__.py": "",
            "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "",
            "sal_detectron2-0.7.2.dist-info/METADATA": WHEEL_METADATA,
            "sal_detectron2-0.7.2.dist-info/RECORD": WHEEL_RECORD,
            "tools/train_net.py": "",
        }
        for name, text in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)


@pytest.fixture
def installer() -> ModuleType:
    return load_installer()


@pytest.fixture
def pretend_installed(installer, monkeypatch):
    """Returns a function that sets which distributions seem to be installed."""

    def pretend(**versions: str) -> None:
        monkeypatch.setattr(installer, "version_of", versions.get)

    pretend()
    return pretend


# --- PyTorch: a user's own build is never replaced ------------------------------------------------


def test_torch_that_is_there_is_not_installed_again(installer, pretend_installed):
    pretend_installed(torch="2.5.1+cu121", torchvision="0.20.1+cu121")
    run = FakeRun()
    assert "Kept torch 2.5.1+cu121" in installer.install_torch(run)
    assert run.kinds == ["use_torchvision"]


def test_only_what_is_missing_is_installed_to_fit_the_torch_that_is_there(
    installer, pretend_installed
):
    pretend_installed(torch="2.5.1+cu121")
    run = FakeRun()
    installer.install_torch(run)
    assert run.kinds == ["install", "use_torchvision"]
    assert run.commands[0][-1] == "torchvision" and "torch" not in run.commands[0]
    assert "torch==2.5.1+cu121" in run.constraints[0]


def test_torch_is_not_pinned_where_it_is_missing(installer, pretend_installed):
    run = FakeRun()
    installer.install_torch(run)
    assert run.commands[0][-2:] == ["torch", "torchvision"]
    assert not any(line.startswith("torch") for line in run.constraints[0])


def test_torchvision_of_another_torch_is_named(installer, pretend_installed):
    """Otherwise Detectron2 would be found broken, and replaced, for a fault that is not its own."""
    pretend_installed(torch="2.13.0+cpu", torchvision="0.28.0")
    run = FakeRun(use_torchvision="RuntimeError: operator torchvision::nms does not exist")
    with pytest.raises(SystemExit, match=r"torch 2\.13\.0\+cpu .*not work together .*::nms"):
        installer.install_torch(run)


def test_every_installation_keeps_torch_and_pkg_resources(installer, pretend_installed, tmp_path):
    """A later pip call could otherwise replace torch, or bring setuptools without pkg_resources."""
    pretend_installed(torch="2.5.1+cpu", torchvision="0.20.1+cpu")
    run = FakeRun(import_detectron2="absent")
    installer.install_package(["test"], run)
    installer.install_detectron2(tmp_path, run)
    offline = FakeRun(import_detectron2="absent", ask_github="no route")
    installer.install_detectron2(tmp_path, offline)
    assert len(run.constraints) == 2 and len(offline.constraints) == 1
    for lines in run.constraints + offline.constraints:
        assert {"setuptools<81", "torch==2.5.1+cpu", "torchvision==0.20.1+cpu"} <= set(lines)
    wheel = next(command for command in offline.commands if offline.kind(command) == "wheel")
    assert "--no-deps" in wheel  # the one pip call without constraints can't touch torch either


# --- OpenCV: another build is not overwritten -----------------------------------------------------


@pytest.mark.parametrize("present", [True, False])
def test_opencv_is_asked_for_only_where_it_is_missing(installer, monkeypatch, present):
    monkeypatch.setattr(installer.util, "find_spec", lambda name: object() if present else None)
    run = FakeRun()
    installer.install_package(["test"], run)
    expected = "[test]" if present else "[test,opencv]"
    assert run.commands[0][-2:] == ["-e", f"{ROOT}{expected}"]


# --- Detectron2: which source, and what is said ---------------------------------------------------


def test_detectron2_that_works_is_kept(installer, pretend_installed, tmp_path):
    run = FakeRun()
    assert "Kept" in installer.install_detectron2(tmp_path, run)
    assert run.kinds == ["import_detectron2"]


def test_upstream_is_built_when_github_answers(installer, pretend_installed, tmp_path):
    run = FakeRun(import_detectron2="absent")
    said = installer.install_detectron2(tmp_path, run)
    assert run.kinds == ["import_detectron2", "ask_github", "upstream"]
    assert "--no-build-isolation" in run.commands[-1]
    assert run.commands[-1][-1].endswith("02b5c4e295e990042a714712c21dc79b731e8833.zip")
    assert "upstream's commit 02b5c4e2" in said and "GitHub can be reached" in said


def test_wheel_is_taken_when_github_does_not_answer(installer, pretend_installed, tmp_path):
    run = FakeRun(import_detectron2="absent", ask_github="Traceback\ntimed out")
    said = installer.install_detectron2(tmp_path, run)
    assert run.kinds == ["import_detectron2", "ask_github", "wheel", "install"]
    assert "--require-hashes" in run.commands[2]
    assert "republished wheel" in said and "GitHub can't be reached (timed out)" in said


def test_wheel_is_taken_when_upstream_does_not_build(installer, pretend_installed, tmp_path):
    run = FakeRun(import_detectron2="absent", upstream="error: g++ not found")
    said = installer.install_detectron2(tmp_path, run)
    assert run.kinds[-3:] == ["upstream", "wheel", "install"]
    assert "republished wheel" in said and "failed" in said and "can't be reached" not in said


def test_broken_detectron2_is_removed_first(installer, pretend_installed, tmp_path):
    """pip leaves an installed package of the same version as it is, broken or not."""
    pretend_installed(detectron2="0.6")
    run = FakeRun(import_detectron2="ImportError: _C")
    installer.install_detectron2(tmp_path, run)
    assert run.kinds == ["import_detectron2", "uninstall", "ask_github", "upstream"]
    assert run.commands[1][-2:] == ["-y", "detectron2"]


def test_wheel_brings_its_requirements_and_nothing_else(installer, pretend_installed, tmp_path):
    """No `tools`, which would shadow others', no `_C` of another Python, no numpy below 2."""
    (tmp_path / "tools").mkdir()  # another package's
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/left_over.py").touch()
    run = FakeRun()
    installer.install_wheel(tmp_path, run)
    assert run.commands[1][-2:] == ["yacs>=0.1.8", "omegaconf<2.4,>=2.1"]
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    info = "sal_detectron2-0.7.2.dist-info"
    assert files == ["detectron2/__init__.py", f"{info}/METADATA", f"{info}/RECORD"]
    assert "numpy" not in (tmp_path / info / "METADATA").read_text()
    record = (tmp_path / info / "RECORD").read_text()
    assert "tools/" not in record and "_C" not in record and "detectron2/__init__.py" in record
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detectron2", info, "tools"]


@pytest.mark.parametrize("failing", ["wheel", "install"])
def test_wheel_that_fails_leaves_nothing_behind(installer, pretend_installed, tmp_path, failing):
    with pytest.raises(subprocess.CalledProcessError):
        installer.install_wheel(tmp_path, FakeRun(**{failing: "no such version"}))
    assert list(tmp_path.iterdir()) == []


# --- The script itself ----------------------------------------------------------------------------


def test_old_python_is_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer; .* is 3\.9\.18$"):
        load_installer()


def test_silence_is_broken(installer, capsys):
    """pip can be silent for a minute; a person would think that it hangs."""
    code = "import time; print('a', flush=True); time.sleep(1); print('b')"
    assert installer.run([sys.executable, "-c", code], quiet=0.1) == "a\nb\n"
    lines = capsys.readouterr().out.splitlines()
    assert "a" in lines and lines[-1] == "b"
    assert sum("still at it after" in line for line in lines) >= 3


def test_failed_command_keeps_its_output(installer, capsys):
    code = "import sys; print('why'); sys.exit(3)"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        installer.run([sys.executable, "-c", code])
    assert (caught.value.returncode, caught.value.output) == (3, "why\n")
    assert "why" in capsys.readouterr().out


def test_problem_is_the_last_line_of_the_error(installer):
    assert installer.problem_with("pass") == ""
    assert installer.problem_with("raise ImportError('no _C')") == "ImportError: no _C"


def test_failed_step_is_named(installer, monkeypatch, capsys):
    def fail() -> str:
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(installer, "install_torch", fail)
    with pytest.raises(SystemExit, match="Step 1, PyTorch and torchvision, failed"):
        installer.main([])
    assert "[1/4] PyTorch and torchvision" in capsys.readouterr().out


# --- setup.py and the package ---------------------------------------------------------------------


def test_setup_bounds_torch_from_below_only():
    """A pin or an upper bound would replace a user's own build, or refuse it."""
    code = (
        "import setuptools\n"  # it brings distutils to Pythons that have none
        "from distutils.core import run_setup\n"
        "print(*run_setup('setup.py', stop_after='init').install_requires, sep='\\n')"
    )
    requirements = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    torch = [r for r in requirements if r.startswith("torch")]
    assert len(torch) == 2
    assert all(">=" in r and not set("<=!~").intersection(r.replace(">=", "")) for r in torch)
    assert not any("detectron2" in r for r in requirements)


@pytest.mark.parametrize("case", ["absent", "broken"])
def test_package_without_detectron2_names_the_installer(tmp_path, case):
    """A user who forgot it should not have to read a traceback through Detectron2."""
    code = "import randwire_d2"
    if case == "absent":
        code = f"import sys; sys.modules['detectron2'] = None; {code}"
    else:
        (tmp_path / "detectron2").mkdir()
        (tmp_path / "detectron2/__init__.py").write_text("raise OSError('undefined symbol')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "ImportError" in result.stderr and "python tools/install.py" in result.stderr, last
