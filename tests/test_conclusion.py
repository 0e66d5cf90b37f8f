"""How trainings end: pictures in their folder, a verified backbone, a line with what to do next.

The trainings are real, and small; the commands that they name are run.
"""

import logging
import multiprocessing
import re
import shlex
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import PATIENCE, ROOT, draw_image_folders, last_metrics
from torch import nn

from randwire_d2.config import detector_config
from randwire_d2.engine import Trainer
from randwire_d2.engine.conclusion import conclude
from randwire_d2.engine.processes.signals import StopOnSignal
from randwire_d2.runs import RunFolder

run_tool = partial(helpers.run_tool, pictures=True)

NETWORK = [
    "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10,
    "MODEL.RANDWIRE.FUSED", "on", "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 2, "SEED", 1,
]  # fmt: skip
DETECTOR = [
    *NETWORK, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TRAIN", "('randwire_shapes_train',)",
    "DATASETS.TEST", "('randwire_shapes_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", 6,
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 50, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    # Weights that have seen a few images, and frozen norms, which amplify: scores may be 0.
    "SOLVER.BASE_LR", 1e-5, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0,
]  # fmt: skip


def classifier(folders: Path) -> list[object]:
    return [
        *NETWORK, "MODEL.CLASSIFIER.NUM_CLASSES", 3, "SOLVER.EPOCHS", 0, "SOLVER.IMS_PER_BATCH", 8,
        "DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders / 'val'}',)",
        "INPUT.TRAIN_CROP_SIZE", 32, "INPUT.TEST_CROP_SIZE", 32,
    ]  # fmt: skip


def in_folder(folder: Path) -> str:
    """What makes a tool work there, as from a shell."""
    return f"import os; os.chdir({str(folder)!r})"


def closing_line(said: str) -> str:
    line = said.rstrip().splitlines()[-1]
    assert "The training has ended" in line, said[-3000:]
    return line


