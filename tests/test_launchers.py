"""Trainings started by torchrun, restarted by it, and ended by signals, in processes of their own.

Whatever starts a training, and whatever ends it before its time, its weights must be those of a run
that nobody disturbed, to the last bit.
"""

import os
import pickle
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_start_method, set_start_method
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.utils import comm
from helpers import ROOT, Tool, assert_equal, raises_one_line, run_tool, wait_until
from launching import COMMANDS, TOOL, TORCHRUN, arguments, command, final, free_port
from torch import distributed
from torch.distributed import HashStore

from randwire_d2.classification import load_config
from randwire_d2.engine import argument_parser, launch
from randwire_d2.engine.processes.torchrun import Launched, agree, count_processes

# -------------------------------------------------------------------------------------------------
# torchrun
# -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_on_one_machine_is_num_gpus(folders: Path, two: Path, tmp_path: Path) -> None:
    """Wrong: torchrun's processes start others, train models of their own, or all of them talk."""
    output = tmp_path / "run"
    given = command("torchrun", folders, output, nproc_per_node=2)
    said = run_tool(TORCHRUN, *given, log=tmp_path / "log")
    assert_equal(final(output), final(two))
    assert said.count("Starting training from iteration 0") == 1
    assert said.count("The training has ended after") == 1


def test_the_commands_that_are_documented_are_tested() -> None:
    """Wrong: what stands in the README does not run."""
    documented = set()
    for page in ("README.md", "GUIDE.md"):
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("torchrun") or "--slurm" in line:
                    documented.add(" ".join(line.partition("#")[0].split()))
    assert documented and documented <= set(COMMANDS.values())


@pytest.mark.slow
def test_torchrun_on_two_machines_is_num_gpus(folders: Path, two: Path, tmp_path: Path) -> None:
    """Wrong: a machine is taken for all, or its only process for a training of its own."""
    output, port = tmp_path / "run", free_port()
    machines = []
    for rank in range(2):
        words = {"node_rank": rank, "nproc_per_node": 1, "master_port": port}
        given = command("two machines", folders, output, **words)
        machines.append(Tool(TORCHRUN, *given, log=tmp_path / f"log{rank}"))
    for machine in machines:
        assert machine.wait() == 0, machine.said[-3000:]
    assert_equal(final(output), final(two))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_restarted(folders: Path, two: Path, tmp_path: Path) -> None:
    """Wrong: the processes that torchrun starts again begin anew, or go on with other weights."""
    output = tmp_path / "run"
    given = command("torchrun, restarts", folders, output, nproc_per_node=2)
    # After it has gone on from the checkpoint before, there is no third.
    moment = f"os.rename {output}/last_checkpoint 3 process"
    tool = Tool(TORCHRUN, *given, log=tmp_path / "log", kill_at=moment)
    assert tool.wait() == 0, tool.said[-3000:]
    assert re.findall(r"Starting training from iteration (\d+)", tool.said) == ["0", "10"]
    assert_equal(final(output), final(two))


