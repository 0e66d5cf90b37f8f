"""The configs of configs/coco are Detectron2's recipes with another backbone, and train."""

import argparse
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import raises_one_line
from PIL import Image

from randwire_d2.config import detector_config, merge_config, merge_file
from randwire_d2.data import training_mapper
from randwire_d2.engine import Trainer, argument_parser, check_model, load_config

COCO = Path(__file__).parents[1] / "configs" / "coco"
CONFIGS = sorted(path.stem for path in COCO.glob("[!B]*.yaml"))
# Detectron2's config of each, with {} for 1x or 3x, and the keys in which ours differs.
SOURCES = {
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_{}.yaml", ()),
    "cascade_mask_rcnn": ("Misc/cascade_mask_rcnn_R_50_FPN_{}.yaml", ()),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_{}.yaml", ()),
    "keypoint_rcnn": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_{}.yaml", ()),
    "panoptic_fpn": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_{}.yaml", ()),
    "scratch_mask_rcnn": (
        "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
        ("SOLVER.STEPS", "SOLVER.MAX_ITER"),
    ),
}
OURS = ("MODEL.RANDWIRE", "MODEL.RESNETS", "MODEL.BACKBONE.NAME", "MODEL.WEIGHTS", "OUTPUT_DIR",
        "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT")  # fmt: skip
# One of each kind, with losses of its heads: the others differ in size and length.
KINDS = {
    "mask_rcnn_randwire_c109_fpn_1x": {"loss_mask", "loss_rpn_cls", "loss_box_reg"},
    "cascade_mask_rcnn_randwire_c109_fpn_1x": {"loss_mask", "loss_box_reg_stage2"},
    "retinanet_randwire_c109_fpn_1x": {"loss_cls", "loss_box_reg"},
    "keypoint_rcnn_randwire_c109_fpn_1x": {"loss_keypoint"},
    "panoptic_fpn_randwire_c109_1x": {"loss_sem_seg", "loss_mask"},
    "mask_rcnn_randwire_c109_fpn_100ep_LSJ": {"loss_mask"},
    "mask_rcnn_randwire_c109_fpn_100ep_LSJ_gn": {"loss_mask"},
    "scratch_mask_rcnn_randwire_c109_fpn_6x_gn": {"loss_mask"},
}
JITTERED = [name for name in CONFIGS if "LSJ" in name]


def config(name: str, *options: object) -> CfgNode:
    cfg = detector_config()
    merge_file(cfg, str(COCO / f"{name}.yaml"))
    cfg.merge_from_list(list(options))
    return cfg


def parse(name: str, *options: object) -> argparse.Namespace:
    path = str(COCO / f"{name}.yaml")
    return argument_parser().parse_args(["--config-file", path, *map(str, options)])


def differences(ours: Any, theirs: Any, key: str = "") -> dict[str, Any]:
    """Every key of theirs whose value is another in ours."""
    if not isinstance(theirs, CfgNode):
        return {} if ours == theirs else {key: (ours, theirs)}
    return {
        found: values
        for name in theirs
        for found, values in differences(ours[name], theirs[name], f"{key}.{name}").items()
    }


def test_there_is_a_config_of_every_kind() -> None:
    """Wrong: one that the README's table names is missing."""
    kinds = [f"{task}_randwire_{{}}{fpn}_{length}"
             for task, fpn in (("mask_rcnn", "_fpn"), ("cascade_mask_rcnn", "_fpn"),
                               ("retinanet", "_fpn"), ("keypoint_rcnn", "_fpn"),
                               ("panoptic_fpn", ""))
             for length in ("1x", "3x")]  # fmt: skip
    kinds += [
        f"mask_rcnn_randwire_{{}}_fpn_{n}00ep_LSJ{gn}" for n in (1, 2, 4) for gn in ("", "_gn")
    ]
    kinds += ["scratch_mask_rcnn_randwire_{}_fpn_6x_gn"]
    assert sorted(kind.format(size) for kind in kinds for size in ("c109", "c154")) == CONFIGS


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in JITTERED])
def test_the_recipe_is_detectron2s(name: str) -> None:
    """Wrong: a key that is neither the backbone's nor the images' has another value than in the
    model zoo's config of the same name."""
    task, rest = name.split("_randwire_")
    source, others = SOURCES[task]
    theirs = model_zoo.get_config(source.format(rest[-2:]))
    found = {key.removeprefix(".") for key in differences(config(name), theirs)}
    assert {key for key in found if not key.startswith(OURS)} == set(others)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("scratch")])
