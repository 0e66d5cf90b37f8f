"""tools/install.py: what it would install, from where, and what it says. No network, no pip."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType

import pytest
from helpers import ROOT

WHEEL = {
    "detectron2/__init__.py": "",
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "",
    "detectron2/evaluation/sem_seg_evaluation.py": "        array = np.array(Image.open(f), "
    "copy=copy, dtype=dtype)\n",
    "tools/train_net.py": "",
    "sal_detectron2-0.7.2.dist-info/METADATA": "Metadata-Version: 2.1\n"
    "Name: sal-detectron2\nVersion: 0.7.2\nRequires-Dist: yacs>=0.1.8\nRequires-Dist: numpy<2\n"
    'Requires-Dist: omegaconf<2.4,>=2.1\nRequires-Dist: timm; extra == "all"\n',
    "sal_detectron2-0.7.2.dist-info/RECORD": "detectron2/__init__.py,,\n"
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so,,\ntools/train_net.py,,\n"
    "sal_detectron2-0.7.2.dist-info/METADATA,,\n",
}


def load_installer() -> ModuleType:
    """Runs tools/install.py as a module; `tools` itself is never imported by name."""
    spec = importlib.util.spec_from_file_location("randwire_d2_install", ROOT / "tools/install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Commands(list[str]):
    """Stands for install.py's ``run``: notes the commands, which do nothing.

    Those that contain a key of ``failures`` fail, with its value as their output.
    """

    def __init__(self, failures: Mapping[str, str] = MappingProxyType({})) -> None:
        self.failures = failures

    def __call__(self, command: list[str], echo: bool = True) -> str:
        self.append(" ".join(command[1:]))
        for part, output in self.failures.items():
            if part in self[-1]:
                raise subprocess.CalledProcessError(1, command, output)
        if "--target" in command:
            folder = Path(command[command.index("--target") + 1])
            for name, text in WHEEL.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        return ""


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


@pytest.mark.parametrize(
    ("versions", "installed"),
    [
        ({"torch": "2.5.1+cu121", "torchvision": "0.20.1+cu121"}, None),
        ({"torch": "2.5.1+cu121"}, "torchvision"),
        ({}, "torch torchvision"),
    ],
)
def test_torch_is_installed_only_where_it_is_missing(
    installer, pretend_installed, versions, installed
):
    """Wrong: a user's own build is replaced, or a torchvision comes that does not fit it."""
    pretend_installed(**versions)
    run = Commands()
    said = installer.install_torch(run)
    assert said.startswith("Installed" if installed else "Kept torch 2.5.1+cu121")
    pip, *checks = run if installed else ["", *run]
    assert not installed or re.fullmatch(rf"-m pip install -c \S+ {installed}", pip)
    assert len(checks) == 1 and "torchvision.ops.nms" in checks[0]
    kept = {f"{name}=={version}" for name, version in versions.items()}
    assert set(installer.constraints()) == {"setuptools<81"} | kept


def test_torchvision_of_another_torch_is_named(installer, pretend_installed):
    """Wrong: Detectron2 is found broken, and replaced, for a fault that is not its own."""
    pretend_installed(torch="2.13.0+cpu", torchvision="0.28.0")
    run = Commands({"nms": "RuntimeError: operator torchvision::nms does not exist"})
    with pytest.raises(SystemExit, match=r"torch 2\.13\.0\+cpu .*not work together .*::nms"):
        installer.install_torch(run)


def test_no_installation_can_replace_torch(installer, pretend_installed, tmp_path):
    """Wrong: a later pip call replaces torch, or brings setuptools without pkg_resources."""
    run = Commands({"import detectron2": "absent"})
    installer.install_package(["test"], run)
    installer.install_detectron2(tmp_path, run)
    installer.install_wheel(tmp_path, run)
    pip = [command for command in run if "pip install" in command]
    assert len(pip) == 4
    assert all(" -c " in command or " --no-deps " in command for command in pip)


# --- OpenCV: another build is not overwritten -----------------------------------------------------


@pytest.mark.parametrize("present", [True, False])
def test_opencv_is_asked_for_only_where_it_is_missing(installer, monkeypatch, present):
    """Wrong: pip writes one build of OpenCV over another, or Detectron2 lacks it."""
    monkeypatch.setattr(installer.util, "find_spec", lambda name: object() if present else None)
    run = Commands()
    installer.install_package(["test"], run)
    expected = "[test]" if present else "[test,opencv]"
    assert run[0].endswith(f" -e {ROOT}{expected}")


