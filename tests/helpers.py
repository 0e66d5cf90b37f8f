"""Helpers of the tests: processes of the tools, small data sets, random specs, comparisons."""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from randwire_d2 import NetworkGenerator, NetworkSpec
from randwire_d2.classification import ClassificationTrainer
from randwire_d2.data import builtin
from randwire_d2.data.shapes import ClassificationShapesConfig, ShapesConfig
from randwire_d2.engine import Trainer, conclusion
from randwire_d2.wiring import Dag

ROOT = Path(__file__).parents[1]
# The time limit (seconds) for a process that hangs; far above the expected times.
PATIENCE = 900.0
LOGGERS = ("randwire_d2", "detectron2", "fvcore")  # the loggers that Detectron2's tools set up


def leave_checkpoint(folder: Path, **weights: Tensor) -> None:
    """Write the files from which a training can be resumed: a checkpoint and its name."""
    torch.save({"model": weights, "iteration": 1}, folder / "model_0000001.pth")
    (folder / "last_checkpoint").write_text("model_0000001.pth")


class RunsCode:
    """An object whose pickle, like an attacker's, calls a function, here mkdir, when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Make trainings in this process end without pictures and without converting a backbone. These
    take half the time of a tiny training, and can't make it fail (test_conclusion)."""
    patch.setattr(conclusion, "_draw", lambda _: None)
    patch.setattr(ClassificationTrainer, "next_command", Trainer.next_command)


# -------------------------------------------------------------------------------------------------
# Processes
# -------------------------------------------------------------------------------------------------

# Importing torch and Detectron2 takes longer than most of these tests. A fork server imports them
# once, and does nothing else before it forks the processes.
FORK_SERVER = multiprocessing.get_context("forkserver")
# What draws is imported late by tools; here it is once for all of them.
FORK_SERVER.set_forkserver_preload(["randwire_d2.classification", "randwire_d2.engine.report"])


KILLER = ROOT / "tests" / "killer" / "sitecustomize.py"


def _run_tool(
    path: str,
    arguments: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    before: str,
    pictures: bool,
) -> None:
    gc.freeze()  # else a search for garbage copies what the fork server has imported
    os.setsid()  # so that its group can be killed
    # The first is the default, as in a process that no fork server has started.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    # Tests that run in the background ignore Ctrl-C, which their children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(env)
    sys.argv = [path, *arguments]
    if not pictures:
        without_pictures(pytest.MonkeyPatch())
    exec(before, {})
    runpy.run_path(path, run_name="__main__")


class Tool:
    """A script, run as ``python tools/NAME ARGUMENTS`` would, in its own process group.

    Its output, and that of its children, is appended to the file ``log``.
    """

    def __init__(
        self,
        name: str | Path,
        *arguments: object,
        log: Path,
        before: str = "",
        kill_at: str = "",
        pictures: bool = False,
    ) -> None:
        """Start the process.

        Args:
            name: the name of a script in tools/, or the path of another script.
            before: code that the process executes first.
            kill_at: the moment at which the process is killed (killer/sitecustomize.py).
            pictures: whether a training ends as for a user, instead of ``without_pictures``.
        """
        env = {}
        if kill_at:
            paths = filter(None, (str(KILLER.parent), os.environ.get("PYTHONPATH")))
            env = {"KILL_AT": kill_at, "PYTHONPATH": os.pathsep.join(paths)}
            before += KILLER.read_text()
        self._log = log
        self._skip = log.stat().st_size if log.exists() else 0
        self._process = FORK_SERVER.Process(
            target=_run_tool,
            args=(str(ROOT / "tools" / name), [*map(str, arguments)], log, env, before, pictures),
        )
        self._process.start()
        _started.append(self)

    @property
    def said(self) -> str:
        """The output so far."""
        with open(self._log, "rb") as file:
            file.seek(self._skip)
            return file.read().decode(errors="replace")

    def wait(self) -> int:
        """Wait for the end; returns the exit status, or -n after signal n."""
        self._process.join(PATIENCE)
        status = self._process.exitcode
        if status is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"it hangs: {self.said[-3000:]}")
        return status

    def send(self, number: signal.Signals, alone: bool = False) -> None:
        """Send a signal to the process group or, with ``alone``, only to the process itself."""
        assert self._process.pid is not None
        (os.kill if alone else os.killpg)(self._process.pid, number)