def test_no_prediction_follows_where_none_is_possible(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: after the training of a semantic segmentation, the command that is named fails."""
    cfg = detector_config()
    cfg.OUTPUT_DIR = str(tmp_path)
    for architecture, follows in (("SemanticSegmentor", False), ("PanopticFPN", True)):
        cfg.MODEL.META_ARCHITECTURE = architecture
        with caplog.at_level(logging.INFO, "randwire_d2"):
            conclude(cfg, 1, nn.Identity(), lambda: Trainer.next_command(SimpleNamespace(cfg=cfg)))
        assert ("Next:" in caplog.messages[-1]) == follows


@pytest.mark.slow
def test_two_commands_are_the_whole_path(tmp_path: Path) -> None:
    """README's way to a detector, with the paths that the configs have: only the sizes and the data
    are other ones. Wrong: a file that the second command does not find, or that is no backbone."""
    draw_image_folders(tmp_path)
    log, here = tmp_path / "log", in_folder(tmp_path)
    config = ROOT / "configs/imagenet/randwire_c109_100ep.yaml"
    said = run_tool(
        "pretrain_imagenet.py", "--config-file", config, *classifier(tmp_path), log=log, before=here
    )
    run = RunFolder(tmp_path / "output/imagenet/randwire_c109_100ep")
    assert {p.name for p in run.path.glob("*.png")} == {"training.png", "wiring.png"}
    line = closing_line(said)
    top1 = last_metrics(run.path)["classification/top1"]
    assert f"classification/top1 {top1:.1f}; the best, {top1:.1f} at iteration 2, is " in line
    assert "output/imagenet/randwire_c109_100ep/model_best.pth" in line
    assert re.search(r"backbone\.pth; verified, largest relative differences: res2 ", said)
    ours = torch.load(run.backbone, weights_only=True)["model"]
    theirs = torch.load(run.final_checkpoint, weights_only=True)["model"]
    name = "stem.conv.weight"
    assert torch.equal(ours[f"backbone.bottom_up.{name}"], theirs[f"network.backbone.{name}"])

    config = ROOT / "configs/faster_rcnn_randwire_c109_fpn_1x.yaml"
    said = run_tool("train_net.py", "--config-file", config, *DETECTOR, log=log, before=here)
    detector = RunFolder(tmp_path / "output/faster_rcnn_randwire_c109_fpn_1x")
    assert detector.final_checkpoint.is_file() and detector.best_checkpoint.is_file()
    assert {p.name for p in detector.path.glob("*.png")} == {
        "detections.png", "training.png", "wiring.png",
    }  # fmt: skip
    folder = "output/faster_rcnn_randwire_c109_fpn_1x"
    assert f"Next: python tools/predict.py {folder} path/to/images" in said
    assert "bbox/AP" in closing_line(said)

    # The command that the pretraining named, with another data set.
    python, tool, *given = shlex.split(line.split("Next: ")[1])
    assert (python, tool) == ("python", "tools/train_net.py")
    given[1] = str(ROOT / given[1])
    options = [*given, *DETECTOR, "MODEL.BACKBONE.FREEZE_AT", 2, "OUTPUT_DIR", "again"]
    said = run_tool("train_net.py", *options, log=log, before=here)
    assert "randwire_c109_100ep/backbone.pth" in said
    assert (tmp_path / "again" / "model_final.pth").is_file()


def test_a_resnet_becomes_a_backbone_too(tmp_path: Path) -> None:
    """Wrong: its command lacks what no weight tells, the stride above all."""
    draw_image_folders(tmp_path)
    narrow = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
              "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "OUTPUT_DIR", "run"]  # fmt: skip
    said = run_tool(
        "pretrain_imagenet.py", "--config-file", ROOT / "configs/imagenet/R_50_100ep.yaml",
        *classifier(tmp_path), *narrow, log=tmp_path / "log", before=in_folder(tmp_path),
    )  # fmt: skip
    command = shlex.split(closing_line(said).split("Next: ")[1])
    assert (tmp_path / "run" / "backbone.pth").is_file()
    pairs = dict(zip(command[4::2], command[5::2]))
    assert pairs["MODEL.WEIGHTS"] == "run/backbone.pth"
    assert pairs["MODEL.RESNETS.STRIDE_IN_1X1"] == "False"
    assert pairs["MODEL.RESNETS.RES2_OUT_CHANNELS"] == "32"


def test_what_fails_after_the_training_does_not_fail_it(tmp_path: Path) -> None:
    """Wrong: a traceback and an exit status for a picture, after weeks of training; or silence."""
    draw_image_folders(tmp_path)
    broken = (
        "from randwire_d2.classification import backbone\n"
        "from randwire_d2.engine import conclusion\n"
        "def fail(*_, **__): raise ValueError('no\\nroom')\n"
        "conclusion._draw = backbone.convert = fail\n"
    )
    config = ROOT / "configs/imagenet/randwire_c109_100ep.yaml"
    said = run_tool(
        "pretrain_imagenet.py", "--config-file", config, *classifier(tmp_path),
        "OUTPUT_DIR", "run", log=tmp_path / "log", before=in_folder(tmp_path) + "\n" + broken,
    )  # fmt: skip
    assert said.count("No report of run could be drawn: ValueError") == 1
    assert said.count("run/backbone.pth was not written: no room") == 1
    expected = "Next: python tools/convert_checkpoint.py run/model_final.pth run/backbone.pth"
    assert expected in closing_line(said)


def test_an_evaluators_pool_ends_during_a_training() -> None:
    """Wrong: its forked workers take over the training's handler of SIGTERM, by which the pool ends
    them, and the panoptic evaluation never returns."""
    hook = StopOnSignal()
    hook.trainer = SimpleNamespace(iter=0, max_iter=1)
    hook.before_train()
    forks = multiprocessing.get_context("fork")
    has_begun = forks.Event()  # a signal that comes during a fork is lost
    worker = forks.Process(target=lambda: has_begun.set() or time.sleep(2 * PATIENCE))
    try:
        worker.start()
        assert has_begun.wait(PATIENCE)
        worker.terminate()
        worker.join(PATIENCE)
        assert worker.exitcode == -signal.SIGTERM
    finally:
        worker.kill()
        hook.after_train()
