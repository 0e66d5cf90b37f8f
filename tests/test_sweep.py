"""Sweeps of generators: which networks they train, how often, and what is said of them."""

import errno
import fcntl
import json
import math
import os
import runpy
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from statistics import correlation, mean
from typing import IO

import networkx
import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.config.defaults import _C
from fake_slurm import FakeSlurm
from helpers import ROOT, Tool, raises_one_line, run_tool, wait_until

from randwire_d2 import NetworkGenerator, complexity
from randwire_d2.cli import compare_generators
from randwire_d2.config import classifier_config, spec_from_config
from randwire_d2.engine.processes.slurm import Queue
from randwire_d2.experiments.sweep import load_sweep
from randwire_d2.experiments.sweep_results import (
    collect,
    pearson,
    plot_bars,
    plot_operations,
    report,
    to_json,
    to_markdown,
)
from randwire_d2.experiments.sweep_run import Run
from randwire_d2.experiments.trainings import Local, Slurm, Training, visible_gpus
from randwire_d2.wiring import GRAPH_REGISTRY, parse_graph

SWEEPS = ROOT / "configs" / "sweeps"
TOOL = ROOT / "tools" / "compare_generators.py"

# Stands for tools/pretrain_imagenet.py: does what its folder's "plan" says, and counts its starts.
TRAINER = """
import json, os, signal, sys, time
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
assert "--resume" in sys.argv
with open(os.path.join(folder, "starts"), "a") as f:
    f.write("x")
plan = json.load(open(os.path.join(folder, "plan")))
with open(os.path.join(folder, "config.yaml"), "w") as f:
    f.write("SOLVER:\\n  MAX_ITER: 10\\n")
if plan == "fail":
    sys.exit("no more disk")
print("iteration 7", flush=True)
if plan in ("SIGUSR2", "SIGKILL"):
    os.kill(os.getpid(), getattr(signal, plan))
time.sleep(3600 if plan == "hang" else 0)
with open(os.path.join(folder, "metrics.json"), "w") as f:
    f.write(json.dumps({"iteration": 9, "classification/top1": plan}))
open(os.path.join(folder, "model_final.pth"), "w").close()
"""


def write_sweep(folder: Path, **keys: object) -> Path:
    path = folder / "sweep.yaml"
    sweep = {
        "config": str(ROOT / "configs/shapes/randwire_pretrain.yaml"),
        "generators": ["WS(4, 0.75)", "BA(1)"],
        "seeds": [1, 2],
        "channels": 8,
        "options": {"MODEL.RANDWIRE.REGIME": "small", "MODEL.RANDWIRE.NUM_NODES": 8},
    }
    path.write_text(yaml.safe_dump({**sweep, **keys}))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return load_sweep(write_sweep(tmp_path), tmp_path / "out")


