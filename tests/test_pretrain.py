"""tools/pretrain_imagenet.py as users run it: real processes, killed with SIGKILL and resumed.

The order of images, augmentation, dropout and edge dropping are random, and every run that is
resumed must end with what the run that nobody disturbed ended with, to the last bit.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import draw_image_folders, last_metrics, run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools/pretrain_imagenet.py"
# Seven epochs of 44 files, of which two are broken; an iteration takes about 10 ms.
ITERATIONS = 38

# Kills the process, or its whole group, the moment before it opens or renames a certain file for
# the n-th time: on every machine at the same point of the program, in it or in a loader's worker.
KILLER = """
import os, signal, sys

event, part, left, victim = os.environ["KILL_AT"].split()
left = int(left)

def watch(name, args):
    global left
    if name == event and any(part in a for a in args if isinstance(a, str)):
        left -= 1
        if not left:
            os.kill(os.getpid() if victim == "process" else 0, signal.SIGKILL)

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw_image_folders(root, val=5)
    for broken in ("train/a/cut.jpg", "train/c/cut.jpg", "val/b/cut.jpg"):
        (root / broken).write_bytes(b"\xff\xd8\xff")
    return root


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes every Python process with it on its path watch for its moment."""
    folder = tmp_path_factory.mktemp("killer")
    (folder / "sitecustomize.py").write_text(KILLER)
    return folder


def command(
    folders: Path, output: Path, *options: object, ranks: int = 1, flags: tuple[str, ...] = ()
) -> list[str]:
    several = ["--num-gpus", str(ranks), "--dist-url", "auto"] if ranks > 1 else []
    scope = "batch" if ranks > 1 else "process"
    return [
        sys.executable, str(TOOL),
        "--config-file", str(ROOT / "configs/imagenet/randwire_c78_250ep.yaml"), *several, *flags,
        "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "6",
        "MODEL.RANDWIRE.EDGE_DROP_PROB", "0.5", "MODEL.RANDWIRE.EDGE_DROP_SCOPE", scope,
        "MODEL.CLASSIFIER.DROPOUT", "0.5",
        "MODEL.CLASSIFIER.NUM_CLASSES", "3",
        "DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders / 'val'}',)",
        "INPUT.TRAIN_CROP_SIZE", "32", "INPUT.TEST_CROP_SIZE", "32", "SOLVER.EPOCHS", "0",
        "SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", str(ITERATIONS),
        "SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(output),
        *map(str, options),
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def train(
    folders: Path, output: Path, *, workers: int, ranks: int = 1, flags: tuple[str, ...] = ()
) -> str:
    """Train to the end; returns the log."""
    options = ("DATALOADER.NUM_WORKERS", workers)
    return run(command(folders, output, *options, ranks=ranks, flags=flags), env=environment())


def train_until(
    moment: str, killer: Path, folders: Path, output: Path, *, workers: int, ranks: int = 1
) -> str:
    """Resume the training, and let it be killed at "EVENT FILE COUNT VICTIM"; returns the log."""
    event, file, *rest = moment.split()
    moment = " ".join([event, f"{folders / file}/" if file == "train" else file, *rest])
    options = ("DATALOADER.NUM_WORKERS", workers)
    done = subprocess.run(
        command(folders, output, *options, ranks=ranks, flags=("--resume",)),
        env=environment(KILL_AT=moment, PYTHONPATH=str(killer)),
        start_new_session=True,  # the group that is killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if moment.endswith("group"):
        assert done.returncode == -signal.SIGKILL, done.stdout[-3000:]
    else:  # one of several: the others must notice
        assert done.returncode > 0, done.stdout[-3000:]
    assert not (output / "model_final.pth").exists()
    return done.stdout


def checkpoints(output: Path) -> dict[str, Any]:
    """All that a run saved, by file: weights, momentum, schedule, iteration, wiring."""
    return {p.name: torch.load(p, weights_only=True) for p in sorted(output.glob("model_*.pth"))}


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """To the bit."""
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


def first_iteration(log: str) -> int:
    (found,) = re.findall(r"Starting training from iteration (\d+)", log)
    return int(found)


def accuracy(output: Path) -> dict[str, float]:
    metrics = last_metrics(output)
    return {k: v for k, v in metrics.items() if k.startswith("classification/")}


@pytest.fixture(scope="module")
def undisturbed(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and the log of a run of one process, without workers."""
    output = tmp_path_factory.mktemp("undisturbed")
    return output, train(folders, output, workers=0)


def test_what_is_compared_is_there(undisturbed: tuple[Path, str]) -> None:
    """Else the other tests compare nothing; and training learns, so weights and momentum move."""
    output, log = undisturbed
    files = checkpoints(output)
    assert list(files) == [f"model_{i:07}.pth" for i in range(4, 38, 5)] + ["model_final.pth"]
    first, final = files["model_0000004.pth"], files["model_final.pth"]
    assert (first["iteration"], final["iteration"]) == (4, 37)
    assert {"model", "trainer", "randwire", "preprocessing"} <= final.keys()
    buffers = str(final).count("momentum_buffer")
    assert buffers == sum("running" not in k and "tracked" not in k for k in final["model"])
    with pytest.raises(AssertionError):
        assert_equal(first["model"], final["model"])
    assert "training images could not be read, and were replaced" in log
    assert accuracy(output)["classification/unreadable"] == 1


