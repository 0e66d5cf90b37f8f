"""Training tools as Slurm jobs: what they submit, their tasks, the time limit, and refusals."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from helpers import ROOT, assert_equal, raises_one_line, run_tool, wait_until
from launching import TOOL, arguments, command, final

from randwire_d2.cli import pretrain, train, train_lazy
from randwire_d2.engine.processes.slurm import FOLDER, Queue, Task, parse_parameters

Submitted = Callable[..., tuple[dict[str, object], Task]]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    slurm = FakeSlurm(tmp_path)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm
    slurm.end()


# -------------------------------------------------------------------------------------------------
# What is submitted
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """Calls a tool, and returns the parameters and the task that it has handed to a queue."""

    def call(main: Callable[..., None], *given: object) -> tuple[dict[str, object], Task]:
        found = []

        def submit(queue: Queue, calls: dict[Path, Task]) -> list[object]:
            found.append((queue.parameters, *calls.values()))
            raise ValueError("enough")

        monkeypatch.setattr(Queue, "submit", submit)
        with pytest.raises(SystemExit, match="enough"):
            main(list(map(str, given)))
        (only,) = found
        return only

    return call


def test_a_job_has_what_the_command_line_asks_for(
    submitted: Submitted, folders: Path, tmp_path: Path
) -> None:
    """Wrong: fewer GPUs or processes than asked for, a loader whose workers share one core, a job
    that ends with one of its tasks still waiting, or another command than was given."""
    flags = ("--slurm", "2×4", "--partition", "gpu", "--time-limit", 600)
    flags += ("--slurm-option", "mem_gb=200", "--slurm-option", "slurm_account=vision")
    given = list(map(str, arguments(folders, tmp_path / "run", *flags, workers=3)))
    parameters, task = submitted(pretrain.main, *given)
    expected = {
        "nodes": 2, "tasks_per_node": 4, "cpus_per_task": 4, "timeout_min": 600, "mem_gb": 200,
        "slurm_partition": "gpu", "slurm_account": "vision",
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }  # fmt: skip
    assert expected.items() <= parameters.items() and "gpus_per_node" not in parameters
    assert list(task.arguments) == given


LAZY = [
    "train.init_checkpoint=", "model.backbone.bottom_up.norm=GN",
    "model.backbone.bottom_up.freeze_at=0",
    "dataloader.train.dataset.names=randwire_shapes_train",
    "dataloader.test.dataset.names=randwire_shapes_val", "model.roi_heads.num_classes=6",
]  # fmt: skip


@pytest.mark.parametrize(
    ("main", "config", "options"),
    [
        (pretrain.main, "shapes/randwire_pretrain.yaml", ["MODEL.DEVICE", "cuda"]),
        (train.main, "faster_rcnn_randwire_shapes.yaml", ["MODEL.DEVICE", "cuda"]),
        (train_lazy.main, "lazy/faster_rcnn_randwire_c109_fpn_1x.py", LAZY),
    ],
)
def test_what_submits_needs_no_gpu(
    main: Callable[..., None],
    config: str,
    options: list[str],
    submitted: Submitted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a training tool has no --slurm, or looks for the job's GPUs where it is submitted."""
    monkeypatch.chdir(tmp_path)
    given = ["--config-file", ROOT / "configs" / config, "--slurm", "1x8", *options]
    parameters, _ = submitted(main, *given)
    assert parameters["gpus_per_node"] == parameters["tasks_per_node"] == 8


