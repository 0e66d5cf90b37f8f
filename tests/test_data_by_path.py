"""Data sets by their path: three formats are one data set, and the config knows it everywhere."""

import argparse
import gc
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode
from helpers import PATIENCE, ROOT, last_metrics, leave_checkpoint, raises_one_line, run_tool
from label_formats import (
    FORMATS,
    Content,
    average_precision,
    simplified,
    write_formats,
    write_sound,
)
from PIL import Image

from randwire_d2.config import detector_config
from randwire_d2.data import (
    count_images,
    existing_path,
    labelled_images,
    look,
    register_detection_data,
)
from randwire_d2.data.detection import by_path, inspection
from randwire_d2.data.detection.by_path import held_back
from randwire_d2.data.detection.classes import class_entries
from randwire_d2.data.detection.inspection import clean
from randwire_d2.data.formats import coco_json, voc, yolo
from randwire_d2.data.formats.coco_json import read_coco
from randwire_d2.data.formats.labels import LabelledImages, image_ids
from randwire_d2.data.images.probing import probe_all
from randwire_d2.data.paths import in_threads
from randwire_d2.engine import (
    argument_parser,
    data_config,
    load_config,
    register_data,
)
from randwire_d2.engine.config import datasets
from randwire_d2.engine.config.datasets import (
    check_evaluator,
    forget_classes,
    log_data,
    settle_classes,
)
from randwire_d2.garbage import uncollected
from randwire_d2.runs import EVALUATIONS, RunFolder

COCO = ROOT.parent / "shared" / "data" / "coco"
SHAPES = str(ROOT / "configs" / "faster_rcnn_randwire_shapes.yaml")
Split = tuple[Content, Path]


def parse(*args: object) -> argparse.Namespace:
    return argument_parser().parse_args(["--config-file", SHAPES, *map(str, args)])


def shapes(split: str) -> Split:
    """The built-in set; its validation images get other names than those for training."""
    metadata = MetadataCatalog.get(f"randwire_shapes_{split}")
    json_file = existing_path("shapes", metadata.json_file)
    return json.loads(Path(json_file).read_text()), Path(metadata.image_root)


def two_splits(kind: str, tmp_path: Path, polygons: bool = False) -> dict[str, Split]:
    if kind == "coco":
        content = json.loads((COCO / "annotations" / "instances_train2017.json").read_text())
        return dict.fromkeys(("train", "val"), (simplified(content, polygons), COCO / "train2017"))
    splits = {}
    for split in ("train", "val"):
        content, folder = shapes(split)
        renamed = tmp_path / f"renamed_{split}"
        renamed.mkdir()
        for image in content["images"]:
            name = f"{split}_{image['file_name']}"
            (renamed / name).symlink_to(folder / image["file_name"])
            image["file_name"] = name
        splits[split] = simplified(content, polygons), renamed
    return splits


REAL = pytest.param(
    "coco", marks=pytest.mark.skipif(not COCO.is_dir(), reason="no images in ../shared/data")
)


@pytest.mark.parametrize("polygons", [False, True], ids=["boxes", "polygons"])
@pytest.mark.parametrize("kind", ["shapes", REAL])
def test_three_formats_are_one_data_set(kind: str, polygons: bool, tmp_path: Path) -> None:
    """Wrong: a format loses an image, its id or size, a box, a fraction of a pixel or a polygon."""
    given = write_formats(tmp_path / "data", two_splits(kind, tmp_path, polygons))
    formats = [f for f in FORMATS if f != "voc" or not polygons]  # it has none
    found = {}
    for name in formats:
        cfg = load_config(parse(*given[name]))
        sets = [DatasetCatalog.get(names[0]) for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)]
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        found[name] = sets, metadata.thing_classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    (records, _), _, _ = found["coco"]
    assert sum(len(r["annotations"]) for r in records) > 50
    assert all(("segmentation" in a) == polygons for r in records for a in r["annotations"])
    for name in formats:
        assert found[name] == found["coco"], name