_started: list[Tool] = []


def end_tools() -> None:
    """Kill the tools that a failed test has left running."""
    while _started:
        tool = _started.pop()
        if tool._process.is_alive():
            tool.send(signal.SIGKILL)
            tool.wait()


def run_tool(name: str | Path, *arguments: object, log: Path, **options: Any) -> str:
    """Run a ``Tool``, which must succeed; returns its output."""
    tool = Tool(name, *arguments, log=log, **options)
    status = tool.wait()
    assert status == 0, tool.said[-3000:]
    return tool.said


def refusal(name: str, *arguments: object, log: Path) -> str:
    """Run a tool that must fail with exit status 1; returns the line of its error."""
    tool = Tool(name, *arguments, log=log)
    assert tool.wait() == 1 and "Traceback" not in tool.said, tool.said[-3000:]
    *_, last = tool.said.splitlines()
    assert last.startswith(f"{name}: error: "), tool.said[-3000:]
    return last


class Ended(NamedTuple):
    """The exit status of a command line, and its output."""

    status: int
    out: str
    err: str


def end_each(lines: Sequence[tuple[str, Sequence[str], Path]]) -> list[Ended]:
    """Run command lines, one after the other, each in its own process.

    This is faster than a ``Tool`` for each: they are forked from a process that has imported all.

    Args:
        lines: for each, the name of a script in tools/, its arguments, and its working directory.
    """
    receiver, sender = FORK_SERVER.Pipe(duplex=False)
    process = FORK_SERVER.Process(target=_end_each, args=(lines, sender))
    process.start()
    sender.close()
    assert receiver.poll(PATIENCE)
    ended: list[Ended] = receiver.recv()
    process.join()
    return ended


def _end_each(lines: Sequence[tuple[str, Sequence[str], Path]], sender: Connection) -> None:
    for name in {name for name, _, _ in lines}:
        runpy.run_path(str(ROOT / "tools" / name), run_name="imported")
    gc.freeze()
    ended = []
    for line in lines:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if not (child := os.fork()):
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _be_tool(*line)
            _, status = os.waitpid(child, 0)
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        ended.append(Ended(os.waitstatus_to_exitcode(status), *said))
    sender.send(ended)