def test_submitits_parameters_have_their_types() -> None:
    """Wrong: "False" is true, an account loses its zeros, or a list is its letters."""
    read = {
        "mem_gb=200": 200, "slurm_use_srun=False": False, "slurm_account=007": "007",
        "slurm_exclude=3,4": "3,4", "slurm_time=1-00:00": "1-00:00", "slurm_constraint=a&b": "a&b",
        "slurm_setup=['module load cuda']": ["module load cuda"],
        "slurm_additional_parameters={'gres': 'gpu:a100:2'}": {"gres": "gpu:a100:2"},
    }  # fmt: skip
    assert list(parse_parameters(read).values()) == list(read.values())


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (("--slurm", "1x2"), {"PATH": ""}, "--slurm 1x2: there is no sbatch here"),
        (("--slurm", "1x2"), {"RANK": "0"}, "torchrun has started the processes already"),
        (("--slurm", "1x3"), {}, "IMS_PER_BATCH 8 is the batch of all 3 processes"),
        (("--slurm", "1x2", "--num-gpus", "2"), {}, "leave out --num-gpus and --num-machines"),
        (("--slurm", "1x2", "--time-limit", "9"), {}, "--time-limit 9: at least 10 minutes"),
        (("--slurm", "1x2", "--slurm-option", "mem"), {}, "NAME=VALUE; got 'mem'"),
        (("--slurm", "1x2", "--slurm-option", "memory=3"), {}, "Slurm: .*memory"),
        (("--partition", "gpu"), {}, "--partition goes with --slurm NODES×GPUS"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    flags: tuple[str, ...],
    environment: dict[str, str],
    expected: str,
    cluster: FakeSlurm,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a traceback, or a job that fails hours later, when it is its turn."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with raises_one_line(SystemExit, match=expected):
        pretrain.main(list(map(str, arguments(folders, tmp_path / "run", *flags))))
    assert not any(cluster.queue.iterdir())


@pytest.mark.parametrize("text", ["2", "0x8", "2x", "x8", "2x8x1", "two"])
def test_slurm_takes_nodes_and_gpus(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--slurm", text])
    assert "is not NODES×GPUS, such as 2x8" in capsys.readouterr().err


def test_a_folder_has_one_job(cluster: FakeSlurm, folders: Path, tmp_path: Path) -> None:
    """Wrong: two jobs write into one OUTPUT_DIR."""
    waiting = tmp_path / "run" / FOLDER / "job"
    waiting.parent.mkdir(parents=True)
    waiting.write_text("99")
    cluster.pretend(99)
    with pytest.raises(SystemExit, match=r"job 99 has the same OUTPUT_DIR .* \(scancel 99\)"):
        pretrain.main(list(map(str, arguments(folders, tmp_path / "run", "--slurm", "1x1"))))
    assert len(list(cluster.queue.iterdir())) == 1


def test_a_job_that_was_killed_bars_no_other(cluster: FakeSlurm, tmp_path: Path) -> None:
    """Wrong: on a cluster without accounting, where sacct knows no job, it waits or runs for ever:
    no other is submitted in its OUTPUT_DIR, and a sweep never ends."""
    (tmp_path / "job").write_text("99_1")
    queue = Queue(tmp_path / "submitit")
    cluster.pretend(99)
    assert queue.job(tmp_path / "job") is not None
    cluster.pretend(99, ended=True)
    assert queue.job(tmp_path / "job") is None


# -------------------------------------------------------------------------------------------------
# Jobs
# -------------------------------------------------------------------------------------------------


def submit(cluster: FakeSlurm, tool: str, given: list[object], log: Path) -> None:
    environment = f"import os; os.environ.update({cluster.environment!r})"
    said = run_tool(tool, *given, log=log, before=environment)
    assert "Slurm's job 0 is submitted" in said


# The first process of a job waits for a signal ahead of its fortieth image: in its tenth iteration,
# and not again in what is left of the training after that.
HOLD = """
import os, signal, sys
left = 40
def hold(name, args):
    global left
    if name == "open" and str(args[0]).startswith(os.environ["IMAGES"]):
        left -= 1
        if not left:
            told, tell = os.pipe()
            os.set_blocking(tell, False)
            signal.set_wakeup_fd(tell)
            open(os.environ["HELD"], "w").close()
            os.read(told, 1)
            signal.set_wakeup_fd(-1)
if os.environ.get("SLURM_PROCID") == "0":
    sys.addaudithook(hold)
"""


@pytest.mark.slow
def test_a_job_whose_time_is_up_goes_on(
    cluster: FakeSlurm, folders: Path, two: Path, tmp_path: Path
) -> None:
    """Wrong: the job's processes train models of their own, what was trained since the last
    checkpoint is lost, the job ends for good, or begins anew."""
    output = tmp_path / "run"
    held, hook = tmp_path / "held", tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(HOLD)
    cluster.environment |= {
        "PYTHONPATH": f"{hook.parent}:{ROOT}", "IMAGES": f"{folders / 'train'}/", "HELD": str(held),
    }  # fmt: skip
    given = command("Slurm", folders, output, slurm="2x1")
    submit(cluster, TOOL, given, tmp_path / "log")
    wait_until(held.exists)
    cluster.send(signal.SIGUSR2, 0)
    wait_until((output / "model_final.pth").exists)
    cluster.wait(0)
    first, second = ((output / FOLDER / f"0_{i}_log.out").read_text() for i in range(2))
    (done,) = re.findall(r"SIGUSR1 ends the training after (\d+) iterations", first)
    assert re.findall(r"Starting training from iteration (\d+)", first) == ["0", done]
    assert int(done) == 10 and "Starting training" not in second
    assert_equal(final(output), final(two))


@pytest.mark.slow
def test_a_job_that_fails_ends_all_its_tasks(
    cluster: FakeSlurm, folders: Path, tmp_path: Path
) -> None:
    """Wrong: the other tasks wait for the one that was killed until their time is up."""
    output = tmp_path / "run"
    given = arguments(folders, output, "--slurm", "1x2", workers=1)
    submit(cluster, TOOL, [*given, "SOLVER.MAX_ITER", 10**6], tmp_path / "log")
    wait_until(lambda: (output / "model_0000004.pth").exists())
    cluster.send(signal.SIGKILL, 0, task=1)
    cluster.wait(0)
    assert not (cluster.queue / "0" / "restarts").exists()
