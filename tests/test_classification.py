"""Training of classifiers: recipes, stream of images, network, accuracy, refusals."""

import argparse
import io
import json
import logging
import math
import shutil
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.logger import setup_logger
from helpers import (
    LOGGERS,
    ROOT,
    draw_image_folders,
    in_two_processes,
    last_metrics,
    leave_checkpoint,
    raises_one_line,
)
from launching import small
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from randwire_d2 import NetworkGenerator, RandWireClassifier
from randwire_d2.checkpoint import RandWireCheckpointer
from randwire_d2.classification import (
    ClassificationTrainer,
    ImageClassifier,
    load_config,
    measure_input,
    trainer,
)
from randwire_d2.classification import data as data_module
from randwire_d2.classification.data import (
    UNREADABLE,
    BatchPositions,
    PCALighting,
    TestImages,
    TrainingStream,
    TrainLoader,
    read_image,
    test_transform,
    train_transform,
)
from randwire_d2.classification.evaluation import AccuracyEvaluator
from randwire_d2.classification.trainer import WatchInput
from randwire_d2.config import classifier_config, spec_from_config
from randwire_d2.engine import argument_parser, read_config, scale_schedule, train_or_evaluate
from randwire_d2.modeling.image_classifier import build_network
from randwire_d2.runs import Evaluation, RunFolder

# Named as pytest's own.
TestImages.__test__ = False
test_transform.__test__ = False

C78 = "imagenet/randwire_c78_250ep.yaml"
R50 = "imagenet/R_50_100ep.yaml"
IMAGENET = 1281167  # training images
SMALL = {"edge_drop": 0.0, "dropout": 0.0, "decay": 5e-5}  # section 4, "Implementation details"
REGULAR = {"edge_drop": 0.1, "dropout": 0.2, "decay": 1e-5}  # section 4.2
RESNET = {"edge_drop": None, "dropout": None, "decay": 1e-4}  # Goyal et al., section 5.1
# 100 and 250 times 1281167 images, in batches of 256.
RECIPES: dict[str, dict[str, Any]] = {
    "randwire_c78_100ep": {"iterations": 500456, **SMALL},
    "randwire_c78_250ep": {"iterations": 1251140, **SMALL},
    "randwire_c109_100ep": {"iterations": 500456, **REGULAR},
    "randwire_c154_100ep": {"iterations": 500456, **REGULAR},
    "R_50_100ep": {"iterations": 500456, **RESNET},
    "R_101_100ep": {"iterations": 500456, **RESNET},
    "X_50_32x4d_100ep": {"iterations": 500456, **RESNET},
    "X_101_32x4d_100ep": {"iterations": 500456, **RESNET},
    "mobilenet_v2_w1.4_250ep": {"iterations": 1251140, **SMALL},
    "shufflenet_v2_x2_250ep": {"iterations": 1251140, **SMALL},
}


def parse(config: str, *args: object) -> argparse.Namespace:
    return argument_parser().parse_args(
        ["--config-file", str(ROOT / "configs" / config), *map(str, args)]
    )


def config(name: str, *options: object) -> CfgNode:
    """A config file of the project with options, before any check."""
    return read_config(parse(name, *options), classifier_config())