def test_a_run_killed_at_chosen_moments_ends_the_same(
    undisturbed: tuple[Path, str], folders: Path, killer: Path, tmp_path: Path
) -> None:
    """One worker, always: at the start, around a checkpoint, amid an epoch, and at the very end."""
    moments = [
        ("open train 3 group", 0),
        # The first checkpoint is written, but not under its name; then it is, but not marked.
        ("os.rename model_0000004.pth 1 group", 0),
        ("os.rename last_checkpoint 1 group", 0),
        # The worker reads ahead: the tenth batch, of the second epoch.
        ("open train 80 group", 0),
        ("os.rename model_final.pth 1 group", 5),
    ]
    for moment, start in moments:
        log = train_until(moment, killer, folders, tmp_path, workers=1)
        assert first_iteration(log) == start, moment
    log = train(folders, tmp_path, workers=1, flags=("--resume",))
    assert first_iteration(log) == 35
    assert_equal(checkpoints(tmp_path), checkpoints(undisturbed[0]))
    assert accuracy(tmp_path) == accuracy(undisturbed[0])


def test_a_run_killed_at_random_moments_ends_the_same(
    undisturbed: tuple[Path, str], folders: Path, killer: Path, tmp_path: Path
) -> None:
    """Two workers, then none: killed from outside, and by the loss of a worker."""
    draw = random.Random(0)
    for flags in ((), ("--resume",)):
        options = ("DATALOADER.NUM_WORKERS", 2)
        running = subprocess.Popen(
            command(folders, tmp_path, *options, flags=flags),
            env=environment(),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert running.stdout is not None
        try:
            for line in running.stdout:
                if "Starting training" in line:
                    time.sleep(draw.uniform(0, 0.5))
                    break
        finally:
            os.killpg(running.pid, signal.SIGKILL)  # a run that was faster is as good a test
            running.communicate()
    if not (tmp_path / "model_final.pth").exists():
        log = train_until("open train 17 process", killer, folders, tmp_path, workers=2)
        assert "DataLoader worker" in log and "killed" in log
    train(folders, tmp_path, workers=0, flags=("--resume",))
    assert_equal(checkpoints(tmp_path), checkpoints(undisturbed[0]))
    assert accuracy(tmp_path) == accuracy(undisturbed[0])


def test_two_processes_one_of_them_killed_end_the_same(
    undisturbed: tuple[Path, str], folders: Path, killer: Path, tmp_path: Path
) -> None:
    """They train one model on the images that one process would read, and test it together."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log = train(folders, whole, workers=0, ranks=2)
    said = r"(\d+) training images could not be read"
    assert re.findall(said, log) == re.findall(said, undisturbed[1]), "other images, or a count"

    # A rank of its own accord: the other, and the tool, end, and nothing waits for ever.
    log = train_until("open train 31 process", killer, folders, resumed, workers=0, ranks=2)
    assert "World size: 2" in log
    log = train(folders, resumed, workers=1, ranks=2, flags=("--resume",))
    assert first_iteration(log) == 5
    assert_equal(checkpoints(resumed), checkpoints(whole))
    assert accuracy(resumed) == accuracy(whole)

    # One process finds what two found; of another wiring, it takes the checkpoint's.
    expected = [["classification", k.split("/")[1], v, 1e-6] for k, v in accuracy(whole).items()]
    run(command(
        folders, tmp_path / "evaluated", "MODEL.WEIGHTS", whole / "model_final.pth",
        "MODEL.RANDWIRE.SEED", 5, "TEST.EXPECTED_RESULTS", expected, "DATALOADER.NUM_WORKERS", 1,
        flags=("--eval-only", "--config-from-weights"),
    ), env=environment())  # fmt: skip


def test_a_data_set_of_broken_images_ends_the_run(folders: Path, tmp_path: Path) -> None:
    """With workers too: an error that names the folder, and no search without an end."""
    draw_image_folders(tmp_path, train=2, val=1)
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"")
    done = subprocess.run(
        command(tmp_path, tmp_path / "output", "DATALOADER.NUM_WORKERS", 2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 1
    assert "100 images in a row can't be read" in done.stdout
    assert str(tmp_path / "train") in done.stdout


def test_an_error_of_the_user_is_one_line_and_leaves_nothing(folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = subprocess.run(
        command(folders, output, "MODEL.CLASSIFIER.NUM_CLASSES", 1000),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "arn" not in line]
    assert [line for line in lines if "NUM_CLASSES is 1000" in line] == lines[-1:]
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_measure_input_prints_both_rates(folders: Path, tmp_path: Path) -> None:
    """The tool's flag, with a tenth of a second in place of ten."""
    shorter = (
        "import runpy, sys\n"
        "from randwire_d2.classification import measure_input\n"
        "measure_input.__defaults__ = (0.1,)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    python, tool, *arguments = command(
        folders, tmp_path, "DATALOADER.NUM_WORKERS", 1, flags=("--measure-input",)
    )
    start = f"import sys\nsys.argv[0] = {tool!r}\n"
    log = run([python, "-c", start + shorter, *arguments], env=environment())
    (line,) = (line for line in log.splitlines() if "The input feeds" in line)
    assert re.search(r"feeds \d+ images/s \(1 × 1 workers\), training alone consumes \d+", line)
