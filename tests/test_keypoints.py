"""Keypoints of data sets by path: what is read, refused, trained on, evaluated, predicted."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import poses
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from helpers import ROOT, last_metrics, raises_one_line
from label_formats import average_precision

from randwire_d2 import load_detector
from randwire_d2.cli import browse_data, export, predict, train
from randwire_d2.config import detector_config
from randwire_d2.data import labelled_images, training_mapper
from randwire_d2.data.formats.keypoints import of_classes
from randwire_d2.engine import Trainer, argument_parser, data_config, load_config
from randwire_d2.engine.config.keypoints import settle_keypoints
from randwire_d2.engine.lazy.config import load_lazy_config

CONFIG = str(ROOT / "configs" / "coco" / "keypoint_rcnn_randwire_c109_fpn_1x.yaml")
SHAPES = str(ROOT / "configs" / "faster_rcnn_randwire_shapes.yaml")
TINY: tuple[object, ...] = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0, "SEED", 1),
    *("MODEL.RANDWIRE.REGIME", "small", "MODEL.RANDWIRE.CHANNELS", 16),
    *("MODEL.RANDWIRE.NUM_NODES", 8, "MODEL.RANDWIRE.NORM", "GN", "MODEL.FPN.NORM", "GN"),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [48], [64], [96]]),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16]),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "DATALOADER.NUM_WORKERS", 0),
    *("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96, "SOLVER.IMS_PER_BATCH", 2),
    *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0),
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poses.write_coco(tmp_path_factory.mktemp("poses") / "coco")


def parse(data: Path, *options: object, config: str = CONFIG) -> argparse.Namespace:
    given = ["--config-file", config, "--data", str(data)]
    return argument_parser().parse_args([*given, *map(str, (*TINY, *options))])


def load(data: Path, *options: object) -> CfgNode:
    return load_config(parse(data, *options))


def changed(tmp_path: Path, coco: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The data set with another file for training; classes are those of validation, too."""
    for split, content in poses.contents(coco).items():
        if split == "train" or change is other_class:
            change(content)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / split).symlink_to(coco / split)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def of_annotation(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][0].update(values)


