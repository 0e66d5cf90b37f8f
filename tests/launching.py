"""Small trainings of a classifier that tests start, disturb, and compare to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from helpers import ROOT, draw_image_folders, run_tool

TOOL = "pretrain_imagenet.py"
TORCHRUN = Path(torch.distributed.run.__file__)
ITERATIONS = 18


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw_image_folders(root, val=5)
    return root


def arguments(folders: Path, output: Path, *flags: object, workers: int = 0) -> list[object]:
    return [
        "--config-file", ROOT / "configs/imagenet/randwire_c78_250ep.yaml", *flags,
        "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 6,
        "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5, "MODEL.RANDWIRE.EDGE_DROP_SCOPE", "batch",
        # Runs in different folders are compared to the bit: none may time its stages.
        "MODEL.RANDWIRE.FUSED", "on", "MODEL.CLASSIFIER.DROPOUT", 0.5,
        "MODEL.CLASSIFIER.NUM_CLASSES", 3,
        "DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders / 'val'}',)",
        "INPUT.TRAIN_CROP_SIZE", 32, "INPUT.TEST_CROP_SIZE", 32, "SOLVER.EPOCHS", 0,
        "SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER", ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 0, "SEED", 1, "OUTPUT_DIR", output,
        "DATALOADER.NUM_WORKERS", workers,
    ]  # fmt: skip


def final(output: Path) -> dict[str, Any]:
    """All that a training ended with, but for its config, which may name other workers."""
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    del checkpoint["config"]
    return checkpoint


@pytest.fixture(scope="session")
def alone(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an undisturbed run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run_tool(TOOL, *arguments(folders, output), log=output.with_name("log"))
    return output


@pytest.fixture(scope="session")
def two(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an undisturbed run of two processes, by --num-gpus."""
    output = tmp_path_factory.mktemp("two") / "run"
    flags = ("--num-gpus", 2, "--dist-url", "auto")
    run_tool(TOOL, *arguments(folders, output, *flags), log=output.with_name("log"))
    return output
