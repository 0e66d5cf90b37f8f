"""Real COCO images, where they lie beside the checkout in ../shared/data; skipped elsewhere."""

import json
import math
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase, default_setup
from helpers import ROOT

from randwire_d2.engine import Trainer, argument_parser, load_config

COCO = ROOT.parent / "shared" / "data" / "coco"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COCO.is_dir(), reason="no COCO images in ../shared/data"),
]


@pytest.fixture
def first_8(tmp_path: Path) -> str:
    """The first 8 of the COCO images as a data set, with the categories that occur in them."""
    content = json.loads((COCO / "annotations" / "instances_train2017.json").read_text())
    content["images"] = content["images"][:8]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    present = {a["category_id"] for a in content["annotations"]}
    content["categories"] = [c for c in content["categories"] if c["id"] in present]
    json_file = tmp_path / "first_8.json"
    json_file.write_text(json.dumps(content))
    register_coco_instances("coco_first_8", {}, str(json_file), str(COCO / "train2017"))
    return "coco_first_8"


def config(file: str, dataset: str, output: Path, *options: object) -> CfgNode:
    args = argument_parser().parse_args(
        ["--config-file", str(ROOT / "configs" / file), "MODEL.DEVICE", "cpu",
         "DATASETS.TRAIN", f"('{dataset}',)", "DATASETS.TEST", f"('{dataset}',)",
         "OUTPUT_DIR", str(output), "SEED", "1", *map(str, options)]
    )  # fmt: skip
    cfg = load_config(args)
    default_setup(cfg, args)
    return cfg


class LossRecorder(HookBase):
    """Keeps the total loss of every iteration."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self) -> None:
        self.losses.append(self.trainer.storage.history("total_loss").latest())


def test_c109_trains_on_coco(first_8: str, tmp_path: Path) -> None:
    """Wrong: the real network, 32 nodes and all, does not learn from real images."""
    cfg = config(
        "quick_schedules/faster_rcnn_randwire_c109_fpn_instant_test.yaml", first_8, tmp_path,
        "SOLVER.MAX_ITER", 12, "SOLVER.WARMUP_ITERS", 2, "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", "(192,)", "INPUT.MIN_SIZE_TEST", 192,
    )  # fmt: skip
    trainer, recorder = Trainer(cfg), LossRecorder()
    trainer.register_hooks([recorder])
    trainer.train()
    losses = recorder.losses
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_small_detector_learns_8_images(first_8: str, tmp_path: Path) -> None:
    """Wrong: a detector can't learn 8 images by heart; it learns nothing else either."""
    cfg = config(
        "faster_rcnn_randwire_shapes.yaml", first_8, tmp_path,
        "MODEL.ROI_HEADS.NUM_CLASSES", 12, "MODEL.ANCHOR_GENERATOR.SIZES", "[[32],[64],[128]]",
        "INPUT.MIN_SIZE_TRAIN", "(192,)", "INPUT.MIN_SIZE_TEST", 192,
        "INPUT.RANDOM_FLIP", "none", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.05,
        "SOLVER.MAX_ITER", 250, "TEST.EVAL_PERIOD", 250,
    )  # fmt: skip
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer._last_eval_results["bbox"]["AP50"] >= 50