def of_category(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["categories"][0].update(values)


def annotations(name: str) -> list[dict[str, Any]]:
    return [a for record in DatasetCatalog.get(name) for a in record["annotations"]]


def test_records_are_those_of_detectron2(coco: Path, tmp_path: Path) -> None:
    """Wrong: a keypoint is half a pixel, or another number, off Detectron2's; formats differ; or
    what Detectron2 knows of the set is another's."""
    cfg = load(coco)
    for split, name in (("train", cfg.DATASETS.TRAIN[0]), ("val", cfg.DATASETS.TEST[0])):
        json_file = str(coco / "annotations" / f"instances_{split}.json")
        assert DatasetCatalog.get(name) == load_coco_json(json_file, str(coco / split), "other")
        metadata = MetadataCatalog.get(name)
        assert metadata.json_file == json_file
        assert metadata.keypoint_names == poses.NAMES
        pairs = [("left_hand", "right_hand"), ("left_foot", "right_foot")]
        assert metadata.keypoint_flip_map == pairs
        lines = [rule[:2] for rule in metadata.keypoint_connection_rules]
        assert lines == [("head", end) for end in poses.NAMES[1:]]
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 5
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    assert cfg.TEST.KEYPOINT_OKS_SIGMAS == [0.05] * 5
    for other in (
        poses.write_roboflow(tmp_path / "r", coco),
        poses.write_yolo(tmp_path / "y", coco),
    ):
        own = load(other)
        for theirs, names in ((cfg.DATASETS.TRAIN, own.DATASETS.TRAIN),
                              (cfg.DATASETS.TEST, own.DATASETS.TEST)):  # fmt: skip
            assert annotations(names[0]) == annotations(theirs[0])
        flips = MetadataCatalog.get(own.DATASETS.TRAIN[0]).keypoint_flip_map
        assert len(flips) == 2 and "json_file" not in MetadataCatalog.get(names[0]).as_dict()
    names = {0: poses.NAMES}
    named = load(poses.write_yolo(tmp_path / "named", coco, kpt_names=names, flip_idx=None))
    assert MetadataCatalog.get(named.DATASETS.TRAIN[0]).keypoint_flip_map == pairs


@pytest.mark.parametrize(
    ("names", "flips"),
    [
        (["Nose", "Left Eye", "Right Eye"], (("Left Eye", "Right Eye"),)),
        (["r_ear", "tail", "l_ear"], (("r_ear", "l_ear"),)),
        (["kneeL", "kneeR"], None),
        (["left_eye", "right_eye", "left_ear"], None),
        (["head", "tail"], None),
        (["1", "2", "3"], None),
        (["tip"], ()),
    ],
)
def test_sides_follow_from_names_alone(names: list[str], flips: object) -> None:
    """Wrong: a mirrored image teaches left for right."""
    assert of_classes({"a": names}, 0).flips == flips


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"keypoints": [1, 2]}, "three finite numbers for each name (left out, boxes are not): 1"),
        ({"keypoints": [float("nan"), *[1] * 14]}, "three finite numbers for each name"),
        ({"keypoints": ["1", *[1] * 14]}, "three finite numbers for each name"),
        ({"keypoints": 7}, "three finite numbers for each name"),
        ({"keypoints": [3] * 15}, "visibility is not 0, 1 or 2"),
        ({"keypoints": [-5, *[1] * 14]}, "keypoints outside their image"),
        ({"keypoints": [9, 99, 1, *[1] * 12]}, "keypoints outside their image"),
        ({"keypoints": None}, ""),
        ({"keypoints": [-5, 0, 0, *[1] * 12]}, ""),
    ],
)
def test_what_is_no_keypoint_is_counted_and_its_box_stays(
    change: dict[str, Any], says: str, coco: Path, tmp_path: Path
) -> None:
    """Wrong: the training ends in its midst, or an object is lost, or trained on as if labelled."""
    cfg = load(changed(tmp_path, coco, of_annotation(**change)))
    lines = [
        f for f in labelled_images(cfg.DATASETS.TRAIN[0]).faults.lines() if "boxes that" not in f
    ]
    assert says in "".join(lines) and len(lines) == bool(says)
    first, *others = annotations(cfg.DATASETS.TRAIN[0])
    assert len(others) == 11 and len(first["keypoints"]) == 15
    if not isinstance(change["keypoints"], list) or "left out" in "".join(lines):
        assert first["keypoints"] == [0.5, 0.5, 0] * 5 or "outside" in says
    assert len(list(zip(range(3), Trainer.build_train_loader(cfg)))) == 3


def other_class(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 2, "name": "snake", "keypoints": ["head", "tail"]})


def unlabelled(content: dict[str, Any]) -> None:
    for a in content["annotations"]:
        a.update(keypoints=[0] * 15, num_keypoints=0)


def boxes_alone(content: dict[str, Any]) -> None:
    del content["categories"][0]["keypoints"]
    for a in content["annotations"]:
        del a["keypoints"]


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (other_class, (), "no keypoint_names that all classes share.*'figure'.*'snake'.*_ON False"),
        (boxes_alone, (), "no keypoint_names; train without keypoints, MODEL.KEYPOINT_ON False"),
        (unlabelled, (), "not one of its keypoints is labelled; .*MODEL.KEYPOINT_ON False"),
        (of_category(keypoints=list("abcde")), (), "have different keypoints: .*'a'.*; give both"),
        (None, ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17), "is 17, but .* has 5 .*; leave the"),
        (None, ("TEST.KEYPOINT_OKS_SIGMAS", [0.1]), "must be 5, one for each keypoint.*; got 1"),
    ],
)
def test_what_a_keypoint_head_can_not_learn_is_refused(
    change: Any, options: tuple[object, ...], says: str, coco: Path, tmp_path: Path
) -> None:
    """Wrong: the training ends later, in Detectron2's words, or learns something else."""
    data = changed(tmp_path, coco, change or of_category())
    with raises_one_line(ValueError, match=says):
        load(data, *options)
    if change:  # a detector of boxes takes them all
        classes = 2 if change is other_class else 1
        load(data, "MODEL.KEYPOINT_ON", False, "MODEL.ROI_HEADS.NUM_CLASSES", classes)