def test_six_times_the_schedule_is_that_of_he_et_al(name: str) -> None:
    """Wrong: the learning rate is not reduced where Detectron2's 6x, after the paper, does it."""
    schedule = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_6x.scheduler
    solver = config(name).SOLVER
    assert [*solver.STEPS, solver.MAX_ITER] == list(schedule.milestones)


@pytest.mark.parametrize("name", JITTERED)
def test_from_scratch_the_recipe_is_that_of_the_new_baselines(name: str) -> None:
    """Wrong: rates, images or heads are not those of Detectron2's LazyConfig of the same length."""
    cfg = config(name, "MODEL.DEVICE", "meta")
    length = name.removesuffix("_gn").split("_")[-2]
    theirs = model_zoo.get_config(f"new_baselines/mask_rcnn_R_50_FPN_{length}_LSJ.py")
    solver, iterations = cfg.SOLVER, theirs.train.max_iter
    assert iterations == solver.MAX_ITER
    assert theirs.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
    assert theirs.train.amp.enabled == solver.AMP.ENABLED

    optimizer = build_optimizer(cfg, torch.nn.Conv2d(1, 1, 1))
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == theirs.optimizer.weight_decay
    scheduler = build_lr_scheduler(cfg, optimizer)
    multiplier = instantiate(theirs.lr_multiplier)
    edges = (0, solver.WARMUP_ITERS, *solver.STEPS)
    for iteration in (edge + d for edge in edges for d in (-1, 0, 1) if edge + d >= 0):
        scheduler.last_epoch = iteration
        expected = theirs.optimizer.lr * multiplier(iteration / iterations)
        assert scheduler.get_lr() == [pytest.approx(expected)], iteration

    ours, other = training_mapper(cfg), instantiate(theirs.dataloader.train.mapper)
    assert [*map(vars, ours.augmentations.augs)] == [*map(vars, other.augmentations.augs)]
    assert ours.recompute_boxes and other.recompute_boxes


@pytest.mark.parametrize("tail", ["", "_gn"])
def test_from_scratch_the_heads_are_those_of_the_new_baselines(tail: str) -> None:
    """Wrong: FPN, RPN or a head of the recipe from scratch has other layers than Detectron2's."""
    theirs = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py").model
    with torch.device("meta"):
        ours = build_model(
            config(f"mask_rcnn_randwire_c109_fpn_100ep_LSJ{tail}", "MODEL.DEVICE", "meta")
        )
        other = instantiate(theirs)
    # By name; the FPN's lateral convolutions read the backbone's channels.
    mine, expected = (
        {n: p.shape for n, p in model.named_parameters() if ".bottom_up." not in n}
        for model in (ours, other)
    )
    assert {n for n, shape in expected.items() if mine.pop(n) != shape} == {
        f"backbone.fpn_lateral{i}.weight" for i in (2, 3, 4, 5)
    }
    assert not mine
    norms = {type(m).__name__ for m in ours.modules() if "Norm" in type(m).__name__}
    assert norms == ({"GroupNorm"} if tail else {"SyncBatchNorm", "NaiveSyncBatchNorm"})


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_lengths_are_of_the_same_detector(name: str) -> None:
    """Wrong: a name does not say what the config is, or it starts from another network."""
    kind = re.sub("c154", "c109", re.sub("_3x", "_1x", re.sub("[24]00ep", "100ep", name)))
    cfg, scratch = config(name), "LSJ" in kind or kind.startswith("scratch")
    found = differences(cfg.MODEL, config(kind).MODEL)
    assert found.keys() <= {".WEIGHTS", ".RANDWIRE.CHANNELS"}
    channels = cfg.MODEL.RANDWIRE.CHANNELS
    weights = "" if scratch else f"output/imagenet/randwire_c{channels}_100ep/backbone.pth"
    assert f"_c{channels}_" in name
    assert (weights, f"./output/{name}") == (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_builds(name: str) -> None:
    """Wrong: a detector of full size can't be built."""
    with torch.device("meta"):
        build_model(config(name, "MODEL.DEVICE", "meta"))


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ("GRAPH: RING, RING: {HOPS: 3}", None),
        ("GRAPH: RING, RINGS: {HOPS: 3}", "MODEL.RANDWIRE.RINGS"),
        ("RING: {HOPS: 3}", "MODEL.RANDWIRE.RING"),
        ("GRAPH: WS, WS: {HOPS: 3}", "MODEL.RANDWIRE.WS.HOPS"),
    ],
)
def test_a_file_may_have_the_parameters_of_its_own_generator(
    keys: str, error: str | None, tmp_path: Path
) -> None:
    """Wrong: a run whose generator only the user's script registers can't be read, or a key that
    is spelt wrong is taken for one's own."""
    cfg, path = detector_config(), tmp_path / "config.yaml"
    known = set(cfg.MODEL.RANDWIRE)
    path.write_text(f"MODEL: {{RANDWIRE: {{{keys}}}}}")
    if error is None:
        merge_file(cfg, str(path))
        assert cfg.MODEL.RANDWIRE.RING.HOPS == 3
        return
    with pytest.raises(ValueError, match=f": Non-existent config key: {error}$"):
        merge_file(cfg, str(path))
    assert set(cfg.MODEL.RANDWIRE) == known


