"""Trainings in processes of their own: killed and resumed, and two that do the work of one.

The kills are at random moments, drawn with a fixed seed. In the environment, RANDWIRE_KILLS is how
many there are (for the figure in MODEL_ZOO.md, 20), RANDWIRE_KILLS_SEED chooses others.
"""

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from helpers import ROOT, Tool, assert_equal, draw_boxes, run_tool

from randwire_d2.runs import RunFolder

TOOL = "train_net.py"
KILLS = int(os.environ.get("RANDWIRE_KILLS", 6))
SEED = int(os.environ.get("RANDWIRE_KILLS_SEED", 1))
FARTHEST = 6  # iterations that a process does before it is killed
TOLERANCE = 1e-4  # of a tensor's largest gradient; 9e-6 were seen
# What lets several processes train what one would: see Trainer.
INDEPENDENT = [
    "MODEL.RANDWIRE.NORM", "GN", "MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN",
    "MODEL.RANDWIRE.CHANNELS", 32, "DATALOADER.ASPECT_RATIO_GROUPING", False,
    "INPUT.LSJ.SIZE", 64, "INPUT.LSJ.SCALES", "(0.8, 1.5)", "MODEL.RANDWIRE.EDGE_DROP_PROB", 1.0,
    "SOLVER.CHECKPOINT_PERIOD", 1,
]  # fmt: skip


# Images of both orientations. By its path, a data set would be looked at before the training.
REGISTER = """
from detectron2.data.datasets import register_coco_instances
for split in ("train", "val"):
    json_file = f"{folder}/annotations/instances_{{split}}.json"
    register_coco_instances(f"boxes_{{split}}", {{}}, json_file, f"{folder}/{{split}}")
"""
BOXES = ["DATASETS.TRAIN", "('boxes_train',)", "DATASETS.TEST", "('boxes_val',)"]


def arguments(output: Path, kills: int, *options: object) -> list[object]:
    return [
        "--config-file", ROOT / "configs/faster_rcnn_randwire_shapes.yaml",
        "--resume", "OUTPUT_DIR", output, "MODEL.RANDWIRE.CHANNELS", 8,
        "MODEL.RANDWIRE.NUM_NODES", 6, "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5,
        "MODEL.RANDWIRE.EDGE_DROP_SCOPE", "batch", "SOLVER.IMS_PER_BATCH", 4,
        "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", FARTHEST * kills + 5,
        "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.EMA.DECAY", 0.5, "TEST.EVAL_PERIOD", 4,
        "TEST.LOSS", True, "SOLVER.BEST_METRIC", "val_total_loss", "SEED", 3,
        "INPUT.MIN_SIZE_TRAIN", "(48, 64, 80)", "INPUT.MIN_SIZE_TEST", 64, *options,
    ]  # fmt: skip


def random_moment(rng: np.random.Generator, kind: int, folder: str, images: int) -> str:
    """A moment of the next iterations (killer/sitecustomize.py).

    Args:
        folder: of the images, with {} for "train" or "val".
        images: the most that a process reads until then.
    """
    training = f"open {folder.format('train')} {rng.integers(1, images)}"
    # Before the first byte of a checkpoint is written, or after the last.
    saving = f"{rng.choice(['open', 'os.rename'])} .pth.tmp {rng.integers(1, 3)}"
    evaluation = f"open {folder.format('val')} {rng.integers(1, 3)}"
    return f"{(training, saving, training, evaluation, training, training)[kind % 6]} group"


def killed_and_resumed(
    folder: str, output: Path, ranks: int, kills: int, given: list[Any], before: str = ""
) -> None:
    """Train with as many kills; prints each."""
    rng, run, log = np.random.default_rng(SEED), RunFolder(output), output.with_suffix(".log")
    for i in range(kills):
        workers = 2 * (i % 2)
        # A worker counts its own images, and reads ahead.
        images = FARTHEST * 4 // ranks // (3 if workers else 1)
        moment = random_moment(rng, i + ranks - 1, folder, images)  # the first differ
        options = ["DATALOADER.NUM_WORKERS", workers]
        tool = Tool(TOOL, *given, *options, log=log, before=before, kill_at=moment)
        assert tool.wait() == -signal.SIGKILL, f"{moment}: {tool.said[-3000:]}"
        assert "Starting training from" in tool.said, moment
        assert folder.format("val") not in moment or "Start inference" in tool.said
        last = run.last_checkpoint.name if run.can_resume else "no checkpoint"
        print(f"{ranks} processes, {workers} workers: SIGKILL at {moment}; {last}")
    run_tool(TOOL, *given, log=log, before=before)


def checkpoints(output: Path) -> dict[str, Any]:
    files = {p.name: torch.load(p, weights_only=True) for p in sorted(output.glob("model_*.pth"))}
    for file in files.values():
        file.pop("config", None)  # it says how many workers there were
    return files


def assert_equal_runs(found: Path, expected: Path, *more: str) -> None:
    """All checkpoints, and ``more`` that they hold, losses and evaluations, to the bit."""
    files = checkpoints(expected)
    assert {"model", "trainer", *more} <= files["model_final.pth"].keys()
    assert_equal(checkpoints(found), files)
    assert_equal(metrics(found), metrics(expected))