def test_unknown_sides_are_not_flipped(coco: Path, tmp_path: Path) -> None:
    """Wrong: a mirrored image teaches left for right; or data.yaml's flip_idx is one of others."""
    data = poses.write_yolo(tmp_path / "unknown", coco, flip_idx=None)
    with pytest.raises(ValueError, match="mirror image isn't known .*; set INPUT.RANDOM_FLIP none"):
        load(data)
    cfg = load(data, "INPUT.RANDOM_FLIP", "none")
    training_mapper(cfg)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 5
    for i, wrong in enumerate(
        ([0, 2, 1], [1, 2, 0, 4, 3], [0, 2, 1, 4, 9], [0, 2.0, 1.0, 4, 3], 3)
    ):
        damaged = poses.write_yolo(tmp_path / str(i), coco, flip_idx=wrong)
        with pytest.raises(ValueError, match="has flip_idx .*; it must say which of kpt_shape's 5"):
            load(damaged)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"keypoint_flip_map": None}, "has no keypoint_flip_map, .*: add it to its metadata"),
        ({"keypoint_flip_map": [("left", "right_hand")]}, "flip_map with 'left', which is none of"),
        ({"keypoint_names": poses.NAMES[::-1]}, "have different keypoint_names: .*; give both the"),
    ],
)
def test_metadata_of_a_registered_set_is_whole(metadata: dict[str, Any], says: str) -> None:
    """Wrong: a missing or wrong entry is a traceback of Detectron2's mapper; or keypoints are
    evaluated as others than were trained."""
    cfg = detector_config()
    cfg.MODEL.KEYPOINT_ON, cfg.DATASETS.TRAIN = True, ("own_poses",)
    given = {"keypoint_names": poses.NAMES, "keypoint_flip_map": [("left_hand", "right_hand")]}
    MetadataCatalog.get("own_poses").set(**{k: v for k, v in (given | metadata).items() if v})
    MetadataCatalog.get("other_poses").set(**given)
    try:
        with raises_one_line(ValueError, match=says):
            settle_keypoints(cfg, 17, ["own_poses", "other_poses"])
    finally:
        MetadataCatalog.pop("own_poses")
        MetadataCatalog.pop("other_poses")


def test_vertical_flips_leave_no_left_for_right(coco: Path, tmp_path: Path) -> None:
    """Wrong: they mirror an image, too, and Detectron2 leaves its keypoints their names."""
    with raises_one_line(ValueError, match="FLIP is vertical.*'left_hand', 'right_hand'.*or none"):
        load(coco, "INPUT.RANDOM_FLIP", "vertical")
    load(poses.write_yolo(tmp_path / "y", coco, flip_idx=[*range(5)]), "INPUT.RANDOM_FLIP",
         "vertical")  # fmt: skip


def test_pairs_of_numbers_in_yolo(coco: Path, tmp_path: Path) -> None:
    """Wrong: where YOLO's labels have no visibility, keypoints that are missing are at 0, 0."""
    data = poses.write_yolo(tmp_path / "y", coco, kpt_shape=[2, 2], flip_idx=[0, 1])
    for label in (tmp_path / "y" / "labels" / "train").glob("*.txt"):
        label.write_text("0 0.5 0.5 0.5 0.5 0.25 0.5 0 0\n")
    for label in (tmp_path / "y" / "labels" / "val").glob("*.txt"):
        label.write_text("0 0.5 0.5 0.5 0.5 0.25 0.5 -1 0.5\n")
    for name in (lambda d: (*d.TRAIN, *d.TEST))(load(data).DATASETS):
        for a in annotations(name):
            assert a["keypoints"][:3] == [24.5, 48.5, 2] and a["keypoints"][5] == 0