@pytest.mark.slow
def test_a_worker_is_restarted_on_two_machines(folders: Path, two: Path, tmp_path: Path) -> None:
    """Wrong: the processes of a second start take the addresses of the first one's for theirs, or
    wait for each other under different names: each machine counts its own restarts."""
    output = tmp_path / "run"
    words = {"nproc_per_node": 1, "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    given = command("two machines, restarts", folders, output, **words)
    # Only the first process, on either machine, writes checkpoints.
    moment = f"os.rename {output}/last_checkpoint 3 process"
    machines = [Tool(TORCHRUN, *given, log=tmp_path / f"log{i}", kill_at=moment) for i in range(2)]
    for machine in machines:
        assert machine.wait() == 0, machine.said[-3000:]
    said = "".join(machine.said for machine in machines)
    assert re.findall(r"Starting training from iteration (\d+)", said) == ["0", "10"]
    assert_equal(final(output), final(two))


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_in_one_line(folders: Path, tmp_path: Path) -> None:
    """Wrong: the tool goes on without it, or ends with two tracebacks."""
    output = tmp_path / "run"
    given = command("one machine", folders, output, "--dist-url", "auto", num_gpus=2)
    moment = f"os.rename {output}/last_checkpoint 2 process"
    tool = Tool(TOOL, *given, log=tmp_path / "log", kill_at=moment)
    assert tool.wait() == 1
    expected = f"{TOOL}: error: process 0 of this machine was ended by SIGKILL, and so the others"
    assert tool.said.splitlines()[-1].startswith(expected)
    assert (output / "last_checkpoint").exists()


@pytest.mark.parametrize("stale", [{}, {"start/0": "a", "start/1": "b", "starts": '["a", "b"]'}])
def test_a_start_has_a_name_of_its_own(stale: dict[str, str]) -> None:
    """Wrong: what an earlier start has left in torchrun's store is taken for this one's."""
    store = HashStore()
    names = []
    for _ in range(3):
        for key, value in stale.items():
            store.set(key, value)
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(lambda rank: agree(store, rank, 3), range(3)))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("flags", "environment", "batch", "expected"),
    [
        (("--num-gpus", "4"), {}, 8, "--num-gpus 4: torchrun has started the processes already"),
        (("--num-machines", "3"), {}, 8, "--num-machines 3: torchrun .* says 2; leave it out"),
        ((), {}, 6, "IMS_PER_BATCH 6 is the batch of all 4 processes"),
        ((), {"LOCAL_WORLD_SIZE": "3"}, 8, "4 processes, 3 of them on this machine: start as many"),
        ((), {"TORCHELASTIC_MAX_RESTARTS": "1"}, 8, "--max-restarts 1 .*: add --resume"),
        (("--num-gpus", "2", "--num-machines", "2", "--dist-url", "auto"), {}, 8, ""),
        (("--resume",), {"TORCHELASTIC_MAX_RESTARTS": "1"}, 8, ""),
    ],
)
def test_the_command_line_must_agree_with_torchrun(
    flags: tuple[str, ...],
    environment: dict[str, str],
    batch: int,
    expected: str,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a run of other processes than were asked for, or one that its restart begins anew."""
    there = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **environment}  # fmt: skip
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    given = [*arguments(folders, tmp_path / "run", *flags), "SOLVER.IMS_PER_BATCH", batch]
    args = argument_parser().parse_args(list(map(str, given)))
    if not expected:
        # No other process is there to list images for.
        monkeypatch.setattr(Launched, "share", lambda launched, name, make: make())
        load_config(args)
        return
    with raises_one_line(ValueError, match=expected):
        load_config(args)


def test_a_launchers_process_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: srun with a script that sets what ``env://`` reads, and no more: the first process
    trains alone, with the whole batch, and the others find OUTPUT_DIR in use. Or a scheduler's
    variables of machines, which start processes of their own, are refused."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    with raises_one_line(ValueError, match="but LOCAL_WORLD_SIZE is not set: set it in each"):
        count_processes(argument_parser().parse_args([]))
    assert count_processes(argument_parser().parse_args(["--num-gpus", "4"])) == (4, 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert count_processes(argument_parser().parse_args([])) == (1, 1)


# -------------------------------------------------------------------------------------------------
# Detectron2's launch
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_cpu", "processes", "before", "seen"),
    [
        (True, 2, "0,1", ""),
        (True, 2, None, ""),
        (True, 1, "0,1", "0,1"),
        (False, 2, "0,1", "0,1"),
    ],
)
def test_processes_on_a_cpu_see_no_gpu(
    on_cpu: bool, processes: int, before: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: Detectron2 wants a GPU for each process, and NCCL, of a machine that has GPUs."""
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    args = argument_parser().parse_args(["--num-gpus", str(processes)])
    look = mock.Mock(side_effect=lambda *_, **__: os.environ.get(name))
    with mock.patch.object(launch, "launch", look), mock.patch.object(launch, "share_cores"):
        assert launch.run_processes(print, (), args, on_cpu, timeout=0.0) == seen
    assert os.environ.get(name) == before


def test_processes_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: arguments that fill a pipe, so that each process is started only once the one before
    has imported the tool."""
    known = os.urandom(1 << 20)
    monkeypatch.setattr(launch, "known", lambda: known)

    def look(*_: Any, args: tuple[Any, ...], **__: Any) -> Path:
        path = Path(args[0])
        assert len(pickle.dumps(args)) < 1000 and pickle.loads(path.read_bytes()) == known
        return path

    args = argument_parser().parse_args(["--num-gpus", "2"])
    with mock.patch.object(launch, "launch", look), mock.patch.object(launch, "share_cores"):
        assert not launch.run_processes(print, (), args, True, timeout=0.0).parent.exists()


def test_workers_start_as_in_a_single_process() -> None:
    """Wrong: a process that was spawned spawns its workers, each of which imports PyTorch anew, in
    each evaluation again."""
    usual = get_start_method()

    def spawn(main: Callable[..., Any], *_: Any, args: tuple[Any, ...], **__: Any) -> Any:
        set_start_method("spawn", force=True)  # as Python does in the process
        return main(*args)

    args = argument_parser().parse_args(["--num-gpus", "2"])
    try:
        with mock.patch.object(launch, "launch", spawn), mock.patch.object(launch, "share_cores"):
            assert launch.run_processes(get_start_method, (), args, True, timeout=0.0) == usual
    finally:
        set_start_method(usual, force=True)


def test_a_program_keeps_its_own_group() -> None:
    """Wrong: a program that has a group, and calls a tool in its process, has none afterwards."""
    args = argument_parser().parse_args([])
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.object(launch, "share_cores"):
            launch.run_processes(comm.synchronize, (), args, True, timeout=0.0)
        assert distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_a_full_temporary_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a message that names neither the place nor a way out."""
    with open("/dev/full", "wb") as full, mock.patch.object(launch, "share_cores"):
        monkeypatch.setattr(launch, "open", lambda *_: full, raising=False)
        args = argument_parser().parse_args(["--num-gpus", "2"])
        with pytest.raises(OSError, match=r"to /.* \(No space left on device\): .*TMPDIR$"):
            launch.run_processes(print, (), args, True, timeout=0.0)


# -------------------------------------------------------------------------------------------------
# Signals
# -------------------------------------------------------------------------------------------------


def last_iteration(output: Path) -> int:
    """That of the checkpoint from which a training goes on."""
    name = (output / "last_checkpoint").read_text()
    iteration = torch.load(output / name, weights_only=True)["iteration"]
    assert name == f"model_{iteration:07d}.pth"
    return int(iteration)


def iterations_done(said: str, number: signal.Signals) -> int:
    """What the log, which must say it once, says of a training that a signal has ended."""
    (done,) = re.findall(rf"{number.name} ends the training after (\d+) iterations", said)
    return int(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "workers"),
    [
        (signal.SIGUSR2, "process", 0),
        (signal.SIGTERM, "group", 1),
        (signal.SIGUSR1, "group", 1),
        (signal.SIGINT, "group", 1),
    ],
)
def test_a_signal_leaves_a_checkpoint_to_go_on_from(
    number: signal.Signals, victim: str, workers: int, folders: Path, alone: Path, tmp_path: Path
) -> None:
    """Wrong: what was trained since the last checkpoint is lost, a signal to the group costs the
    loader's worker, and with it the training, or what goes on ends with other weights."""
    output, log = tmp_path / "run", tmp_path / "log"
    given = arguments(folders, output, "--resume", workers=workers)
    moment = f"open {folders / 'train'}/ 60 {victim} {number.name}"
    tool = Tool(TOOL, *given, log=log, kill_at=moment)
    assert tool.wait() == -number, tool.said[-3000:]
    done = iterations_done(tool.said, number)
    assert 5 < done <= 8 and last_iteration(output) == done - 1
    said = run_tool(TOOL, *given, log=log)
    assert f"Starting training from iteration {done}" in said
    assert_equal(final(output), final(alone))