def metrics(output: Path) -> dict[int, dict[str, float]]:
    """All but the times, and the evaluations that found nothing (NaN)."""
    return {
        iteration: {
            name: value
            for name, value in written.items()
            if not name.endswith(("time", "seconds")) and not math.isnan(value)
        }
        for iteration, written in RunFolder(output).metrics().items()
    }


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path: Path) -> None:
    """Wrong: a bit of the weights, momentum, average, best checkpoint, losses or evaluations is
    another, if a detector's training was killed amid iterations, a checkpoint or an evaluation."""
    data = draw_boxes(tmp_path / "boxes")
    before, options = REGISTER.format(folder=data), [*BOXES, "MODEL.RANDWIRE.FUSED", "on"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    given = arguments(whole, KILLS, *options)
    run_tool(TOOL, *given, log=tmp_path / "whole.log", before=before)
    given = arguments(resumed, KILLS, *options)
    killed_and_resumed(f"{data}/{{}}/", resumed, 1, KILLS, given, before)
    assert_equal_runs(resumed, whole, "ema")
    best = torch.load(RunFolder(whole).best_checkpoint, weights_only=True)
    assert best["iteration"] > 3, "the first evaluation was the best"


@pytest.mark.slow
def test_two_processes_train_what_one_does_killed_or_not(tmp_path: Path) -> None:
    """Wrong: as above, of two gloo processes; or their first step differs from one process's with
    the same images: they augment the images otherwise, sample other regions, or weigh their
    gradients in another way. (Later, rounding may swap proposals of nearly the same score.)"""
    kills = max(1, KILLS // 4)
    whole, resumed, alone = (tmp_path / name for name in ("whole", "resumed", "alone"))
    two = ["--num-gpus", 2, "--dist-url", "auto"]
    run_tool(TOOL, *two, *arguments(whole, kills, *INDEPENDENT), log=tmp_path / "whole.log")
    images = MetadataCatalog.get("randwire_shapes_train").image_root
    assert Path(images).name == "train"
    given = [*two, *arguments(resumed, kills, *INDEPENDENT)]
    killed_and_resumed(f"{Path(images).parent}/{{}}/", resumed, 2, kills, given)
    assert_equal_runs(resumed, whole, "ema")

    given = arguments(alone, kills, *INDEPENDENT, "SOLVER.MAX_ITER", 1)
    run_tool(TOOL, *given, log=tmp_path / "alone.log")
    found, expected = gradients(whole), gradients(alone)
    assert found.keys() == expected.keys() and any(g.abs().max() > 0.1 for g in expected.values())
    errors = {
        i: ((found[i] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-3)).item()
        for i, gradient in expected.items()
    }
    print(f"two processes: the gradients of one are met to {max(errors.values()):.1e}")
    assert max(errors.values()) < TOLERANCE


def gradients(output: Path) -> dict[int, torch.Tensor]:
    """Those of the first iteration, which are its momentum."""
    file = torch.load(output / "model_0000000.pth", weights_only=True)
    state = file["trainer"]["_trainer"]["optimizer"]["state"]
    return {i: values["momentum_buffer"] for i, values in state.items()}


LAZY = [
    "--config-file", ROOT / "configs/lazy/retinanet_randwire_c109_fpn_1x.py", "--resume",
    "model.num_classes=2", "model.backbone.top_block.in_channels=64", "model.head.conv_dims=[256]",
    "model.test_score_thresh=0.0",
    *(f"model.backbone.bottom_up.{option}" for option in (
        "spec._target_.channels=8", "spec._target_.num_nodes=10", "norm=BN", "freeze_at=0",
        "fused=on",
    )),
    "dataloader.train.dataset.names=boxes_train",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[48,64,80]",
    "dataloader.train.total_batch_size=2",
    "dataloader.test.dataset.names=boxes_val",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64", "dataloader.test.num_workers=0",
    "lr_multiplier.warmup_length=0.5", "train.device=cpu", "train.init_checkpoint=''",
    "train.max_iter=12", "train.checkpointer.period=3", "train.eval_period=3", "train.log_period=1",
    "train.ema.decay=0.5",
]  # fmt: skip


@pytest.mark.slow
def test_a_lazy_config_killed_anywhere_ends_the_same(tmp_path: Path) -> None:
    """A LazyConfig's training is killed as it writes a checkpoint, or in the evaluation after one,
    with or without workers. Wrong: it ends with another bit in the weights, the momentum, the
    average, the best checkpoint, the losses or the evaluations; or its seed, which was drawn, does
    not come from the checkpoint."""
    tool, whole, resumed = "lazyconfig_train_net.py", tmp_path / "whole", tmp_path / "resumed"
    data, workers = draw_boxes(tmp_path / "boxes"), "dataloader.train.num_workers={}".format
    before, given = REGISTER.format(folder=data), [*LAZY, workers(0), f"train.output_dir={whole}"]
    run_tool(tool, *given, log=tmp_path / "whole.log", before=before)
    resumed.mkdir()
    shutil.copy(whole / "model_0000002.pth", resumed)
    (resumed / "last_checkpoint").write_text("model_0000002.pth")

    log, given = tmp_path / "log", [*LAZY, f"train.output_dir={resumed}"]
    moments = [
        (0, f"open {data}/val/ 2 group"),  # of iteration 2, after its checkpoint
        (0, f"open {data}/train/ 4 group"),  # of iteration 4
        (2, f"open {data}/train/ 7 group"),  # at least one iteration later: a worker reads ahead
        (0, "os.rename model_0000011.pth 1 group"),
    ]
    for number, moment in moments:
        killed = Tool(tool, *given, workers(number), log=log, before=before, kill_at=moment)
        assert killed.wait() == -signal.SIGKILL, killed.said[-3000:]
        print(f"{number} workers: SIGKILL at {moment}; {RunFolder(resumed).last_checkpoint.name}")
        assert "Starting training from" in killed.said, moment
    run_tool(tool, *given, workers(2), log=log, before=before)

    files = checkpoints(whole)
    assert "model_best.pth" in files and "ema" in files["model_final.pth"]
    assert_equal(checkpoints(resumed), files)
    since = {i: values for i, values in metrics(whole).items() if i >= 2}
    assert_equal(metrics(resumed), since)
    assert any("bbox/AP" in values for values in since.values())
