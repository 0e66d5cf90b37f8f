"""Data sets that are not as they should be: each is one clear line, or a fault that is counted."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper
from helpers import ROOT, raises_one_line
from label_formats import FORMATS, HEIGHT, TRAIN, VAL, WIDTH, write_sound
from PIL import Image

from randwire_d2.config import detector_config
from randwire_d2.data import labelled_images
from randwire_d2.data.images.patience import PatientMapper
from randwire_d2.data.images.reading import read_rgb
from randwire_d2.drawing.detections import draw_results
from randwire_d2.drawing.samples import draw_samples
from randwire_d2.engine import argument_parser, load_config
from randwire_d2.engine.train_loader import detection_train_loader

SHAPES = str(ROOT / "configs" / "faster_rcnn_randwire_shapes.yaml")
Damage = Callable[[Path], Any]


def coco(change: Callable[[dict[str, Any]], Any], file: str = "train.json") -> Damage:
    def damage(root: Path) -> None:
        content = json.loads((root / file).read_text())
        change(content)
        (root / file).write_text(json.dumps(content))

    return damage


def box(*values: Any) -> Damage:
    return coco(lambda c: c["annotations"][0].update(bbox=list(values)))


def write(name: str, text: str) -> Damage:
    return lambda root: (root / name).write_text(text)


def replace(name: str, old: str, new: str) -> Damage:
    def damage(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return damage


def truncate(root: Path) -> None:
    path = root / "JPEGImages" / "train1.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def as_heic(root: Path) -> None:
    (root / "JPEGImages" / "train1.jpg").rename(root / "JPEGImages" / "train1.HEIC")
    (root / "JPEGImages" / "train1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "JPEGImages" / "train2.heic").write_bytes(b"")  # has been converted


def no_images(root: Path) -> None:
    for path in (root / "JPEGImages").glob("*.jpg"):
        path.unlink()


def resize(root: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(root / "JPEGImages" / "train1.jpg")


def no_labels(root: Path) -> None:
    for path in (root / "JPEGImages").glob("*.txt"):
        path.unlink()


def deepen(mode: str) -> Damage:
    """Store an image with 16 or 32 bits per pixel; only its first bytes tell its kind."""

    def damage(root: Path) -> None:
        path = root / "JPEGImages" / "train1.jpg"
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(np.full((HEIGHT, WIDTH), 3000, dtype))
        assert image.mode == mode
        image.save(path, "PNG" if mode == "I;16" else "TIFF")

    return damage


def postscript(root: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / "train1.jpg", "EPS")


def turn(root: Path) -> None:
    """Store an image on its side, with the EXIF tag that says so: no fault."""
    path = root / "JPEGImages" / "train1.jpg"
    with Image.open(path) as image:
        image.rotate(90, expand=True).save(path)
    tag_as_turned(root)


def turn_tiff(root: Path) -> None:
    path = root / "JPEGImages" / "train1.jpg"
    with Image.open(path) as image:
        image.save(path, "TIFF", tiffinfo={0x0112: 3})


def tag_as_turned(root: Path) -> None:
    path = root / "JPEGImages" / "train1.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)


LABEL = "JPEGImages/train1.txt"
XML = "Annotations/train1.xml"
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
NOT_JSON = '{"images": ['
BILLION = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'

STOPS: dict[str, tuple[str, Damage, list[str]]] = {
    "not JSON": ("coco", write("train.json", NOT_JSON), ["train.json", "no JSON", "line 1"]),
    "JSON of another form": ("coco", write("train.json", "[1]"), ["COCO's format"]),
    "not text": ("coco", lambda root: (root / "train.json").write_bytes(b"\xff\xfe\x00"),
                 ["train.json", "UTF-8"]),
    "no list of annotations": ("coco", coco(lambda c: c.pop("annotations")), ["'annotations'"]),
    "no annotation": ("coco", coco(lambda c: c.update(annotations=[])), ["one of its 6 images"]),
    "crowds alone": ("coco", coco(lambda c: [a.update(iscrowd=1) for a in c["annotations"]]),
                     ["of its 6 images has a box but 12 crowds (iscrowd 1)"]),
    "boxes that are fractions": ("coco", coco(lambda c: [
        a.update(bbox=[0.25, 0.5, 0.3, 0.2]) for a in c["annotations"]]),
        ["train.json", "not one of its 12 boxes", "[0.25, 0.5, 0.3, 0.2]", "in pixels"]),
    "no image": ("coco", coco(lambda c: c.update(images=[])), ["train.json", "has no images"]),
    "no categories": ("coco", coco(lambda c: c.update(categories=[])), ["category_id 1", "none"]),
    "two images with one id": ("coco", coco(lambda c: c["images"][1].update(id=1)),
                               ["train1.jpg", "train2.jpg", "the id 1"]),
    "a category whose id is text": ("coco", coco(lambda c: c["categories"][1].update(id="2")), [
        "category 'dog' has the id '2', which is no integer; number each category"]),
    "an image without a name": ("coco", coco(lambda c: c["images"][0].pop("file_name")),
                                ["image 1", "'file_name'"]),
    "unknown category": ("coco", coco(lambda c: c["annotations"][3].update(category_id=9)),
                         ["annotation 4", "category_id 9", "1, 2"]),
    "a category that is a list": ("coco", coco(lambda c: c["annotations"][0].update(
        category_id=[1])), ["annotation 1", "category_id [1]"]),
    "a class of two lines": ("coco", coco(lambda c: c["categories"][1].update(name="a\ncat")),
                             [r"the class name 'a\ncat' has a line break", "rename"]),
    "a class that rings": ("coco", coco(lambda c: c["categories"][1].update(name="\a")),
                           [r"the class name '\x07' has", "rename"]),
    "a class twice": ("coco", coco(lambda c: c["categories"][1].update(name="cat")),
                      ["a class twice", "cat"]),
    "no images there": ("coco", no_images, ["6 of 6 images", "missing", "train1.jpg"]),
    "other names in val": ("coco", coco(lambda c: c["categories"][1].update(name="wolf"),
                                        "val.json"), ["only in", "dog", "wolf"]),
    "other order in val": ("coco", coco(lambda c: c.update(categories=[
        {"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]), "val.json"), ["another order"]),
    "YOLO class out of range": ("yolo", write(LABEL, "2 0.5 0.5 0.1 0.1\n"),
                                ["train1.txt:1", "class 2", "0 … 1"]),
    "YOLO class that is no number": ("yolo", write(LABEL, "nan 0.5 0.5 0.1 0.1\n"),
                                     ["train1.txt:1", "class nan"]),
    "data.yaml without names": ("yolo", write("data.yaml", "train: train.txt\n"), ["'names'"]),
    "data.yaml that is no YAML": ("yolo", write("data.yaml", "names: [a\ntrain"), ["no YAML"]),
    "data.yaml with code": ("yolo", write("data.yaml", "!!python/object/apply:os.getcwd []"),
                            ["no YAML"]),
    "data.yaml without train": ("yolo", write("data.yaml", "names: [cat, dog]"), ["no 'train'"]),
    "data.yaml with another nc": ("yolo", write("data.yaml", "names: [a, b]\nnc: 3\n"), ["nc 3"]),
    "a name whose key is no number": ("yolo", write("data.yaml", "names: {0: a, x: b}\ntrain: t"),
                                      ["keys of 'names'", "[0, 'x']"]),
    "names with a gap": ("yolo", write("data.yaml", "names: {0: a, 2: b}\ntrain: train.txt"),
                         ["keys of 'names'", "[0, 2]"]),
    "train that is not there": ("yolo", write("data.yaml", "names: [cat, dog]\ntrain: gone\n"),
                                ["'gone'", "does not exist"]),
    "train without images": ("yolo", write("train.txt", "\n"), ["no images in 'train.txt'"]),
    "a kpt_shape that is a number": ("yolo", replace("data.yaml", '{', '{"kpt_shape": 12, '),
                                     ["kpt_shape 12", "[17, 3]"]),
    "keypoints of four numbers": ("yolo", replace("data.yaml", '{', '{"kpt_shape": [2, 4], '),
                                  ["kpt_shape [2, 4]"]),
    "no label file": ("yolo", no_labels, ["not one of 6 label files"]),
    "VOC with a DOCTYPE": ("voc", write(XML, BILLION), ["train1.xml", "DOCTYPE"]),
    "VOC that is no XML": ("voc", write(XML, "<annotation><size>"), ["train1.xml", "no element"]),
    "VOC class that is not in labelmap.txt": ("voc", replace(XML, "cat", "wolf"),
                                              ["train1.xml", "'wolf'", "cat, dog"]),
}  # fmt: skip

NO_HEIC = "train1.HEIC: .heic can't be read here: convert to JPEG)"
COUNTS: dict[str, tuple[str, Damage, str, int]] = {
    # What is counted, and the boxes that are left of the 12 in the training images.
    "an image missing": ("coco", lambda root: (root / "JPEGImages/train1.jpg").unlink(),
                         "images whose file is missing (left out): 1 (", 10),
    "a truncated JPEG": ("yolo", truncate, "images that can't be read (left out): 1 (", 10),
    "a JPEG that is PostScript": ("coco", postscript, "train1.jpg: it is PostScript, a prog", 10),
    "HEIC that a COCO file names": ("coco", lambda root: [as_heic(root), coco(
        lambda c: c["images"][0].update(file_name="train1.HEIC"))(root)], NO_HEIC, 10),
    "HEIC in YOLO's folder": ("yolo", lambda root: [as_heic(root), write(
        "data.yaml", "names: [cat, dog]\ntrain: JPEGImages\nval: val.txt\n")(root)], NO_HEIC, 14),
    "HEIC in VOC's folder": ("voc", as_heic, NO_HEIC, 10),
    "an image that is text": ("voc", write("JPEGImages/train1.jpg", "not found"),
                              "train1.jpg: it is no image)", 10),
    **{f"a grey image in Pillow's mode {mode}": (kind, deepen(mode), "of more than 8 bits", 10)
       for mode, kind in (("I;16", "coco"), ("I", "yolo"), ("F", "voc"))},
    "an image of another size": ("coco", resize, f"{WIDTH} × {HEIGHT + 1}, not {WIDTH} × {HEIGHT}",
                                 10),
    "an image of another size than 48.0 × 32.0": ("coco", lambda root: [resize(root), coco(
        lambda c: [i.update(width=48.0, height=32.0) for i in c["images"]])(root)],
        f"{WIDTH} × {HEIGHT + 1}, not {WIDTH} × {HEIGHT}", 10),
    "an image of the size before EXIF turned it": (
        "coco", tag_as_turned, f"{HEIGHT} × {WIDTH}, as EXIF turns it, not {WIDTH} × {HEIGHT}", 10),
    "a TIFF that would be turned twice": ("coco", turn_tiff, "Detectron2 turns it again: conv", 10),
    "a box with NaN": ("coco", box(float("nan"), 1, 2, 3), "NaN or infinite numbers (left", 11),
    "an infinite box": ("coco", box(1, 1, float("inf"), 3), "NaN or infinite numbers (left", 11),
    "an empty box": ("coco", box(4, 4, 0, 3), "boxes without area (left out): 1 (", 11),
    "a negative box": ("coco", box(4, 4, 3, -3), "boxes without area (left out): 1 (", 11),
    "a huge box": ("coco", box(-9e6, 0, 1e7, 10), "twice as wide or high", 11),
    "a box outside": ("coco", box(WIDTH + 1, 0, 5, 5), "boxes outside their image (left", 11),
    "a box partly outside": ("coco", box(40, 4, 20, 5), "reach beyond their image (training", 12),
    "a box twice": ("coco", coco(lambda c: c["annotations"].append(
        {**c["annotations"][0], "id": 99})), "boxes that come again in their image, of the", 13),
    "a box of three numbers": ("coco", box(1, 2, 3), "not four numbers (left out): 1 (ann", 11),
    "a box of text": ("coco", box("1", 2, 3, 4), "not four numbers (left out): 1 (ann", 11),
    "a polygon of two points": ("coco", coco(lambda c: c["annotations"][0].update(
        segmentation=[[1, 2, 3, 4]])), "a polygon of three points", 11),
    "a polygon of text": ("coco", coco(lambda c: c["annotations"][0].update(
        segmentation=[["a"] * 6])), "masks that can't be read", 11),
    **{f"a polygon whose outline is {what}": ("coco", coco(lambda c, p=polygon: c["annotations"][
        0].update(segmentation=[p])), "or with an outline of more than 1000 times its lon", 11)
       for what, polygon in {
           "far away": [5, 5, 3e4, 5, 9, 9], "farther": [5, 5, -1e9, 5, 9, 9],
           "infinite": [5, 5, 1e400, 5, 9, 9], "NaN": [5, 5, 1e400 - 1e400, 5, 9, 9],
           "to and fro": [0, 0, 40, 0] * 700, "elsewhere": [1e9, 1e9, 1e9, 1e9 + 9, 1e9 + 9, 1e9],
       }.items()},
    "an RLE of another size": ("coco", coco(lambda c: c["annotations"][0].update(
        segmentation={"size": [2, 3], "counts": [1, 5]})), "of another size than their image", 11),
    "an RLE without size": ("coco", coco(lambda c: c["annotations"][0].update(
        segmentation={"counts": [1, 5]})), "of another size than their image", 11),
    "an RLE of garbage": ("coco", coco(lambda c: c["annotations"][0].update(
        segmentation={"size": [HEIGHT, WIDTH], "counts": "é~"})), "masks that can't be read", 11),
    "an RLE of one number": ("coco", coco(lambda c: c["annotations"][0].update(
        segmentation={"size": 5, "counts": "T3"})), "masks that can't be read", 11),
    "a polygon of integers that no float holds": ("coco", coco(
        lambda c: c["annotations"][0].update(segmentation=[[10**400] * 6])),
        "masks that can't be read", 11),
    "a box of integers that no float holds": ("coco", box(10**400, 1, 2, 3), "not four num", 11),
    "a crowd of text": ("coco", coco(lambda c: c["annotations"][0].update(iscrowd="0")),
                        "iscrowd is neither 0 nor 1 (left out): 1 (annotation 1)", 11),
    "a name with a zero byte": ("coco", coco(lambda c: c["images"][0].update(file_name="a\0b")),
                                "images whose file is missing (left out): 1 (", 10),
    "an annotation of no image": ("coco", coco(lambda c: c["annotations"][0].update(image_id=77)),
                                  "an image that is not in the file (left out): 1", 11),
    "a label of four numbers": ("yolo", write(LABEL, "1 0.5 0.5 0.1\n0 0.5 0.5 0.1 0.1\n"),
                                "neither class x y width height nor a polygon", 11),
    "a label of words": ("yolo", write(LABEL, "a cat\n1 0.5 0.5 0.1 0.1\n"), "train1.txt:1", 11),
    "a label with NaN": ("yolo", write(LABEL, "1 nan 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n"),
                         "NaN or infinite numbers (left out): 1", 11),
    "VOC without size": ("voc", replace(XML, SIZE, ""),
                         "without the image's size (it is taken from the image): 1 (", 12),
    "VOC of infinite size": ("voc", replace(XML, f"<width>{WIDTH}<", "<width>inf<"),
                             "without the image's size (it is taken from the image): 1 (", 12),
    "VOC with a box of words": ("voc", replace(XML, "<xmin>5.0<", "<xmin>left<"),
                                "bndbox is not four numbers (left out): 1 (", 11),
    "VOC without annotations of an image": ("voc", lambda root: (root / XML).unlink(),
                                            "images without an XML file (left out): 1 (", 10),
}  # fmt: skip
SOUND: dict[str, tuple[str, Damage]] = {
    "ids with gaps": ("coco", coco(lambda c: [
        c["categories"][1].update(id=70), *(a.update(category_id=70) for a in c["annotations"]
                                            if a["category_id"] == 2)])),
    "no height and width": ("coco", coco(lambda c: [
        (i.pop("height"), i.pop("width")) for i in c["images"]])),
    "an image beside the folder": ("coco", lambda root: [
        (root / "JPEGImages/train1.jpg").rename(root / "train1.jpg"),
        coco(lambda c: c["images"][0].update(file_name="../train1.jpg"))(root)]),
    "an image that EXIF turns": ("coco", turn),
    "names by their numbers": ("yolo", write(
        "data.yaml", "names: {1: dog, 0: cat}\ntrain: ./train.txt\nval: [val.txt]\npath: .\n")),
    "the names of the objects": ("voc", lambda root: (root / "labelmap.txt").unlink()),
    "trainval and test": ("voc", lambda root: [
        (root / f"ImageSets/Main/{old}.txt").rename(root / f"ImageSets/Main/{new}.txt")
        for old, new in (("train", "trainval"), ("val", "test"))]),
}  # fmt: skip


def read(tmp_path: Path, kind: str, damage: Damage) -> Any:
    """The config that trains with the damaged data; nothing may be written for it."""
    given = write_sound(tmp_path / "data")
    damage(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config-file", SHAPES, *given[kind], "OUTPUT_DIR", str(tmp_path / "output")]
    try:
        return load_config(argument_parser().parse_args(arguments))
    finally:
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", STOPS)
def test_what_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    kind, damage, says = STOPS[name]
    with raises_one_line(ValueError) as e:
        read(tmp_path, kind, damage)
    for words in says:
        assert words in str(e.value)


def usable(cfg: Any) -> list[dict[str, Any]]:
    """The training records, each of which Detectron2's mapper has turned into a sample."""
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    for record in records:
        sample = DatasetMapper(cfg, is_train=True)(record)
        assert np.isfinite(sample["instances"].gt_boxes.tensor.numpy()).all()
        assert len(sample["instances"]) == len(record["annotations"])
    return records


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_set_with_a_name_has_no_white_images(mode: str, is_train: bool, tmp_path: Path) -> None:
    """By path they are left out. Wrong: what is above 255 is cut off in silence."""
    root = tmp_path / "data"
    write_sound(root)
    cfg, image = detector_config(), root / "JPEGImages" / "train1.jpg"
    cfg.INPUT.FORMAT = "RGB"
    record = {"file_name": str(image), "image_id": 1, "height": HEIGHT, "width": WIDTH}
    mapper = PatientMapper(cfg, is_train=is_train)
    assert mapper(record)["image"].shape[0] == 3
    deepen(mode)(root)
    with raises_one_line(ValueError, match=rf"{image} can't be .*8 bits .*mode {mode[0]}.*convert"):
        mapper(record)