@pytest.mark.slow
def test_two_processes_stop_after_the_same_iteration(
    folders: Path, two: Path, tmp_path: Path
) -> None:
    """Wrong: a process that was told earlier leaves the other waiting, or one that was told twice,
    by the signal and by the tool, ends before the checkpoint is there."""
    output, log = tmp_path / "run", tmp_path / "log"
    flags = ("--resume", "--num-gpus", 2, "--dist-url", "auto")
    given = arguments(folders, output, *flags, workers=1)
    tool = Tool(TOOL, *given, log=log, kill_at=f"open {folders / 'train'}/ 30 group SIGTERM")
    assert tool.wait() == -signal.SIGTERM, tool.said[-3000:]
    done = last_iteration(output) + 1
    assert 5 < done <= 8 and len(re.findall("ends the training after", tool.said)) == 1
    said = run_tool(TOOL, *given, log=log)
    assert f"Starting training from iteration {done}" in said
    assert_equal(final(output), final(two))


def ended_amid(end: Callable[[int], None], tool: Tool, output: Path, number: signal.Signals) -> int:
    """End a training without an end once it has begun; the exit status of its tool."""
    wait_until(lambda: (output / "model_0000004.pth").exists())
    assert tool._process.pid is not None
    end(tool._process.pid)
    status = tool.wait()
    assert iterations_done(tool.said, number) == last_iteration(output) + 1
    return status