def tiny(folders: Path, *options: object) -> list[str]:
    given = [*small(folders), "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 0, *options]
    return [*map(str, given)]


# Recipes


def test_every_recipe_is_tested() -> None:
    files = {path.stem for path in (ROOT / "configs/imagenet").glob("*.yaml")}
    assert files == {"Base-ImageNet", *RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_papers(name: str) -> None:
    """Iterations, rates, decay, regularisation, as the real builders make them of the file."""
    expected = RECIPES[name]
    cfg = scale_schedule(config(f"imagenet/{name}.yaml", "MODEL.DEVICE", "meta"), IMAGENET)
    assert cfg.OUTPUT_DIR.endswith(name)
    iterations = cfg.SOLVER.MAX_ITER
    assert iterations == expected["iterations"]
    with torch.device("meta"):  # the whole network, without its memory
        model = ClassificationTrainer.build_model(cfg)
    optimizer = ClassificationTrainer.build_optimizer(cfg, model)
    scheduler = ClassificationTrainer.build_lr_scheduler(cfg, optimizer)

    def rates(iteration: int) -> set[float]:
        """Of all parameters in this iteration, in steps of 1e-9."""
        optimizer.step()  # without gradients: nothing, but the scheduler insists
        scheduler.last_epoch = iteration - 1
        scheduler.step()
        return {round(group["lr"], 9) for group in optimizer.param_groups}

    # Half a cosine: 0.1 · (1 + cos(π t / T)) / 2, without a warm-up at batch 256.
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert rates(1) == {0.1}
    assert rates(iterations // 4) == {0.085355339}
    assert rates(iterations // 2) == {0.05}
    assert rates(iterations // 4 * 3) == {0.014644661}
    assert rates(iterations) == {0.0}

    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    others = set(model.parameters()) - norms
    assert norms and others
    groups = {g["weight_decay"]: set(g["params"]) for g in optimizer.param_groups}
    assert groups == {0.0: norms, expected["decay"]: others}
    momentum = {(g["momentum"], g["dampening"], g["nesterov"]) for g in optimizer.param_groups}
    assert momentum == {(0.9, 0, True)}  # Goyal et al., section 5.1

    assert model.label_smoothing == 0.1
    network = model.network
    if cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
        assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} <= {0.0}
    elif expected["dropout"] is not None:
        assert isinstance(network, RandWireClassifier)
        assert network.dropout.p == expected["dropout"]
        assert network.backbone.edge_drop_prob == expected["edge_drop"]
        regime, channels = ("small", 78) if "c78" in name else ("regular", int(name[10:13]))
        spec = NetworkGenerator(regime=regime, channels=channels)(seed=1)  # WS(4, 0.75), N = 32
        assert network.backbone.spec == spec


def test_images_are_augmented_as_in_the_recipe() -> None:
    """Crops of 8 … 100% of the area, flipped; tests crop 224 of 256 or, in Table 4, 320."""
    cfg = config(C78)
    crop, flip, _ = train_transform(cfg).transforms
    assert isinstance(crop, v2.RandomResizedCrop) and isinstance(flip, v2.RandomHorizontalFlip)
    assert (crop.scale, crop.size, flip.p) == ((0.08, 1.0), (224, 224), 0.5)
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    kinds = [type(t) for t in train_transform(config(C78, "INPUT.RANDOM_FLIP", "none")).transforms]
    assert kinds == [v2.RandomResizedCrop, v2.PILToTensor]
    resize, centre, _ = test_transform(cfg).transforms
    assert (resize.size, centre.size) == ([256], (224, 224))
    large = test_transform(config(C78, "INPUT.TEST_CROP_SIZE", 320))
    assert large(Image.new("RGB", (500, 400))).shape == (3, 320, 320)
    # ImageNet's statistics, in the order of the channels that the network gets.
    assert cfg.INPUT.FORMAT == "RGB"
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    assert mean == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    assert std == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])


def test_pca_lighting_adds_one_colour_to_all_pixels(folders: Path) -> None:
    """Wrong: noise of another scale or another one than AlexNet's; or it is on by default."""
    kinds = [type(t) for t in train_transform(config(C78, "INPUT.PCA_LIGHTING", 0.1)).transforms]
    assert kinds[-2:] == [v2.PILToTensor, PCALighting]
    grey = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    colours = []
    for _ in range(2000):
        image = PCALighting(0.1)(grey)
        assert image.dtype == torch.uint8 and (image == image[:, :1, :1]).all()
        colours.append(image[:, 0, 0] - 128.0)
    # Σ λ² v vᵀ over the components: the first, nearly grey, has σ = 255 · 0.1 · 0.2175.
    assert torch.stack(colours).mean(dim=0).abs().max() < 0.3
    covariance = torch.stack(colours).T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    assert values[2].sqrt().item() == pytest.approx(255 * 0.1 * 0.2175, rel=0.05)
    assert (vectors[:, 2].abs() - torch.tensor([0.5675, 0.5808, 0.5836])).abs().max() < 0.02
    for value in (0, 255):
        extreme = PCALighting(0.1)(torch.full((3, 1, 1), value, dtype=torch.uint8))
        assert (extreme.float() - value).abs().max() < 100, "values wrap around"
    # In the stream it is a function of the position, like all else, and RGB's before BGR.
    plain, *found = (stream(folders, *o)[5]["image"].float() for o in (
        (), ("INPUT.PCA_LIGHTING", 0.1), ("INPUT.PCA_LIGHTING", 0.1),
        ("INPUT.PCA_LIGHTING", 0.1, "INPUT.FORMAT", "BGR"),
    ))  # fmt: skip
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2].flip(0))
    assert 0 < (found[0] - plain).abs().max() < 60


def test_another_batch_size_scales_the_schedule() -> None:
    """Goyal et al.: k times the images, k times the rate, a k-th of the iterations."""
    options = ["SOLVER.IMS_PER_BATCH", 1024, "SOLVER.WARMUP_ITERS", 4000]
    cfg = scale_schedule(config("imagenet/randwire_c109_100ep.yaml", *options), IMAGENET)
    solver, rate = cfg.SOLVER, cfg.SOLVER.BASE_LR
    assert rate == pytest.approx(0.4)
    assert solver.MAX_ITER == 125114  # 100 · 1281167 / 1024 = 125113.96
    assert (solver.IMS_PER_BATCH, solver.WARMUP_ITERS) == (1024, 1000)
    assert (solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1250, 6250)
    assert (solver.WEIGHT_DECAY, solver.MOMENTUM) == (1e-5, 0.9)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        # 5 · 1281167 / 1024 = 6255.7 iterations from 0.1 up to the half cosine of 0.4 and 125114:
        # 0.2 · (1 + cos(π · 6256 / 125114)) = 0.39753743, and half of the way at their half.
        (1024, {0: 0.1, 3128: 0.248768716, 6256: 0.397537432, 62557: 0.2}),
        # 5 · 1281167 / 8192 = 781.96; 1.6 · (1 + cos(π · 782 / 15640)) = 3.18030134.
        (8192, {0: 0.1, 391: 1.640150672, 782: 3.180301345, 7820: 1.6}),
        (256, {0: 0.1, 250228: 0.05}),
        (64, {0: 0.025}),
    ],
)
def test_a_larger_batch_is_warmed_up(batch: int, expected: dict[int, float]) -> None:
    """Goyal et al., section 2.2. Wrong: a rate of 3.2 at once diverges, or 256 is warmed up."""
    cfg = scale_schedule(config(R50, "SOLVER.IMS_PER_BATCH", batch), IMAGENET)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = ClassificationTrainer.build_lr_scheduler(cfg, optimizer)
    optimizer.step()  # nothing, but the scheduler insists
    for iteration, rate in expected.items():
        if iteration:
            scheduler.last_epoch = iteration - 1
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-8), iteration