def test_a_tiff_is_turned_once(tmp_path: Path) -> None:
    """Wrong: a scan is predicted and drawn upside down, because Pillow and Detectron2 both turn it;
    or, in a set with a name, trained on so."""
    path = tmp_path / "a.tif"
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(path, tiffinfo={0x0112: 3})
    np.testing.assert_array_equal(read_rgb(path, upright=True), pixels[::-1, ::-1])
    with raises_one_line(ValueError, match=rf"{path} can't be trained .*again: convert it, such"):
        PatientMapper(detector_config(), False)({"file_name": str(path)})


def test_a_set_with_a_name_of_crowds_alone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: it ends the training as if that were a bug of this project's."""
    crowd = {"bbox": [0, 0, 5, 5], "bbox_mode": 1, "category_id": 0, "iscrowd": 1}
    record = {"file_name": "a.jpg", "image_id": 1, "height": 9, "width": 9, "annotations": [crowd]}
    cfg = detector_config()
    cfg.DATASETS.TRAIN = ("crowds",)
    for records, said in (([record], "No valid data found in crowds."), ([], "'crowds' is empty!")):
        monkeypatch.setitem(DatasetCatalog.data, "crowds", lambda records=records: records)
        with raises_one_line(ValueError, match=f"DATASETS.TRAIN .'crowds',. can't .*{said} An ima"):
            detection_train_loader(cfg)