def _be_tool(name: str, arguments: Sequence[str], folder: Path) -> NoReturn:
    os.chdir(folder)
    signal.alarm(int(os.environ.get("TRY", PATIENCE / 10)))
    sys.argv = [str(ROOT / "tools" / name), *arguments]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:  # as Python does at the end of a process
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def in_two_processes(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``work(rank, *arguments)`` in two processes of a gloo group; returns both results."""
    with tempfile.TemporaryDirectory() as folder, FORK_SERVER.Pool(2) as pool:
        tasks = [(work, f"file://{folder}/store", rank, arguments) for rank in range(2)]
        return pool.starmap(_in_group, tasks, chunksize=1)


def _in_group(work: Callable[..., Any], store: str, rank: int, arguments: Sequence[Any]) -> Any:
    gc.freeze()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    found = work(rank, *arguments)
    torch.distributed.destroy_process_group()
    return found


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run a command, which must succeed; returns its output."""
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def output_of(code: str, **environment: str) -> str:
    """Run Python code, which must succeed, in a new process; returns its output."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def raises_one_line(
    error: type[BaseException], match: str | None = None
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Like ``pytest.raises``, for an exception whose message is one line."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------
# Files
# -------------------------------------------------------------------------------------------------


def last_metrics(output: Path) -> dict[str, float]:
    """The last logged value of each metric."""
    last: dict[str, float] = {}
    for line in (output / "metrics.json").read_text().splitlines():
        last.update(json.loads(line))
    return last


def draw_image_folders(
    root: Path, *, classes: Sequence[str] = ("a", "b", "c"), train: int = 14, val: int = 6
) -> None:
    """Write ``root/{train,val}/<class>/<i>.png``: noise, ``train`` and ``val`` per class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def draw_small_builtin_sets(root: Path) -> None:
    """Put a few images in place of the built-in data sets, which take a minute to draw."""
    for kind in (ShapesConfig, ClassificationShapesConfig):
        few = builtin.make_dataset(root, kind(num_train=24, num_val=12))
        few.rename(builtin.dataset_folder(root, kind()))


def draw_boxes(root: Path, *, train: int = 21, val: int = 5) -> Path:
    """Write a detector's data set in COCO's layout: noise with a bright box. Images have 64 × 96
    pixels (height × width), every third has 96 × 64."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(number):
            height, width = (96, 64) if i % 3 == 0 else (64, 96)
            pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
            x, y, w, h = rng.integers((4, 4, 20, 20), (24, 24, 36, 36)).tolist()
            pixels[y : y + h, x : x + w] += np.uint8(100)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
            annotations.append({
                "id": i + 1, "image_id": i, "category_id": 1 + i % 2, "bbox": [x, y, w, h],
                "area": w * h, "iscrowd": 0,
            })  # fmt: skip
        content = {
            "images": images, "annotations": annotations,
            "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        }  # fmt: skip
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


# -------------------------------------------------------------------------------------------------
# Random graphs
# -------------------------------------------------------------------------------------------------

GOLDEN = json.loads((ROOT / "tests" / "golden" / "ws_4_075.json").read_text())
SEEDS = st.integers(0, 2**32 - 1)
PROBABILITIES = st.floats(0, 1)


@st.composite
def er(draw: st.DrawFn, most: int = 40) -> tuple[str, int, dict[str, Any]]:
    return "ER", draw(st.integers(1, most)), {"p": draw(PROBABILITIES)}


@st.composite
def ba(draw: st.DrawFn, most: int = 40) -> tuple[str, int, dict[str, Any]]:
    num_nodes = draw(st.integers(2, most))
    return "BA", num_nodes, {"m": draw(st.integers(1, num_nodes - 1))}


@st.composite
def ws(draw: st.DrawFn, most: int = 40) -> tuple[str, int, dict[str, Any]]:
    num_nodes = draw(st.integers(3, most))
    k = 2 * draw(st.integers(1, (num_nodes - 1) // 2))
    return "WS", num_nodes, {"k": k, "p": draw(PROBABILITIES)}


# -------------------------------------------------------------------------------------------------
# Networks and their oracle
# -------------------------------------------------------------------------------------------------

GRAPHS = {"ER": {"p": 0.35}, "BA": {"m": 2}, "WS": {"k": 2, "p": 0.75}}
NODE_OPS = ("sep_conv3x3", "conv3x3", "max_pool3x3", "avg_pool3x3")
# The ways to run a stage, as options of RandWire.
PATHS = {"plain": {"fused": "off"}, "fused": {}, "recompute": {"recompute": True}}
TOLERANCE = 1e-10  # relative, in float64


def draw_spec(regime: str, graph: str, node_op: str = "sep_conv3x3", seed: int = 1) -> NetworkSpec:
    num_nodes = 7 if regime == "small" else 8
    return NetworkGenerator(regime, 5, num_nodes, graph, GRAPHS[graph], node_op)(seed)


def played(dag: Dag, order: Sequence[int]) -> int:
    """The peak of memory of an order of nodes, by keeping every result under its name."""
    held: set[int | str] = set()
    readers = {u: set(dag.successors[u]) for u in order}
    moments = []
    for v in order:
        moments.append(len(held) + 1)  # the aggregation
        for u in dag.predecessors[v]:
            readers[u].remove(v)
            if not readers[u]:
                held.remove(u)
        moments.append(len(held) + 2)  # the result and the workspace
        held.add(v if dag.successors[v] else "the sum")
    assert held == {"the sum"}
    return max(moments)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every tensor to random values, so that a forgotten or swapped tensor is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith(("running_var", "norm.weight")):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.dim() == 1:  # w, γ's partner β, running means, the fc's bias
            tensor.normal_(generator=generator)
    return model


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict whose parameters are new leaf tensors."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[name].requires_grad_(parameter.requires_grad)
    return state


def images(height: int = 37, width: int = 45, device: str | torch.device = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
    return x.to(device)


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Assert that nested containers of tensors and other values are bitwise equal."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected)):
            assert_equal(a, b, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def assert_same(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert actual is not None and expected is not None, what
    assert actual.shape == expected.shape, what
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE * max(scale, 1e-3), f"{what}: off by {error:.3g} of {scale:.3g}"


def assert_same_gradients(
    model: nn.Module, x: Tensor, state: dict[str, Tensor], x_oracle: Tensor
) -> None:
    assert_same(x.grad, x_oracle.grad, "gradient of the images")
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, state[name].grad, f"gradient of {name}")