def test_the_warm_up_is_optional_and_shorter_than_the_training() -> None:
    """Wrong: a short training never reaches its rate, or a config's own warm-up is overwritten."""

    def warm_up(*options: object) -> tuple[int, float]:
        cfg = config(C78, "SOLVER.IMS_PER_BATCH", 512, *options)
        solver = scale_schedule(cfg, 25600).SOLVER
        return solver.WARMUP_ITERS, solver.WARMUP_FACTOR

    assert warm_up() == (250, 0.5)
    assert warm_up("SOLVER.WARMUP_EPOCHS", 2) == (100, 0.5)
    assert warm_up("SOLVER.WARMUP_EPOCHS", 0)[0] == 0
    assert warm_up("SOLVER.WARMUP_ITERS", 10) == (5, 0.001)  # Detectron2's factor
    with raises_one_line(ValueError, match="WARMUP_EPOCHS 5 is not less than EPOCHS 5"):
        warm_up("SOLVER.EPOCHS", 5)
    assert warm_up("SOLVER.EPOCHS", 5, "SOLVER.WARMUP_EPOCHS", 4) == (200, 0.5)


@pytest.mark.parametrize(("batch", "length"), [(64, 5004559), (1024, 312785)])
def test_a_scaled_config_is_not_scaled_again(tmp_path: Path, batch: int, length: int) -> None:
    """A run's config.yaml, given to a run, is that run. Wrong: its rate is scaled once more."""
    cfg = scale_schedule(config(C78, "SOLVER.IMS_PER_BATCH", batch), IMAGENET)
    assert pytest.approx(0.1 * batch / 256) == cfg.SOLVER.BASE_LR
    assert length == cfg.SOLVER.MAX_ITER  # 250 · 1281167 / batch, rounded up
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = scale_schedule(config(str(tmp_path / "config.yaml")), IMAGENET)
    assert json.dumps(again) == json.dumps(cfg)  # YAML has no tuples


def test_epochs_are_of_the_images_that_there_are(folders: Path) -> None:
    """42 images: two epochs are 10.5 batches of 8; without EPOCHS, keys are taken literally."""
    options = ["SOLVER.EPOCHS", 2, "SOLVER.REFERENCE_BATCH_SIZE", 16]
    cfg = load_config(parse(C78, *small(folders), *options))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (11, 0.005)
    assert cfg.SOLVER.IMS_PER_BATCH == 8 and cfg.is_frozen()
    cfg = load_config(parse(C78, *tiny(folders)))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (4, 0.01)


# The stream of training images


def records(folder: Path) -> list[dict]:
    paths = sorted(folder.glob("*/*"))
    return [{"file_name": str(p), "label": ord(p.parent.name) - ord("a")} for p in paths]


def stream(folders: Path, *options: object, seed: int = 1) -> TrainingStream:
    return TrainingStream(records(folders / "train"), config(C78, *tiny(folders, *options)), seed)


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(*map(torch.as_tensor, (a[k], b[k]))) for k in a)


def test_an_epoch_is_every_image_once_in_an_order_of_its_own(folders: Path) -> None:
    images = stream(folders)
    names = [images._record(position)["file_name"] for position in range(84)]
    assert sorted(names[:42]) == sorted(names[42:]) == [r["file_name"] for r in images.records]
    assert names[:42] != names[42:]
    other = stream(folders, seed=2)
    assert names[:42] != [other._record(position)["file_name"] for position in range(42)]


def test_the_files_of_an_iteration_are_known(folders: Path) -> None:
    """Else a message names other images than those that made the loss no number."""
    loader = TrainLoader(config(C78, *tiny(folders)), seed=1)
    loader.start_iter = 3
    labels = [ord(Path(name).parent.name) - ord("a") for name in loader.file_names(3)]
    assert next(iter(loader))["label"].tolist() == labels


def test_an_item_is_a_function_of_seed_and_position(folders: Path) -> None:
    """Else a resumed run gets other crops; nor does augmentation touch the model's generator."""
    images = stream(folders)
    before = torch.get_rng_state()
    item = images[5]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert same(stream(folders)[5], item)
    name = images._record(5)["file_name"]
    later = next(p for p in range(42, 84) if images._record(p)["file_name"] == name)
    assert not torch.equal(images[later]["image"], item["image"]), "each epoch has the same crop"


