"""Run the fast tests in an environment of each version that setup.py allows.

    python tools/check_matrix.py [NAME ...] [--detectron2 FOLDER] [--folder FOLDER]

It needs only the Pythons themselves, as `python3.12` on the PATH. tools/install.py makes each
environment in --folder, some 6 GB, where it stays for the next time. If an environment can't be
made, the table says why. The table is written to matrix.md in --folder, its figures to matrix.json.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["-q", "-n", "2", "--dist", "loadfile", "-m", "not slow"]
VERSIONS = """
import json, platform
from importlib import metadata
names = ("torch", "torchvision", "networkx", "numpy", "detectron2", "sal-detectron2")
found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
found = {name: found[name] for name in names if name in found}
print(json.dumps({"python": platform.python_version()} | found))
"""


@dataclass(frozen=True)
class Environment:
    """What is chosen; all else is the newest that pip finds.

    Attributes:
        python: its version, as in the name of its program.
        packages: pip's requirements that are installed first.
        upstream: whether Detectron2 is built from a source tree, not taken from the wheel.
    """

    python: str
    packages: tuple[str, ...] = ()
    upstream: bool = False


@dataclass
class Outcome:
    """Attributes:
    problem: why no test ran, or "".
    versions: of what was tested, by the distributions' names.
    counts: tests that passed, failed and were skipped.
    failed: the tests that failed, by name.
    seconds: that the tests took.
    """

    name: str
    problem: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def lower_bounds() -> tuple[str, ...]:
    """Every requirement of setup.py, and of its extras, in the lowest version that it allows."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and (m := re.match(r"([\w-]+)[>~]=([\w.]+)(,|$)", text)):
            found.setdefault(m[1], f"{m[1]}=={m[2]}")
    return tuple(found.values())


def environments() -> dict[str, Environment]:
    """Those that setup.py and the README promise, by name."""
    return {
        "lowest": Environment("3.10", lower_bounds()),
        "python3.11": Environment("3.11"),
        "python3.12": Environment("3.12"),
        "python3.13": Environment("3.13"),
        "upstream": Environment("3.11", upstream=True),
    }


def make(environment: Environment, folder: Path, detectron2: str) -> Path:
    """Makes an environment, unless it is there; returns its Python.

    Args:
        detectron2: the source tree for those that build it.

    Raises:
        LookupError: it can't be had; the reason.
        subprocess.CalledProcessError: a step failed; its lines are in ``install.log``.
    """
    if environment.upstream and not detectron2:
        raise LookupError("no source tree of Detectron2: --detectron2 FOLDER")
    python = folder / "bin/python"
    done = folder / "complete"
    if done.is_file():
        return python
    program = f"python{environment.python}"
    try:
        subprocess.run([program, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise LookupError(f"no {program} on the PATH") from None
    folder.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "install"]
    steps = [[program, "-m", "venv", "--clear", str(folder)]]
    if environment.packages:
        steps.append([*pip, *environment.packages])
    if environment.upstream:
        steps.append([*pip, "torch", "torchvision", "setuptools<81", "wheel"])
        steps.append([*pip, "--no-build-isolation", detectron2])
    steps.append([str(python), "tools/install.py", "--extras", "test"])
    with open(folder.with_suffix(".log"), "w") as log:
        for step in steps:
            subprocess.run(step, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    done.touch()
    return python


def run_tests(python: Path, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Runs the fast tests of this checkout; returns how many passed, failed and were skipped, and
    the names of those that failed.

    Raises:
        subprocess.CalledProcessError: pytest itself failed; its lines are in ``tests.log``.
    """
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", *TESTS, f"--junitxml={report}"]
    # The tests start tools by name: those of this environment.
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    with open(folder / "tests.log", "w") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PATH": path}, stdout=log, stderr=log
        )
    if not report.is_file():
        raise subprocess.CalledProcessError(done.returncode, command)
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts, failed


def check(name: str, environment: Environment, folder: Path, detectron2: str = "") -> Outcome:
    """Makes an environment in ``folder``, if it is not there, and runs the fast tests in it."""
    outcome = Outcome(name)
    try:
        python = make(environment, folder, detectron2)
        versions = subprocess.run(
            [str(python), "-c", VERSIONS], check=True, capture_output=True, text=True
        )
        outcome.versions = json.loads(versions.stdout)
        start = time.monotonic()
        outcome.counts, outcome.failed = run_tests(python, folder)
        outcome.seconds = time.monotonic() - start
    except LookupError as e:
        outcome.problem = str(e)
    except subprocess.CalledProcessError as e:
        outcome.problem = f"`{' '.join(map(str, e.cmd))}` ended with status {e.returncode}"
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    columns = ["environment", "Python", "torch", "networkx", "numpy", "Detectron2", "fast tests"]
    rows = []
    for outcome in outcomes:
        found = outcome.versions
        wheel = found.get("sal-detectron2")
        detectron2 = f"wheel {wheel}" if wheel else found.get("detectron2", "")
        result = f"not run: {outcome.problem}"
        if not outcome.problem:
            result = ", ".join(f"{n} {kind}" for kind, n in outcome.counts.items())
            result += "".join(f"; {test}" for test in outcome.failed)
        versions = [found.get(key, "") for key in ("python", "torch", "networkx", "numpy")]
        rows.append([outcome.name, *versions, detectron2, result])
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the environments one after the other; the exit status is 1 if a test failed."""
    known = environments()
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"an environment (default: all): {', '.join(known)}",
    )
    parser.add_argument(
        "--detectron2",
        default="",
        metavar="FOLDER",
        help="a source tree of Detectron2, which `upstream` builds in some minutes",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "output/matrix",
        help="the folder for the environments and the table (default: output/matrix)",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(known):
        parser.error(f"no such environment: {', '.join(sorted(unknown))}; there are {list(known)}")
    folder, outcomes = args.folder.resolve(), []
    for name in args.names or known:
        outcomes.append(check(name, known[name], folder / name, args.detectron2))
        folder.mkdir(parents=True, exist_ok=True)
        figures = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
        (folder / "matrix.json").write_text(figures)
        (folder / "matrix.md").write_text(table(outcomes))
        print(table(outcomes[-1:]).splitlines()[-1], flush=True)
    if any(outcome.failed for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
