"""The built-in data sets: what is drawn, how it is written, and that Detectron2 can use it."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import shapely
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from helpers import PATIENCE, output_of
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder

from randwire_d2.data import builtin, shapes
from randwire_d2.data.shapes import CLASSES, ClassificationShapesConfig, ShapesConfig

SMALL = ShapesConfig(num_train=6, num_val=4)
SMALL_CLASSIFICATION = ClassificationShapesConfig(num_train=18, num_val=12)
# Every value is given, so that tuning the defaults does not look like a change of the drawing.
HARD = {
    "seed": 0, "stretch": 1.25, "occluders": 2, "texture": 1.0, "contrast": 60.0, "noise": 12,
}  # fmt: skip
GOLDEN = ShapesConfig(
    **HARD, num_train=4, num_val=4, image_size=128, objects=(1, 6), scale=(0.14, 0.56), clutter=12,
    min_visible=0.4,
)  # fmt: skip
GOLDEN_CLASSIFICATION = ClassificationShapesConfig(
    **HARD, num_train=6, num_val=6, image_size=48, objects=(1, 1), scale=(0.4, 0.9), clutter=6,
    min_visible=0.6,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes():
    return [builtin.draw_image(ShapesConfig(), "train", i) for i in range(60)]


@pytest.fixture
def unchecked(monkeypatch):
    """As if this process had not verified any set."""
    monkeypatch.setattr(builtin, "_checked", set())


def raster(annotation: dict, size: int) -> np.ndarray:
    """pycocotools' mask (size, size), bool, of an annotation's polygons."""
    rles = coco_mask.frPyObjects(annotation["segmentation"], size, size)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


# -------------------------------------------------------------------------------------------------
# Drawing
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split, pixels, annotations",
    [
        ("train", "26613269aa5e48e9", "2bf3292704d22850"),
        ("val", "7cbcc8a086f67703", "81a36d0ad06f518a"),
    ],
)
def test_golden(split, pixels, annotations):
    """If this fails, the drawing changed: other images under the name of the old ones.

    Raise builtin.VERSION, look at what is drawn, and pin the new hashes.
    """
    drawn, noted = hashlib.sha256(), hashlib.sha256()
    for i in range(4):
        scene = builtin.draw_image(GOLDEN, split, i)
        drawn.update(scene.image.tobytes())
        noted.update(json.dumps(builtin.coco_annotations(scene, i + 1, first_id=1)).encode())
    assert (drawn.hexdigest()[:16], noted.hexdigest()[:16]) == (pixels, annotations)


@pytest.mark.parametrize(
    "split, pixels", [("train", "c1d74f9608e97f4c"), ("val", "c78576a09a303248")]
)
def test_golden_classification(split, pixels):
    """The same for the classification set, whose images show the six classes in turn."""
    scenes = [builtin.draw_image(GOLDEN_CLASSIFICATION, split, i) for i in range(6)]
    assert [[o.category for o in scene.objects] for scene in scenes] == [[i] for i in range(6)]
    drawn = hashlib.sha256(b"".join(scene.image.tobytes() for scene in scenes))
    assert drawn.hexdigest()[:16] == pixels


@pytest.mark.parametrize(
    "config, name",
    [
        (GOLDEN, "randwire_shapes_v2_seed0_b7b7d208"),
        (GOLDEN_CLASSIFICATION, "randwire_shapes_cls_v2_seed0_c597df8e"),
    ],
)
def test_folders_keep_their_names(config, name):
    """A new field or order would have every user's set drawn again, with the same images."""
    assert builtin.dataset_folder("", config).name == name


@pytest.mark.parametrize("kind", [ShapesConfig, ClassificationShapesConfig])
def test_images_differ(kind):
    """A seed, split or index that does not reach the generator would repeat images."""
    keys = [(seed, split, i) for seed in (0, 1) for split in builtin.SPLITS for i in (0, 6)]
    images = {builtin.draw_image(kind(seed=s), t, i).image.tobytes() for s, t, i in keys}
    assert len(images) == len(keys)


def test_polygons_match_pixels(scenes):
    """Polygons shifted by half a pixel, or blind to what hides an object, would teach wrongly."""
    ious = []
    for scene in scenes:
        for o, a in zip(scene.objects, builtin.coco_annotations(scene, 1, 1), strict=True):
            mask, drawn = raster(a, len(scene.image)), o.coverage > 0.5
            ious.append((mask & drawn).sum() / (mask | drawn).sum())
    assert min(ious) > 0.9 and np.mean(ious) > 0.97, (min(ious), np.mean(ious))