# --- Detectron2: which source, and what is said ---------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "source", "says"),
    [
        ({}, None, "Kept"),
        ({"import detectron2": "absent"}, "upstream", "GitHub can be reached"),
        (
            {"import detectron2": "absent", "urlopen": "Traceback\ntimed out"},
            "wheel",
            "GitHub can't be reached (timed out)",
        ),
        ({"import detectron2": "absent", "-isolation": "no g++"}, "wheel", "02b5c4e2 failed"),
    ],
    ids=["it works", "GitHub answers", "GitHub does not answer", "upstream does not build"],
)
def test_the_source_of_detectron2(installer, tmp_path, failures, source, says):
    """Wrong: a Detectron2 that works is replaced, or none is installed where GitHub can't be
    reached or nothing can be compiled; or a user is told another source."""
    run = Commands(failures)
    said = installer.install_detectron2(tmp_path, run)
    assert says in said
    pip = [command for command in run if "pip install" in command]
    if source is None:
        assert not pip
    elif source == "upstream":
        assert len(pip) == 1 and "--no-build-isolation" in pip[0]
        assert pip[0].endswith("02b5c4e295e990042a714712c21dc79b731e8833.zip")
        assert "upstream's commit 02b5c4e2" in said
    else:
        assert "--require-hashes" in pip[-2] and "republished wheel" in said
        assert (tmp_path / "detectron2" / "__init__.py").exists()


def test_broken_detectron2_is_removed_first(installer, pretend_installed, tmp_path):
    """Wrong: pip leaves an installed package of the same version as it is, broken or not."""
    pretend_installed(detectron2="0.6")
    run = Commands({"import detectron2": "ImportError: _C"})
    installer.install_detectron2(tmp_path, run)
    assert run[1] == "-m pip uninstall -y detectron2"


def test_wheel_brings_its_requirements_and_nothing_else(installer, tmp_path):
    """Wrong: a `tools` that shadows others', a `_C` of another Python, or a numpy below 2, which
    the evaluation of stuff would need."""
    (tmp_path / "tools").mkdir()  # another package's
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/left_over.py").touch()
    run = Commands()
    installer.install_wheel(tmp_path, run)
    assert run[1].endswith(" yacs>=0.1.8 omegaconf<2.4,>=2.1")
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    info = "sal_detectron2-0.7.2.dist-info"
    stuff = "detectron2/evaluation/sem_seg_evaluation.py"
    assert files == ["detectron2/__init__.py", stuff, f"{info}/METADATA", f"{info}/RECORD"]
    assert "np.asarray(Image.open(f), dtype=dtype)" in (tmp_path / stuff).read_text()
    assert "numpy" not in (tmp_path / info / "METADATA").read_text()
    record = (tmp_path / info / "RECORD").read_text()
    assert "tools/" not in record and "_C" not in record and "detectron2/__init__.py" in record
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detectron2", info, "tools"]


@pytest.mark.parametrize("failing", ["--target", "yacs"])
def test_wheel_that_fails_leaves_nothing_behind(installer, tmp_path, failing):
    """Wrong: half a Detectron2 that can be imported."""
    run = Commands({failing: "no such version"})
    with pytest.raises(subprocess.CalledProcessError):
        installer.install_wheel(tmp_path, run)
    assert list(tmp_path.iterdir()) == []


# --- The script itself ----------------------------------------------------------------------------


def test_old_python_is_told(monkeypatch):
    """Wrong: an old Python ends in a SyntaxError."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer; .* is 3\.9\.18$"):
        load_installer()


def test_silence_is_broken(installer, monkeypatch, tmp_path):
    """Wrong: pip is silent for a minute, and a person thinks that it hangs."""
    code = (
        "import os, time\nprint('a', flush=True)\n"
        f"while not os.listdir({str(tmp_path)!r}):\n    time.sleep(0.02)\nprint('b')"
    )
    lines = []

    def say(line, **_):
        lines.append(line.strip())
        if "still at it after" in line and "a" in lines:
            (tmp_path / "goes on").touch()

    monkeypatch.setattr(installer, "print", say, raising=False)
    assert installer.run([sys.executable, "-c", code], quiet=0.1) == "a\nb\n"
    assert [line for line in lines if "still at it" not in line] == ["a", "b"]


def test_failed_command_keeps_its_output(installer, capsys):
    """Wrong: nobody sees why pip failed."""
    code = "import sys; print('why'); sys.exit(3)"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        installer.run([sys.executable, "-c", code])
    assert (caught.value.returncode, caught.value.output) == (3, "why\n")
    assert "why" in capsys.readouterr().out


def test_problem_is_the_last_line_of_the_error(installer):
    """Wrong: a traceback, or nothing, is given as the reason."""
    assert installer.problem_with("pass") == ""
    assert installer.problem_with("raise ImportError('no _C')") == "ImportError: no _C"


def test_failed_step_is_named(installer, monkeypatch, capsys):
    """Wrong: a failure does not say which step it was, and what to do."""

    def fail() -> str:
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(installer, "install_torch", fail)
    with pytest.raises(SystemExit, match="Step 1, PyTorch and torchvision, failed"):
        installer.main([])
    assert "[1/4] PyTorch and torchvision" in capsys.readouterr().out


# --- setup.py and the package ---------------------------------------------------------------------


def test_setup_bounds_torch_from_below_only():
    """Wrong: a pin or an upper bound replaces a user's own build, or refuses it."""
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
    """Wrong: a user who forgot it reads a traceback through Detectron2."""
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
