"""tools/pretrain_imagenet.py in processes of its own, killed with SIGKILL and resumed.

The order of images, augmentation, dropout and edge dropping are random, and every run that is
resumed must end with what the run that nobody disturbed ended with, to the last bit.
"""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Tool, assert_equal, draw_image_folders, last_metrics, run_tool
from launching import C78, TOOL, small

from randwire_d2.data.classification.shard_writer import make_shards

# Five epochs of 44 files, of which two are broken.
ITERATIONS = 28


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw_image_folders(root, val=5)
    for broken in ("train/a/cut.jpg", "train/c/cut.jpg", "val/b/cut.jpg"):
        (root / broken).write_bytes(b"\xff\xd8\xff")
    return root


def arguments(
    folders: Path, output: Path, *options: object, ranks: int = 1, flags: tuple[str, ...] = ()
) -> list[object]:
    several = ["--num-gpus", ranks, "--dist-url", "auto"] if ranks > 1 else []
    scope = "batch" if ranks > 1 else "process"
    return [
        "--config-file", C78, *several, *flags, *small(folders),
        "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5, "MODEL.RANDWIRE.EDGE_DROP_SCOPE", scope,
        "MODEL.CLASSIFIER.DROPOUT", 0.5, "INPUT.RAND_AUGMENT.NUM_OPS", 1,
        "INPUT.MIXUP_ALPHA", 0.2, "INPUT.CUTMIX_ALPHA", 1.0, "SOLVER.MAX_ITER", ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", output, *options,
    ]  # fmt: skip


def log_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


def train(
    folders: Path, output: Path, *, workers: int, ranks: int = 1, flags: tuple[str, ...] = ()
) -> str:
    """Train to the end; returns the log."""
    options = ("DATALOADER.NUM_WORKERS", workers)
    given = arguments(folders, output, *options, ranks=ranks, flags=flags)
    return run_tool(TOOL, *given, log=log_of(output))


def train_until(moment: str, folders: Path, output: Path, *, workers: int, ranks: int = 1) -> str:
    """Resume the training, and let it be killed at a moment; returns the log."""
    event, file, *rest = moment.split()
    moment = " ".join([event, f"{folders / file}/" if file == "train" else file, *rest])
    options = ("DATALOADER.NUM_WORKERS", workers)
    given = arguments(folders, output, *options, ranks=ranks, flags=("--resume",))
    tool = Tool(TOOL, *given, log=log_of(output), kill_at=moment)
    if moment.endswith("group"):
        assert tool.wait() == -signal.SIGKILL, tool.said[-3000:]
    else:  # one of several: the others must notice
        assert tool.wait() > 0, tool.said[-3000:]
    assert not (output / "model_final.pth").exists()
    return tool.said


def checkpoints(output: Path) -> dict[str, Any]:
    """All that a run saved, by file, but for its config, which names the number of workers."""
    files = {p.name: torch.load(p, weights_only=True) for p in sorted(output.glob("model_*.pth"))}
    for file in files.values():
        assert "NUM_CLASSES: 3" in file.pop("config")
    return files


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


@pytest.mark.slow
def test_what_is_compared_is_there(undisturbed: tuple[Path, str]) -> None:
    """Wrong: the other tests compare nothing, or training does not move weights and momentum."""
    output, log = undisturbed
    files = checkpoints(output)
    periodic = [f"model_{i:07}.pth" for i in range(4, ITERATIONS, 5)]
    assert list(files) == [*periodic, "model_best.pth", "model_final.pth"]
    first, final = files["model_0000004.pth"], files["model_final.pth"]
    assert (first["iteration"], final["iteration"]) == (4, ITERATIONS - 1)
    assert {"model", "trainer", "randwire", "preprocessing"} <= final.keys()
    assert final["class_names"] == ["a", "b", "c"]
    buffers = str(final).count("momentum_buffer")
    assert buffers == sum("running" not in k and "tracked" not in k for k in final["model"])
    with pytest.raises(AssertionError):
        assert_equal(first["model"], final["model"])
    assert "training images could not be read, and were replaced" in log
    assert accuracy(output)["classification/unreadable"] == 1


@pytest.mark.slow
def test_a_run_killed_at_chosen_moments_ends_the_same(
    undisturbed: tuple[Path, str], folders: Path, tmp_path: Path
) -> None:
    """Wrong: with a worker, a run that was killed around a checkpoint, amid an epoch or at the very
    end ends with other weights than one that was not."""
    moments = [
        # The first checkpoint is written, but not under its name; then it is, but not marked.
        ("os.rename model_0000004.pth 1 group", 0),
        ("os.rename last_checkpoint 1 group", 0),
        # The worker reads ahead: the tenth batch, of the second epoch.
        ("open train 80 group", 0),
        ("os.rename model_final.pth 1 group", 5),
    ]
    output = tmp_path / "run"
    for moment, start in moments:
        log = train_until(moment, folders, output, workers=1)
        assert first_iteration(log) == start, moment
    log = train(folders, output, workers=1, flags=("--resume",))
    assert first_iteration(log) == 25
    assert_equal(checkpoints(output), checkpoints(undisturbed[0]))
    assert accuracy(output) == accuracy(undisturbed[0])


