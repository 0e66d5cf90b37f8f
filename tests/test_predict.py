"""Models out of their checkpoints alone, and tools/predict.py: an evaluation's very boxes."""

import csv
import json
import os
import resource
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from helpers import ROOT, draw_image_folders, raises_one_line, run_tool
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from randwire_d2 import load_classifier, load_detector
from randwire_d2.checkpoint import Classes, RandWireCheckpointer
from randwire_d2.classification import ClassificationTrainer
from randwire_d2.cli.predict import main
from randwire_d2.config import classifier_config, detector_config
from randwire_d2.data import register_folders
from randwire_d2.data.images.names import is_image_file
from randwire_d2.data.images.reading import open_image, read_rgb
from randwire_d2.drawing.detections import draw_instances
from randwire_d2.engine import Trainer
from randwire_d2.inference import Detector
from randwire_d2.inference.inputs import _inputs, files_as_inputs, find_inputs
from randwire_d2.inference.prediction import job
from randwire_d2.inference.prediction.output import results_writer, video_writer

VAL = "randwire_shapes_val"
CONFIG = ROOT / "configs/faster_rcnn_randwire_shapes.yaml"
# A Mask R-CNN that takes milliseconds; without training it is sure of nothing, and finds much.
SMALL = [
    "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 8, "MODEL.MASK_ON", True,
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7, "TEST.DETECTIONS_PER_IMAGE", 5,
    "DATALOADER.NUM_WORKERS", 0, "SEED", 1, "MODEL.ROI_HEADS.NUM_CLASSES", 6,
]  # fmt: skip