@pytest.mark.slow
def test_the_tool_hands_a_signal_to_its_processes(folders: Path, tmp_path: Path) -> None:
    """Wrong: a sweep, or a plain kill, ends the tool alone, and its processes without a trace."""
    output = tmp_path / "run"
    flags = ("--num-gpus", 2, "--dist-url", "auto")
    given = [*arguments(folders, output, *flags, workers=1), "SOLVER.MAX_ITER", 10**6]
    tool = Tool(TOOL, *given, log=tmp_path / "log")
    status = ended_amid(lambda p: os.kill(p, signal.SIGTERM), tool, output, signal.SIGTERM)
    assert status == -signal.SIGTERM, tool.said[-3000:]
    assert "Traceback" not in tool.said


@pytest.mark.slow
def test_torchrun_that_is_ended_leaves_a_checkpoint(folders: Path, tmp_path: Path) -> None:
    """Wrong: torchrun's SIGTERM to the groups of its workers costs their loaders' workers."""
    output = tmp_path / "run"
    given = command("torchrun", folders, output, workers=1, nproc_per_node=2)
    given += ["SOLVER.MAX_ITER", 10**6]
    tool = Tool(TORCHRUN, *given, log=tmp_path / "log")
    assert ended_amid(lambda p: os.kill(p, signal.SIGTERM), tool, output, signal.SIGTERM)
    assert "DataLoader worker" not in tool.said


@pytest.mark.slow
def test_a_detector_that_is_ended_goes_on(tmp_path: Path) -> None:
    """Wrong: the other training tool does not write a checkpoint, or Detectron2's loader loses its
    worker to a signal for the group."""
    output, log = tmp_path / "run", tmp_path / "log"
    given = [
        "--config-file", ROOT / "configs/faster_rcnn_randwire_shapes.yaml", "--resume",
        "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10, "MODEL.RANDWIRE.FUSED", "on",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 0,
        "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", output,
    ]  # fmt: skip
    tool = Tool("train_net.py", *given, "SOLVER.MAX_ITER", 10**6, log=log)
    status = ended_amid(lambda p: os.killpg(p, signal.SIGTERM), tool, output, signal.SIGTERM)
    assert status == -signal.SIGTERM, tool.said[-3000:]
    done = last_iteration(output) + 1
    said = run_tool("train_net.py", *given, "SOLVER.MAX_ITER", done + 1, log=log)
    assert f"Starting training from iteration {done}" in said
    assert (output / "model_final.pth").exists()


def states(group: int) -> list[str]:
    """The states of a process group's processes, as Linux has them: R, S, T, Z."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group:
                found.append(state)
    return found


@pytest.mark.slow
def test_a_second_interrupt_ends_processes_that_hang(folders: Path, tmp_path: Path) -> None:
    """Wrong: the tool ends, and its processes keep their GPUs for as long as they hang."""
    output = tmp_path / "run"
    given = command("one machine", folders, output, "--dist-url", "auto", num_gpus=2)
    moment = f"open {folders / 'train'}/ 30 process SIGSTOP"
    tool = Tool(TOOL, *given, log=tmp_path / "log", kill_at=moment)
    group = tool._process.pid
    assert group is not None
    wait_until(lambda: states(group).count("T") == 2)

    def has_ended() -> bool:  # signals that come together are one
        with suppress(ProcessLookupError):
            tool.send(signal.SIGINT, alone=True)
        return not tool._process.is_alive()

    wait_until(has_ended)
    assert tool.wait() == -signal.SIGINT, tool.said[-3000:]
    wait_until(lambda: not set(states(group)) - {"Z"})


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(folders: Path, tmp_path: Path) -> None:
    """Wrong: who presses Ctrl-C twice, as the first had no effect, waits for an iteration that
    hangs."""
    hang = (
        "import signal, time\n"
        "from randwire_d2.classification.trainer import WatchInput\n"
        "def hang(hook):\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('it hangs', flush=True)\n"
        "    time.sleep(1e6)\n"
        "WatchInput.after_step = hang\n"
    )
    output = tmp_path / "run"
    log = tmp_path / "log"
    log.touch()
    tool = Tool(TOOL, *arguments(folders, output), log=log, before=hang)
    wait_until(lambda: "it hangs" in tool.said)
    tool.send(signal.SIGINT)
    assert tool.wait() == -signal.SIGINT, tool.said[-3000:]
    assert not (output / "last_checkpoint").exists()