def test_coverage_is_what_was_painted(monkeypatch):
    """Coverage that differs from the pixels would make the test above compare two wrongs."""
    monkeypatch.setattr(shapes, "TEXTURES", shapes.TEXTURES[:1])  # plain
    config = ShapesConfig(clutter=0, occluders=0, noise=0)
    for i in range(20):
        scene = builtin.draw_image(config, "train", i)
        covered = sum(o.coverage for o in scene.objects)
        regions = [o.coverage == 1 for o in scene.objects] + [covered == 0]
        colours = [np.unique(scene.image[region], axis=0) for region in regions if region.any()]
        assert all(len(c) == 1 for c in colours), f"image {i}: a region has several colours"


def test_objects_are_lighter_than_all_else():
    """Objects that differ from their surroundings either way are several times slower to learn."""
    config = ShapesConfig(noise=0)
    for i in range(20):
        scene = builtin.draw_image(config, "train", i)
        lightness = scene.image.mean(axis=2)
        covered = sum(o.coverage for o in scene.objects)
        rounding = 0.5
        assert lightness[covered == 1].min() >= 127.5 + config.contrast / 2 - rounding
        assert lightness[covered == 0].max() <= 127.5 - config.contrast / 2 + rounding


def test_objects_can_be_seen(scenes):
    """Objects nearly hidden or lost, holes, crumbs: nobody could label or detect these."""
    for scene in scenes:
        assert scene.objects, "an image without objects"
        for o in scene.objects:
            assert o.visible.is_valid
            assert o.visible.area >= ShapesConfig().min_visible * o.area
            for piece in shapely.get_parts(o.visible):
                assert not piece.interiors and piece.area >= shapes.MIN_PIECE
    counts = np.bincount([o.category for s in scenes for o in s.objects], minlength=len(CLASSES))
    assert counts.min() > 0.4 * counts.mean(), dict(zip(CLASSES, counts, strict=True))
    hidden = [o.visible.area < 0.9 * o.area for s in scenes for o in s.objects]
    assert 0.15 < np.mean(hidden) < 0.7, "occlusion is part of what makes the set hard"


def test_classification_object_can_be_told():
    """An image whose one object is missing or mostly hidden would teach the classifier noise;
    objects of other sizes than the detection set's, features that the detector can't use."""
    config = ClassificationShapesConfig()
    sides = []
    for i in range(120):
        (o,) = builtin.draw_image(config, "train", i).objects
        assert o.category == i % len(CLASSES)
        assert o.visible.area >= config.min_visible * o.area
        x0, y0, x1, y1 = o.visible.bounds
        sides.append(max(x1 - x0, y1 - y0))
    assert min(sides) > 15 and 25 < np.median(sides) < 40 and max(sides) > 42
    shapes_config = ShapesConfig()
    smallest = [c.scale[0] * c.image_size for c in (config, shapes_config)]
    assert smallest[0] == pytest.approx(smallest[1], abs=2)
    look = ("stretch", "clutter", "occluders", "texture", "contrast", "noise")
    assert [getattr(config, k) for k in look] == [getattr(shapes_config, k) for k in look]


# -------------------------------------------------------------------------------------------------
# Writing
# -------------------------------------------------------------------------------------------------


def test_coco_format(tmp_path):
    """What COCO's and Detectron2's readers take for granted."""
    folder = builtin.make_dataset(tmp_path, SMALL)
    for split, size in (("train", 6), ("val", 4)):
        coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        assert [c["id"] for c in coco["categories"]] == list(range(1, len(CLASSES) + 1))
        assert {f.name for f in (folder / split).iterdir()} == {
            image["file_name"] for image in coco["images"]
        }
        image_ids = {image["id"] for image in coco["images"]}
        assert len(image_ids) == len(coco["images"]) == size
        assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
        assert {a["image_id"] for a in coco["annotations"]} == image_ids
        drawn = [
            o.category for i in range(size) for o in builtin.draw_image(SMALL, split, i).objects
        ]
        assert [a["category_id"] for a in coco["annotations"]] == [c + 1 for c in drawn]
        for a in coco["annotations"]:
            pieces = [shapely.Polygon(np.reshape(ring, (-1, 2))) for ring in a["segmentation"]]
            region = shapely.MultiPolygon(pieces)
            x, y, w, h = a["bbox"]
            assert (x, y, x + w, y + h) == region.bounds
            assert min(x, y) >= 0 and max(x + w, y + h) <= SMALL.image_size
            assert a["area"] == region.area
            assert a["iscrowd"] == 0