@pytest.mark.slow
def test_a_run_that_lost_a_worker_ends_the_same_with_none(
    undisturbed: tuple[Path, str], folders: Path, tmp_path: Path
) -> None:
    """Wrong: training hangs when one of two workers is gone, or their number changes it."""
    output = tmp_path / "run"
    log = train_until("open train 50 process", folders, output, workers=2)
    assert "a worker that reads images was killed" in log
    log = train(folders, output, workers=0, flags=("--resume",))
    assert first_iteration(log) > 0
    assert_equal(checkpoints(output), checkpoints(undisturbed[0]))
    assert accuracy(output) == accuracy(undisturbed[0])


@pytest.mark.slow
def test_two_processes_one_of_them_killed_end_the_same(
    undisturbed: tuple[Path, str], folders: Path, tmp_path: Path
) -> None:
    """Wrong: two processes do not train one model on the images that one would read, do not test
    it together, or wait for ever for one that was killed."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log = train(folders, whole, workers=0, ranks=2)
    said = r"(\d+) training images could not be read"
    assert re.findall(said, log) == re.findall(said, undisturbed[1]), "other images, or a count"

    # A rank of its own accord: the other, and the tool, end, and nothing waits for ever.
    log = train_until("open train 31 process", folders, resumed, workers=0, ranks=2)
    assert "World size: 2" in log
    log = train(folders, resumed, workers=1, ranks=2, flags=("--resume",))
    assert first_iteration(log) == 5
    assert_equal(checkpoints(resumed), checkpoints(whole))
    assert accuracy(resumed) == accuracy(whole)

    # One process finds what two found; of another wiring, it takes the checkpoint's.
    expected = [["classification", k.split("/")[1], v, 1e-6] for k, v in accuracy(whole).items()]
    run_tool(TOOL, *arguments(
        folders, tmp_path / "evaluated", "MODEL.WEIGHTS", whole / "model_final.pth",
        "MODEL.RANDWIRE.SEED", 5, "TEST.EXPECTED_RESULTS", expected, "DATALOADER.NUM_WORKERS", 1,
        flags=("--eval-only", "--config-from-weights"),
    ), log=tmp_path / "evaluated.log")  # fmt: skip


@pytest.mark.slow
def test_on_shards_a_killed_run_ends_as_one_on_their_folder(
    undisturbed: tuple[Path, str], folders: Path, tmp_path: Path
) -> None:
    """Wrong: what is trained on tar shards are other images, or a resumed run gets others."""
    shards, output = tmp_path / "shards", tmp_path / "run"
    for split in ("train", "val"):
        make_shards(str(folders / split), shards / split, images=10)
    moments = [("os.rename model_0000009.pth 1 group", 0), ("os.rename last_checkpoint 4 group", 5)]
    for moment, start in moments:
        log = train_until(moment, shards, output, workers=1)
        assert first_iteration(log) == start, moment
    log = train(shards, output, workers=0, flags=("--resume",))
    assert first_iteration(log) > 5
    assert_equal(checkpoints(output), checkpoints(undisturbed[0]))
    assert accuracy(output) == accuracy(undisturbed[0])


def test_a_data_set_of_broken_images_ends_the_run(tmp_path: Path) -> None:
    """Wrong: with workers, a search without an end, or an error that does not name the folder."""
    draw_image_folders(tmp_path, train=2, val=1)
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"")
    given = arguments(tmp_path, tmp_path / "output", "DATALOADER.NUM_WORKERS", 2)
    tool = Tool(TOOL, *given, log=tmp_path / "log")
    assert tool.wait() == 1
    assert "100 images in a row can't be read" in tool.said
    assert str(tmp_path / "train") in tool.said


def test_measure_input_prints_both_rates(folders: Path, tmp_path: Path) -> None:
    """Wrong: the tool's flag trains, or measures something else. A tenth of a second is enough."""
    shorter = (
        "from randwire_d2.classification import measure_input\n"
        "measure_input.__defaults__ = (0.1,)\n"
    )
    given = arguments(
        folders, tmp_path / "run", "DATALOADER.NUM_WORKERS", 1, flags=("--measure-input",)
    )
    log = run_tool(TOOL, *given, log=tmp_path / "log", before=shorter)
    (line,) = (line for line in log.splitlines() if "The input feeds" in line)
    assert re.search(r"feeds \d+ images/s \(1 × 1 workers\), training alone consumes \d+", line)