def test_no_image_is_run_as_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: Pillow hands a stranger's photo to Ghostscript, which runs it."""
    write_sound(tmp_path)
    postscript(tmp_path)
    image = tmp_path / "JPEGImages" / "train1.jpg"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it ran"))
    record = {"file_name": str(image), "image_id": 1, "height": HEIGHT, "width": WIDTH}
    record["annotations"] = []
    monkeypatch.setitem(DatasetCatalog.data, "name", lambda: [record])
    for read in (
        lambda: PatientMapper(detector_config(), False)(record),
        lambda: read_rgb(image),
        lambda: draw_results("name", [], [1], 0.5),
        lambda: draw_samples(detector_config(), "name", 1),
    ):
        with pytest.raises(ValueError, match=f"{image} can't be .*: it is PostScript.*convert"):
            read()


@pytest.mark.parametrize("is_train", [True, False])
def test_an_image_that_cannot_be_read_or_resized_is_named(is_train: bool, tmp_path: Path) -> None:
    """Wrong: one strip, or one bitmap that was cut off, among thousands of images ends a training
    with Pillow's words alone."""
    mapper = PatientMapper(detector_config(), is_train=is_train)
    for name, says in (("strip.png", "height and width must be > 0"), ("cut.bmp", "truncated")):
        path = tmp_path / name
        Image.new("RGB", (6000, 1)).save(path)
        if name == "cut.bmp":
            path.write_bytes(path.read_bytes()[:-9])
        with raises_one_line(ValueError, match=f"{path} can't be .*{says}"):
            mapper({"file_name": str(path), "image_id": 1, "height": 1, "width": 6000})


