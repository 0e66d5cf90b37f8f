"""TEST.LOSS: the losses of the test images, which leave the training as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import ROOT, draw_image_folders, last_metrics, run_tool

from randwire_d2 import classification
from randwire_d2.classification import ClassificationTrainer
from randwire_d2.engine import Trainer, argument_parser, load_config, mean_losses
from randwire_d2.engine.validation import detection_loss_loader, detection_losses
from randwire_d2.runs import RunFolder

DETECTOR = "configs/faster_rcnn_randwire_shapes.yaml"
CLASSIFIER = "configs/imagenet/randwire_c78_250ep.yaml"
SMALL: list[object] = [
    "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 8,
    "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5, "MODEL.RANDWIRE.FUSED", "on",
    "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 1, "SEED", 1,
]  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    draw_image_folders(tmp_path)
    return tmp_path


def classifier(folders: Path) -> list[object]:
    return [
        *SMALL, "MODEL.CLASSIFIER.NUM_CLASSES", 3, "MODEL.CLASSIFIER.DROPOUT", 0.5,
        "DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders / 'val'}',)",
        "INPUT.TRAIN_CROP_SIZE", 32, "INPUT.TEST_CROP_SIZE", 32, "TEST.IMS_PER_PROCESS", 7,
        "SOLVER.EPOCHS", 0, "SOLVER.IMS_PER_BATCH", 8,
    ]  # fmt: skip


def parse(config: str, *options: object) -> Any:
    return argument_parser().parse_args(["--config-file", str(ROOT / config), *map(str, options)])


def weights_after(output: Path, *options: object) -> dict[str, torch.Tensor]:
    """A detector's, after three iterations."""
    given = [*SMALL, "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", output, *options]
    cfg = load_config(parse(DETECTOR, *given))
    seed_all_rng(1)
    trainer = _Untested(cfg)
    trainer.train()
    weights: dict[str, torch.Tensor] = trainer.model.state_dict()
    return weights


class _Untested(Trainer):
    @classmethod
    def test(cls, *args: Any) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_detectors_training_stays_as_it_is(tmp_path: Path, ema: float) -> None:
    """Wrong: other weights or batch statistics than without, as random numbers were used up or
    norms counted the test images; or not every loss is written after every evaluation."""
    average = ("SOLVER.EMA.DECAY", ema)
    without = weights_after(tmp_path / "without", *average)
    loss = ("TEST.LOSS", True, "SOLVER.BEST_METRIC", "val_total_loss")
    found = weights_after(tmp_path / "run", *average, *loss)
    assert found.keys() == without.keys()
    assert all(torch.equal(found[key], value) for key, value in without.items())
    run = RunFolder(tmp_path / "run")
    losses = run.evaluations("val_total_loss")
    assert [i for i, _ in losses] == [0, 1, 3]
    last = last_metrics(run.path)
    parts = {k: v for k, v in last.items() if k.startswith("val_loss_")}
    assert parts.keys() == {f"val_{k}" for k in last if k.startswith("loss_")} and len(parts) == 4
    assert sum(parts.values()) == pytest.approx(last["val_total_loss"])
    best = torch.load(run.best_checkpoint, weights_only=True)["iteration"]
    assert best == min(losses, key=lambda item: item[1])[0]


def test_a_detectors_losses_are_those_of_its_test_images() -> None:
    """Wrong: augmented images, other statistics of the norms than in a test, a normaliser that
    the test images move, or a mean over something else. Each image's loss is computed by itself,
    by Detectron2, as there."""
    options = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME",
               "build_randwire_retinanet_fpn_backbone", "MODEL.RETINANET.NUM_CLASSES", 6,
               "MODEL.RETINANET.IN_FEATURES", "['p4', 'p5', 'p6']", "MODEL.RETINANET.NUM_CONVS", 1,
               "MODEL.RANDWIRE.OUT_FEATURES", "['res4', 'res5']", "MODEL.FPN.IN_FEATURES",
               "['res4', 'res5']", "TEST.LOSS", True]  # fmt: skip
    cfg = load_config(parse(DETECTOR, *SMALL, *options))
    seed_all_rng(3)
    model = build_model(cfg).train()
    model.loss_normalizer = normaliser = 50.0  # RetinaNet's own, a running mean
    batches = list(detection_loss_loader(cfg, "randwire_shapes_val"))
    records = DatasetCatalog.get("randwire_shapes_val")
    assert len(batches) == len(records) == 12
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = [mean_losses(detection_losses(model), batches) for _ in range(2)]
    assert found[0].keys() == {"val_total_loss", "val_loss_cls", "val_loss_box_reg"}
    assert found[0] == found[1]
    losses = detection_losses(model)
    with torch.no_grad(), EventStorage():
        sums = [float(sum(losses(batch)[0].values())) for batch in batches]
    assert found[0]["val_total_loss"] == pytest.approx(sum(sums) / 12, rel=1e-5)
    assert model.training and model.loss_normalizer == normaliser
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for batch, record in zip(batches, records):
        (item,) = batch
        height, width = item["image"].shape[1:]
        assert min(height, width) == cfg.INPUT.MIN_SIZE_TEST
        scale = width / record["width"]
        x, y, w, h = record["annotations"][0]["bbox"]
        box = torch.tensor([x, y, x + w, y + h]) * scale
        torch.testing.assert_close(item["instances"].gt_boxes.tensor[0], box, atol=1e-3, rtol=0)


def test_a_classifiers_losses_are_those_of_its_logits(folders: Path) -> None:
    """Wrong: dropout, dropped edges or batch statistics of the test; a mean of batches that are not
    of one size; or an image that can't be read counts."""
    (folders / "val" / "a" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    args = parse(CLASSIFIER, *classifier(folders), "OUTPUT_DIR", folders / "run", "TEST.LOSS", True)
    cfg = classification.load_config(args)
    trainer = ClassificationTrainer(cfg)
    trainer.train()
    model = trainer.model.eval()
    loader = ClassificationTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    with torch.no_grad():
        logits, labels = zip(*[(model(batch), batch["label"]) for batch in loader])
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    readable = all_labels >= 0
    assert len(all_labels) == 19 and readable.sum() == 18
    smoothing = cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING
    expected = F.cross_entropy(
        all_logits[readable], all_labels[readable], label_smoothing=smoothing
    )
    last = last_metrics(folders / "run")
    assert last["val_total_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert last["val_loss_cls"] == last["val_total_loss"]


def test_what_is_drawn_of_an_image_is_the_same_in_each_process() -> None:
    """Wrong: a detector's validation loss depends on the number of processes, as each samples other
    anchors of an image: a run that goes on on fewer GPUs compares its best with another measure."""

    def losses(batch: float) -> tuple[dict[str, torch.Tensor], int]:
        return {"loss": batch * torch.rand(())}, 1

    images = [1.0, 2.0, 6.0]
    of_each = [mean_losses(losses, [image])["val_loss"] for image in images]
    assert mean_losses(losses, images)["val_loss"] == pytest.approx(sum(of_each) / 3)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folders: Path) -> None:
    """Wrong: the mean of one process's images, or each process's mean counts as much."""
    (folders / "val" / "a" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    output, found = folders / "run", []
    for several in ([], ["--num-gpus", 2, "--dist-url", "auto"]):
        run_tool(
            "pretrain_imagenet.py", "--config-file", ROOT / CLASSIFIER, "--resume", *several,
            *classifier(folders), "TEST.LOSS", True, "OUTPUT_DIR", output, log=folders / "log",
        )  # fmt: skip
        found.append(last_metrics(output)["val_total_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