def test_batches_are_the_same_with_workers_and_from_any_start(folders: Path) -> None:
    def batches(workers: int, start: int) -> list[dict]:
        options = tiny(folders, "DATALOADER.NUM_WORKERS", workers)
        loader = TrainLoader(config(C78, *options), seed=1)
        loader.start_iter = start
        return list(islice(loader, 8 - start))  # past the first epoch

    before = torch.get_rng_state()
    expected = batches(workers=0, start=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert expected[0]["image"].shape == (8, 3, 32, 32)
    for workers, start in ((0, 3), (1, 5), (2, 0)):
        found = batches(workers, start)
        assert all(map(same, found, expected[start:])), (workers, start)


def test_the_images_of_an_iteration_do_not_depend_on_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks share the eight images that one would read, without overlap."""

    def positions(world_size: int, rank: int) -> list[list[int]]:
        comm = SimpleNamespace(get_world_size=lambda: world_size, get_rank=lambda: rank)
        monkeypatch.setattr(data_module, "comm", comm)
        return list(islice(BatchPositions(8), 5))

    alone = positions(1, 0)
    assert alone[:2] == [list(range(8)), list(range(8, 16))]
    for ranks in (2, 4):
        shared = zip(*(positions(ranks, rank) for rank in range(ranks)))
        assert [list(chain(*parts)) for parts in shared] == alone


# Files that are no good images


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
BROKEN = {
    "truncated.jpg": encoded(NOISE, "JPEG")[:900],
    "truncated.png": encoded(NOISE, "PNG")[:900],
    "empty.jpg": b"",
    "text.jpg": b"<html>404 Not Found</html>",
    "deep.png": encoded(Image.fromarray(np.full((9, 9), 3000, np.uint16)), "PNG"),
}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Folders whose classes a and b have two broken training images each, a two in val."""
    draw_image_folders(tmp_path, train=6)
    for path, content in zip(("train/a", "train/b", "train/a", "train/b"), BROKEN.items()):
        (tmp_path / path / content[0]).write_bytes(content[1])
    for name in ("truncated.jpg", "empty.jpg"):
        (tmp_path / "val/a" / name).write_bytes(BROKEN[name])
    return tmp_path


def test_damaged_files_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
        assert read_image(str(tmp_path / name)) is None
        assert f"Skipped {tmp_path / name}" in caplog.text
    assert read_image(str(tmp_path / "gone.jpg")) is None
    (tmp_path / "huge.jpg").write_bytes(
        b"BM" + bytes(12) + (40).to_bytes(4, "little") + (60000).to_bytes(4, "little") * 2
        + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    )  # fmt: skip
    assert read_image(str(tmp_path / "huge.jpg")) is None
    assert len(caplog.records) == len(BROKEN) + 2
    assert "deep.png can't be read: it has more than 8 bits" in caplog.text


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"),
     ("1", "PNG"), ("L", "PPM"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("RGB", "BMP")],
)  # fmt: skip
def test_images_of_every_kind_are_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    """ImageNet has CMYK, grey and PNG images, all named .JPEG."""
    path = tmp_path / "image.JPEG"
    red = Image.new("RGB", (40, 30), (200, 10, 30))
    path.write_bytes(encoded(red.quantize() if mode == "P" else red.convert(mode), kind))
    image = read_image(str(path))
    assert image is not None and (image.mode, image.size) == ("RGB", (40, 30))
    if mode not in ("L", "LA", "1"):
        pixel = np.array(image.getpixel((20, 15)))
        assert np.abs(pixel - (200, 10, 30)).max() < 12, "colours are wrong"


def test_a_broken_training_image_is_replaced_by_the_next(damaged: Path) -> None:
    images = stream(damaged)
    size = len(images.records)
    assert size == 3 * 6 + 4
    replaced = 0
    for position in range(2 * size):
        good = position
        while Path(images._record(good)["file_name"]).name in BROKEN:
            good += 1
        item = images[position]
        assert item["broken"] == good - position
        assert item["label"] == images._record(good)["label"]
        replaced += item["broken"]
    assert replaced >= 8