@pytest.mark.parametrize("name", COUNTS)
def test_a_fault_is_counted_and_named(name: str, tmp_path: Path) -> None:
    """Wrong: a box or an image is dropped in silence, or training meets it."""
    kind, damage, says, boxes = COUNTS[name]
    cfg = read(tmp_path, kind, damage)
    (line,) = labelled_images(cfg.DATASETS.TRAIN[0]).faults.lines()
    assert says in line
    assert sum(len(record["annotations"]) for record in usable(cfg)) == boxes
    assert not labelled_images(cfg.DATASETS.TEST[0]).faults


@pytest.mark.parametrize("shape", [(12, 2), (17, 3)])
def test_keypoints_of_yolo_are_not_taken_for_polygons(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """Wrong: the corners of a polygon are a box's numbers and its keypoints'; or a label that has
    not the keypoints of kpt_shape is taken for one of another kind, or dropped in silence."""

    def pose(root: Path) -> None:
        points = ["0.1"] * (shape[0] * shape[1])
        lines = [["0", "0.5", "0.5", "0.25", "0.5", *points[i:]] for i in (0, 0, 2, len(points))]
        for path in (root / "JPEGImages").glob("*.txt"):
            path.write_text("\n".join(map(" ".join, lines)))
        replace("data.yaml", "{", f'{{"kpt_shape": {list(shape)}, ')(root)

    cfg = read(tmp_path, "yolo", pose)
    first, *others = (a for r in usable(cfg) for a in r["annotations"])
    assert (first["bbox"], len(others)) == ([18, 8, 12, 16], 2 * TRAIN - 1)
    assert "segmentation" not in first
    assert len(first["keypoints"]) == 3 * shape[0]
    left_out, *_ = labelled_images(cfg.DATASETS.TRAIN[0]).faults.lines()
    assert f"kpt_shape's keypoints (left out): {2 * TRAIN} (" in left_out
    assert "train1.txt:3" in left_out


@pytest.mark.parametrize("name", SOUND)
def test_what_is_unusual_works(name: str, tmp_path: Path) -> None:
    kind, damage = SOUND[name]
    cfg = read(tmp_path, kind, damage)
    assert not labelled_images(cfg.DATASETS.TRAIN[0]).faults
    found = [a["category_id"] for record in usable(cfg) for a in record["annotations"]]
    assert found == [0, 1] * TRAIN
    assert len(DatasetCatalog.get(cfg.DATASETS.TEST[0])) == VAL


@pytest.mark.parametrize(
    "change",
    [
        {"area": None},
        {"area": "large"},
        {"iscrowd": None},
        {"height": str(HEIGHT)},
        {"id": 9, "name": "pets", "supercategory": "none"},  # Roboflow's root category
    ],
    ids=lambda change: str(change),
)
def test_cocos_evaluation_reads_no_file_that_it_cannot(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Wrong: the first evaluation, hours later, compares None with a number, draws a mask of "480"
    lines, or finds a class that the detector has not."""
    sound = {"area": 5.0, "iscrowd": 0}
    for name, first in (("sound", {}), ("damaged", change)):

        def update(content: dict[str, Any], first: dict[str, Any] = first) -> None:
            for found in content["annotations"]:
                found.update(sound)
            if "supercategory" in first:
                content["categories"][0]["supercategory"] = first["name"]
                content["categories"].append(first)
            else:
                content["images" if "height" in first else "annotations"][0].update(first)

        (tmp_path / name).mkdir()
        cfg = read(tmp_path / name, "coco", coco(update, "val.json"))
        assert (labelled_images(cfg.DATASETS.TEST[0]).json_file is not None) == (name == "sound")


def test_validation_needs_masks_too(tmp_path: Path) -> None:
    """Wrong: COCO's evaluation ends in a KeyError after the first period."""
    given = write_sound(tmp_path / "data")["coco"]
    mask = {"segmentation": [[1, 1, 9, 1, 9, 9]]}
    coco(lambda c: [found.update(mask) for found in c["annotations"]])(tmp_path / "data")
    arguments = ["--config-file", SHAPES, *given, "MODEL.MASK_ON", "True"]
    with pytest.raises(ValueError, match=r"4 of 4 boxes of '.*/val.json' have no p.*MASK_ON F"):
        load_config(argument_parser().parse_args(arguments))


@pytest.mark.parametrize("kind", FORMATS)
def test_byte_order_marks_are_no_part_of_labels(kind: str, tmp_path: Path) -> None:
    """Windows programs begin a text file with one. Wrong: the first box of each file or the first
    image of a list is left out, or an evaluation fails in COCO's own reader."""

    def mark(root: Path) -> None:
        for path in root.rglob("*.*"):
            if path.suffix != ".jpg":
                path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())

    cfg = read(tmp_path, kind, mark)
    train, val = (labelled_images(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    assert not train.faults and train.num_boxes == 2 * TRAIN
    assert not val.faults and val.num_boxes == 2 * VAL and val.json_file is None


def test_linked_folders_of_yolo_are_searched(tmp_path: Path) -> None:
    """As by Ultralytics. Wrong: their images are left out in silence; or a link that leads back has
    each image forty times, all but one without labels; or one to itself ends it all; or thumbnails
    that a program has hidden there are images without objects."""

    def link(root: Path) -> None:
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            for i in range(1, TRAIN + 1):
                folder = root / kind if i > 2 else root.parent / "disk" / kind
                folder.mkdir(parents=True, exist_ok=True)
                name = f"train{i}.{suffix}"
                (folder / name).write_bytes((root / "JPEGImages" / name).read_bytes())
            (root / kind / "more").symlink_to(root.parent / "disk" / kind)
        (root.parent / "disk" / "images" / "back").symlink_to(root / "images")
        (root / "images" / "self").symlink_to("self")
        for name in (".thumbnails/train1.jpg", ".train1.jpg"):
            (root / "images" / name).parent.mkdir(exist_ok=True)
            (root / "images" / name).write_bytes((root / "images" / "train3.jpg").read_bytes())
        replace("data.yaml", '"train.txt"', '"images"')(root)

    cfg = read(tmp_path, "yolo", link)
    assert [len(record["annotations"]) for record in usable(cfg)] == [2] * TRAIN


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--data", "{tmp}/nowhere"], ["/nowhere", "does not exist"]),
        (["--data", "{tmp}/empty"], ["holds no data set", "data.yaml", "JPEGImages"]),
        (["--data", "{tmp}/data"], ["YOLO and VOC", "give one of them"]),
        (["--data", "{tmp}/data/train.json:{tmp}/gone"], ["/gone", "does not exist"]),
        (["--data", "{tmp}/data/train.txt"], ["train.txt", "no data set"]),
        (["--data", "{tmp}/data/data.yaml", "--data-val", "{tmp}/gone.yaml"], ["gone.yaml"]),
    ],
)
def test_a_path_that_names_no_data_is_one_line(
    given: list[str], says: list[str], tmp_path: Path
) -> None:
    write_sound(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    arguments = ["--config-file", SHAPES, *(part.format(tmp=tmp_path) for part in given)]
    with raises_one_line(ValueError) as e:
        load_config(argument_parser().parse_args(arguments))
    for words in says:
        assert words in str(e.value)


def test_several_layouts_are_found(tmp_path: Path) -> None:
    """Wrong: an export of Roboflow's or a folder like COCO's needs its files named one by one."""
    write_sound(tmp_path / "data")
    roboflow, coco_like, yolo = (tmp_path / name for name in ("roboflow", "coco", "yolo"))
    for split, of_roboflow in (("train", "train"), ("val", "valid")):
        content = (tmp_path / "data" / f"{split}.json").read_text()
        images = tmp_path / split
        (coco_like / "annotations").mkdir(parents=True, exist_ok=True)
        (coco_like / "annotations" / f"instances_{split}2017.json").write_text(content)
        (coco_like / f"{split}2017").symlink_to(images)
        (roboflow / of_roboflow).mkdir(parents=True)
        (roboflow / of_roboflow / "_annotations.coco.json").write_text(content)
        for folder in (yolo / of_roboflow / "images", yolo / of_roboflow / "labels"):
            folder.mkdir(parents=True)
        for image in images.iterdir():
            (roboflow / of_roboflow / image.name).symlink_to(image)
            (yolo / of_roboflow / "images" / image.name).symlink_to(image)
            label = (tmp_path / "data" / "JPEGImages" / image.name).with_suffix(".txt")
            (yolo / of_roboflow / "labels" / label.name).write_text(label.read_text())
    # As Roboflow writes it: its paths lead out of the folder, and mean the one in it.
    (yolo / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n"
    )
    found = []
    for root in (roboflow, coco_like, yolo):
        arguments = ["--config-file", SHAPES, "--data", str(root)]
        cfg = load_config(argument_parser().parse_args(arguments))
        names = *cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST
        found.append([[r["annotations"] for r in DatasetCatalog.get(name)] for name in names])
    assert found[0] == found[1] == found[2]
    assert [len(records) for records in found[0]] == [TRAIN, VAL]
