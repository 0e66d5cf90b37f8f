"""The frame of every tool: what a user can mend ends in a line, a bug in its traceback."""

import argparse
import importlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import default_argument_parser
from helpers import PATIENCE, ROOT, Ended, end_each
from torch.distributed import TCPStore
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from randwire_d2.cli import train
from randwire_d2.cli.frame import command_line, framed, task_of, training, training_parser
from randwire_d2.command import TOOL, TOOLS
from randwire_d2.engine import Trainer
from randwire_d2.engine.processes import torchrun

SMALL = [
    "--config-file", "faster_rcnn_randwire_shapes.yaml", "MODEL.DEVICE", "cpu",
    "MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "8", "SOLVER.IMS_PER_BATCH", "4",
    "DATALOADER.NUM_WORKERS", "0", "SEED", "1", "OUTPUT_DIR", "run",
]  # fmt: skip
# What torch.multiprocessing and a loader make of an error in another process.
CHILD = (
    "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n"
    '  File "spawn.py", line 1, in _wrap\n    fn(i, *args)\n{}\n'
)
WORKER = (
    "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
    'last):\n  File "worker.py", line 1, in _loop\n    x\n    ^\nValueError: bad\n image\n'
)


def raising(error: BaseException) -> Callable[..., None]:
    @framed("train_net.py")
    def main(argv: object = None) -> None:
        raise error

    return main


