"""tools/train_net.py in processes of its own: killed and resumed, and two that do the work of one.

The kills are at random moments, of which the seed is fixed. RANDWIRE_KILLS in the environment is
how many there are; RANDWIRE_KILLS_SEED chooses others.
"""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, Tool, assert_equal, draw_boxes, run_tool

from randwire_d2.runs import RunFolder

TOOL = "train_net.py"
KILLS = int(os.environ.get("RANDWIRE_KILLS", 6))
SEED = int(os.environ.get("RANDWIRE_KILLS_SEED", 1))
FARTHEST = 6  # iterations that a process does before it is killed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_boxes(tmp_path_factory.mktemp("boxes"))


def arguments(data: Path, output: Path, ranks: int, *options: object) -> list[object]:
    several = ["--num-gpus", ranks, "--dist-url", "auto"] if ranks > 1 else []
    return [
        "--config-file", ROOT / "configs/faster_rcnn_randwire_shapes.yaml", "--data", data,
        *several, "--resume", "OUTPUT_DIR", output, "MODEL.RANDWIRE.CHANNELS", 8,
        "MODEL.RANDWIRE.NUM_NODES", 6, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 2,
        "INPUT.MIN_SIZE_TRAIN", "(48, 64, 80)", "INPUT.MIN_SIZE_TEST", 64, "SEED", 3, *options,
    ]  # fmt: skip


def random_moment(rng: np.random.Generator, kind: int, data: Path, workers: int, ranks: int) -> str:
    """A moment within the next FARTHEST iterations (killer/sitecustomize.py)."""
    images = FARTHEST * 4 // ranks  # of a process; each worker counts its own, and reads ahead
    train = f"open {data}/train/ {rng.integers(1, images // 3 if workers else images)}"
    saving = f"{rng.choice(['open', 'os.rename'])} model_ {rng.integers(1, 3)}"
    evaluation = f"open {data}/val/ {rng.integers(1, 3)}"
    return f"{(train, saving, train, evaluation, train, train)[kind]} group"


def checkpoints(output: Path) -> dict[str, Any]:
    files = {p.name: torch.load(p, weights_only=True) for p in sorted(output.glob("model_*.pth"))}
    for file in files.values():
        del file["config"]  # it says how many workers there were
    return files


def metrics(output: Path) -> dict[int, dict[str, float]]:
    return {
        iteration: {k: v for k, v in values.items() if not k.endswith(("time", "seconds"))}
        for iteration, values in RunFolder(output).metrics().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_moments_ends_the_same(
    data: Path, tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a bit of the weights, momentum, average, best checkpoint, losses or evaluations is
    another, if a detector's training was killed amid iterations, a checkpoint or an evaluation."""
    kills = KILLS if ranks == 1 else (KILLS + 2) // 3
    options = (
        "SOLVER.MAX_ITER", FARTHEST * kills + 5, "SOLVER.CHECKPOINT_PERIOD", 3,
        "SOLVER.EMA.DECAY", 0.5, "TEST.EVAL_PERIOD", 4, "TEST.LOSS", True,
        "SOLVER.BEST_METRIC", "val_total_loss", "MODEL.RANDWIRE.FUSED", "on",
    )  # fmt: skip
    whole, resumed, log = tmp_path / "whole", tmp_path / "resumed", tmp_path / "log"
    run_tool(TOOL, *arguments(data, whole, ranks, *options), log=tmp_path / "whole.log")
    rng = np.random.default_rng(SEED)
    for i in range(kills):
        workers = (0, 2)[i % 2]
        moment = random_moment(rng, i % 6, data, workers, ranks)
        given = arguments(data, resumed, ranks, *options, "DATALOADER.NUM_WORKERS", workers)
        tool = Tool(TOOL, *given, log=log, kill_at=moment)
        assert tool.wait() == -signal.SIGKILL, f"{moment}: {tool.said[-3000:]}"
        with capsys.disabled():
            print(f"\nkilled with {ranks} processes, {workers} workers, {moment}", end="")
    run_tool(TOOL, *arguments(data, resumed, ranks, *options), log=log)
    expected = checkpoints(whole)
    assert {"model", "trainer", "ema"} <= expected["model_final.pth"].keys()
    assert expected["model_best.pth"]["iteration"] > 3, "the first evaluation was the best"
    assert_equal(checkpoints(resumed), expected)
    assert metrics(resumed) == metrics(whole)
