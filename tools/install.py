"""Install randwire_d2 and all it needs into the environment of the Python that runs this script.

    python tools/install.py [--extras test]

It installs PyTorch and torchvision only if they are missing; it never replaces a build that is
already there. It builds Detectron2 from GitHub or, if GitHub can't be reached, installs a
republished wheel. Running it again installs what is missing, and leaves the rest alone.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (an older Python that runs this must be told)
    sys.exit(
        f"randwire_d2 needs Python 3.10 or newer; {sys.executable} is "
        + ".".join(str(number) for number in sys.version_info[:3])
    )

import argparse
import os
import queue
import shutil
import site
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent

# GitHub's archive of a commit is pinned as well as a clone is, and needs no git.
UPSTREAM_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
UPSTREAM_URL = f"https://github.com/facebookresearch/detectron2/archive/{UPSTREAM_COMMIT}.zip"

# Upstream's commit 181aae36 (April 2024) with six small differences, compared file by file.
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"

SETUPTOOLS = "setuptools<81"  # the last with pkg_resources, which Detectron2's model_zoo imports

# An OSError of urlopen is a host not found, a refusal, a time-out or an HTTP error.
ASK_GITHUB = f"""
import sys, urllib.request
request = urllib.request.Request({UPSTREAM_URL!r}, method="HEAD")
try:
    urllib.request.urlopen(request, timeout=5)
except OSError as error:
    sys.exit(str(error))
"""
# The operators of a torchvision that was built for another torch are missing.
USE_TORCHVISION = """
import torch, torchvision
torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
"""
# `import detectron2` alone reads one line; these bring in its requirements.
IMPORT_DETECTRON2 = "import detectron2.engine, detectron2.modeling, detectron2.model_zoo"
PRINT_VERSIONS = f"""
from importlib import import_module, metadata
{IMPORT_DETECTRON2}
for name in ("torch", "torchvision", "detectron2", "pycocotools"):
    version = getattr(import_module(name), "__version__", None) or metadata.version(name)
    print("     ", name, version)
"""

Run = Callable[..., str]  # the signature of `run`; tests pass their own


def run(command: Sequence[str], echo: bool = True, quiet: float = 10.0) -> str:
    """Runs a command in the repository's root and returns what it printed.

    pip is silent while it unpacks gigabytes, so after every `quiet` seconds without a line from
    the command, one line says that it is still at work.

    Args:
        echo: pass the command's lines on as they come.

    Raises:
        subprocess.CalledProcessError: it exits with another status than 0; `output` has its lines.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    output = []
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:

        def read() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=quiet)
            except queue.Empty:
                print(f"      ... still at it after {time.monotonic() - start:.0f} s", flush=True)
                continue
            if line is None:
                break
            output.append(line)
            if echo:
                print(line, end="", flush=True)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, "".join(output))
    return "".join(output)


def problem_with(code: str, run: Run = run) -> str:
    """Runs Python code in a fresh interpreter; returns "", or the last line of its error."""
    try:
        run([sys.executable, "-c", code], echo=False)
    except subprocess.CalledProcessError as error:
        return (error.output.strip().splitlines() or [str(error)])[-1]
    return ""


def version_of(distribution: str) -> str | None:
    """Returns the installed version of a distribution, None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def constraints() -> list[str]:
    """Returns pip constraints that keep the installed torch and torchvision as they are.

    The version is whole, with its local part (`2.5.1+cu121`), so that pip can't put another
    build of the same release in its place.
    """
    versions = {name: version_of(name) for name in ("torch", "torchvision")}
    return [SETUPTOOLS] + [f"{name}=={version}" for name, version in versions.items() if version]


def pip_install(*args: str, run: Run = run) -> None:
    """Runs `pip install` under `constraints()`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "constraints.txt")
        file.write_text("\n".join(constraints()) + "\n")
        run([sys.executable, "-m", "pip", "install", "-c", str(file), *args])


def install_torch(run: Run = run) -> str:
    """Installs torch and torchvision where they are missing; returns what was done.

    Raises:
        SystemExit: the two do not work together, as where torchvision comes for CUDA only and the
            user's torch is for CPUs. Which to replace is for the user to say.
    """
    missing = [name for name in ("torch", "torchvision") if version_of(name) is None]
    if missing:
        pip_install(*missing, run=run)
    versions = f"torch {version_of('torch')} and torchvision {version_of('torchvision')}"
    problem = problem_with(USE_TORCHVISION, run)
    if problem:
        sys.exit(
            f"{versions} do not work together ({problem}). Run `pip uninstall torchvision`, "
            "install the one that was built for this torch, from where torch came, and run this "
            "again."
        )
    return f"Installed {' and '.join(missing)}: {versions}." if missing else f"Kept {versions}."


def install_package(extras: Sequence[str], run: Run = run) -> str:
    """Installs this package, editable, and its requirements; returns what was done."""
    extras = list(extras)
    if util.find_spec("cv2") is None:  # another build of OpenCV than the one of the extra will do
        extras.append("opencv")
    package = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    # wheel: older versions of pip need it to build without isolation, as Detectron2 must be.
    pip_install(SETUPTOOLS, "wheel", "-e", package, run=run)
    return "Installed randwire_d2 and its requirements."