@pytest.fixture
def trainer(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    return sys.executable, str(path)


def plan(run: Run, what: float | str) -> None:
    run.claim()
    (run.folder / "plan").write_text(json.dumps(what))


def starts(run: Run) -> int:
    path = run.folder / "starts"
    return len(path.read_text()) if path.exists() else 0


# -------------------------------------------------------------------------------------------------
# What a sweep is
# -------------------------------------------------------------------------------------------------


def test_figure_3_is_the_papers() -> None:
    """Wrong: a setting of the paper's text is missing, or one has larger networks than another."""
    runs = load_sweep(SWEEPS / "figure3.yaml", "out")
    generators = {run.setting.generator for run in runs}
    named = {"ER(0.2)", "BA(1)", "WS(4, 0.75)", "NAS(5)"}
    assert named | {f"WS({k}, 0)" for k in (2, 4, 6, 8)} <= generators
    assert len(generators) >= 17 and len(runs) == 5 * len(generators)
    assert {run.seed for run in runs} == {1, 2, 3, 4, 5}
    settings = {run.setting.generator: run.setting for run in runs}
    ws = settings["WS(4, 0.75)"]
    assert ws.channels == 78 and f"{ws.flops / 1e6:.0f}" == "584"
    # "the deviation of FLOPs is typically ±2% among … different generators" (§3.2)
    assert all(abs(setting.flops / ws.flops - 1) < 0.02 for setting in settings.values())


@pytest.mark.parametrize("name", ["figure3_cifar10", "figure6_shapes", "miniature"])
def test_the_smaller_sweeps_can_start(name: str) -> None:
    """Wrong: a config of ours is refused, or compares networks of other sizes."""
    settings = {run.setting for run in load_sweep(SWEEPS / f"{name}.yaml", "out")}
    flops = [setting.flops for setting in settings]
    assert len(settings) > 5 and max(flops) / min(flops) < 1.25


def test_figure_6_has_four_operations_of_the_same_complexity() -> None:
    """Wrong: an operation wins because its networks are larger."""
    runs = load_sweep(SWEEPS / "figure6.yaml", "out")
    settings = {(run.setting.generator, run.setting.node_op): run.setting for run in runs}
    generators = {generator for generator, _ in settings}
    operations = {"sep_conv3x3", "conv3x3", "max_pool3x3", "avg_pool3x3"}
    assert set(settings) == {(g, op) for g in generators for op in operations}
    ws = settings["WS(4, 0.75)", "sep_conv3x3"]
    assert ws.channels == 78
    # One C more or less is 6% of the multiply-adds of dense convolutions.
    assert all(abs(setting.flops / ws.flops - 1) < 0.035 for setting in settings.values())


def test_the_arguments_build_the_networks_that_are_counted(tmp_path: Path) -> None:
    """Wrong: the table says C and multiply-adds of one network, and another one is trained."""
    generators = ["WS(4, 0.75)", "WS(2, 0)", "BA(2)", "ER(0.2)", "NAS(5)"]
    path = write_sweep(tmp_path, generators=generators, node_ops=["conv3x3", "sep_conv3x3"])
    flops: dict[tuple[str, str], list[int]] = {}
    for run in load_sweep(path, tmp_path):
        cfg = classifier_config()
        assert run.arguments[0] == "--config-file"
        cfg.merge_from_file(run.arguments[1])
        cfg.merge_from_list(list(run.arguments[2:]))
        graph, params = parse_graph(run.setting.generator)
        setting = run.setting
        expected = NetworkGenerator("small", setting.channels, 8, graph, params, setting.node_op)
        assert spec_from_config(cfg) == expected(run.seed)
        assert run.seed == cfg.SEED and str(run.folder) == cfg.OUTPUT_DIR
        assert cfg.SOLVER.CHECKPOINTS_TO_KEEP == 1
        counted = complexity(expected(run.seed), 48, 48, 6).flops
        flops.setdefault((setting.generator, setting.node_op), []).append(counted)
        assert setting.flops in (mean(flops[setting.generator, setting.node_op]), setting.flops)
    settings = {run.setting for run in load_sweep(path, tmp_path)}
    for setting in settings:
        assert setting.flops == mean(flops[setting.generator, setting.node_op])


def test_multiply_adds_find_the_channels_of_each_generator(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, generators=["BA(5)", "WS(4, 0.75)"], multiply_adds=2e6)
    path.write_text(path.read_text().replace("channels: 8\n", ""))
    settings = {run.setting for run in load_sweep(path, tmp_path)}
    assert len({setting.channels for setting in settings}) == 2
    assert all(abs(setting.flops / 2e6 - 1) < 0.05 for setting in settings)


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"genrators": []}, r"unknown keys \['genrators'\]; known are"),
        ({"generators": []}, "the key 'generators' is missing or empty"),
        ({"generators": ["BA(1)", "BA(1)"]}, "without repetitions"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": [True]}, "seeds takes int; got True"),
        ({"evaluate": "no"}, "evaluate takes bool; got 'no'"),
        ({"multiply_adds": 1e6}, "exclude each other"),
        ({"node_ops": ["conv5x5"]}, "unknown node operation 'conv5x5'; known are"),
        ({"config": str(ROOT / "configs/imagenet/R_50_100ep.yaml")}, "a sweep is of RandWires"),
        ({"options": {"SEED": 7}}, "SEED is given by the sweep's seeds; change that"),
        ({"options": {"MODEL.RANDWIRE.CHANNELS": 9}}, "CHANNELS is given by the sweep's channels"),
        ({"options": {"OUTPUT_DIR": "out"}}, "OUTPUT_DIR is given by the sweep's --output"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    tmp_path: Path, keys: dict, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        load_sweep(write_sweep(tmp_path, **keys), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_is_not_mixed_in(tmp_path: Path, runs: list[Run]) -> None:
    """Wrong: after a change of the sweep, the table mixes old runs with new ones."""
    runs[0].claim()
    runs[0].check()
    options = {"SOLVER.MAX_ITER": 77, "MODEL.RANDWIRE.NUM_NODES": 12}
    sweep = write_sweep(tmp_path, options=options)
    changed = load_sweep(sweep, tmp_path / "out")
    with pytest.raises(ValueError, match=r"NUM_NODES: 12.*MAX_ITER: 77.*another --output"):
        changed[0].check()
    # The machine may change.
    load_sweep(write_sweep(tmp_path), tmp_path / "out", ["MODEL.DEVICE", "cuda"])[0].check()


def test_a_generator_of_ones_own_is_trained_through_its_script(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the trainings don't know what the script of the sweep has registered, and all fail."""

    def RING(num_nodes: int, seed: int, hops: int) -> networkx.Graph:
        return networkx.circulant_graph(num_nodes, range(1, hops + 1))

    script = tmp_path / "my_sweep.py"
    script.touch()
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setitem(GRAPH_REGISTRY._obj_map, "RING", RING)
    (run,) = {replace(runs[0], setting=replace(runs[0].setting, generator="RING(2)"))}
    command = compare_generators.training(run).command
    assert command == ("env", "RANDWIRE_D2_TOOL=pretrain", sys.executable, str(script))
    assert str(script) not in compare_generators.training(runs[0]).command
    called = []
    monkeypatch.setattr("randwire_d2.cli.pretrain.main", lambda: called.append("pretrain"))
    monkeypatch.setenv("RANDWIRE_D2_TOOL", "pretrain")
    with pytest.raises(SystemExit):
        compare_generators.main(["none.yaml"])
    assert called == ["pretrain"]
    script.unlink()
    with raises_one_line(ValueError, match="RING is your own.* in a script that registers it"):
        compare_generators.training(run)


def test_another_generator_of_ones_own_changes_no_run(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who registers one more has to train the others again."""
    runs[0].claim()
    monkeypatch.setitem(GRAPH_REGISTRY._obj_map, "RING", networkx.circulant_graph)
    monkeypatch.setitem(_C.MODEL.RANDWIRE, "RING", CfgNode({"HOPS": 2}))
    load_sweep(write_sweep(tmp_path), tmp_path / "out")[0].check()


# -------------------------------------------------------------------------------------------------
# Running it
# -------------------------------------------------------------------------------------------------


def test_local_runs_finish_fail_and_are_not_repeated(
    runs: list[Run], trainer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a failure ends the others or is lost, or more run at a time than were allowed."""
    monkeypatch.setattr("randwire_d2.experiments.trainings.POLL", 0.05)
    for run, what in zip(runs, (70.5, "fail", 60.25, 61.0)):
        assert run.status().state == "unfinished"
        plan(run, what)
    running: list[int] = []

    def watch() -> None:
        running.append(sum(run.status().state == "running" for run in runs))

    Local(jobs=2)([Training(run, trainer) for run in runs], watch)
    states = [run.status() for run in runs]
    assert [s.state for s in states] == ["finished", "failed", "finished", "finished"]
    assert [s.score for s in states] == [70.5, None, 60.25, 61.0]
    assert states[1].reason == "no more disk"
    assert max(running) <= 2
    assert [starts(run) for run in runs] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "given, count, expected",
    [
        (None, 4, ["0,1", "2,3"]),
        ("4,5,6,7", 4, ["4,5", "6,7"]),
        ("GPU-5a, GPU-0b,GPU-c1,GPU-d2", 4, ["GPU-5a,GPU-0b", "GPU-c1,GPU-d2"]),
        ("4,5,-1,6", 2, ["4,5", "4,5"]),  # CUDA reads no further than the first that is none
        ("MIG-a,MIG-b,MIG-c,MIG-d", 1, ["MIG-a,MIG-b", "MIG-c,MIG-d"]),
    ],
)
def test_trainings_get_none_but_their_own_gpus(
    monkeypatch: pytest.MonkeyPatch, given: str | None, count: int, expected: list[str]
) -> None:
    """Wrong: a sweep takes GPUs that CUDA_VISIBLE_DEVICES, or a scheduler, gave to others."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    local = Local(2, 2, visible_gpus())
    found = [local._environment(slot) for slot in range(2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": devices} for devices in expected]


@pytest.mark.parametrize(
    "device, numbers, said",
    [
        ("cuda", (1, 8), "error: --num-gpus 8: there are 4 (CUDA_VISIBLE_DEVICES 0,1,2,3)"),
        ("cuda", (2, 4), "warning: --jobs 2 × --num-gpus 4 are more than the 4 GPUs here"),
        ("cuda", (2, 2), ""),
        ("cpu", (2, 8), ""),
    ],
)
def test_more_gpus_than_there_are(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    numbers: tuple[int, int],
    said: str,
) -> None:
    """Wrong: a training gets one GPU twice, or two share it, without a word; or on a CPU, which
    has as many processes as one likes, it is refused."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(Local, "__call__", lambda *_: None)
    path, (jobs, num_gpus) = write_sweep(tmp_path), numbers
    given = ["--output", str(tmp_path / "out"), "--jobs", str(jobs), "--num-gpus", str(num_gpus)]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:  # at the latest because no run is finished
            runpy.run_path(str(TOOL))["main"]([str(path), *given, "MODEL.DEVICE", device])
    finally:
        signal.signal(signal.SIGTERM, before)
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    refused = "" if "4 of 4 runs are not finished" in str(ended.value) else str(ended.value)
    assert said in (refused + "".join(told)) and bool(said) == bool(refused or told)
    assert bool(refused) != (tmp_path / "out").exists(), "something was begun"


@pytest.mark.parametrize("number, state", [("SIGUSR2", "unfinished"), ("SIGKILL", "failed")])
def test_out_of_time_is_no_failure_and_out_of_memory_is(
    runs: list[Run], trainer: tuple[str, ...], number: str, state: str
) -> None:
    """Wrong: Slurm's time limit ends a sweep for good, or what ate all memory is tried for ever."""
    plan(runs[0], number)
    Training(runs[0], trainer)()
    assert runs[0].status().state == state
    assert ("killed by signal 9" in runs[0].status().reason) == (state == "failed")


def test_an_interrupted_run_is_killed_and_has_not_failed(
    runs: list[Run], trainer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: after a Ctrl-C trainings go on in the background, or count as failures."""
    monkeypatch.setattr("randwire_d2.experiments.trainings.POLL", 0.05)
    for run in runs:
        plan(run, "hang")

    def watch() -> None:
        if starts(runs[0]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Local(jobs=1)([Training(run, trainer) for run in runs], watch)
    assert [starts(run) for run in runs] == [1, 0, 0, 0]
    assert {run.status().state for run in runs} == {"unfinished"}


def test_a_run_that_another_sweep_trains_is_left_alone(
    runs: list[Run], trainer: tuple[str, ...]
) -> None:
    """Wrong: two processes write into one folder, as after a sweep was killed with SIGKILL."""
    plan(runs[0], 50.0)
    with open(runs[0].lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs[0].status().state == "running"
        Training(runs[0], trainer)()
        assert not starts(runs[0])
    Training(runs[0], trainer)()
    assert starts(runs[0]) == 1 and runs[0].status().score == 50.0


def test_a_sweep_that_leaves_runs_to_others_does_not_succeed(
    tmp_path: Path, runs: list[Run], trainer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: status 0 tells a script that all runs are finished."""
    monkeypatch.setattr(compare_generators, "training", lambda run: Training(run, trainer))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for run in runs:
        plan(run, 50.0)
    arguments = [str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out")]
    with open(runs[0].lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="1 of 4 runs are not finished.*same command again"):
            compare_generators.main(arguments)
    assert [starts(run) for run in runs] == [0, 1, 1, 1]
    compare_generators.main(arguments)
    assert starts(runs[0]) == 1


def test_disks_of_networks_may_lock_otherwise(
    runs: list[Run], trainer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a sweep ends with its first look at a run: on NFS, where who only reads a file can't
    lock it alone, or where there are no locks."""
    flock = fcntl.flock

    def nfs(file: IO[str], operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    def without(file: IO[str], operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    plan(runs[0], 50.0)
    with open(runs[0].lock, "w") as lock:
        flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", nfs)
        assert runs[0].status().state == "running"
    assert runs[0].status().state == "unfinished"
    monkeypatch.setattr(fcntl, "flock", without)
    Training(runs[0], trainer)()
    assert runs[0].status().score == 50.0


def test_the_lock_outlives_a_killed_sweep(runs: list[Run], trainer: tuple[str, ...]) -> None:
    """Wrong: the training that a killed sweep left behind is started a second time."""
    plan(runs[0], "hang")
    stop = threading.Event()
    thread = threading.Thread(target=Training(runs[0], trainer), args=(None, stop))
    thread.start()
    wait_until(lambda: starts(runs[0]) == 1)
    assert runs[0].status().state == "running"
    stop.set()
    thread.join()
    assert runs[0].status().state == "unfinished"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_slurm_jobs_have_what_trainings_need(tmp_path: Path, device: str) -> None:
    """Wrong: submitit's defaults, five minutes and one core for all processes and their workers;
    or a job on CPUs that waits for GPUs."""
    options = ["MODEL.DEVICE", device, "DATALOADER.NUM_WORKERS", "3"]
    runs = load_sweep(write_sweep(tmp_path), tmp_path / "out", options, num_gpus=2)
    args = compare_generators.parse_args(["x", "--num-gpus", "2", "--slurm", "mem_gb=20"])
    launch = compare_generators.launcher(args, runs)
    assert isinstance(launch, Slurm)
    needed = {"timeout_min": 1440, "cpus_per_task": 8, "mem_gb": 20}
    needed |= {"gpus_per_node": 2} if device == "cuda" else {}
    assert launch.queue.parameters == {"name": "x", **needed}


@pytest.mark.slow
def test_slurm_jobs_are_submitted_once_and_waited_for(
    tmp_path: Path,
    runs: list[Run],
    trainer: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: submitit is called in a way that it does not understand, or a job is sent twice."""
    monkeypatch.setattr("randwire_d2.experiments.trainings.POLL", 0.1)
    cluster = FakeSlurm(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    for run, what in zip(runs, (70.5, "fail", 60.25)):
        plan(run, what)
    trainings = [Training(run, trainer) for run in runs]
    slurm = Slurm(Queue(tmp_path / "slurm", {"timeout_min": 5, "slurm_partition": "gpu"}))
    slurm(trainings[:2], lambda: None)
    states = [run.status().state for run in runs]
    assert states == ["finished", "failed", "unfinished", "unfinished"]
    assert "--partition=gpu" in cluster.script(0)

    # A job in the queue, of a tool that was interrupted while it waited.
    (runs[2].folder / "slurm_job").write_text("99")
    cluster.pretend(99)
    assert slurm.job(trainings[2]) is not None
    assert len(list(cluster.queue.iterdir())) == 2


@pytest.mark.slow
def test_the_tool_from_the_first_run_to_the_picture(tmp_path: Path) -> None:
    """Wrong: a failure is lost or repeated unasked, or what is finished is trained again."""
    tiny = {"MODEL.RANDWIRE.NUM_NODES": 6, "SOLVER.EPOCHS": 0, "SOLVER.MAX_ITER": 2,
            "SOLVER.IMS_PER_BATCH": 4, "TEST.EVAL_PERIOD": 0}  # fmt: skip
    sweep = write_sweep(tmp_path, seeds=[1], options={"MODEL.RANDWIRE.REGIME": "small", **tiny})
    out, log = tmp_path / "out", tmp_path / "log"
    first, second = (run.folder for run in load_sweep(sweep, out))
    second.mkdir(parents=True)
    (second / "last_checkpoint").write_text("model_0000001.pth")
    (second / "model_0000001.pth").write_bytes(b"a broken disk")

    tool = Tool(TOOL.name, sweep, "--output", out, "--jobs", 2, log=log)
    assert tool.wait() == 1, tool.said
    assert "some runs failed; --retry tries them again" in tool.said
    assert "Not finished (1):" in tool.said and f"- {second}: failed at 0%" in tool.said
    trained = (first / "model_final.pth").stat().st_mtime_ns

    (second / "last_checkpoint").unlink()
    tool = Tool(TOOL.name, sweep, "--output", out, log=log)
    assert tool.wait() == 1
    assert "failed at 0%" in tool.said, "tried again unasked"
    said = run_tool(TOOL.name, sweep, "--output", out, "--retry", log=log)
    assert "Not finished" not in said
    assert (first / "model_final.pth").stat().st_mtime_ns == trained
    results = json.loads((out / "results.json").read_text())
    assert [len(setting["runs"]) for setting in results["settings"]] == [1, 1]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text() in said

    # What the sweep has trained is what the other tools read.
    figure, table = tmp_path / "damage.png", tmp_path / "table.md"
    arguments = [str(first), str(second), "--images", "6", "--output", str(figure)]
    runpy.run_path(str(TOOL.with_name("damage_graph.py")))["main"](arguments)
    assert figure.read_bytes().startswith(b"\x89PNG")
    arguments = [str(out), "--output", str(table)]
    runpy.run_path(str(TOOL.with_name("collect_results.py")))["main"](arguments)
    assert table.read_text().count("randwire_shapes_cls_val") == 2


def test_the_tool_is_interrupted_and_goes_on(tmp_path: Path, runs: list[Run]) -> None:
    """Wrong: a Ctrl-C leaves trainings behind, or the next start does not go on with them."""
    # The tool beside a stand-in of the tool that it starts.
    shutil.copy(TOOL, tmp_path)
    (tmp_path / "pretrain_imagenet.py").write_text(TRAINER)
    path, log = write_sweep(tmp_path, generators=["BA(1)"], seeds=[1]), tmp_path / "log"
    (run,) = load_sweep(path, tmp_path / "out")
    plan(run, "hang")
    tool = Tool(tmp_path / TOOL.name, path, "--output", tmp_path / "out", log=log)
    wait_until(lambda: starts(run) == 1)
    tool.send(signal.SIGINT)
    assert tool.wait() == 130, tool.said
    assert "Interrupted; give the same command again to continue" in tool.said
    assert f"- {run.folder}: unfinished" in tool.said
    assert run.status().state == "unfinished"

    plan(run, 60.0)
    said = run_tool(tmp_path / TOOL.name, path, "--output", tmp_path / "out", log=log)
    assert "| 60.0 " in said and run.status().state == "finished", said
    assert starts(run) == 2


# -------------------------------------------------------------------------------------------------
# Table and pictures
# -------------------------------------------------------------------------------------------------


def finish(run: Run, top1: float) -> None:
    run.claim()
    (run.folder / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 10\n")
    line = json.dumps({"iteration": 9, "classification/top1": top1})
    (run.folder / "metrics.json").write_text(line)
    (run.folder / "model_final.pth").touch()


@pytest.fixture
def finished(tmp_path: Path) -> list[Run]:
    """Four generators, two operations, two seeds; one run has failed, and one is not finished."""
    path = write_sweep(
        tmp_path,
        generators=["WS(4, 0)", "WS(4, 0.75)", "BA(1)", "ER(0.2)"],
        node_ops=["sep_conv3x3", "conv3x3"],
    )
    runs = load_sweep(path, tmp_path / "out")
    for i, run in enumerate(runs[:-2]):
        finish(run, 60 + i * 7 % 10)
    runs[-1].claim()
    runs[-1].failure.write_text("exit status 1\nTraceback\nValueError: diverged\n\n")
    return runs


def test_the_table_has_every_setting_and_every_missing_run(finished: list[Run]) -> None:
    """Wrong: a failed run is dropped silently, a mean is of other runs, or a row is missing."""
    results = collect(finished)
    table = to_markdown(results)
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(results) == 8
    # Figure 3's order: the non-random at the right.
    assert [result.group for result in results][-2:] == ["WS, P=0"] * 2
    assert "Not finished (2):" in table
    assert "unfinished at 0%" in table and "failed at 0%: ValueError: diverged" in table
    row = next(row for row in rows if "WS(4, 0.75)" in row and "| sep_conv3x3" in row)
    chosen = ("WS(4, 0.75)", "sep_conv3x3")
    runs = [r for r in finished if (r.setting.generator, r.setting.node_op) == chosen]
    tops = [run.status().score for run in runs]
    assert "2 of 2" in row and f"{mean(tops):.1f} ± " in row and "73.8" in row
    data = json.loads(to_json(results))
    assert sum(r["state"] == "failed" for s in data["settings"] for r in s["runs"]) == 1


def test_a_damaged_config_is_named(finished: list[Run]) -> None:
    """Wrong: a finished run is unfinished at 0%, and nobody knows why."""
    (finished[0].folder / "config.yaml").write_text("SOLVER: {")
    assert "config.yaml" in finished[0].status().reason
    assert f"{finished[0].folder}: unfinished at 0%: " in to_markdown(collect(finished))


def test_pearson_is_that_of_the_means(finished: list[Run]) -> None:
    """Wrong: a correlation over runs, or over generators that one series does not have."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in finished:
        if run.status().score is not None:
            of_op = found.setdefault(run.setting.node_op, {})
            of_op.setdefault(run.setting.generator, []).append(run.status().score)
    a, b = found.values()
    common = [generator for generator in a if generator in b]
    expected = correlation([mean(a[g]) for g in common], [mean(b[g]) for g in common])
    ((first, second, r, n),) = pearson(collect(finished))
    assert {first, second} == set(found) and n == len(common)
    assert r == pytest.approx(expected)


def test_bars_are_the_means_and_points_the_series(finished: list[Run]) -> None:
    """Wrong: a picture that shows other numbers than the table."""
    results = [r for r in collect(finished) if r.setting.node_op == "sep_conv3x3"]
    ax = plot_bars(results).axes[0]
    heights = [bar.get_y() + bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([mean(r.scores) for r in results if r.scores])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["4, 0.75", "1", "0.2", "4, 0"]
    assert {"WS", "BA", "ER", "WS, P=0"} <= {t.get_text() for t in ax.texts}

    ax = plot_operations(collect(finished)).axes[0]
    columns = [t.get_text() for t in ax.get_xticklabels()]
    for line in ax.lines:
        for x, y in zip(line.get_xdata(), line.get_ydata()):
            result = next(r for r in collect(finished) if r.setting.generator == columns[int(x)]
                          and r.setting.node_op == line.get_label())  # fmt: skip
            assert y == pytest.approx(mean(result.scores))
    first = ax.lines[0].get_ydata()
    assert list(first) == sorted(first, reverse=True), "sorted by the first series"


def test_a_detector_that_finds_nothing_is_left_out_of_the_picture(tmp_path: Path) -> None:
    """Wrong: its AP, which is NaN, ends the sweep with a traceback, or makes a correlation NaN."""
    generators = ["WS(4, 0.75)", "BA(1)", "ER(0.2)", "ER(0.5)"]
    for node_ops in (["sep_conv3x3"], ["sep_conv3x3", "conv3x3"]):
        sweep = write_sweep(tmp_path, generators=generators, node_ops=node_ops)
        runs = load_sweep(sweep, tmp_path / str(len(node_ops)))
        for i, run in enumerate(runs):
            finish(run, 60 + i % 4 if i else math.nan)
        found = report(runs)
        assert "| –" in found.table and "nan over" not in found.table
        first = json.loads(found.data, parse_constant=pytest.fail)["settings"][0]["runs"][0]
        assert (first["state"], first["score"]) == ("finished", None)
        assert found.figure is not None
        labels = [text.get_text() for text in found.figure.axes[0].get_xticklabels()]
        assert len(labels) == 3 or len(node_ops) == 2
    assert "over 3 generators" in found.table


def test_channels_need_no_network_of_the_configs_own(tmp_path: Path) -> None:
    """Wrong: with N=4, they are refused because the config's WS(4, 0.75) has no such graph."""
    options = {"MODEL.RANDWIRE.REGIME": "small", "MODEL.RANDWIRE.NUM_NODES": 4}
    sweep = write_sweep(tmp_path, generators=["BA(1)", "ER(0.5)"], options=options)
    assert len(load_sweep(sweep, tmp_path / "out")) == 4


def test_nothing_finished_has_a_table_and_no_picture(runs: list[Run]) -> None:
    found = report(runs)
    assert "Not finished (4):" in found.table and found.figure is None