def end(error: BaseException) -> int | str | None:
    with pytest.raises(SystemExit) as e:
        raising(error)([])
    return e.value.code


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_has_the_frame(name: str) -> None:
    """Wrong: a new tool ends in tracebacks."""
    module = importlib.import_module(f"randwire_d2.cli.{name.replace('-', '_')}")
    assert module.main.__code__ is framed(name)(print).__code__


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (FileNotFoundError(2, "No such file or directory", "x"), "'x': No such file or directory"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'; pip install"),
        (FloatingPointError("Loss became infinite"), "Loss became infinite"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't"),
        (ValueError(WORKER), "bad image"),
        (ProcessRaisedException(CHILD.format("ValueError: bad"), 1, 2), "bad"),
        (ProcessRaisedException(CHILD.format(f"ValueError: {WORKER}"), 1, 2), "bad image"),
        (
            ProcessRaisedException(CHILD.format("PIL.UnidentifiedImageError: x: y\nz"), 1, 2),
            "x: y z",
        ),
        (ProcessExitedException("process 0 terminated with signal SIGKILL", 0, 1, -9), "process 0"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a traceback, or the text of one in another process."""
    said = end(error)
    assert isinstance(said, str) and said.startswith(f"train_net.py: error: {line}"), said
    assert "\n" not in said and "Traceback" not in said + capsys.readouterr().err


def test_what_torchruns_processes_refuse_alike_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wrong: as many lines as GPUs; or a fault of one process, machine or start is not said."""
    monkeypatch.setattr(torchrun, "_LEAD", 0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 4,
                "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip

    def ends(rank: int, message: str, restarts: int = 0) -> int | str | None:
        there = {"RANK": rank, "LOCAL_RANK": rank % 2, "TORCHELASTIC_RESTART_COUNT": restarts}
        for name, value in {**launched, **there}.items():
            monkeypatch.setenv(name, str(value))
        return end(ValueError(message))

    assert [ends(1, "bad"), ends(0, "bad"), ends(0, "worse"), ends(3, "bad")] == [1] * 4
    assert ends(0, "bad", restarts=1) == 1
    own = [f"train_net.py: error: {word}" for word in ("bad", "worse", "bad", "bad")]
    assert capfd.readouterr().err.splitlines() == own
    monkeypatch.setattr(torchrun, "_ANSWER", timedelta(seconds=0.2))
    del store  # and whoever answers
    assert ends(0, "bad") == own[0]


def test_the_first_process_has_the_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: torchrun's --local-ranks-filter 0, which shows the first process's lines alone, shows
    none where another was faster."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(torchrun, "_LEAD", PATIENCE)

    def says(rank: int) -> bool:
        launched = torchrun.Launched(rank, rank, 2, 2)
        monkeypatch.setattr(torchrun.Launched, "here", lambda: launched)
        return torchrun.said_once("bad")

    with ThreadPoolExecutor() as pool:
        second = pool.submit(says, 1)
        early = wait([second], 0.3).done
        silent = capsys.readouterr().err
        assert says(0) and second.result() and not early
    assert (silent, capsys.readouterr().err) == ("", "bad\n")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("no such thing"),
        ProcessRaisedException(CHILD.format("IndexError: list index out of range"), 1, 2),
    ],
)
def test_a_bug_has_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: a bug looks like a mistake of the user's, and nobody can find it."""
    assert end(error) == 70
    said = capsys.readouterr().err
    *_, last = said.splitlines()
    assert "Traceback" in said and last.startswith("train_net.py: bug: ")
    versions = json.loads(last[last.index("{") : last.index("}") + 1])
    assert versions["torch"] == torch.__version__


def test_the_traceback_of_a_mistake_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANDWIRE_D2_TRACEBACK", "1")
    assert end(ValueError("a")) == "train_net.py: error: a"
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "train_net.py: interrupted\n"


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_s_error_names_its_checkpoint(resume: bool, tmp_path: Path) -> None:
    """Wrong: an earlier training's is named, or a command that begins anew, or one that was
    refused; or the error is lost where the earlier one's was set aside, and there is none yet."""
    last = tmp_path / "last_checkpoint"
    last.write_text("model_0000001.pth")
    os.utime(last, (1, 1))  # not in the same tick of the clock as what is written below
    args = argparse.Namespace(resume=resume, eval_only=False)
    argv = ["--resume"] * resume + ["OUTPUT_DIR", "a b"]
    for number in (1, 3):
        torch.save({"iteration": number}, tmp_path / f"model_000000{number}.pth")
    for writes in (False, True):
        with pytest.raises(SystemExit) as e, training("train_net.py", argv, args, str(tmp_path)):
            if writes:
                last.unlink()
                last.write_text("model_0000003.pth")
            raise FloatingPointError("NaN")
        said = str(e.value)
        if not writes and not resume:
            assert said == "train_net.py: error: NaN"
            continue
        checkpoint = tmp_path / f"model_000000{3 if writes else 1}.pth"
        assert f"the last checkpoint is {checkpoint}; to go on from it: " in said
        assert said.endswith("python tools/train_net.py --resume OUTPUT_DIR 'a b'")
    with pytest.raises(SystemExit) as e, training("train_net.py", argv, args, str(tmp_path)):
        raise ValueError("--resume: other momentum")
    assert e.value.code == "train_net.py: error: --resume: other momentum"
    with pytest.raises(SystemExit) as e, training("train_net.py", argv, args, str(tmp_path)):
        last.unlink()
        raise FloatingPointError("NaN")
    assert e.value.code == "train_net.py: error: NaN"


@pytest.mark.parametrize("script", ["my own.py", "train_net.py"])
def test_a_script_of_ones_own_goes_on_by_itself(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the command that goes on, or Slurm's job, is of a tool, which lacks what the script
    that called it registers."""
    own = tmp_path / script
    own.touch()
    monkeypatch.setattr(sys, "argv", [str(own), "--resume"])
    assert command_line("train_net.py", None) == shlex.join(["python", str(own), "--resume"])
    assert task_of("train_net.py", None).tool == (sys.executable, str(own))
    with monkeypatch.context() as of_a_sweep:  # whose script would else begin the sweep
        of_a_sweep.setenv(TOOL, "train")
        called = command_line("train_net.py", None)
    assert called == shlex.join([f"{TOOL}=train", "python", str(own), "--resume"])
    assert command_line("train_net.py", []) == "python tools/train_net.py"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / "train_net.py"), "--resume"])
    assert command_line("train_net.py", None) == "python tools/train_net.py --resume"


@pytest.mark.parametrize("make", [None, default_argument_parser], ids=["yaml", "lazy"])
def test_each_training_has_a_port_of_its_own(make: Any) -> None:
    """Wrong: a second training on a machine finds the first one's port taken, or the one that was
    asked for is not used."""
    parser = training_parser("train_net.py", "", make)
    assert parser.parse_args([]).dist_url == "auto"
    assert parser.parse_args(["--dist-url", "tcp://a:1"]).dist_url == "tcp://a:1"


def test_a_notebook_goes_on_after_an_interrupted_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: who interrupts a training in a notebook loses the kernel, with all that is in it; or
    the next training prints each line twice, and writes into the folder of the one before, too."""
    monkeypatch.chdir(tmp_path)
    step = Trainer.run_step

    def interrupt(trainer: Trainer) -> None:
        step(trainer)
        logging.getLogger("randwire_d2").info("Here and now")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "run_step", interrupt)
    few = ["DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.RANDWIRE.FUSED", "on"]
    for i, folder in enumerate(("run", "other", "run"), start=1):
        with pytest.raises(SystemExit) as e:
            train.main([*SMALL, *few, "OUTPUT_DIR", folder])
        assert e.value.code == 128 + signal.SIGINT
        assert (tmp_path / folder / "model_0000000.pth").is_file()
        said = capsys.readouterr()
        assert said.out.count("Here and now") == 1
        assert said.err.splitlines()[-1].startswith(
            f"train_net.py: interrupted; the last checkpoint is {folder}/model_0000000.pth; to go"
        )
        logs = [path.read_text() for path in tmp_path.rglob("log.txt")]
        assert [log.count("Here and now") for log in logs] == [1] * i


def diverge(tmp_path: Path, *flags: str) -> Ended:
    options = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "4"]
    options += ["SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "0"]
    (ended,) = end_each([("train_net.py", [*flags, *SMALL, *options], tmp_path)])
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_training_that_diverges(processes: str, tmp_path: Path) -> None:
    """Wrong: a traceback, of each process; or nobody knows how to go on."""
    ended = diverge(tmp_path, "--num-gpus", processes, "--dist-url", "auto")
    *_, last = ended.err.splitlines()
    assert ended.status == 1 and last.startswith("train_net.py: error: "), ended.err[-3000:]
    assert "Traceback" not in ended.out + ended.err
    assert "checkpoint is run/model_0000000.pth" in last and " --resume " in last
    assert (tmp_path / "run" / "model_0000000.pth").is_file()