def site_packages() -> Path:
    """Returns the folder that pip would install into: the user's own if ours is read-only."""
    folder = Path(sysconfig.get_path("purelib"))
    return folder if os.access(folder, os.W_OK) else Path(site.getusersitepackages())


def trim_wheel(folder: Path, dist_info: Path) -> None:
    """Removes what the wheel unpacked into `folder` should not bring into an environment.

    That is a top-level package `tools`, which would shadow other people's; the extension module
    `_C`, compiled for one version of Python and an old torch; and the need of numpy below 2, which
    only one line has: it is made upstream's. Without `_C` only rotated boxes and deformable
    convolutions are lost, and COCO evaluation uses pycocotools.
    """
    shutil.rmtree(folder / "tools")
    for extension in (folder / "detectron2").glob("_C.*"):
        extension.unlink()

    stuff = folder / "detectron2" / "evaluation" / "sem_seg_evaluation.py"
    needs_old = "np.array(Image.open(f), copy=copy, dtype=dtype)"
    stuff.write_text(stuff.read_text().replace(needs_old, "np.asarray(Image.open(f), dtype=dtype)"))

    def filter_lines(name: str, unwanted: tuple[str, ...]) -> None:
        lines = (dist_info / name).read_text().splitlines(keepends=True)
        (dist_info / name).write_text("".join(s for s in lines if not s.startswith(unwanted)))

    # Or `pip uninstall` would later remove another package's `tools`.
    filter_lines("RECORD", ("tools/", "detectron2/_C."))
    filter_lines("METADATA", ("Requires-Dist: numpy<2",))


def runtime_requirements(dist_info: Path) -> list[str]:
    """Returns the requirements in a distribution's metadata, less those of optional extras."""
    return [r for r in metadata.Distribution.at(dist_info).requires or [] if "extra ==" not in r]


def install_wheel(destination: Path, run: Run = run) -> None:
    """Installs the republished wheel of Detectron2 into `destination`, its requirements beside it.

    It is unpacked beside its destination and moved there last, so that Detectron2 can be imported
    when it is complete and not before.
    """
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".detectron2-", dir=destination) as folder:
        pinned = Path(folder, "wheel.txt")
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        target = Path(folder, "target")
        # The wheel's tag, named so that pip takes it on any version of Python.
        tag = ["--python-version=3.10", "--implementation=cp", "--abi=none", "--platform=any"]
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", *tag]
        pip = [sys.executable, "-m", "pip", "install"]
        run([*pip, *options, "--target", str(target), "-r", str(pinned)])

        (dist_info,) = target.glob("*.dist-info")
        trim_wheel(target, dist_info)
        pip_install(*runtime_requirements(dist_info), run=run)
        for source in (dist_info, target / "detectron2"):
            shutil.rmtree(destination / source.name, ignore_errors=True)
            source.rename(destination / source.name)


def install_detectron2(destination: Path, run: Run = run) -> str:
    """Installs Detectron2 unless it works already; returns what was done and why.

    Args:
        destination: the folder of packages that the wheel would be put into.
    """
    problem = problem_with(IMPORT_DETECTRON2, run)
    if not problem:
        return "Kept the Detectron2 that is installed: it can be imported."
    print(f"      Detectron2 can't be imported yet: {problem}", flush=True)
    broken = [name for name in ("detectron2", "sal-detectron2") if version_of(name)]
    if broken:  # pip would take the same version for good and leave it
        run([sys.executable, "-m", "pip", "uninstall", "-y", *broken])

    commit = f"upstream's commit {UPSTREAM_COMMIT[:8]}"
    no_answer = problem_with(ASK_GITHUB, run)
    if no_answer:
        reason = f"GitHub can't be reached ({no_answer})"
    else:
        print(f"      GitHub answers: building {commit}, some minutes", flush=True)
        try:
            pip_install("--no-build-isolation", f"detectron2 @ {UPSTREAM_URL}", run=run)
            return f"Built Detectron2 from {commit}, because GitHub can be reached."
        except subprocess.CalledProcessError as error:
            reason = f"building {commit} failed (exit status {error.returncode}, output above)"
    install_wheel(destination, run)
    return f"Installed Detectron2 from the republished wheel {WHEEL}, because {reason}."


def print_versions(run: Run = run) -> str:
    """Imports what was installed, in a fresh interpreter that prints the versions."""
    return run([sys.executable, "-W", "ignore", "-c", PRINT_VERSIONS])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Installs everything, step by step, and prints the versions that can be imported."""
    parser = _Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--extras",
        nargs="+",
        default=[],
        metavar="NAME",
        help="extras of setup.py that are also installed, such as test",
    )
    extras = parser.parse_args(argv).extras

    steps: list[tuple[str, Callable[[], str]]] = [
        ("PyTorch and torchvision", install_torch),
        ("randwire_d2 and its requirements", lambda: install_package(extras)),
        ("Detectron2", lambda: install_detectron2(site_packages())),
        ("Versions, as imported", print_versions),
    ]
    start = time.monotonic()
    print(f"Installing into {sys.prefix}", flush=True)
    for number, (title, step) in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {title}", flush=True)
        try:
            done = step()
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"Step {number}, {title}, failed with exit status {error.returncode}: "
                "the reason is above. What was installed stays; run this again when that is mended."
            )
        if number < len(steps):
            print(f"      {done}", flush=True)
    print(f"Done in {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