def save(trainer: type[Trainer], cfg: CfgNode, folder: Path, **classes: Any) -> Path:
    """A checkpoint as a trainer saves it, of weights that nobody trained."""
    torch.manual_seed(0)
    model = build_model(cfg)
    folder.mkdir(exist_ok=True)
    own = trainer.classes(cfg)._replace(**classes)
    RandWireCheckpointer(model, str(folder), cfg=cfg, classes=own).save("model_final")
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = detector_config()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(SMALL)
    return save(Trainer, cfg, tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    draw_image_folders(root, classes=list("abcdefg"), train=1, val=2)
    return root


@pytest.fixture(scope="module")
def classifier(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    register_folders([str(folders / "train"), str(folders / "val")])
    cfg = classifier_config()
    cfg.merge_from_file(str(ROOT / "configs/shapes/randwire_pretrain.yaml"))
    cfg.merge_from_list([
        "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.CLASSIFIER.NUM_CLASSES", 7,
        "DATASETS.TRAIN", (str(folders / "train"),), "DATASETS.TEST", (str(folders / "val"),),
    ])  # fmt: skip
    return save(ClassificationTrainer, cfg, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of different sizes in two folders, one of which a camera held upright."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    rng = np.random.default_rng(1)
    for name, size in (("a.png", (60, 90)), ("b.jpg", (80, 60)), ("more/a.jpg", (64, 64))):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[0x0112] = 6 if name == "b.jpg" else 1  # rotated by a quarter
        image.save(root / name, exif=exif)
    return root


def predict(*arguments: object) -> int:
    """The exit status; a refusal is raised as what it says."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as e:
        if isinstance(e.code, str) and e.code.startswith("predict.py: error: "):
            raise ValueError(e.code) from e
        return int(e.code is not None)
    return 0


@pytest.fixture(scope="module")
def predicted(detector: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole prediction, which stays as it is."""
    folder = tmp_path_factory.mktemp("predicted") / "whole"
    assert predict(detector, images, "--device", "cpu", "--output", folder) == 0
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def write_clip(path: Path, number: int) -> list[np.ndarray]:
    """A video of images of the data set, and its frames: FFV1 loses nothing of them."""
    frames = [cv2.imread(r["file_name"])[:96] for r in DatasetCatalog.get(VAL)[:number]]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), 5, (128, 96))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return frames


# -------------------------------------------------------------------------------------------------
# Loading
# -------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
import cv2
import randwire_d2
assert "randwire_d2.inference" not in sys.modules
from randwire_d2 import load_detector
from detectron2.data import MetadataCatalog

detector = load_detector(sys.argv[1], device="cpu")
assert "nobody_has_it" not in MetadataCatalog.list()
found = detector(cv2.imread(sys.argv[2]))["instances"]
print("FOUND", json.dumps([detector.class_names, detector.records(found.to("cpu"), 1)]))
"""


def test_a_copied_checkpoint_is_a_whole_model_elsewhere(tmp_path: Path, images: Path) -> None:
    """Wrong: a checkpoint alone in a folder, in a process that has never heard of its data set,
    gives no model, another one, or loses the names and the ids of its classes."""
    cfg = detector_config()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list([*SMALL, "DATASETS.TRAIN", ("nobody_has_it",), "MODEL.MASK_ON", False,
                         "MODEL.ROI_HEADS.NUM_CLASSES", 2])  # fmt: skip
    classes = {"names": ["dog", "cat"], "ids": [18, 17]}
    run = tmp_path / "run"
    file = save(Trainer, cfg, run, **classes)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone / "x.pth")
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    said = run_tool(script, alone / "x.pth", images / "a.png", log=tmp_path / "log")
    names, records = json.loads(said.split("FOUND ")[1])
    here = load_detector(run, device="cpu")
    found = here(cv2.imread(str(images / "a.png")))["instances"]
    assert names == ["dog", "cat"] and {r["category_id"] for r in records} <= {17, 18}
    assert len(records) == len(found) == 5
    assert [r["score"] for r in records] == found.scores.tolist()
    assert [{18: 0, 17: 1}[r["category_id"]] for r in records] == found.pred_classes.tolist()


def test_detectron2s_predictor_takes_the_config(
    detector: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: a detector finds something else than Detectron2's DefaultPredictor with its config, or
    its loading warns of a training without weights."""
    own = load_detector(detector, "cpu")
    assert "MODEL.WEIGHTS" not in caplog.text
    image = cv2.imread(str(images / "b.jpg"))
    found, expected = own(image)["instances"], DefaultPredictor(own.cfg)(image)["instances"]
    assert len(found) == 5 and found.scores.tolist() == expected.scores.tolist()
    assert found.pred_boxes.tensor.tolist() == expected.pred_boxes.tensor.tolist()


@pytest.mark.parametrize("channels", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_a_file_is_opened_once_and_read_as_by_the_mapper(
    channels: str, detector: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: each image is opened twice; or the model gets other pixels than in its tests, of an
    array or a file, or of a model whose images are no RGB."""
    own = load_detector(detector, "cpu")
    cfg = own.cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = channels
    own = Detector("", cfg, own.model, Classes(own.class_names))
    record = {"file_name": str(images / "b.jpg"), "height": 60, "width": 80, "annotations": []}
    expected = DatasetMapper(cfg, False)(record)
    opened: list[Any] = []
    open_file = Image.open
    monkeypatch.setattr(Image, "open", lambda f: opened.append(f) or open_file(f))
    read = own.read(record)
    assert len(opened) == 1
    array = own.prepare(cv2.imread(record["file_name"]))["image"]
    assert torch.equal(read.pop("image"), image := expected.pop("image")) and read == expected
    assert array.shape == image.shape and (array.float() - image.float()).abs().mean() < 2
    with pytest.raises(SizeMismatchError):
        own.read({**record, "width": 81})


def test_what_is_no_image_is_refused_in_one_line(detector: Path, classifier: Path) -> None:
    """Wrong: a path, or what cv2.imread gives of a wrong one, is an AttributeError; or an image of
    0 … 1, in which nothing would be found, passes for one."""
    grey, floats = np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3))
    for model in (load_detector(detector, "cpu"), load_classifier(classifier, "cpu")):
        for given in (None, "a.jpg", grey, floats, np.zeros((9, 9, 4), np.uint8)):
            with raises_one_line(ValueError, match=r"must be an array \(H, W, 3\) of uint8; got"):
                model(given)


def test_a_run_gives_its_best_checkpoint_and_old_ones_its_config(
    detector: Path, tmp_path: Path
) -> None:
    """Wrong: the best is passed over, or a checkpoint of before it held its config is lost."""
    file = torch.load(detector, weights_only=True)
    cfg = load_detector(detector).cfg
    del file["config"], file["class_names"], file["category_ids"]
    torch.save({**file, "iteration": 1}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ValueError, match=r"holds no config.*config\.yaml of its run"):
        load_detector(tmp_path)
    (tmp_path / "config.yaml").write_text("optimizer:\n  _target_: !!python/name:torch.optim.SGD\n")
    with pytest.raises(ValueError, match=r"config\.yaml is a LazyConfig's.*detector\.yaml"):
        load_detector(tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    old = load_detector(tmp_path)
    assert old.file.endswith("model_0000001.pth")
    assert old.class_names == MetadataCatalog.get(VAL).thing_classes
    assert old.category_ids == [1, 2, 3, 4, 5, 6]
    names = [f"{name}s" for name in reversed(old.class_names)]  # only in a file, not yet read
    coco = tmp_path / "coco.json"
    register_coco_instances("unread_train", {}, str(coco), str(tmp_path))
    cfg.defrost()
    cfg.DATASETS.TRAIN = ("unread_train",)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load_detector(tmp_path).class_names[0] == "class 0"  # the file is on another machine
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(names)]
    coco.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    known = load_detector(tmp_path)
    assert known.class_names == names and known.category_ids == [10, 11, 12, 13, 14, 15]
    shutil.copy(detector, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert load_detector(tmp_path).file.endswith("model_final.pth")
    shutil.copy(detector, tmp_path / "model_best.pth")
    assert load_detector(tmp_path).file.endswith("model_best.pth")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_detector(tmp_path.parent)


def test_a_detector_has_the_weights_that_evaluations_test(detector: Path, tmp_path: Path) -> None:
    """Wrong: of a training with SOLVER.EMA, the raw weights are used in place of their average."""
    file = torch.load(detector, weights_only=True)
    average = {name: value + 1 for name, value in file["model"].items()}
    torch.save({**file, "ema": average}, tmp_path / "x.pth")
    loaded = load_detector(tmp_path / "x.pth").model.state_dict()
    assert all(torch.equal(loaded[name].cpu(), value) for name, value in average.items())


def test_what_is_no_whole_model_is_refused_in_one_line(
    detector: Path, classifier: Path, tmp_path: Path
) -> None:
    """Wrong: a traceback, a model with random heads, or an error without the way out."""
    whole = torch.load(detector, weights_only=True)
    state = whole["model"]
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.bottom_up.")}
    headless = {k: v for k, v in state.items() if not k.startswith("roi_heads.mask_head")}
    files: dict[str, Any] = {
        "it is a backbone without heads": {"model": backbone},
        "weights of the model are missing": {**whole, "model": headless},
        "holds a list, not a state dict": ["a", "list"],
        "'config'.*NONE": {**whole, "config": "NONE: 1"},
        "registers its parts": {**whole, "config": "MODEL: {META_ARCHITECTURE: Theirs}"},
        "a SemanticSegmentor finds no": {
            **whole,
            "config": "MODEL: {META_ARCHITECTURE: SemanticSegmentor}",
        },
        "states": {**whole, "randwire": {**whole["randwire"], "fingerprint": "another"}},
    }
    for i, (message, content) in enumerate(files.items()):
        torch.save(content, tmp_path / f"{i}.pth")
        with raises_one_line(ValueError, match=message) as e:
            load_detector(tmp_path / f"{i}.pth")
        assert f"{i}.pth" in str(e.value)
    with pytest.raises(ValueError, match="use load_classifier"):
        load_detector(classifier)
    with pytest.raises(ValueError, match="use load_detector"):
        load_classifier(detector)
    for device in ("gpu7", "cuda:99", "meta"):
        with raises_one_line(ValueError, match=rf"device .*'{device}'"):
            load_detector(detector, device=device)


# -------------------------------------------------------------------------------------------------
# tools/predict.py
# -------------------------------------------------------------------------------------------------


def test_a_data_sets_results_are_those_of_its_evaluation(detector: Path, tmp_path: Path) -> None:
    """Wrong: a box, a score, a mask or an id is another than --eval-only's."""
    run, log, out = tmp_path / "run", tmp_path / "log", tmp_path / "out"
    given = ["--config-file", CONFIG, "--eval-only", "OUTPUT_DIR", run, *SMALL,
             "MODEL.WEIGHTS", detector]  # fmt: skip
    run_tool("train_net.py", *given, log=log)
    (evaluated,) = run.rglob("coco_instances_results.json")
    run_tool("predict.py", detector, "--dataset", "test", "--output", out, "--device", "cpu",
             log=log)  # fmt: skip
    expected = json.loads(evaluated.read_text())
    assert len(expected) == 60 and {r["image_id"] for r in expected} == set(range(1, 13))
    assert results(out) == expected
    pictures = sorted(p.name for p in (out / "pictures").iterdir())
    assert pictures == [f"{i:06}.jpg" for i in range(12)]
    # What the ids mean is beside them, in COCO's form, and COCO's tools read both.
    coco = COCO(str(out / "images.json"))
    assert len(coco.loadRes(str(out / "results.json")).anns) == 60
    assert coco.cats == COCO(MetadataCatalog.get(VAL).json_file).cats
    by_id = {r["image_id"]: r["file_name"] for r in DatasetCatalog.get(VAL)}
    assert {i: image["file_name"] for i, image in coco.imgs.items()} == by_id


def test_images_folders_and_globs(detector: Path, images: Path, tmp_path: Path) -> None:
    """Wrong: an image is lost, found twice, or drawn over another of its name; a camera's
    orientation is ignored; the table says something else than the JSON."""
    out = tmp_path / "out"
    given = [images / "b.jpg", images, str(images / "**" / "*.jpg"), f"{images}/./a.png"]
    assert predict(detector, *given, "--output", out, "--device", "cpu") == 0
    listed = json.loads((out / "images.json").read_text())["images"]
    names = [Path(i["file_name"]).relative_to(images).as_posix() for i in listed]
    assert names == ["b.jpg", "a.png", "more/a.jpg"] and [i["id"] for i in listed] == [1, 2, 3]
    assert [(i["height"], i["width"]) for i in listed] == [(60, 80), (60, 90), (64, 64)]
    drawn = sorted(p.relative_to(out / "pictures").as_posix() for p in out.rglob("*.jpg"))
    assert drawn == ["a.jpg", "b.jpg", "more/a.jpg"]
    found = results(out)
    assert {r["image_id"] for r in found} == {1, 2, 3}
    for record in found:
        height, width = record["segmentation"]["size"]
        assert (height, width) == [(60, 80), (60, 90), (64, 64)][record["image_id"] - 1]
        assert mask_util.decode(record["segmentation"]).shape == (height, width)
    with open(out / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["score"]) for r in rows] == [r["score"] for r in found]
    assert [r["category"] for r in rows] == [
        MetadataCatalog.get(VAL).thing_classes[r["category_id"] - 1] for r in found
    ]
    assert [[float(r[k]) for k in ("x", "y", "width", "height")] for r in rows] == [
        r["bbox"] for r in found
    ]


def test_a_batch_changes_no_result(detector: Path, images: Path, tmp_path: Path) -> None:
    """Wrong: images of different sizes are padded to one, which moves boxes and scores."""
    given = [images, *(r["file_name"] for r in DatasetCatalog.get(VAL)[:2])]
    found = []
    for size in (1, 5):
        out = tmp_path / str(size)
        options = ["--output", out, "--device", "cpu", "--no-pictures", "--batch", size]
        assert predict(detector, *given, *options) == 0
        found.append(results(out))
    assert len(found[0]) == 25
    for one, many in zip(*found, strict=True):
        assert (one["image_id"], one["category_id"]) == (many["image_id"], many["category_id"])
        assert many["score"] == pytest.approx(one["score"], abs=1e-5)
        assert many["bbox"] == pytest.approx(one["bbox"], abs=1e-3)


def test_a_threshold_is_of_all_that_is_written(
    detector: Path, images: Path, tmp_path: Path
) -> None:
    """Wrong: what has a lower score is written or drawn, or the picture shows nothing."""
    whole, none = tmp_path / "whole", tmp_path / "none"
    model = load_detector(detector, "cpu")
    image = cv2.imread(str(images / "a.png"))[:, :, ::-1].copy()
    found = model.predict([model.read({"file_name": str(images / "a.png")})])[0]
    middle = float(found.scores.median())
    given = [detector, images / "a.png", "--device", "cpu", "--score-threshold"]
    assert predict(*given, middle, "--output", whole) == 0
    assert len(results(whole)) == int((found.scores >= middle).sum()) == 3
    assert predict(*given, 1, "--output", none) == 0
    assert results(none) == []
    nothing, few, all_ = (model.draw(image, found, t) for t in (1, middle, 0))
    assert nothing.shape == (300, 450, 3), "a small image is enlarged"
    assert (nothing == model.draw(image, found[:0], 0)).all()
    changed = [(drawn != nothing).any(axis=2).mean() for drawn in (few, all_)]
    assert 0.01 < changed[0] < changed[1]


def test_names_are_drawn_as_they_are(detector: Path, classifier: Path, images: Path) -> None:
    """Wrong: a name with two $ is taken for a formula, which fails."""
    image = cv2.imread(str(images / "a.png"))
    model = load_detector(detector, "cpu")
    model = Detector(model.file, model.cfg, model.model, Classes([f"{i} $$" for i in range(6)]))
    found = model(image)["instances"]
    assert len(found) == 5 and model.draw(image, found, 0).any()
    instances = [{**record, "bbox_mode": 1, "category_id": 0} for record in model.records(found, 1)]
    assert draw_instances(image, instances, Metadata(thing_classes=["$$"])).any()
    labels = load_classifier(classifier, "cpu")
    labels.class_names = ["$$"] * 7
    assert labels.draw(image, labels(image), 0).any()


@pytest.mark.parametrize(
    ("by_default", "given", "threshold"),
    [(0.5, [], None), (0.9, [], 0.9), (0.5, ["--score-threshold", 0.8], 0.8),
     (0.9, ["--score-threshold", 0.1], None)],
)  # fmt: skip
def test_that_nothing_is_drawn_is_said(
    by_default: float,
    given: list[object],
    threshold: float | None,
    detector: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: who sees empty pictures beside many results takes the drawing for broken."""
    monkeypatch.setattr(Detector, "least_drawn", by_default)
    assert predict(detector, images / "a.png", "--output", tmp_path / "out", *given) == 0
    first, found, said = capsys.readouterr().out.partition("No score reaches")
    assert first.rstrip().endswith(f"results.json, the pictures in {tmp_path}/out/pictures")
    assert bool(found) == (threshold is not None)
    if found:
        start, _, best = said.strip().rpartition(" ")
        assert (
            start == f"{threshold} (--score-threshold), so the pictures show nothing: the best is"
        )
        assert 0.5 < float(best) < 0.8


def test_broken_inputs_are_named_and_nothing_is_overwritten_unasked(
    detector: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: one broken file ends the work, or is passed over in silence; earlier results are
    lost; an input is drawn over."""
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    shutil.copytree(images, inputs)
    (inputs / "cut.jpg").write_bytes((images / "b.jpg").read_bytes()[:700])
    (inputs / "clip.mp4").write_bytes(b"no video")
    Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(inputs / "deep.png")
    for number in range(20):  # whose names the last line need not have
        (inputs / f"z{number}.jpg").write_bytes(b"no image")
    given = [detector, inputs, "--output", out, "--device", "cpu", "--batch", 2]
    with pytest.raises(SystemExit, match="^23 of the inputs could not.*cut.jpg, .* and 20 more$"):
        main([str(a) for a in given])
    said = capsys.readouterr()
    assert f"Skipped {inputs}/cut.jpg: " in said.out and f"Skipped {inputs}/clip.mp4: " in said.out
    assert f"Skipped {inputs}/deep.png: it has more than 8 bits per pixel" in said.out
    assert {r["image_id"] for r in results(out)} == {1, 2, 5}
    assert sorted(p.name for p in out.iterdir()) == [
        "images.json", "job.json", "pictures", "results.csv", "results.json",
    ]  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        predict(*given)
    for source, message in (("no/*.jpg", "matches no image"), (out / "pictures", "drawn over")):
        with pytest.raises(ValueError, match=message):
            predict(detector, source, "--output", out, "--overwrite")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert predict(detector, images / "a.png", "--output", out, "--overwrite", "--no-pictures") == 0
    assert {r["image_id"] for r in results(out)} == {1}


def fail(monkeypatch: pytest.MonkeyPatch, key: str, value: object, error: BaseException) -> None:
    """Have ``Detector.outputs`` raise an error of batches with an input that has such a value."""
    own = Detector.outputs

    def outputs(self: Detector, inputs: list[dict[str, Any]]) -> Any:
        if any(str(one.get(key)).endswith(str(value)) for one in inputs):
            raise error
        return own(self, inputs)

    monkeypatch.setattr(Detector, "outputs", outputs)


@pytest.fixture
def sigterm() -> Iterator[list[int]]:
    """The signals that reach what handled SIGTERM before the test."""
    reached: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: reached.append(number))
    yield reached
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (KeyboardInterrupt(), 130),
        (OSError("the disk is full"), "predict.py: error: the disk is full"),
        (signal.SIGTERM, 143),
    ],
)
def test_a_prediction_that_ends_early_keeps_what_it_found(
    end: BaseException | signal.Signals, status: int | str, sigterm: list[int], detector: Path,
    images: Path, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: after 999 of 1000 images everything is gone, an earlier run's results too, or what is
    left can't be read, or passes for the whole."""
    out = tmp_path / "out"
    given = [detector, images, "--device", "cpu", "--output"]
    shutil.copytree(predicted, out)
    before = (out / "results.json").read_bytes()
    save, killed = job.save_picture, tmp_path / "killed"

    def stop_at_second(image: np.ndarray, path: Path) -> None:
        if path.stem == "b":
            shutil.copytree(out, killed)
            if isinstance(end, BaseException):
                raise end
            os.kill(os.getpid(), end)
        save(image, path)

    monkeypatch.setattr(job, "save_picture", stop_at_second)
    with pytest.raises(SystemExit) as caught:
        main([*map(str, given), str(out), "--overwrite"])
    assert caught.value.code == status
    os.kill(os.getpid(), signal.SIGTERM)
    assert sigterm == [signal.SIGTERM], "it is handled as before"
    left = json.loads((out / "results.partial.json").read_text())
    assert left == [r for r in results(predicted) if r["image_id"] <= 2] and len(left) == 10
    coco = COCO(str(out / "images.partial.json"))
    assert list(coco.imgs) == [1, 2] and len(coco.loadRes(left).anns) == 10
    assert len((out / "results.partial.csv").read_text().splitlines()) == 11
    assert (out / "results.json").read_bytes() == before
    assert f"found in 2 images is in {out}/results.partial.json" in capsys.readouterr().err
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(ValueError, match="or --resume to go on"):
        predict(*given, out)
    with pytest.raises(ValueError, match="drawn over.*move this one there to --resume"):
        predict(detector, images, out, "--output", out, "--resume")
    monkeypatch.undo()
    digest, read = job.digest, []
    # What a signal has left, then what SIGKILL would have left at that moment.
    for folder, skipped in ((out, 1), (killed, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(job, "digest", lambda value: read.append(type(value)) or digest(value))
            computed = count_outputs(patch)
            assert predict(*given, folder, "--resume") == 0
        assert read.count(bytes) == 1, "the checkpoint is read more than once"
        read.clear()
        assert len(computed) == 3 - skipped and contents(folder) == contents(predicted)


def test_a_finished_prediction_is_not_done_again(
    detector: Path, images: Path, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: --resume computes it once more, or takes it for another one, or for whole where it is
    damaged; or it does not begin what isn't there."""
    out, expected = tmp_path / "out", contents(predicted)
    given = [detector, images, "--device", "cpu", "--output"]
    shutil.copytree(predicted, out)
    with monkeypatch.context() as patch:  # whatever computes fails
        patch.setattr(job.Job, "run", None)
        assert predict(*given, out, "--resume") == 0 and contents(out) == expected
    assert "The prediction is finished; its results are in" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"score-threshold \(None; now 0.2\)"):
        predict(*given, out, "--resume", "--score-threshold", 0.2)
    for name, content in (
        *(("job.json", content) for content in ("null", "[]", '{"--batch": []}', '{"stamps": 5}')),
        *(("images.json", content) for content in ("", "[]", '{"images": [[]]}', None)),
        ("results.json", None),
    ):
        (out / name).unlink() if content is None else (out / name).write_text(content)
        with raises_one_line(ValueError, match="(damaged|not whole any more) .*--overwrite"):
            predict(*given, out, "--resume")
        (out / name).write_bytes(expected[name])
    (out / "job.json").unlink()
    with pytest.raises(ValueError, match="holds no prediction to go on with"):
        predict(*given, out, "--resume")
    assert predict(*given, tmp_path / "new", "--resume") == 0
    assert contents(tmp_path / "new") == expected


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def count_outputs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``Detector.outputs`` is called with from here on."""
    own, computed = Detector.outputs, list[dict[str, Any]]()

    def outputs(self: Detector, inputs: list[dict[str, Any]]) -> Any:
        computed.extend(inputs)
        return own(self, inputs)

    monkeypatch.setattr(Detector, "outputs", outputs)
    return computed


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_prediction_skips_what_is_done(
    batch: int, detector: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: an image or a whole video is computed twice, or a batch in other parts; a frame gets
    another id; a broken input is forgotten. Or old results are mixed with those of another model,
    threshold or set of inputs, or kept for an image that has changed."""
    inputs, whole, out = tmp_path / "inputs", tmp_path / "whole", tmp_path / "out"
    another = tmp_path / "x.pth"
    torch.save({**torch.load(detector, weights_only=True), "iteration": 9}, another)
    shutil.copytree(images, inputs)
    (inputs / "aa.jpg").write_bytes(b"no image")
    for name in ("x.avi", "y.avi", "z.avi"):
        write_clip(inputs / name, 3)
    given = [detector, inputs, "--device", "cpu", "--batch", batch, "--score-threshold", 0.84]
    assert predict(*given, "--output", whole) == 1
    assert 0 < len(results(whole)) < 5 * 12, "some have a lower score"
    write = job.Job._write
    # One image is done, and once all and the first video.
    for at, left in ((("a.jpg", 0), 2 + 9), (("y.avi", 2), 6)):

        def stop(self: job.Job, writer: Any, prepared: Any, *rest: Any, at: object = at) -> None:
            if (Path(prepared["file_name"]).name, prepared.get("frame", 0)) == at:
                raise KeyboardInterrupt
            write(self, writer, prepared, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(job.Job, "_write", stop)
            assert predict(*given, "--output", out) == 1
        before = contents(out)
        others = (
            ()
            if at[1]
            else (
                (
                    (detector, images, *given[2:]),
                    rf"has another set of INPUTs \(7, {inputs}/a.png to {inputs}/z.avi; now 3, ",
                ),
                ((*given[:-1], 0.2), r"another --score-threshold \(0.84; now 0.2\)"),
                ((*given[:5], 3, *given[6:]), "another --batch"),
                ((*given, "--no-pictures"), "another choice of --no-pictures"),
                ((*given, "--runtime", "onnx"), "another --runtime"),
                (
                    (another, *given[1:]),
                    rf"another CHECKPOINT_OR_RUN \({detector}, sha256 \w+; now {another}, sha256",
                ),
            )
        )
        for options, message in others:
            with raises_one_line(ValueError, match=message):
                predict(*options, "--output", out, "--resume")
        for changed in (inputs / "a.png", inputs / "x.avi") if at[1] else ():
            times = changed.stat()
            os.utime(changed, (1, 1))
            with pytest.raises(ValueError, match=f"{changed} has changed since the prediction"):
                predict(*given, "--output", out, "--resume")
            os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert contents(out) == before
        capsys.readouterr()
        with monkeypatch.context() as patch:
            computed = count_outputs(patch)
            assert predict(*given, "--output", out, "--resume") == 1
        assert f"Skipped {inputs}/aa.jpg: " in capsys.readouterr().out
        assert len(computed) == left and contents(out) == contents(whole)
        assert predict(*given, "--output", out, "--resume") == 1
        assert f"Skipped {inputs}/aa.jpg: as before" in capsys.readouterr().out
        shutil.rmtree(out)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_whatever_of_the_files_is_left_is_gone_on_with(cut: int, tmp_path: Path) -> None:
    """Wrong: when the machine went down, an image of which one file has not all is kept, or one of
    which all is there is not, or half a line."""
    records = [
        [{"image_id": i, "category_id": 7, "score": 0.5}] * n for i, n in enumerate((2, 0, 1, 3))
    ]
    images = [{"id": i, "file_name": f"ü,{i}.jpg"} for i in range(4)]
    segments = [{"image_id": i, "file_name": f"{i}.png", "segments_info": []} for i in range(4)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()

    def write(folder: Path, keep: Any) -> int:
        with results_writer(folder, {7: "cat, ü"}, [], {}, keep) as writer:
            begin = writer.images
            for one in zip(images[begin:], records[begin:], segments[begin:]):
                writer.add(*one)
            if folder == whole and not out.exists():
                shutil.copytree(whole, out)
        return begin

    write(whole, None)
    expected, left = contents(whole), contents(out)
    files = ("results.partial.json", "results.partial.csv", "images.partial.json",
             "panoptic.partial.json")  # fmt: skip
    assert left.keys() == {*files, "job.partial.json"}
    kept = []
    last = len(left[files[cut]])
    for end in (*range(0, last, 12), last):
        for name, content in left.items():
            (out / name).write_bytes(content[:end] if name == files[cut] else content)
        kept.append(write(out, len))
        assert contents(out) == expected
    # Whether the last image had more results can't be told; the table can be made of the others.
    assert kept == sorted(kept) and kept[-1] == 3
    assert set(kept) == ({3} if cut == 1 else {0, 2, 3} if cut == 0 else {0, 1, 2, 3})


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError("the disk is full")])
def test_what_ends_a_prediction_while_it_ends_takes_nothing(
    end: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a second Ctrl-C, or a disk that is too full for a file's end, removes all that was
    found; or it is renamed as if it were whole."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    record = {"category_id": 7, "score": 0.5}

    def write(keep: Any, *, number: int) -> int:
        with results_writer(tmp_path, {7: "cat"}, None, {}, keep) as writer:
            begin = writer.images
            for image in images[begin:number]:
                writer.add(image, [{"image_id": image["id"], **record}])
            if number < 3:
                monkeypatch.setattr(os, "fsync", fail)
                raise KeyboardInterrupt
        return begin

    def fail(*_: object) -> None:
        raise end

    with pytest.raises(type(end)):
        write(None, number=2)
    monkeypatch.undo()
    assert not (tmp_path / "results.json").exists()
    assert write(len, number=3) == 2
    assert [r["image_id"] for r in results(tmp_path)] == [0, 1, 2]
    names = {"results.json", "results.csv", "images.json", "job.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("keep", [None, len])
def test_one_prediction_at_a_time_is_at_work_in_a_folder(keep: Any, tmp_path: Path) -> None:
    """Wrong: a second one, resumed or not, writes into the files of the first."""
    with results_writer(tmp_path, {7: "cat"}, None, {}) as writer:
        before = contents(tmp_path)
        with (
            raises_one_line(ValueError, match="another prediction is at work there"),
            results_writer(tmp_path, {7: "cat"}, None, {}, keep),
        ):
            pass
        assert contents(tmp_path) == before
        writer.add({"id": 1, "file_name": "a.jpg"}, [])
    with results_writer(tmp_path, {7: "cat"}, None, {}):
        pass


def test_an_image_is_in_partial_files_wholly_or_not_at_all(tmp_path: Path) -> None:
    """Wrong: an error within an image leaves half of it, or a table of another length."""
    whole = {"image_id": 1, "category_id": 7, "score": 0.5}
    with pytest.raises(KeyError), results_writer(tmp_path, {7: "cat"}, None, {}) as writer:
        writer.add({"id": 1, "file_name": "é.jpg"}, [whole])
        writer.add({"id": 2, "file_name": "b.jpg"}, [whole, {**whole, "category_id": 8}])
    assert json.loads((tmp_path / "results.partial.json").read_text()) == [whole]
    (listed,) = json.loads((tmp_path / "images.partial.json").read_text())["images"]
    assert listed == {"id": 1, "file_name": "é.jpg"}
    assert len((tmp_path / "results.partial.csv").read_text().splitlines()) == 2
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_an_image_that_cant_be_computed_is_skipped(
    name: str, batch: int, detector: Path, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: one huge image ends the work, or takes those of its batch with it; or a model that
    computes nothing at all is blamed on every image in turn."""
    out, error = tmp_path / "out", RuntimeError("can't allocate memory: you tried\n9 TB")
    given = [detector, images, "--device", "cpu", "--batch", batch, "--output"]
    with monkeypatch.context() as patch:
        fail(patch, "file_name", name, error)
        assert predict(*given, out) == 1
    said = capsys.readouterr()
    assert f"Skipped {images / name}: can't allocate memory: you tried 9 TB\n" in said.out
    skipped = ["a.png", "b.jpg", "a.jpg"].index(name) + 1
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [i["id"] for i in listed] == [i for i in (1, 2, 3) if i != skipped]
    assert {r["image_id"] for r in results(out)} == {i["id"] for i in listed}
    fail(monkeypatch, "image", "", error)  # each has one
    with pytest.raises(ValueError, match=r"error: can't allocate memory: you tried 9 TB$"):
        predict(*given, tmp_path / "none")
    assert "Skipped" not in capsys.readouterr().out
    assert list((tmp_path / "none").iterdir()) == []


def test_a_picture_that_cant_be_drawn_is_named(
    detector: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: an image that is too large for Matplotlib ends the work, or loses what was found."""

    def draw(*arguments: object) -> np.ndarray:
        raise ValueError("Image size of 70000x90 pixels is too large")

    monkeypatch.setattr(Detector, "draw", draw)
    out = tmp_path / "out"
    assert predict(detector, images / "a.png", "--output", out, "--device", "cpu") == 1
    assert f"Drew no picture of {images}/a.png: Image size of" in capsys.readouterr().out
    assert len(results(out)) == 5


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_a_video_that_ends_early_is_kept_so_far(
    error: BaseException, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: a frame that can't be computed, or Ctrl-C, takes those before it with it."""
    clip, out = tmp_path / "clip.avi", tmp_path / "out"
    write_clip(clip, 5)
    fail(monkeypatch, "frame", 3, error)
    given = [detector, clip, "--output", out, "--device", "cpu", "--batch", 2]
    skipped = isinstance(error, Exception)
    assert predict(*given) == 1
    partial = "" if skipped else ".partial"
    listed = json.loads((out / f"images{partial}.json").read_text())["images"]
    assert [i["frame"] for i in listed] == ([0, 1, 2] if skipped else [0, 1])
    drawn = cv2.VideoCapture(str(out / "pictures" / f"clip{partial}.mp4"))
    assert int(drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == len(listed)
    assert len(list((out / "pictures").iterdir())) == 1
    said = f"Skipped all from frame 3 of {clip}: MemoryError"
    assert (said in capsys.readouterr().out) == skipped


def test_a_video_is_read_frame_by_frame(detector: Path, tmp_path: Path) -> None:
    """Wrong: frames are lost or found twice, prepared otherwise than images, or the video with the
    detections does not play as long as the one without."""
    clip, out = tmp_path / "clip.avi", tmp_path / "out"
    frames = write_clip(clip, 7)
    Image.fromarray(frames[3][:, :, ::-1]).save(tmp_path / "frame.png")
    given = [tmp_path / "frame.png", clip]
    assert predict(detector, *given, "--output", out, "--device", "cpu") == 0
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(i["id"], i.get("frame")) for i in listed] == [(1, None), *zip(range(2, 9), range(7))]
    found = results(out)
    of_image, of_frame = ([r for r in found if r["image_id"] == i] for i in (1, 5))
    assert [{**r, "image_id": 1} for r in of_frame] == of_image and of_image
    drawn = cv2.VideoCapture(str(out / "pictures" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    played = []
    while (read := drawn.read())[0]:
        played.append(read[1])
    assert len(played) == 7 and played[0].shape == (96, 128, 3)
    for i, shown in enumerate(played):
        distances = [np.abs(shown.astype(float) - frame).mean() for frame in frames]
        assert np.argmin(distances) == i
    assert [p.name for p in (out / "pictures").iterdir() if "part" in p.name] == []

    # One that was cut off is named, and what is left of it is kept.
    (tmp_path / "cut.avi").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    out = tmp_path / "cut"
    options = ["--output", out, "--device", "cpu", "--batch", 4, "--no-pictures"]
    assert predict(detector, tmp_path / "cut.avi", *options) == 1
    kept = {r["image_id"] for r in results(out)}
    assert kept in ({1, 2, 3}, {1, 2, 3, 4})  # OpenCV 4.8 reads half a frame as one
    assert not (out / "pictures").exists()


def test_a_classifiers_best_class_is_what_its_evaluation_counts(
    classifier: Path, folders: Path, tmp_path: Path
) -> None:
    """Wrong: images are prepared otherwise than in the test, or the five best are not the best."""
    out = tmp_path / "out"
    given = ["--dataset", "test", "--output", out, "--device", "cpu", "--batch", 3]
    assert predict(classifier, *given) == 0
    assert len(list((out / "pictures").glob("[a-g]/[01].jpg"))) == 14
    model = load_classifier(classifier, "cpu")
    top1 = ClassificationTrainer.test(model.cfg, model.model)["classification"]["top1"]
    found = results(out)
    labels = [r["label"] for r in DatasetCatalog.get(str(folders / "val"))]
    assert len(found) == 5 * len(labels) == 70
    best = [r["category_id"] for r in found[::5]]
    assert top1 == pytest.approx(100 * np.mean([b == i for b, i in zip(best, labels)]))
    assert top1 < 100 and all(a["score"] >= b["score"] for a, b in zip(found[:4], found[1:5]))
    image = folders / "val" / "c" / "0.png"
    probabilities = model(cv2.imread(str(image)))
    assert probabilities.sum().item() == pytest.approx(1)
    of_it = next(i for i, r in enumerate(DatasetCatalog.get(str(folders / "val")))
                 if r["file_name"] == str(image))  # fmt: skip
    assert found[5 * of_it]["score"] == pytest.approx(probabilities.max().item(), abs=1e-6)
    drawn = model.draw(cv2.imread(str(image)), probabilities, 0)
    assert (drawn != model.draw(cv2.imread(str(image)), probabilities, 1)).any()


def test_a_classifier_sees_a_photo_as_opencv_reads_it(
    classifier: Path, images: Path, tmp_path: Path
) -> None:
    """Wrong: a photo that a camera turned is classified sideways, and drawn upright; or a data
    set's is turned, on which its evaluation and ImageNet's figures are not."""
    model, photo = load_classifier(classifier, "cpu"), str(images / "b.jpg")
    upright = model.prepare(cv2.imread(photo))["image"].float()
    for record, seen in (({}, upright), ({"label": 0}, upright.rot90(1, (1, 2)))):
        record |= {"file_name": photo}
        read = model.read(record)
        assert (read["image"].float() - seen).abs().mean() < 2  # of random pixels: 64
        assert model.picture(record).shape[:2] == (read["height"], read["width"])
    out = tmp_path / "out"
    assert predict(classifier, photo, "--output", out, "--device", "cpu") == 0
    (listed,) = json.loads((out / "images.json").read_text())["images"]
    assert (listed["height"], listed["width"]) == (60, 80)
    assert Image.open(out / "pictures" / "b.jpg").size == (480, 360)


def test_a_data_set_of_other_classes_is_refused(detector: Path, tmp_path: Path) -> None:
    """Wrong: ids of one data set are written for another's classes, or the error names no way."""
    out = tmp_path / "out"
    MetadataCatalog.get("others").thing_classes = ["a"]
    DatasetCatalog.register("others", list)
    with pytest.raises(ValueError, match="has the classes a, the model circle, triangle"):
        predict(detector, "--dataset", "others", "--output", out)
    with pytest.raises(ValueError, match="no data set of a detector, as the model is one: its"):
        predict(detector, "--dataset", "randwire_shapes_cls_val", "--output", out)
    assert not out.exists()


def test_a_class_may_be_renamed_as_in_an_evaluation(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who corrects a name in the labels can't predict them; what the line says to add is
    refused; one class's name may stand for another's; or classes have the model's ids where the
    data set has none."""
    out, classes = tmp_path / "out", load_detector(detector, "cpu").class_names
    given = [detector, "--dataset", "corrected", "--output", out, "--device", "cpu"]
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 7}
    Image.new("RGB", (64, 64)).save(record["file_name"])
    monkeypatch.setitem(DatasetCatalog.data, "corrected", lambda: [record])
    metadata = Metadata(thing_classes=[*classes[:-1], "a new name"])
    monkeypatch.setitem(MetadataCatalog.data, "corrected", metadata)
    says = f"--dataset 'corrected': class {len(classes) - 1} .* only names were corrected, add "
    with pytest.raises(ValueError, match=says) as e:
        predict(*given)
    assert not out.exists()
    assert predict(*given, *shlex.split(str(e.value).split(" add ")[1])) == 0
    assert {r["image_id"] for r in results(out)} == {7}
    listed = json.loads((out / "images.json").read_text())["categories"]
    assert [c["id"] for c in listed] == [*range(len(classes))], "not those of an evaluation"
    metadata.thing_classes[:2] = classes[1::-1]
    swap = ["--renamed-class", *classes[:2], "--renamed-class", *classes[1::-1]]
    with pytest.raises(
        ValueError, match="with another order; give data with the checkpoint's classes$"
    ):
        predict(*given, "--overwrite", *swap)


PANOPTIC = "coco_2017_train_panoptic_separated"


@pytest.mark.parametrize(
    ("train", "stored"),
    [
        pytest.param(PANOPTIC, False, marks=pytest.mark.slow),
        pytest.param("nobody_has_it", False, marks=pytest.mark.slow),
        ("nobody_has_it", True),
    ],
)
def test_a_panoptic_model_tells_of_stuff_too(
    train: str, stored: bool, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: all but the instances is dropped without a word, or COCO's tools read other segments,
    classes or ids than the model found; or the names of stuff, which the checkpoint holds, need the
    data set."""
    cfg = detector_config()
    cfg.merge_from_file(str(ROOT / "configs/coco/panoptic_fpn_randwire_c109_1x.yaml"))
    cfg.merge_from_list([
        *SMALL, "MODEL.RANDWIRE.REGIME", "small", "MODEL.RANDWIRE.NORM", "BN",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
        "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu",
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.1, "INPUT.MIN_SIZE_TEST", 100,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 20, "DATASETS.TRAIN", (train,),
    ])  # fmt: skip
    names, ids = ["dog", "cat", "cow", "pig", "emu", "ant"], [18, 17, 21, 1, 16, 90]
    of_coco = cfg.clone()
    of_coco.DATASETS.TRAIN = (PANOPTIC,)
    entry = Trainer.classes(of_coco).stuff if stored else None
    file = save(Trainer, cfg, tmp_path / "run", names=names, ids=ids, stuff=entry)
    out = tmp_path / "out"
    options = ["--output", out, "--device", "cpu", "--score-threshold", 0]
    assert predict(file, images, *options) == 0
    model = load_detector(file, "cpu")
    written = json.loads((out / "panoptic.json").read_text())
    categories = {c["id"]: c for c in written["categories"]}
    assert len(categories) == 6 + 53
    known = train == PANOPTIC or stored
    assert Detector.from_pretrained(model.save_pretrained(tmp_path / "own")).stuff == model.stuff
    stuff = "banner" if known else "stuff 1"
    assert categories[92 if known else 91] == {**categories[92 if known else 91], "name": stuff}
    assert ("Stuff is called stuff 1" in capsys.readouterr().out) != known
    assert [a["image_id"] for a in written["annotations"]] == [1, 2, 3]
    for annotation, path in zip(written["annotations"], ("a.png", "b.jpg", "more/a.jpg")):
        found = model(cv2.imread(str(images / path)))
        pixels, segments = found["panoptic_seg"]
        stored = np.asarray(Image.open(out / "panoptic" / annotation["file_name"])).astype(int)
        assert (stored @ [1, 256, 65536] == pixels.numpy()).mean() > 0.99
        infos = annotation["segments_info"]
        assert {s["id"] for s in infos} == set(np.unique(stored @ [1, 256, 65536])) - {0}
        for info, own in zip(infos, segments, strict=True):
            of = categories[info["category_id"]]
            assert bool(of["isthing"]) == own["isthing"]
            of_its_kind = names if own["isthing"] else model.metadata.stuff_classes
            assert of["name"] == of_its_kind[own["category_id"]]
        image = cv2.imread(str(images / path))[:, :, ::-1].copy()
        picture = (out / "pictures" / annotation["file_name"]).with_suffix(".jpg")
        drawn = np.asarray(Image.open(picture)).astype(float)
        whole = model.draw_panoptic(image, (pixels, segments), 0)
        things = model.draw(image, found["instances"], 0)
        assert np.abs(drawn - whole).mean() < np.abs(drawn - things).mean() / 2
    kinds = {categories[i["category_id"]]["isthing"]
             for a in written["annotations"] for i in a["segments_info"]}  # fmt: skip
    assert kinds == {0, 1}


def test_a_full_disk_takes_nothing_of_what_was_written(tmp_path: Path) -> None:
    """Wrong: what a buffer still has is written first, which fails again, and all is lost."""
    record = {"image_id": 1, "category_id": 7, "score": 0.5}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(OSError, match="too large"),
            results_writer(tmp_path, {7: "cat"}, None, {}) as w,
        ):
            w.add({"id": 1, "file_name": "a.jpg"}, [record])
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
            w.add({"id": 2, "file_name": "b.jpg"}, [record] * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads((tmp_path / "results.partial.json").read_text()) == [record]
    (listed,) = json.loads((tmp_path / "images.partial.json").read_text())["images"]
    assert listed["id"] == 1


def test_a_video_that_a_full_disk_has_cut_is_no_result(tmp_path: Path) -> None:
    """Wrong: the prediction ends well, and its video can't be played."""
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, ends in ((limits[0], nullcontext()), (3000, pytest.raises(OSError, match="full"))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with ends, video_writer(tmp_path / f"{size}.mp4", 29.97) as video:
                for _ in range(9):
                    video.write(frame)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {f"{limits[0]}.mp4", "3000.partial.mp4"}


def test_a_name_that_is_no_utf8_is_as_good_as_any(
    detector: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: one such file, as Latin-1 has left them, ends the work, where it is written into the
    table or named as broken."""
    whole, broken = (tmp_path / os.fsdecode(name) for name in (b"\xe9.png", b"broken\xe9.png"))
    shutil.copy(images / "a.png", whole)
    broken.write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict(detector, whole, broken, "--output", out, "--device", "cpu") == 1
    assert f"Skipped {tmp_path}/broken\ufffd.png: " in capsys.readouterr().out
    assert os.fsencode(whole) in (out / "results.csv").read_bytes()
    (listed,) = json.loads((out / "images.json").read_text())["images"]
    assert listed["file_name"] == str(whole) and len(results(out)) == 5


def test_a_name_says_nothing_to_the_terminal(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a broken image is named on two lines, or its name clears the screen."""
    path = tmp_path / "a\x1b[2J\nb.png"
    path.write_bytes(b"no image")
    assert predict(detector, path, "--output", tmp_path / "out", "--device", "cpu") == 1
    said = capsys.readouterr().out
    assert f"Skipped {tmp_path}/a [2J b.png: " in said and "\x1b" not in said


def test_what_is_hidden_in_a_folder_is_no_image(tmp_path: Path) -> None:
    """Wrong: each photo that a Mac has copied comes with a file that can't be read; or a folder
    that is itself hidden, and named, is empty; or photos in a folder that is linked there are
    passed over without a word, though a glob finds them."""
    for name in ("a.jpg", "._a.jpg", ".trash/b.jpg", "sub/._c.png", "sub/d.mp4"):
        (tmp_path / ".photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".photos" / name).write_bytes(b"")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "e.jpg").write_bytes(b"")
    (tmp_path / ".photos" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / ".photos" / "sub" / "back").symlink_to("..")
    found = find_inputs([str(tmp_path / ".photos")])
    assert [i.name for i in found] == ["a", "linked/e", "sub/d"]
    alone = str(tmp_path / ".photos" / "._a.jpg")
    assert [i.path for i in find_inputs([alone])] == [alone]


def test_what_a_prediction_has_drawn_is_no_photo(tmp_path: Path) -> None:
    """Wrong: a second prediction beside the photos takes the pictures of the first for photos; or
    a folder of pictures can't be given, or one that is only called so is left out."""
    for name in ("a.jpg", "pictures/b.jpg", "out/pictures/a.jpg", "out/pictures/sub/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "out" / "job.partial.json").write_text("{}")
    for given in (tmp_path, tmp_path / "**" / "*.jpg"):
        assert [Path(i.path).name for i in find_inputs([str(given)])] == ["a.jpg", "b.jpg"]
    for given in (tmp_path / "out" / "pictures", tmp_path / "out" / "pictures" / "**" / "*.jpg"):
        assert [Path(i.path).name for i in find_inputs([str(given)])] == ["a.jpg", "c.jpg"]


def test_photos_that_cannot_be_read_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: 40 photos of an iPhone are passed over without a word, or called no image; or pictures
    that Pillow reads are passed over."""
    tmp_path.joinpath("more").mkdir()
    for name in ("1.HEIC", "more/2.heic", "._3.heic", "4.dng", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    said = "2 .heic, 1 .dng can't be read here: convert to JPEG"
    for given in (tmp_path, tmp_path / "**"):
        with raises_one_line(ValueError, f"matches no image and no video; {said}"):
            find_inputs([str(given)])
    (tmp_path / "e.heic").write_bytes(b"")  # has been converted
    last = "d.avif" if is_image_file(".avif") else "d.png"
    for name in ("a.gif", "b.jfif", "c.jp2", last, "e.jpg"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
        with open_image(str(tmp_path / name)) as image:
            assert image.size == (8, 6)
    caplog.clear()
    assert [i.name for i in find_inputs([str(tmp_path)])] == ["a", "b", "c", "d", "e"]
    assert [r.getMessage() for r in caplog.records] == [
        f"INPUT {str(tmp_path)!r} has images that are left out: {said}"
    ]
    with raises_one_line(ValueError, "1.HEIC can't be read: .heic can't be read here: convert to"):
        read_rgb(str(tmp_path / "1.HEIC"))


def test_names_of_pictures_are_different(tmp_path: Path) -> None:
    """Wrong: a.png of one folder is drawn over a.jpg of another."""
    for name in ("x/a.jpg", "x/a.png", "y/a.jpg", "y/[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    given = [tmp_path / "x", tmp_path / "y/*.jpg", tmp_path / "y/[1].jpg"]
    found = find_inputs(list(map(str, given)))
    assert [i.name for i in found] == ["a", "a_2", "[1]", "a_3"]


@pytest.mark.parametrize("folder", ["/data/images", "images", "../images"])
def test_pictures_of_a_data_set_stay_in_their_folder(folder: str) -> None:
    """Wrong: a name with .. in a COCO file leads a picture out of the folder of --output."""
    names = ("a.jpg", "../b.jpg", "../../other/../c.jpg", "more/../../d/./e.jpg")
    found = [i.name for i in files_as_inputs([f"{folder}/{name}" for name in names])]
    assert [os.path.basename(name) for name in found] == ["a", "b", "c", "e"]
    assert [os.path.normpath(name) for name in found] == found
    assert not any(name.startswith(("/", "..")) for name in found)


def test_many_of_one_name_are_named_in_one_go_each() -> None:
    """Wrong: 'data/*/frame.jpg' takes time with the square of its files; or two have one name."""
    tried = 0

    class Name(str):
        def __format__(self, spec: str) -> str:
            nonlocal tried
            tried += 1
            return str(self)

    names = [*map(Name, ["frame"] * 50), "frame_3", "frame_51", Name("frame")]
    found = [i.name for i in _inputs((str(n), name) for n, name in enumerate(names))]
    assert found[:3] == ["frame", "frame_2", "frame_3"]
    assert found[50:] == ["frame_3_2", "frame_51", "frame_52"]
    assert len(set(found)) == len(found) and tried <= 52


# -------------------------------------------------------------------------------------------------
# Other people's tools
# -------------------------------------------------------------------------------------------------


def test_sahi_slices_images_for_a_detector(detector: Path, images: Path) -> None:
    """Wrong: what sahi finds has other names or scores than the detector's own."""
    pytest.importorskip("sahi", reason="pip install sahi")
    from sahi.models.detectron2 import Detectron2DetectionModel
    from sahi.predict import get_prediction

    own = load_detector(detector, "cpu")
    model = Detectron2DetectionModel(
        load_at_init=False,
        confidence_threshold=0.0,
        category_mapping={str(i): name for i, name in enumerate(own.class_names)},
    )
    model.model = own
    found = get_prediction(str(images / "a.png"), model).object_prediction_list
    expected = own(cv2.imread(str(images / "a.png")))["instances"]
    assert [o.score.value for o in found] == expected.scores.tolist()
    names = [own.class_names[c] for c in expected.pred_classes]
    assert [o.category.name for o in found] == names