@pytest.mark.parametrize("name, ids", [("9223372036854775807", [2**63 - 1, 7]),
                                       ("20231015123456789012", [1, 2])])  # fmt: skip
def test_ids_are_numbers_that_numpy_has(name: str, ids: list[int]) -> None:
    """Wrong: a time to the microsecond in a name, which COCO's evaluation makes a float of."""
    assert image_ids([name, "007"]) == ids
    assert np.array(ids).dtype == np.int64


def test_three_formats_have_the_same_ap(tmp_path: Path) -> None:
    """Wrong: the ground truth that the evaluation makes of a format is another's."""
    given = write_formats(tmp_path / "data", two_splits("shapes", tmp_path))
    coco, yolo, voc = (
        average_precision(load_config(parse(*given[name])), tmp_path / name, noise=3)["bbox"]
        for name in FORMATS
    )
    assert 20 < coco < 80
    assert yolo == coco == voc


@pytest.mark.parametrize("held_back", [False, True])
def test_difficult_objects_are_trained_on_and_ignored_in_evaluation(
    held_back: bool, tmp_path: Path
) -> None:
    """Wrong: AP of a VOC folder is another than VOC's own evaluation would mean: an object that it
    leaves out is a miss, or what is found there is false."""
    root = tmp_path / "data"
    given = write_sound(root)["voc"]
    for path in (root / "Annotations").glob("*.xml"):
        mark = "</name><difficult>1</difficult>"  # of the first of two objects
        text = path.read_text().replace("</name>", mark, 1)
        path.write_text(text.replace("dog</name>", "dog</name><difficult>0</difficult>"))
    if held_back:
        (root / "ImageSets" / "Main" / "val.txt").unlink()
        given = [*given, "DATASETS.HOLD_BACK", "0.5"]
    cfg = load_config(parse(*given))
    train, val = (labelled_images(n) for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    for split, crowds in ((train, [0, 0]), (val, [1, 0])):
        assert all([a["iscrowd"] for a in r["annotations"]] == crowds for r in split.records)
    number = len(train.records)
    summary = look({"train": train, "val": val}).summary
    assert f"{2 * number} boxes, {number} of them difficult (evaluation ignores these)" in summary
    for crowds in (True, False):
        output = tmp_path / f"found_{crowds}"
        assert average_precision(cfg, output, crowds=crowds)["bbox"] == pytest.approx(100)


def test_labels_are_read_without_detours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: of a set of COCO's size, more time goes into a search for garbage where there is none,
    and into words for faults that no annotation has, than into its JSON."""
    collects: list[bool] = []
    monkeypatch.setattr(coco_json, "brief", None)
    monkeypatch.setattr(by_path, "clean", lambda s: collects.append(gc.isenabled()) or clean(s))
    load_config(parse(*write_sound(tmp_path / "data")["coco"]))
    assert collects == [False, False] and gc.isenabled()
    with uncollected():
        made: list[list] = [[]]
    if not gc.get_freeze_count():  # Python 3.12 begins with some hundred frozen objects of its own
        assert any(thing is made for thing in gc.get_objects(generation=2))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_for_garbage_is_as_it_was_before(enabled: bool) -> None:
    """Wrong: one block in another, or an error, leaves it off; or what a program has frozen for the
    processes that it forks is searched again."""
    gc.freeze()
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ValueError), uncollected():
            with uncollected():
                pass
            assert not gc.isenabled()
            raise ValueError
        assert (gc.isenabled(), gc.get_freeze_count() > 0) == (enabled, True)
    finally:
        gc.unfreeze()
        gc.enable()


def test_many_images_are_few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a task for each, which takes longer than the image; or images have others' sizes."""
    paths = [str(tmp_path / f"{i}.png") for i in range(1, 60)]
    for i, path in enumerate(paths, start=1):
        Image.new("L", (i, 1)).save(path)
    tasks = []
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(
        ThreadPoolExecutor, "submit", lambda *given: tasks.append(given) or submit(*given)
    )
    assert [file.size for file in probe_all(paths)] == [(i, 1) for i in range(1, 60)]
    assert len(tasks) <= 16


@pytest.mark.parametrize(("of_validation", "number"), [("", 8), ("other", 10)])
def test_a_voc_file_is_parsed_once(
    of_validation: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: twice where there is no labelmap.txt: for the names of all classes, too."""
    parsed: list[Path] = []
    parse_file = voc._parse
    monkeypatch.setattr(voc, "_parse", lambda path: parsed.append(path) or parse_file(path))
    given: list[object] = ["--data", tmp_path / "own" / "data"]
    for folder in filter(None, ("own", of_validation)):
        (tmp_path / folder).mkdir()
        write_sound(tmp_path / folder / "data")
        (tmp_path / folder / "data" / "labelmap.txt").unlink()
        (tmp_path / folder / "data" / "data.yaml").unlink()
    if of_validation:
        given += ["--data-val", tmp_path / of_validation / "data"]
    load_config(parse(*given))
    assert len(parsed) == len(set(parsed)) == number


@pytest.mark.skipif(not COCO.is_dir(), reason="no images in ../shared/data")
def test_a_coco_file_is_read_as_detectron2_reads_it() -> None:
    """Wrong: crowds, polygons of several parts, ids with gaps or the order of images differ."""
    json_file = str(COCO / "annotations" / "instances_train2017.json")
    images = str(COCO / "train2017")
    ours = read_coco(json_file, images)
    assert ours.records == load_coco_json(json_file, images, "coco_of_detectron2")
    metadata = MetadataCatalog.get("coco_of_detectron2")
    assert list(ours.classes) == metadata.thing_classes
    assert ours.category_ids == tuple(metadata.thing_dataset_id_to_contiguous_id)
    MetadataCatalog.remove("coco_of_detectron2")


@pytest.mark.slow
def test_three_formats_train_alike(tmp_path: Path) -> None:
    """Wrong: the first losses depend on the format; or another process, or an
    evaluation with a saved config, does not know the data."""
    given = write_formats(tmp_path / "data", two_splits("shapes", tmp_path))
    # Not what a measurement chooses, whose sums have other last bits.
    small = ["MODEL.RANDWIRE.FUSED", "off", "MODEL.RANDWIRE.CHANNELS", 8,
             "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 2]  # fmt: skip
    losses = {}
    for name in FORMATS:
        said = run_tool(
            "train_net.py", "--config-file", SHAPES, *given[name],
            "OUTPUT_DIR", tmp_path / name, *small, log=tmp_path / "log",
        )  # fmt: skip
        assert said.count("24 images (all 128 × 128)") == 1
        losses[name] = last_metrics(tmp_path / name)["total_loss"]
    assert losses["yolo"] == losses["coco"] == losses["voc"]
    run_tool(
        "train_net.py", "--config-file", tmp_path / "voc" / "config.yaml", "--eval-only",
        "--resume", "--num-gpus", 2, "--dist-url", "auto", log=tmp_path / "log",
    )  # fmt: skip
    (evaluation,) = map(RunFolder, (tmp_path / "voc" / EVALUATIONS).iterdir())
    assert "bbox" in evaluation.evaluation().results


@pytest.fixture
def unsplit(tmp_path: Path) -> Iterator[Path]:
    """Ten images of 40 × 30 with a box each, in Roboflow's form of COCO, not split."""
    folder = tmp_path / "unsplit"
    folder.mkdir()
    images, annotations = [], []
    for i in range(10):
        Image.new("RGB", (40, 30), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 40, "height": 30})
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2,
                            "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0})  # fmt: skip
    categories = [{"id": 0, "name": "cells", "supercategory": "none"},
                  {"id": 1, "name": "red", "supercategory": "cells"},
                  {"id": 2, "name": "white", "supercategory": "cells"}]  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_images_are_held_back(unsplit: Path) -> None:
    """Wrong: an image is in both splits or in none, or another process holds back others."""
    with raises_one_line(ValueError, match=r"no validation split.*DATASETS.HOLD_BACK 0.1"):
        load_config(parse("--data", unsplit))
    with pytest.raises(ValueError, match=r"less than 1; got 1.5"):
        load_config(parse("--data", unsplit, "DATASETS.HOLD_BACK", 1.5))
    held = {}
    for seed in (-1, 0, 7):
        cfg = load_config(parse("--data", unsplit, "DATASETS.HOLD_BACK", 0.2, "SEED", seed))
        train, val = (
            [r["image_id"] for r in DatasetCatalog.get(name)]
            for name in (cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0])
        )
        assert train and val and sorted(train + val) == list(range(10))
        held[seed] = val
    assert held[-1] == held[0] != held[7]
    # Read again, as by a second loader, and as in a new process.
    assert [r["image_id"] for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])] == held[7]
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert register_data(cfg) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    assert [r["image_id"] for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])] == held[7]
    assert count_images(cfg.DATASETS.TRAIN[0]) == 10 - len(held[7])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--data"], []),
        (["--data", "--data-val"], ["there is a validation split"]),
        ([], ["it is for DATASETS.PATH (--data)"]),
    ],
)
def test_a_share_that_holds_nothing_back_is_named(
    given: list[str], expected: list[str], unsplit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: who asked for a tenth of the images believes that AP is of these."""
    flags = [part for flag in given for part in (flag, unsplit)]
    load_config(parse(*flags, "DATASETS.HOLD_BACK", 0.2))
    said = [record.message for record in caplog.records if "HOLD_BACK" in record.message]
    assert said == [f"DATASETS.HOLD_BACK 0.2 holds no image back: {why}" for why in expected]


@pytest.mark.parametrize(
    ("period", "iterations", "labelled", "says"),
    [
        (1, 10, 6, "an epoch is 6 iterations of 1 ("),
        (1, 10, 4, "an epoch is 4 iterations of 1 ("),
        (1, 10, 1, "as many images are 2 iterations of 1 ("),
        (2, 10, 6, ""),
        (0, 10, 6, ""),
        (1, 1, 6, ""),
    ],
)
def test_evaluations_of_more_images_than_are_trained_on_are_named(
    period: int,
    iterations: int,
    labelled: int,
    says: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Wrong: a period that suits a few hundred images evaluates thousands after each hundred; or
    the one that is named counts images without boxes, or is shorter still."""
    given = write_sound(tmp_path / "data")["coco"]
    file = tmp_path / "data" / "train.json"
    content = json.loads(file.read_text())
    kept = [a for a in content["annotations"] if a["image_id"] <= labelled]
    file.write_text(json.dumps({**content, "annotations": kept}))
    keys = ["SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", iterations, "TEST.EVAL_PERIOD", period]
    log_data(load_config(parse(*given, *keys)))
    said = [r.message for r in caplog.records if "TEST.EVAL_PERIOD" in r.message]
    assert len(said) == bool(says)
    assert all("the 2 validation images" in m and says in m for m in said)


def test_files_of_labels_are_waited_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: of 100,000 files on a network disk one is asked for after the other, or they are mixed
    up."""
    together, read = Barrier(2), yolo._text

    def wait(path: str) -> str | None:
        together.wait(PATIENCE)
        return read(path)

    monkeypatch.setattr(yolo, "_text", wait)
    load_config(parse(*write_sound(tmp_path / "data")["yolo"]))
    assert in_threads(str, range(50)) == list(map(str, range(50)))


def test_an_image_that_comes_or_goes_moves_no_other(unsplit: Path, tmp_path: Path) -> None:
    """Wrong: a training that goes on after an image was added, lost or damaged, or the folder was
    moved, validates on images that it was trained on."""

    def sides(folder: Path) -> dict[str, str]:
        names = register_detection_data(str(folder), hold_back=0.3, seed=1)
        found = {
            Path(record["file_name"]).name: split
            for split, (name,) in zip(("train", "val"), names)
            for record in DatasetCatalog.get(name)
        }
        for (name,) in names:
            DatasetCatalog.remove(name)
        return found

    before = sides(unsplit)
    assert len(before) == 10 and set(before.values()) == {"train", "val"}
    (unsplit / "3.png").unlink()
    (unsplit / "7.png").write_bytes(b"damaged")
    annotations = unsplit / "_annotations.coco.json"
    content = json.loads(annotations.read_text())
    for i in (10, 11, 12):
        (unsplit / f"new{i}.png").write_bytes((unsplit / "0.png").read_bytes())
        content["images"].insert(0, {**content["images"][0], "id": i, "file_name": f"new{i}.png"})
    annotations.write_text(json.dumps(content))
    after = sides(unsplit.rename(tmp_path / "moved"))
    assert len(after) == 11
    kept = before.keys() - {"3.png", "7.png"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "--eval-only"]])
def test_no_run_goes_on_with_another_split(unsplit: Path, tmp_path: Path, flags: list[str]) -> None:
    """Wrong: it validates on images that it was trained on, drawn with another seed or, by an
    older version, in another way, which called the sets after path, share and seed alone."""
    run = tmp_path / "run"
    run.mkdir()
    given = ["--data", unsplit, "DATASETS.HOLD_BACK", 0.2, "OUTPUT_DIR", run]
    cfg = load_config(parse(*given))
    leave_checkpoint(run)
    (run / "config.yaml").write_text(cfg.dump())
    load_config(parse(*flags, *given))
    with pytest.raises(ValueError, match=r"did .DATASETS.HOLD_BACK 0.2, SEED 1; .*--data-val"):
        load_config(parse(*flags, *given, "SEED", 7))
    digest = hashlib.sha256(json.dumps([str(unsplit), "", 0.2, cfg.SEED]).encode()).hexdigest()
    older = cfg.dump().replace(cfg.DATASETS.TRAIN[0], f"{unsplit.name}_{digest[:8]}_train")
    (run / "config.yaml").write_text(older)
    with raises_one_line(ValueError, match="which was trained on some of them"):
        load_config(parse(*flags, *given))
    load_config(parse(*flags, "--data-val", unsplit, *given))
    (run / "config.yaml").write_text(cfg.dump())
    linked = tmp_path / "linked"
    linked.symlink_to(unsplit)
    given[1] = linked  # the same images by another path
    load_config(parse(*flags, *given))
    with raises_one_line(ValueError, match="which was trained on some of them"):
        load_config(parse(*flags, *given, "SEED", 7))


@pytest.mark.parametrize(
    ("number", "share", "least", "most"),
    [(1000, 0.1, 70, 130), (1000, 0.7, 650, 750), (20, 1e-9, 1, 1), (20, 1 - 1e-9, 19, 19),
     (2, 0.5, 1, 1)],
)  # fmt: skip
def test_no_split_is_empty(number: int, share: float, least: int, most: int) -> None:
    """Wrong: other shares than asked for, or, of few images, none for validation or training."""
    records = [{"file_name": f"/data/{i}.png"} for i in range(number)]
    whole = LabelledImages("some", records, ("a",), (1,), image_root="/data")
    for seed in range(5):
        assert least <= len(held_back(whole, share, seed)) <= most


def test_the_root_category_of_roboflow_is_no_class(unsplit: Path) -> None:
    """Wrong: a detector has a class that nothing is labelled with, unlike the YOLO export's."""
    cfg = load_config(parse("--data", unsplit, "DATASETS.HOLD_BACK", 0.2))
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    assert metadata.thing_classes == ["red", "white"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2


def test_the_evaluation_reads_what_roboflow_writes(unsplit: Path, tmp_path: Path) -> None:
    """Wrong: the root category is a class of the evaluation's, or the annotation with id 0 is never
    found; or labels that were corrected are evaluated as they were before."""
    for run, category in (("first", 2), ("second", 1)):
        for name in [n for n in DatasetCatalog.list() if n.startswith(f"{unsplit.name}_")]:
            DatasetCatalog.remove(name)  # as in a new process
        content = json.loads((unsplit / "_annotations.coco.json").read_text())
        content["annotations"][1]["category_id"] = category
        (unsplit / "_annotations.coco.json").write_text(json.dumps(content))
        cfg = load_config(parse("--data", unsplit, "--data-val", unsplit))
        assert average_precision(cfg, tmp_path / run)["bbox"] == pytest.approx(100)
        assert average_precision(cfg, tmp_path / f"{run}_again", noise=9)["bbox"] < 50


def test_a_path_is_the_configs(
    unsplit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a saved config means another folder elsewhere, or --eval-only trains the names."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(parse("--data", "unsplit", "--data-val", "unsplit"))
    assert (str(unsplit), str(unsplit)) == (cfg.DATASETS.PATH, cfg.DATASETS.PATH_VAL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    monkeypatch.chdir("/")
    saved = RunFolder(tmp_path / "run").config()
    assert register_data(saved) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    args = argument_parser().parse_args(["--config-file", str(tmp_path / "run" / "config.yaml")])
    assert load_config(args).DATASETS == cfg.DATASETS
    with pytest.raises(ValueError, match="needs DATASETS.PATH"):
        load_config(parse("--data-val", unsplit))
    with pytest.raises(ValueError, match=r"DATASETS.TEST and DATASETS.PATH .*unsplit"):
        load_config(parse("--data", unsplit, "DATASETS.TEST", "('randwire_shapes_val',)"))


def test_the_number_of_classes_follows_from_the_data(unsplit: Path) -> None:
    """Wrong: a head has classes that the data has not, which ends in an IndexError inside."""
    given = ["--data", unsplit, "DATASETS.HOLD_BACK", 0.2]
    assert load_config(parse()).MODEL.ROI_HEADS.NUM_CLASSES == 6  # the registered set's
    load_config(parse(*given, "MODEL.ROI_HEADS.NUM_CLASSES", 2))
    # A head that isn't built may have any number.
    load_config(parse(*given, "MODEL.RETINANET.NUM_CLASSES", 3))
    with pytest.raises(ValueError, match=r"ROI_HEADS.NUM_CLASSES is 3, but .* 2 classes \(red, wh"):
        load_config(parse(*given, "MODEL.ROI_HEADS.NUM_CLASSES", 3))
    cfg = detector_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", 3
    with pytest.raises(ValueError, match=r"RETINANET.NUM_CLASSES is 3, but .* 80 classes"):
        settle_classes(cfg, {}, ["coco_2017_train"])
    with pytest.raises(ValueError, match=r"different classes: 80 classes.* 6 classes"):
        settle_classes(cfg, {}, ["coco_2017_train", "randwire_shapes_val"])
    with pytest.raises(ValueError, match=r"10 of 10 boxes.*MASK_ON"):
        load_config(parse("--data", unsplit, "--data-val", unsplit, "MODEL.MASK_ON", True))


def test_a_panoptic_detector_needs_more_than_boxes(unsplit: Path) -> None:
    """Wrong: the training ends as a bug, in its first iteration, for want of sem_seg."""
    given = ["--data", unsplit, "DATASETS.HOLD_BACK", 0.2]
    with pytest.raises(ValueError, match=r"no labels of stuff, which a PanopticFPN needs; .* name"):
        load_config(parse(*given, "MODEL.META_ARCHITECTURE", "PanopticFPN"))


@pytest.fixture
def panoptic() -> Iterator[str]:
    """The name of a registered set with three classes of stuff, one of them that of all things."""
    name, stuff = "stuff_of_three", ["things", "sky", "sea"]
    MetadataCatalog.get(name).set(stuff_classes=stuff, evaluator_type="coco_panoptic_seg")
    yield name
    MetadataCatalog.pop(name)


def test_the_number_of_stuff_follows_from_the_data(panoptic: str) -> None:
    """Wrong: a panoptic detector of the user's own data has COCO's 54 outputs, and its evaluation
    fails at a pixel of the fiftieth; or a detector without stuff is refused for it."""
    cfg = detector_config()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    settle_classes(cfg, forget_classes(cfg), [panoptic])
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    with raises_one_line(ValueError, match="SEM_SEG_HEAD.NUM_CLASSES is 4, .* 3 .*; set it to 3"):
        settle_classes(cfg, {}, [panoptic])
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    settle_classes(cfg, {}, [panoptic])
    settle_classes(cfg, forget_classes(cfg) | {"SEM_SEG_HEAD": 54}, [panoptic])
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 54


def test_a_panoptic_evaluation_needs_its_package(
    panoptic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the training ends at its first evaluation, for want of panopticapi."""
    check_evaluator("coco_2017_val")
    monkeypatch.setattr(datasets, "find_spec", lambda _: None)
    with raises_one_line(ValueError, match=r"needs panopticapi: pip install .*DATASETS.TEST"):
        check_evaluator(panoptic)
    monkeypatch.setattr(datasets, "find_spec", lambda _: "found")
    check_evaluator(panoptic)


def test_ids_of_own_stuff_are_kept(panoptic: str) -> None:
    """Wrong: where several ids are one class, predictions have other ids than the data set; or an
    evaluation ends with an assertion at the first pixel whose class has no id."""
    metadata = MetadataCatalog.get(panoptic)
    metadata.set(stuff_dataset_id_to_contiguous_id={11: 1, 12: 2})
    with raises_one_line(ValueError, match="no id in .* for 'things', index 0 of .* 0: 0"):
        check_evaluator(panoptic)
    MetadataCatalog.pop(panoptic)
    metadata = MetadataCatalog.get(panoptic)
    metadata.set(stuff_classes=["things", "sky", "sea"], thing_classes=["cat", "dog"])
    metadata.set(stuff_dataset_id_to_contiguous_id={11: 1, 12: 2, 1: 0, 2: 0})
    metadata.set(thing_dataset_id_to_contiguous_id={1: 0, 7: 0, 2: 1})
    check_evaluator(panoptic)
    found = class_entries(panoptic)
    assert found["stuff"] == {"names": ["things", "sky", "sea"], "ids": [1, 11, 12]}
    assert found["ids"] == [1, 2]


def test_a_registered_set_without_names_is_read(unsplit: Path) -> None:
    """Wrong: a COCO file that a project registers by itself fails inside the training."""
    json_file = unsplit / "_annotations.coco.json"
    register_coco_instances("own", {}, str(json_file), str(unsplit))
    own = ["DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)"]
    assert load_config(parse(*own)).MODEL.ROI_HEADS.NUM_CLASSES == 3  # as Detectron2 reads it
    MetadataCatalog.remove("own")  # as in a new process
    MetadataCatalog.get("own").set(json_file=str(json_file), image_root=str(unsplit))
    json_file.write_text(json_file.read_text().replace('"category_id": 2', '"category_id": 9'))
    with pytest.raises(ValueError, match=r"'own' can't be read: .*category_id=9"):
        load_config(parse(*own))


def test_the_look_counts_what_is_there(unsplit: Path) -> None:
    """Wrong: an image that training and validation share is not named, or counts are wrong."""
    (unsplit / "copy.png").write_bytes((unsplit / "4.png").read_bytes())
    content = json.loads((unsplit / "_annotations.coco.json").read_text())
    image = {**content["images"][4], "file_name": "copy.png"}
    other = {**content, "images": [image], "annotations": [content["annotations"][4]]}
    val = unsplit / "val.json"
    val.write_text(json.dumps(other))
    (train,), (test,) = register_detection_data(str(unsplit), str(val))
    found = look({"train": labelled_images(train), "val": labelled_images(test)})
    assert "10 images (all 40 × 30), 0 without a box" in found.summary
    assert [line.split() for line in found.summary.splitlines()[-2:]] == [
        ["red", "5", "1"], ["white", "5", "0"]]  # fmt: skip
    (warning,) = found.warnings
    assert "also in train" in warning and ": 1 (" in warning
    assert f"{unsplit / 'copy.png'} is {unsplit / '4.png'}" in warning


def test_the_search_for_duplicates_reads_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: of bitmaps with the same last bytes, each is read anew for each of the others; or one
    that is in both splits is not found, or another one is."""
    paths = [tmp_path / f"{i:02}.bmp" for i in range(12)]
    for i, path in enumerate(paths):
        image = Image.new("L", (40, 40))
        image.putpixel((0, 0), i % 10)  # in the last row of the file
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    records = [{"file_name": str(path)} for path in paths]
    read: list[str] = []
    digest = inspection.digest
    monkeypatch.setattr(inspection, "digest", lambda path: read.append(path) or digest(path))
    found = inspection.duplicates(records[:7], records[6:])
    assert found == [(str(paths[a]), str(paths[b])) for a, b in ((6, 6), (0, 10), (1, 11))]
    assert sorted(read) == list(map(str, paths))


def test_browse_data_draws_what_it_counts(unsplit: Path, tmp_path: Path) -> None:
    """Wrong: the picture isn't written, or the augmented images lie beside their boxes."""
    picture = tmp_path / "data.png"
    said = run_tool("browse_data.py", "--data", unsplit, "--data-val", unsplit, "--output", picture,
                    log=tmp_path / "log")  # fmt: skip
    assert "10 boxes" in said and "also in train" in said
    with Image.open(picture) as image:
        assert image.size[0] > 1000
    said = run_tool("browse_data.py", "--data", unsplit, "--output", picture, log=tmp_path / "log")
    assert "10 images (all" in said and "name one with --data-val, or hold back" in said


def test_data_are_looked_at_before_they_are_split(unsplit: Path) -> None:
    """Wrong: who looks must decide first how to validate, an image is missing from what is shown,
    or a look lets a training without a validation split begin."""
    args = parse("--data", unsplit)
    for _ in range(2):  # the second time, it is registered
        cfg = data_config(args)
        assert (len(cfg.DATASETS.TRAIN), len(cfg.DATASETS.TEST)) == (1, 0)
        assert len(labelled_images(cfg.DATASETS.TRAIN[0]).records) == 10
    with pytest.raises(ValueError, match="no validation split; name one with --data-val"):
        load_config(args)
    held = data_config(parse("--data", unsplit, "DATASETS.HOLD_BACK", 0.2)).DATASETS
    assert len(held.TRAIN) == len(held.TEST) == 1
    labels = unsplit / "labels.csv"
    labels.write_text("a,b\n")
    for load in (load_config, data_config):
        with pytest.raises(ValueError, match="labels.csv' is no JSON"):
            load(parse("--data", f"{labels}:{unsplit}"))


def test_augmented_boxes_stay_on_their_objects(tmp_path: Path) -> None:
    """Wrong: boxes or masks are drawn where they were before a flip or a change of size."""
    from randwire_d2.drawing import samples

    Image.fromarray(np.pad(np.full((20, 30, 3), 255, np.uint8), ((5, 25), (10, 60), (0, 0)))).save(
        tmp_path / "white.png"
    )
    points = [10.0, 5.0, 40.0, 5.0, 40.0, 25.0, 10.0, 25.0]
    record = {"file_name": str(tmp_path / "white.png"), "image_id": 1, "height": 50, "width": 100,
              "annotations": [{"bbox": [10, 5, 30, 20], "bbox_mode": BoxMode.XYWH_ABS,
                               "category_id": 0, "segmentation": [points]}]}  # fmt: skip
    cfg = detector_config()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.FORMAT = (200,), "RGB"
    flipped = set()
    for seed in range(6):
        np.random.seed(seed)
        image, (found,) = samples._augment(cfg, record)
        x0, y0, x1, y1 = map(round, found["bbox"])
        assert image[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() > 200
        assert image[:, : x0 - 4].max(initial=0) < 50 > image[:, x1 + 4 :].max(initial=0)
        flipped.add(x0 > 200)
    assert flipped == {True, False}