def test_a_whole_probability_is_written_with_a_point() -> None:
    """Wrong: who tries P=1, or P=0, reads of Python's types, and not how to write it."""
    with raises_one_line(ValueError, match=r"RANDWIRE.ER.P; write the number with a point"):
        merge_config(detector_config(), "", ["MODEL.RANDWIRE.ER.P", "1"])
    merge_config(detector_config(), "", ["MODEL.RANDWIRE.ER.P", "1.0"])


def test_sync_bn_is_refused_on_a_cpu_wherever_it_is() -> None:
    """Wrong: the recipe from scratch, with another norm in the backbone, fails within PyTorch."""
    name, people = JITTERED[0], ("MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", False)
    for options, key in (
        ((), "RANDWIRE"),
        (("MODEL.RANDWIRE.NORM", "BN"), "FPN"),
        (("MODEL.RANDWIRE.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM",
          "SyncBN"), "ROI_MASK_HEAD"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"MODEL.{key}.NORM SyncBN needs GPUs; .* naiveSyncBN, BN or GN"
        ):
            check_model(config(name, *people, *options), parse(name))


def test_augmented_tests_are_of_what_detectron2_can_augment() -> None:
    """Wrong: the training ends with a traceback in its last evaluation, of keypoints, say."""
    scratch = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RANDWIRE.NORM", "BN",
               "MODEL.BACKBONE.FREEZE_AT", 0, "TEST.AUG.ENABLED", True)  # fmt: skip
    for kind in ("keypoint_rcnn_randwire_c109_fpn", "retinanet_randwire_c109_fpn",
                 "panoptic_fpn_randwire_c109", "mask_rcnn_randwire_c109_fpn"):  # fmt: skip
        name = f"{kind}_1x"
        expected = raises_one_line(ValueError, match=r"TEST.AUG.ENABLED must be False: .*R-CNN of")
        with nullcontext() if kind.startswith("mask") else expected:
            check_model(config(name, *scratch), parse(name))