def test_labels_have_an_ap_of_100(coco: Path, tmp_path: Path) -> None:
    """Wrong: the ground truth that the evaluation makes of a format is another's; or it moves with
    each evaluation, by the half pixel that Detectron2 takes off the records themselves."""
    (tmp_path / "u").mkdir()
    uncounted = changed(tmp_path / "u", coco, of_category())
    path = uncounted / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace("num_keypoints", "number"))
    sets = coco, poses.write_roboflow(tmp_path / "r", coco), uncounted
    for number, data in enumerate(sets):
        cfg = load(data, "TEST.KEYPOINT_OKS_SIGMAS", [0.001] * 5)
        before = annotations(cfg.DATASETS.TEST[0])
        for _ in range(3):
            found = average_precision(cfg, tmp_path / str(number))
            assert found == pytest.approx({"bbox": 100, "keypoints": 100})
        assert annotations(cfg.DATASETS.TEST[0]) == before


def test_processes_compare_keypoints(coco: Path) -> None:
    """Wrong: machines whose copies differ in keypoints alone train together."""
    split = labelled_images(load(coco).DATASETS.TEST[0])
    before = split.checksum()
    split.records[0]["annotations"][0]["keypoints"][0] += 1
    assert split.checksum() != before
    split.records[0]["annotations"][0]["keypoints"][0] -= 1
    assert split.checksum() == before


def test_other_detectors_ignore_keypoints(coco: Path) -> None:
    """Wrong: a detector of boxes trains on another's labels, or its config changes."""
    cfg = load(coco, "MODEL.KEYPOINT_ON", False)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 17 and not cfg.TEST.KEYPOINT_OKS_SIGMAS
    sample = training_mapper(cfg)(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0])
    assert sample["instances"].has("gt_boxes") and not sample["instances"].has("gt_keypoints")


def test_the_length_counts_images_with_keypoints(coco: Path, tmp_path: Path) -> None:
    """Wrong: an epoch has images that Detectron2 leaves out, as they have no labelled keypoint."""

    def first_image(content: dict[str, Any]) -> None:
        for a in content["annotations"]:
            if a["image_id"] < 3:
                a.update(keypoints=[0] * 15, num_keypoints=0)

    given = ("SOLVER.EPOCHS", 1, "SOLVER.REFERENCE_BATCH_SIZE", 2)
    args = parse(changed(tmp_path, coco, first_image), *given)
    length = args.opts.index("SOLVER.MAX_ITER")
    del args.opts[length : length + 2]
    cfg = load_config(args)
    assert cfg.SOLVER.MAX_ITER == 3
    assert len(Trainer.build_train_loader(cfg)._records) == 6