def test_broken_training_images_are_counted(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In metrics.json as training goes, in the log at its end; the same for any workers, and where
    it was resumed. Wrong: just after that, where no iteration's time is measured yet, it fails."""
    monkeypatch.setattr(WatchInput.__init__, "__defaults__", (20,))
    for length in (18, 22):
        given = ("SOLVER.MAX_ITER", length, "OUTPUT_DIR", tmp_path / "run", "SEED", 1)
        args = parse(C78, "--resume", *tiny(damaged, *given))
        train_or_evaluate(load_config(args), args, ClassificationTrainer)
    images = stream(damaged)
    counts = [images[position]["broken"] for position in range(22 * 8)]
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    (found,) = {m["broken_images"] for m in map(json.loads, lines) if m["iteration"] == 19}
    assert found == sum(counts[:160]) > 0
    log = (tmp_path / "run/log.txt").read_text()
    assert f"{sum(counts)} training images could not be read, and were replaced" in log


def test_a_broken_test_image_is_left_out_and_counted(
    damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Accuracy is that of the folder without it."""
    options = ("OUTPUT_DIR", tmp_path / "run")
    model = ClassificationTrainer.build_model(config(C78, *tiny(damaged)))

    def test() -> dict[str, float]:
        cfg = load_config(parse(C78, *tiny(damaged, *options)))
        return ClassificationTrainer.test(cfg, model)["classification"]

    broken = test()
    assert broken["unreadable"] == 2
    assert "2 test images can't be read; accuracy is of the other 18" in caplog.text
    for name in ("truncated.jpg", "empty.jpg"):
        (damaged / "val/a" / name).unlink()
    assert test() == {**broken, "unreadable": 0}
    for path in (damaged / "val").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(OSError, match="none of the test images can be read"):
        test()


def test_a_data_set_of_broken_images_is_an_error(damaged: Path) -> None:
    """And not an endless search for a sound one."""
    for path in (damaged / "train").glob("*/*"):
        path.write_bytes(b"")
    cfg = config(C78, *tiny(damaged))
    with pytest.raises(OSError, match=f"100 images in a row.*{damaged / 'train'}.*disk"):
        next(iter(TrainLoader(cfg, seed=1)))


# Refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.BACKBONE.NAME", "build_randwire_fpn_backbone"),
        ("INPUT.FORMAT", "L"),
        ("INPUT.RANDOM_FLIP", "vertical"),
        ("MODEL.PIXEL_MEAN", "[90.0]"),
        ("INPUT.TRAIN_CROP_AREA", "[0.0, 1.0]"),
        ("INPUT.TRAIN_CROP_AREA", "[0.5, 0.4]"),
        ("INPUT.TRAIN_CROP_AREA", "[0.5, 1.1]"),
        ("INPUT.TRAIN_CROP_AREA", "[0.5]"),
        ("INPUT.PCA_LIGHTING", -0.1),
        ("INPUT.TEST_CROP_SIZE", 0),
        ("INPUT.TEST_CROP_RATIO", 0.0),
        ("INPUT.TEST_CROP_RATIO", 1.5),
        ("MODEL.CLASSIFIER.LABEL_SMOOTHING", 1.0),
        ("MODEL.CLASSIFIER.LABEL_SMOOTHING", -0.1),
        ("MODEL.CLASSIFIER.DROPOUT", 1.0),
        ("SOLVER.EPOCHS", -1),
        ("SOLVER.WARMUP_EPOCHS", -1),
        ("SOLVER.REFERENCE_BATCH_SIZE", 0),
        ("TEST.IMS_PER_PROCESS", 0),
        ("TEST.AUG.ENABLED", True),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(
    folders: Path, key: str, value: object
) -> None:
    with raises_one_line(ValueError) as e:
        load_config(parse(C78, *tiny(folders, key, value)))
    assert str(e.value).startswith(f"{key} must be ")
    shown = value if isinstance(value, str) and not value.startswith("[") else str(value)
    assert str(shown) in str(e.value)


def test_a_training_of_before_nesterov_goes_on_without(folders: Path, tmp_path: Path) -> None:
    """Wrong: it does so anyway, and its config.yaml says it had Nesterov's momentum."""
    given = ["--resume", *tiny(folders, "OUTPUT_DIR", tmp_path)]
    leave_checkpoint(tmp_path)
    solver = "SOLVER: {NESTEROV: false, WEIGHT_DECAY: 0.00005}"
    network = "MODEL: {BACKBONE: {FREEZE_AT: 0}, RANDWIRE: {NORM: BN}}"
    (tmp_path / "config.yaml").write_text(f"{solver}\n{network}")
    with pytest.raises(ValueError, match="add to the command SOLVER.NESTEROV False;"):
        load_config(parse(C78, *given))
    assert not load_config(parse(C78, *given, "SOLVER.NESTEROV", False)).SOLVER.NESTEROV


@pytest.mark.parametrize(
    ("key", "default", "value"), [("DROPOUT", 0, 0.2), ("HEAD_RELU", False, True)]
)
def test_a_resnet_has_no_such_head(folders: Path, key: str, default: object, value: object) -> None:
    """Wrong: a key that only RandWire's head reads is accepted for a ResNet, and does nothing."""
    key = f"MODEL.CLASSIFIER.{key}"
    with pytest.raises(ValueError, match=f"{key} must be {default}.*got {value}"):
        load_config(parse(R50, *tiny(folders, key, value)))
    load_config(parse(R50, *tiny(folders)))


def test_keys_reach_the_classifier(folders: Path) -> None:
    """Wrong: a key of a RandWire's classifier is ignored."""
    options = ["MODEL.CLASSIFIER.HEAD_RELU", True, "MODEL.RANDWIRE.EDGE_DROP_SCOPE", "batch"]
    cfg = load_config(parse(C78, *tiny(folders, *options, "MODEL.RANDWIRE.INIT", "fan_out")))
    network = build_network(cfg)
    assert isinstance(network, RandWireClassifier)
    assert network.head_relu and network.backbone.edge_drop_scope == "batch"
    # He's fan-out of 1280 outputs: √(2/1280).
    assert network.conv.weight.std().item() == pytest.approx(0.0395, rel=0.05)
    literal = build_network(load_config(parse(C78, *tiny(folders))))
    assert not literal.head_relu and literal.backbone.edge_drop_scope == "process"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN", "empty"]),
        (["DATASETS.TEST", "()"], ["DATASETS.TEST", "empty"]),
        (["DATASETS.TRAIN", "('/no/such/folder',)"], ["/no/such/folder", "DETECTRON2_DATASETS"]),
        (["DATASETS.TRAIN", "('imagenet_train',)"], ["imagenet_train", "DETECTRON2_DATASETS"]),
        (["DATASETS.TRAIN", "('randwire_shapes_train',)"], ["randwire_shapes_train", "folder"]),
        (["--eval-only"], ["--eval-only", "MODEL.WEIGHTS"]),
        (["--num-gpus", "3"], ["IMS_PER_BATCH", "3 processes"]),
        (["MODEL.RANDWIRE.NORM", "FrozenBN"], ["FrozenBN", "NORM BN"]),
    ],
)
def test_a_run_that_cannot_work_is_refused_in_one_line(
    folders: Path, args: list[str], says: list[str]
) -> None:
    flags = [a for a in args if a.startswith("--")]
    rest = [*flags, *args[len(flags) :]] if flags else []
    options = tiny(folders, *([] if flags else args))
    with raises_one_line(ValueError) as e:
        load_config(parse(C78, *rest, *options))
    for words in says:
        assert words in str(e.value)


def test_folders_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    """A class without images, or with another name in train and val, spoils the labels."""
    draw_image_folders(tmp_path, train=1, val=1)
    (tmp_path / "train/d").mkdir()
    with pytest.raises(ValueError, match=r"no images in 'd'.*") as empty:
        load_config(parse(C78, *tiny(tmp_path)))
    (tmp_path / "train/c").rename(tmp_path / "train/d/d")  # in a folder below: that's allowed
    with pytest.raises(ValueError, match="different classes.*'d'.*'c'") as other:
        load_config(parse(C78, *tiny(tmp_path)))
    assert "\n" not in f"{empty.value}{other.value}"


# Evaluation