def test_image_folder_format(tmp_path):
    """What torchvision's ImageFolder takes for granted, and that labels name what was drawn."""
    folder = builtin.make_dataset(tmp_path, SMALL_CLASSIFICATION)
    for split, size in (("train", 18), ("val", 12)):
        listing = ImageFolder(str(folder / split))
        assert listing.classes == sorted(CLASSES)
        assert np.bincount(listing.targets).tolist() == [size // len(CLASSES)] * len(CLASSES)
        indices = set()
        for path, label in listing.samples:
            index = int(os.path.splitext(os.path.basename(path))[0])
            indices.add(index)
            scene = builtin.draw_image(SMALL_CLASSIFICATION, split, index)
            assert listing.classes[label] == CLASSES[scene.objects[0].category]
            with Image.open(path) as image:
                assert image.size == (48, 48)
                assert np.abs(np.asarray(image, float) - scene.image).mean() < 6, "not that image"
        assert indices == set(range(size))
    assert {p.name for p in folder.iterdir()} == {"train", "val", "manifest.json"}


@pytest.mark.parametrize("config", [SMALL, SMALL_CLASSIFICATION], ids=lambda c: c.name)
def test_reused_and_checked(tmp_path, monkeypatch, unchecked, config):
    """A set drawn anew each time costs the user time; a damaged one, wrong results."""
    folder = builtin.make_dataset(tmp_path, config)
    manifest = (folder / "manifest.json").read_text()
    image = next((folder / "val").rglob("000001.jpg"))
    original = image.read_bytes()

    def check_again():
        builtin._checked.clear()
        return builtin.make_dataset(tmp_path, config)

    with monkeypatch.context() as m:
        m.delattr(builtin, "_write")
        assert check_again() == folder, "the set was drawn again"

    extra = image.with_name("extra.jpg")
    damages = {
        "changed": lambda: image.write_bytes(original[:-1] + b"x"),
        "missing": lambda: image.unlink(),
        "added": lambda: (image.write_bytes(original), extra.touch()),
        "without manifest": lambda: (extra.unlink(), (folder / "manifest.json").unlink()),
    }
    for name, damage in damages.items():
        damage()
        with pytest.raises(ValueError, match=f"{folder}.*Delete that folder"):
            check_again()
            pytest.fail(f"not noticed: {name}")

    # The way out that the message names; and the same content, or it would not be deterministic.
    shutil.rmtree(folder)
    assert (check_again() / "manifest.json").read_text() == manifest


def test_configs_do_not_share_a_folder(tmp_path):
    """A changed difficulty or seed would silently get the images of the old one."""
    configs = [SMALL, ShapesConfig(), ShapesConfig(seed=1), ShapesConfig(clutter=3)]
    configs += [SMALL_CLASSIFICATION, ClassificationShapesConfig()]
    assert len({builtin.dataset_folder(tmp_path, c) for c in configs}) == len(configs)


def _make_at_once(barrier, root, config):
    barrier.wait()
    builtin.make_dataset(root, config)


@pytest.mark.parametrize(
    "config",
    [
        ShapesConfig(num_train=30, num_val=10),
        ClassificationShapesConfig(num_train=60, num_val=12),
    ],
    ids=lambda c: c.name,
)
def test_processes_that_start_at_once(tmp_path, config):
    """The ranks of a distributed run would break each other's set, or draw it once each."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    processes = [
        fork.Process(target=_make_at_once, args=(barrier, tmp_path, config)) for _ in range(3)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(PATIENCE)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    folder = builtin.make_dataset(tmp_path, config)  # checks the content
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, folder.name + ".lock"}


def _write_until_killed(root, config):
    save, names = builtin._save, []

    def save_five(scene, path):
        if len(names) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        names.append(path)
        save(scene, path)

    builtin._save = save_five
    builtin.make_dataset(root, config)


def test_killed_writer(tmp_path):
    """Half a set would be taken for the whole, or block everyone who comes later."""
    config = ShapesConfig(num_train=12, num_val=4)
    folder = builtin.dataset_folder(tmp_path, config)
    part = folder.with_name(folder.name + ".part")
    writer = multiprocessing.get_context("fork").Process(
        target=_write_until_killed, args=(tmp_path, config)
    )
    writer.start()
    writer.join(PATIENCE)
    assert writer.exitcode == -signal.SIGKILL
    assert len(list(part.glob("train/*.jpg"))) == 5 and not folder.exists()

    assert builtin.make_dataset(tmp_path, config) == folder
    assert len(list(folder.glob("train/*.jpg"))) == 12 and not part.exists()


def test_progress(tmp_path, capsys):
    """A user would take the silence while the set is drawn for a hang."""
    builtin.make_dataset(tmp_path, SMALL)
    assert "Drawing: 100%" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# Detectron2
# -------------------------------------------------------------------------------------------------


def test_registered_under_detectron2_datasets(tmp_path):
    """The set would be drawn elsewhere than the user said, or on import, or clash on a reload. Nor
    must that of ImageNet look for it."""
    code = (
        "import importlib, randwire_d2.data.builtin as b; importlib.reload(b)\n"
        "import randwire_d2.data.classification.image_folder as f; importlib.reload(f)\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "for n in ('randwire_shapes_train', 'randwire_shapes_val'):\n"
        "    assert n in DatasetCatalog\n"
        "    print(MetadataCatalog.get(n).json_file)\n"
        "for s in ('train', 'val'):\n"
        "    for n in ('randwire_shapes_cls_', 'imagenet_'):\n"
        "        assert n + s in DatasetCatalog\n"
        "        print(MetadataCatalog.get(n + s).image_root)\n"
        "print(*f.check_image_folders(['imagenet_train'], ['imagenet_val']))"
    )
    roots = [tmp_path / "imagenet" / split for split in builtin.SPLITS]
    for root in roots:
        for name in ("n02", "n01"):
            (root / name).mkdir(parents=True)
            (root / name / "1.JPEG").touch()
    said = output_of(code, DETECTRON2_DATASETS=str(tmp_path))
    folder = builtin.dataset_folder(tmp_path, ShapesConfig())
    expected = [folder / "annotations" / f"instances_{split}.json" for split in builtin.SPLITS]
    folder = builtin.dataset_folder(tmp_path, ClassificationShapesConfig())
    expected += [
        path for split, root in zip(builtin.SPLITS, roots) for path in (folder / split, root)
    ]
    assert said.split() == [*map(str, expected), "n01", "n02"]
    assert os.listdir(tmp_path) == ["imagenet"], "drawn before it was needed"


def test_only_the_set_asked_for_is_made(tmp_path):
    """A COCO run, a checkpoint's path, would cost the time that both sets take to draw; or the
    set registered last would be drawn in place of the one asked for."""
    configs = (SMALL, SMALL_CLASSIFICATION)
    for config in configs:
        builtin.register_shapes(str(tmp_path), config, f"{config.name}_{tmp_path.name}")
    folders = [builtin.dataset_folder(tmp_path, config) for config in configs]
    for path in (str(tmp_path / "coco" / "x.json"), "model.pth", f"{folders[0]}_no/x"):
        PathManager.get_local_path(path)
    assert not list(tmp_path.iterdir()), "drawn for a path outside"
    for folder in folders:
        assert not folder.exists()
        PathManager.get_local_path(str(folder / "train"))
        assert (folder / "train").is_dir()
        with PathManager.open(str(folder / "manifest.json"), "rb") as f:
            assert f.read() == (folder / "manifest.json").read_bytes()


@pytest.fixture
def registered(tmp_path):
    """Names of a small set registered like the built-in one."""
    prefix = f"shapes_{tmp_path.name}"
    builtin.register_shapes(str(tmp_path), SMALL, prefix)
    return [f"{prefix}_{split}" for split in builtin.SPLITS]


def test_evaluator_before_loader(registered, tmp_path):
    """On a fresh machine, an evaluation may build the evaluator before the loader. Ground truth
    given as predictions must score 100: less says that boxes, masks or category ids do not survive
    the way through Detectron2 and pycocotools."""
    name = registered[1]
    assert MetadataCatalog.get(name).evaluator_type == "coco"
    evaluator = COCOEvaluator(name, ("bbox", "segm"), distributed=False)
    evaluator.reset()
    coco = COCO(MetadataCatalog.get(name).json_file)
    truth = {d["image_id"]: d["annotations"] for d in DatasetCatalog.get(name)}
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    for batch in build_detection_test_loader(DatasetCatalog.get(name), mapper=mapper):
        image = batch[0]
        height, width = image["image"].shape[1:]
        annotations = truth[image["image_id"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        instances = Instances((height, width))
        instances.pred_boxes = Boxes(torch.tensor(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        instances.scores = torch.ones(len(annotations))
        instances.pred_masks = torch.tensor(np.stack([raster(a, height) for a in annotations]))
        evaluator.process([image], [{"instances": instances}])
    results = evaluator.evaluate()
    assert len(coco.imgs) == SMALL.num_val
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