# -------------------------------------------------------------------------------------------------
# On images
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set whose images have a person each: box, polygon, keypoints, semantic classes."""
    folder, name = tmp_path_factory.mktemp("people"), "configs_people"
    rng, records = np.random.default_rng(0), []
    for i in range(4):
        x, y, w, h = 8 + 4 * i, 10, 40, 60
        pixels = rng.integers(0, 80, (80, 112, 3), dtype=np.uint8)
        pixels[y : y + h, x : x + w] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
        classes = np.full((80, 112), 7, dtype=np.uint8)
        classes[y : y + h, x : x + w], classes[:4] = 0, 255
        Image.fromarray(classes).save(folder / f"{i}_classes.png")
        points = rng.uniform((x, y), (x + w, y + h), (len(COCO_PERSON_KEYPOINT_NAMES), 2))
        records.append({
            "file_name": str(folder / f"{i}.png"), "image_id": i, "height": 80, "width": 112,
            "sem_seg_file_name": str(folder / f"{i}_classes.png"),
            "annotations": [{
                "bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0,
                "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "keypoints": [value for point in points for value in (*point, 2)],
            }],
        })  # fmt: skip
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        thing_classes=["person"],
        keypoint_names=COCO_PERSON_KEYPOINT_NAMES,
        keypoint_flip_map=COCO_PERSON_KEYPOINT_FLIP_MAP,
    )
    return name


def on_cpu(name: str, data: str, *options: object) -> CfgNode:
    """A config with its own heads, small images and a small backbone; from scratch."""
    given = (
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10),
        *("DATASETS.TRAIN", (data,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0, "SEED", 1),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.AMP.ENABLED", False),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, *options),
    )
    return load_config(parse(name, *given))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_it_takes_a_training_step(name: str, people: str) -> None:
    """Wrong: a loss of its kind is missing or no number, or a parameter that it trains gets no
    gradient."""
    norms: tuple[object, ...] = ()
    if not name.endswith("_gn"):
        norms = ("MODEL.RANDWIRE.NORM", "BN")
    if name.endswith("LSJ"):
        norms += ("MODEL.FPN.NORM", "BN")
    jitter = ("INPUT.LSJ.SIZE", 96, "INPUT.LSJ.SCALES", "(0.8, 1.2)") if "LSJ" in name else ()
    cfg = on_cpu(name, people, *norms, *jitter)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 1
    seed_all_rng(1)
    model = build_model(cfg).train()
    batch = next(iter(Trainer.build_train_loader(cfg)))
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model(batch)
    assert KINDS[name] <= losses.keys()
    total = sum(losses.values())
    assert torch.isfinite(total), losses
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        (found, _) = model(batch)
    assert "instances" in found and ("sem_seg" in found) == name.startswith("panoptic")


def test_large_scale_jitter_makes_squares_of_all_scales(people: str) -> None:
    """Wrong: an image is not of SIZE, its scale is not drawn from SCALES, the objects are not
    where the image's are, or boxes are not tight around what a crop left."""
    cfg = on_cpu(
        "mask_rcnn_randwire_c109_fpn_1x", people, "MODEL.RANDWIRE.NORM", "BN",
        "INPUT.LSJ.SIZE", 128, "INPUT.LSJ.SCALES", (0.5, 2.0), "SOLVER.IMS_PER_BATCH", 1,
    )  # fmt: skip
    seed_all_rng(1)
    loader = iter(Trainer.build_train_loader(cfg))
    widths, padded = list[float](), list[int]()
    for _ in range(40):
        ((image, instances),) = ((d["image"], d["instances"]) for d in next(loader))
        assert image.shape == (3, 128, 128)
        boxes = instances.gt_boxes.tensor
        assert torch.equal(boxes, instances.gt_masks.get_bounding_boxes().tensor)
        for x0, y0, x1, y1 in boxes.round().int().tolist():
            inside = image[:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
            assert inside.numel() == 0 or inside.min() >= 130
        padded += [int((image == 128).all(dim=0).all(dim=0).sum())]
        widths += (boxes[:, 2] - boxes[:, 0]).tolist()
    # An image is as wide as the square times the scale; the person, 40 of 112 of that.
    full = 128 * 40 / 112
    assert 0.35 * 128 < max(padded) <= 64 and 1.6 * full < max(widths) < 2 * full + 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("INPUT.LSJ.SIZE", -1), "INPUT.LSJ.SIZE .* 0 for none; got -1"),
        (("INPUT.LSJ.SCALES", "(2.0, 0.1)"), r"INPUT.LSJ.SCALES .*; got \[2.0, 0.1\]"),
        (("INPUT.LSJ.SCALES", "(1.0,)"), r"INPUT.LSJ.SCALES .*; got \[1.0\]"),
        (("INPUT.LSJ.SIZE", 64, "INPUT.CROP.ENABLED", True), "set INPUT.CROP.ENABLED False"),
    ],
)
def test_a_jitter_that_no_image_can_take_is_refused(
    options: tuple[object, ...], says: str, people: str
) -> None:
    with raises_one_line(ValueError, match=says):
        on_cpu("mask_rcnn_randwire_c109_fpn_1x", people, "MODEL.RANDWIRE.NORM", "BN", *options)