def test_accuracy_of_an_example_by_hand() -> None:
    """Six classes; the rank of the true one is 1, 2, 5, 6, and once it's unknown."""
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(5, 1)
    labels = torch.tensor([0, 1, 4, 5, UNREADABLE])
    evaluator.process({"label": labels[:2]}, logits[:2])
    evaluator.process({"label": labels[2:]}, logits[2:])
    assert evaluator.evaluate() == {"classification": {"top1": 25.0, "top5": 75.0, "unreadable": 1}}
    evaluator.reset()
    evaluator.process({"label": labels[:1]}, logits[:1])
    assert evaluator.evaluate()["classification"]["top1"] == 100.0, "reset forgets nothing"


def test_accuracy_of_fewer_than_five_classes() -> None:
    """Top-5 of three classes is all."""
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    evaluator.process({"label": torch.tensor([0, 1, 2, UNREADABLE])}, torch.eye(4, 3))
    found = evaluator.evaluate()["classification"]
    assert found == {"top1": 100.0, "top5": 100.0, "unreadable": 1}


def test_the_test_set_is_each_image_once_in_order(folders: Path) -> None:
    cfg = config(C78, *tiny(folders, "TEST.IMS_PER_PROCESS", 4))
    loader = ClassificationTrainer.build_test_loader(cfg, str(folders / "val"))
    labels = torch.cat([batch["label"] for batch in loader]).tolist()
    assert labels == 6 * [0] + 6 * [1] + 6 * [2]
    resize, crop = v2.Resize(37), v2.CenterCrop(32)  # 32 / 0.875 = 36.6
    first = np.array(crop(resize(Image.open(folders / "val/a/0.png"))))
    (image, *_), *_ = (batch["image"] for batch in loader)
    assert np.array_equal(image.numpy(), first.transpose(2, 0, 1))


# The network


@pytest.fixture(scope="module")
def classifier(folders: Path) -> ImageClassifier:
    torch.manual_seed(0)
    return ClassificationTrainer.build_model(config(C78, *tiny(folders))).eval()