def test_a_picture_of_the_data(coco: Path, tmp_path: Path, capsys: Any) -> None:
    """Wrong: keypoints are not among what is looked at before a training."""
    picture = tmp_path / "data.png"
    browse_data.main(["--data", str(coco), "--output", str(picture), "--images", "1"])
    assert "5 keypoints (head, left_hand, right_hand and 2 more), labelled in 12 boxes" in (
        capsys.readouterr().out
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    data = changed(plain, coco, boxes_alone)
    browse_data.main(["--data", str(data), "--output", str(plain / "d.png"), "--images", "1"])
    assert (cv2.imread(str(picture)) != cv2.imread(str(plain / "d.png"))).any()
    data_config(parse(coco))


@pytest.mark.slow
def test_training_evaluation_prediction_and_export(coco: Path, tmp_path: Path) -> None:
    """Wrong: one of the commands ends early, or forgets what the keypoints are."""
    run, output = tmp_path / "run", tmp_path / "predictions"
    given = ("OUTPUT_DIR", run, "TEST.EVAL_PERIOD", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001)
    options = list(map(str, (*TINY, *given)))
    train.main(["--config-file", CONFIG, "--data", str(coco), *options])
    assert "keypoints/AP" in last_metrics(run)
    assert "evaluated with TEST.KEYPOINT_OKS_SIGMAS [0.05, 0.05" in (run / "log.txt").read_text()
    detector = load_detector(run, "cpu")
    assert detector.metadata.keypoint_names == poses.NAMES
    assert len(detector.metadata.keypoint_connection_rules) == 4
    image = cv2.imread(str(coco / "val" / "1.png"))
    found = detector(image)["instances"]
    assert len(found) and found.pred_keypoints.shape[1:] == (5, 3)
    assert detector.draw(image, found, 0).shape[2] == 3
    predict.main([str(run), str(coco / "val"), "--output", str(output), "--score-threshold", "0"])
    results = json.loads((output / "results.json").read_text())
    assert results and all(len(result["keypoints"]) == 15 for result in results)
    detector.save_pretrained(tmp_path / "saved")
    again = type(detector).from_pretrained(tmp_path / "saved", "cpu")
    assert again.keypoint_entry == detector.keypoint_entry
    export.main([str(run), str(tmp_path / "model.ts"), "--images", str(coco / "val")])
    exported = load_detector(tmp_path / "model.ts")
    assert exported.keypoint_entry == detector.keypoint_entry
    larger = cv2.resize(image, (192, 192))
    both = [model(larger)["instances"].pred_keypoints for model in (detector, exported)]
    assert np.allclose(*(b[:5, :, :2] for b in both), atol=0.1)
    with pytest.raises(SystemExit):
        export.main([str(run), str(tmp_path / "model.onnx")])


LAZY = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from randwire_d2 import NetworkGenerator, RandWire
dataloader = model_zoo.get_config("common/data/coco_keypoint.py").dataloader
model = model_zoo.get_config("common/models/keypoint_rcnn_fpn.py").model
model.backbone.bottom_up = L(RandWire)(
    spec=L(L(NetworkGenerator)(channels=8, num_nodes=10))(seed=1), norm="GN",
    out_features=model.backbone.bottom_up.out_features)
train = model_zoo.get_config("common/train.py").train
train.update(device="cpu", init_checkpoint="")
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
"""


def test_lazy_configs_take_the_number_of_keypoints(coco: Path, tmp_path: Path) -> None:
    """Wrong: Detectron2's LazyConfig keeps COCO's 17 keypoints, their sides or their sigmas."""
    config = tmp_path / "lazy.py"
    config.write_text(LAZY)

    def lazy(data: Path, *options: str) -> Any:
        given = ["--config-file", str(config), "--data", str(data), f"train.output_dir={tmp_path}"]
        return load_lazy_config(argument_parser().parse_args([*given, *options]))

    cfg = lazy(coco)
    assert cfg.model.roi_heads.keypoint_head.num_keypoints == 5
    assert list(cfg.dataloader.train.mapper.keypoint_hflip_indices) == poses.FLIP_IDX
    assert list(cfg.dataloader.evaluator.kpt_oks_sigmas) == [0.05] * 5
    with pytest.raises(ValueError, match=r"num_keypoints is 17, but .* has 5 keypoints: model"):
        lazy(coco, "model.roi_heads.keypoint_head.num_keypoints=17")
    unknown = poses.write_yolo(tmp_path / "unknown", coco, flip_idx=None)
    with pytest.raises(ValueError, match=r"take RandomFlip out of dataloader.train.mapper.augm"):
        lazy(unknown)