def test_logits_are_the_networks_of_normalised_images(classifier: ImageClassifier) -> None:
    """A constant of another order of magnitude, or none, is noticed nowhere else."""
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = classifier.network((images / 255 - mean) / std)
        found = classifier({"image": images})
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_network_computes_in_channels_last(classifier: ImageClassifier) -> None:
    inputs: list[torch.Tensor] = []
    network: Any = classifier.network
    ends = (network.backbone.stem.conv, network.conv)  # no fused stage calls those between
    hooks = [end.register_forward_pre_hook(lambda _, args: inputs.extend(args)) for end in ends]
    with torch.no_grad():
        classifier({"image": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)})
    for hook in hooks:
        hook.remove()
    assert len(inputs) == 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_with_smoothed_labels(
    classifier: ImageClassifier, smoothing: float
) -> None:
    """Szegedy et al. (2016): the target is 1 − ε on the label, and ε / K on every class."""
    batch = {"image": torch.randint(256, (4, 3, 32, 32)), "label": torch.tensor([0, 1, 2, 1])}
    model = ImageClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)),
        input_format="RGB", pixel_mean=[100.0] * 3, pixel_std=[50.0] * 3, label_smoothing=smoothing,
    )  # fmt: skip
    (loss,) = model(batch).values()
    assert model.train_top1 is not None
    top1 = model.train_top1.item()
    model.eval()
    logits = model(batch)
    expected = 0.0
    for row, label in zip(logits.tolist(), batch["label"].tolist()):
        total = math.log(sum(math.exp(value) for value in row))
        target = [(1 - smoothing) * (k == label) + smoothing / 3 for k in range(3)]
        expected -= sum(t * (value - total) for t, value in zip(target, row)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    hits = (logits.argmax(1) == batch["label"]).sum().item()
    assert top1 == 25 * hits


def test_channels_are_in_the_configs_order(folders: Path, tmp_path: Path) -> None:
    """BGR is Detectron2's default: weights of such a network must see such images."""
    draw_image_folders(tmp_path, train=1, val=1)
    for path in tmp_path.glob("*/*/*"):
        Image.new("RGB", (40, 40), (250, 100, 5)).save(path)
    for order, values in (("RGB", [250, 100, 5]), ("BGR", [5, 100, 250])):
        cfg = config(C78, *tiny(tmp_path, "INPUT.FORMAT", order))
        train = TrainingStream(records(tmp_path / "train"), cfg, seed=1)[0]["image"]
        test = TestImages(records(tmp_path / "val"), cfg)[0]["image"]
        for image in (train, test):
            assert image[:, 16, 16].tolist() == values


def test_a_test_crop_of_another_size_fits_the_same_weights(
    folders: Path, tmp_path: Path, classifier: ImageClassifier
) -> None:
    """Table 4 tests at 320 what was trained at 224."""
    RandWireCheckpointer(classifier, str(tmp_path)).save("model")
    options = ["MODEL.WEIGHTS", tmp_path / "model.pth", "OUTPUT_DIR", tmp_path / "run",
               "INPUT.TEST_CROP_SIZE", 64]  # fmt: skip
    args = parse(C78, "--eval-only", *tiny(folders, *options))
    results = train_or_evaluate(load_config(args), args, ClassificationTrainer)
    assert 0 <= results["classification"]["top1"] <= results["classification"]["top5"] == 100


def test_weights_of_another_wiring_are_refused_or_bring_their_config(
    folders: Path, tmp_path: Path, classifier: ImageClassifier
) -> None:
    """The same shapes fit many wirings: nothing but the fingerprint tells that one is wrong."""
    RandWireCheckpointer(classifier, str(tmp_path)).save("model")
    options = ["MODEL.WEIGHTS", tmp_path / "model.pth", "OUTPUT_DIR", tmp_path / "run",
               "MODEL.RANDWIRE.SEED", 2]  # fmt: skip
    args = parse(C78, "--eval-only", *tiny(folders, *options))
    with pytest.raises(ValueError, match="--config-from-weights") as e:
        load_config(args)
    theirs = classifier.network.backbone.spec.fingerprint
    ours = spec_from_config(config(C78, *tiny(folders, *options))).fingerprint
    assert theirs != ours and theirs in str(e.value) and ours in str(e.value)
    args = parse(C78, "--eval-only", "--config-from-weights", *tiny(folders, *options))
    results = train_or_evaluate(load_config(args), args, ClassificationTrainer)
    assert results["classification"]["unreadable"] == 0


@pytest.mark.parametrize(
    ("name", "reference"),
    [("R_50", "resnet50"), ("R_101", "resnet101"), ("X_50_32x4d", "resnext50_32x4d"),
     ("X_101_32x4d", "resnext101_32x4d")],
)  # fmt: skip
def test_a_resnet_is_the_standard_one(name: str, reference: str) -> None:
    """Parameter by parameter; torchvision's ResNeXt-101-32x4d is only in newer code than 64x4d."""
    cfg = config(f"imagenet/{name}_100ep.yaml", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        ours = ClassificationTrainer.build_model(cfg)
        if hasattr(torchvision.models, reference):
            theirs = getattr(torchvision.models, reference)()
        else:
            theirs = torchvision.models.ResNet(
                torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4
            )
    shapes = [sorted(tuple(p.shape) for p in m.parameters()) for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    strided = [
        sorted((m.kernel_size, m.stride, m.weight.shape) for m in model.modules()
               if isinstance(m, nn.Conv2d))
        for model in (ours, theirs)
    ]  # fmt: skip
    assert strided[0] == strided[1]


def test_a_resnets_blocks_start_as_the_identity() -> None:
    """Goyal et al., section 5.1: γ = 0 in the last norm of each block."""
    model = ClassificationTrainer.build_model(config(R50, "MODEL.DEVICE", "cpu"))
    blocks = [m for m in model.modules() if isinstance(m, BottleneckBlock)]
    assert len(blocks) == 16
    for block in blocks:
        assert not block.conv3.norm.weight.any()
        assert block.conv1.norm.weight.all() and block.conv2.norm.weight.all()
    x = torch.rand(1, 256, 4, 4)
    assert torch.equal(blocks[1](x), x)


# Watching the input


@pytest.mark.parametrize(("waited", "warned"), [(0.05, False), (0.5, True)])
def test_waiting_for_data_is_said(
    waited: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that starves looks like a slow network."""
    loader = SimpleNamespace(broken=3)
    hook = WatchInput(loader, period=10)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(storage=storage, iter=0, max_iter=1000)
        for hook.trainer.iter in range(20):
            storage.put_scalars(data_time=waited if hook.trainer.iter >= 10 else 0.0, time=1.0)
            hook.after_step()
            storage.step()
            if hook.trainer.iter == 9:
                assert not caplog.records
    assert storage.history("broken_images").values() == [(3, 9), (3, 19)]
    assert len(caplog.records) == warned
    if warned:
        assert "50% of the last 10" in caplog.text and "NUM_WORKERS" in caplog.text


def counted_and_resumed(rank: int) -> list[Any]:
    """What a checkpoint and the metrics have after three broken images in one process and one in
    the other, and what a training that was resumed from it has after five more in each."""
    found = []
    state = {"broken": 0}
    for broken in (3 - 2 * rank, 5):
        loader = SimpleNamespace(broken=0)
        hook = WatchInput(loader, period=1)
        hook.load_state_dict(state)
        loader.broken += broken
        with EventStorage() as storage:
            hook.trainer = SimpleNamespace(storage=storage, iter=0)
            hook.after_step()
        state = comm.all_gather(hook.state_dict())[0]  # the main process saves it
        found += [state["broken"], storage.latest().get("broken_images", (None,))[0]]
    return found


def test_broken_images_of_all_processes_are_counted() -> None:
    """Wrong: metrics.json counts those of the first process, and a resumed training forgets what
    the others had counted."""
    assert in_two_processes(counted_and_resumed) == [[4, 4, 14, 14], [4, None, 14, None]]


def log_to_stdout() -> None:
    """As the tools do, whatever another test's log was."""
    for name in LOGGERS:
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
    setup_logger(name="randwire_d2")


def test_input_and_training_are_measured_alone(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """--measure-input says both rates. Wrong: it writes into OUTPUT_DIR, a training's perhaps."""
    args = parse(C78, *tiny(folders, "OUTPUT_DIR", tmp_path, "DATALOADER.NUM_WORKERS", 1))
    log_to_stdout()
    measure_input(load_config(args), args, seconds=0.2)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "input feeds" in x)
    assert "(1 × 1 workers)" in line and "training alone consumes" in line
    assert not list(tmp_path.iterdir())


def measured_in_one_of_two(rank: int) -> tuple[int, float]:
    """How often a process whose clock runs at a speed of its own has made a step, and its rate."""
    step, clock = mock.Mock(), count(step=1 + 2 * rank)
    with mock.patch.object(trainer.time, "perf_counter", lambda: next(clock)):
        rate = trainer._rate(step, 10.0)
    return step.call_count, rate


def test_processes_measure_as_many_steps() -> None:
    """Wrong: one makes a step more than the other, for whose gradients it waits for ever."""
    (steps, rate), (others, others_rate) = in_two_processes(measured_in_one_of_two)
    assert steps == others > 1 and rate == others_rate


def test_the_accuracy_is_read_with_the_loss(folders: Path, tmp_path: Path) -> None:
    """Wrong: a step waits for the device a second time, until the optimizer has done its work."""
    args = parse(C78, *tiny(folders, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2))
    training, written = ClassificationTrainer(load_config(args)), []
    training.optimizer.register_step_pre_hook(
        lambda *_: written.append(get_event_storage().latest()["train_top1"][1])
    )
    training.train()
    assert written == [0, 1]


def test_training_writes_what_it_should(folders: Path, tmp_path: Path) -> None:
    """A run of every ResNet part: loss, training accuracy, test accuracy, a whole checkpoint."""
    narrow = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
              "MODEL.RESNETS.RES2_OUT_CHANNELS", 32]  # fmt: skip
    args = parse(R50, *tiny(folders, "OUTPUT_DIR", tmp_path, "TEST.EVAL_PERIOD", 2, *narrow))
    train_or_evaluate(load_config(args), args, ClassificationTrainer)
    metrics = last_metrics(tmp_path)
    assert 0 < metrics["total_loss"] < math.inf and 0 <= metrics["train_top1"] <= 100
    assert metrics["classification/top5"] == 100
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3
    assert checkpoint["preprocessing"]["input_format"] == "RGB"


def checkpoint(output: Path, name: str = "model_final") -> dict[str, Any]:
    return torch.load(output / f"{name}.pth", weights_only=True)


def test_precise_norms_leave_the_training_as_it_is(folders: Path, tmp_path: Path) -> None:
    """TEST.PRECISE_BN. Wrong: other weights than without it, or others after an interruption."""

    def train(output: Path, *options: object, flags: tuple[str, ...] = ()) -> dict[str, Any]:
        options = (
            *("SEED", 1, "MODEL.CLASSIFIER.DROPOUT", 0.5, "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5),
            *("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "OUTPUT_DIR", output),
            *options,
        )
        args = parse(C78, *flags, *tiny(folders, *options))
        train_or_evaluate(load_config(args), args, ClassificationTrainer)
        return checkpoint(output)["model"]

    precise = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3)
    without, found = train(tmp_path / "without"), train(tmp_path / "precise", *precise)
    statistics = {key for key in found if "running_" in key}
    same_keys = {key for key in found if torch.equal(found[key], without[key])}
    assert statistics and not statistics & same_keys
    weights = {key for key in found if key.endswith((".weight", ".bias"))}
    assert weights and weights <= same_keys

    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    shutil.copy(tmp_path / "precise" / "model_0000001.pth", interrupted)
    (interrupted / "last_checkpoint").write_text("model_0000001.pth")
    resumed = train(interrupted, *precise, flags=("--resume",))
    assert all(torch.equal(resumed[key], found[key]) for key in found)


def test_an_evaluation_leaves_the_training_as_it_is(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """README's command for Table 4. Wrong: it changes the training's files, or its own results
    are not those that it printed."""
    output = tmp_path / "run"
    options = ["OUTPUT_DIR", output, "TEST.EVAL_PERIOD", 4]
    args = parse(C78, *tiny(folders, *options))
    train_or_evaluate(load_config(args), args, ClassificationTrainer)
    log_to_stdout()

    def evaluate(*options: object, flags: tuple[str, ...] = ()) -> tuple[dict, Path]:
        args = parse(C78, "--eval-only", *flags, *tiny(folders, "OUTPUT_DIR", output, *options))
        capsys.readouterr()
        results = train_or_evaluate(load_config(args), args, ClassificationTrainer)
        *_, last = capsys.readouterr().out.splitlines()
        return results, Path(last.split()[-1])

    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    before = contents()
    weights = ("MODEL.WEIGHTS", output / "model_final.pth")
    # MAX_ITER of the command, not of the training: what config.yaml must not get.
    large = (*weights, "INPUT.TEST_CROP_SIZE", 64, "SOLVER.MAX_ITER", 40000)
    results, folder = evaluate(*large)
    after = contents()
    assert {path: after[path] for path in before} == before
    assert all(path.is_relative_to(folder) for path in after.keys() - before)
    run = RunFolder(folder)
    assert folder.parent == output / "evaluations" and run.is_evaluation
    assert run.config().INPUT.TEST_CROP_SIZE == 64
    found = run.evaluation()
    assert found == Evaluation(str(output / "model_final.pth"), str(output), results)

    # Where and how it is computed makes no other evaluation of it; the same one replaces itself.
    assert evaluate(*large, "TEST.IMS_PER_PROCESS", 7, "DATALOADER.NUM_WORKERS", 1)[1] == folder
    small_results, small = evaluate(flags=("--resume",))
    assert small != folder and RunFolder(small).evaluation().weights == found.weights
    assert RunFolder(folder).evaluation() == found
    last = last_metrics(output)
    assert {f"classification/{k}": v for k, v in small_results["classification"].items()} == {
        k: v for k, v in last.items() if k.startswith("classification/")
    }
    # From its own config.yaml, too.
    args = parse(str(small / "config.yaml"), "--eval-only")
    train_or_evaluate(load_config(args), args, ClassificationTrainer)
    assert sorted(p.name for p in (output / "evaluations").iterdir()) == sorted(
        [folder.name, small.name]
    )
    (folder / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="results.json is damaged.*evaluate again"):
        run.evaluation()
