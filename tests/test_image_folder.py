"""Folders of images as Detectron2 data sets: what is listed, and every line a user may get."""

import re
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import raises_one_line
from torchvision.datasets import ImageFolder

from randwire_d2.data import builtin
from randwire_d2.data.classification import image_folder
from randwire_d2.data.classification.image_folder import (
    check_image_folders,
    image_folder_classes,
    register_folders,
    register_image_folder,
)
from randwire_d2.data.shapes import CLASSES, ClassificationShapesConfig


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    """DETECTRON2_DATASETS is a folder of this test."""
    monkeypatch.setattr(image_folder, "DATASETS_ROOT", str(tmp_path))


def touch(folder, *names):
    """Empty files, which is all that listing needs."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def line(train, test=()):
    """The one line that refuses these data sets."""
    register_folders([*train, *test])
    with raises_one_line(ValueError) as e:
        check_image_folders(train, test)
    return str(e.value)


# -------------------------------------------------------------------------------------------------
# Registered and listed
# -------------------------------------------------------------------------------------------------


def test_listing_is_torchvisions(tmp_path):
    """Another order or another label of a class would break other people's checkpoints."""
    touch(tmp_path, "b/2.JPEG", "b/10.png", "b/deep/er/1.jpg", "a/z.webp", "B/1.bmp", "a/notes.txt")
    touch(tmp_path, "no_class.jpg")
    register_image_folder("listing", str(tmp_path))
    records = DatasetCatalog.get("listing")
    expected = ImageFolder(str(tmp_path))
    assert [(r["file_name"], r["label"]) for r in records] == expected.samples
    assert len(records) == 5 and {type(r["label"]) for r in records} == {int}
    metadata = MetadataCatalog.get("listing")
    assert metadata.evaluator_type == "image_folder" and metadata.image_root == str(tmp_path)
    assert metadata.classes == image_folder_classes("listing") == ["B", "a", "b"]


def test_a_class_that_was_added_is_there(tmp_path):
    """Wrong: in a notebook, a second training on a folder that has changed ends in a traceback."""
    register_image_folder("grows", str(tmp_path))
    for name in "ab":
        touch(tmp_path, f"{name}/1.jpg")
        assert DatasetCatalog.get("grows")[-1]["label"] == len(image_folder_classes("grows")) - 1
        assert MetadataCatalog.get("grows").classes[-1] == name


def test_what_macos_leaves_is_no_image(tmp_path):
    """Wrong: on a disk that came from a Mac, half of an epoch's images are broken."""
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", "b/._1.jpg")
    register_image_folder("from_a_mac", str(tmp_path))
    assert "no images in 'b'" in line(["from_a_mac"])
    touch(tmp_path, "b/2.jpg")
    names = [Path(record["file_name"]).name for record in DatasetCatalog.get("from_a_mac")]
    assert names == ["1.jpg", "2.jpg"]


def test_folders_are_names(tmp_path, monkeypatch):
    """DATASETS.TRAIN may name a folder; one under DETECTRON2_DATASETS comes first."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    touch(tmp_path, "both/a/1.jpg", "here/both/b/1.jpg", "here/only/c/1.jpg")
    absolute = str(tmp_path / "here" / "only")
    for name, classes in (("both", ["a"]), ("only", ["c"]), (absolute, ["c"])):
        for _ in range(2):
            register_folders([name])
        assert image_folder_classes(name) == classes
        assert [r["label"] for r in DatasetCatalog.get(name)] == [0]


def test_other_names_stay_unknown(tmp_path):
    """A typing error, or an empty name, would become a data set; a known name, another one."""
    touch(tmp_path, "file", "coco_2017_val/a/1.jpg")
    before = set(DatasetCatalog.list())
    register_folders(["", "file", "missing", "imagenet_train", "coco_2017_val"])
    assert set(DatasetCatalog.list()) == before
    assert MetadataCatalog.get("coco_2017_val").evaluator_type == "coco"


def test_built_in_set_is_made_when_asked_for(tmp_path):
    """The user would have to know a command that draws it."""
    config = ClassificationShapesConfig(num_train=12, num_val=6)
    for use in (
        lambda train, val: DatasetCatalog.get(train),
        lambda train, val: image_folder_classes(val),
        lambda train, val: check_image_folders([train], [val]),
    ):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        builtin.register_shapes(str(root), config, prefix=root.name)
        assert not root.exists(), "drawn before it was needed"
        names = [f"{root.name}_{split}" for split in ("train", "val")]
        use(*names)
        assert [len(DatasetCatalog.get(name)) for name in names] == [12, 6]
        assert image_folder_classes(names[0]) == sorted(CLASSES)


# -------------------------------------------------------------------------------------------------
# Checked
# -------------------------------------------------------------------------------------------------


def test_good_folders(tmp_path):
    """Classes in the order of their labels; images may lie deeper, and beside other files."""
    touch(tmp_path, "train/b/x/y/1.jpg", "train/a/1.txt", "train/a/2.PNG", "val/a/1.jpg")
    touch(tmp_path, "val/b/1.jpg", "val/readme.txt")
    register_folders(["train", "val"])
    assert check_image_folders(["train"], ["val"]) == ["a", "b"]
    assert check_image_folders([], ["val"]) == ["a", "b"]
    assert check_image_folders(["train", "val"], ["val"]) == ["a", "b"]


def test_photos_that_cannot_be_read(tmp_path, caplog):
    """A class of an iPhone's photos looks empty, or half of one is left out without a word."""
    touch(tmp_path, "t/a/x/1.HEIC", "t/b/1.jpg", "t/b/1.heic", "t/b/2.gif")
    assert line(["t"]).endswith("; 1 .heic can't be read here: convert to JPEG")
    touch(tmp_path, "t/a/2.jp2")
    assert check_image_folders(["t"], []) == ["a", "b"]
    names = [Path(image["file_name"]).name for image in DatasetCatalog.get("t")]
    assert names == ["2.jp2", "1.jpg", "2.gif"]
    (said,) = caplog.messages
    assert said == "'t' has images that are left out: 1 .heic can't be read here: convert to JPEG"


def test_unknown_name(tmp_path):
    """What is no data set and no folder: say both, and where it was looked for."""
    message = line(["train_set"])
    assert "no data set 'train_set' is registered" in message and "no such folder" in message
    assert str(tmp_path) in message and "DETECTRON2_DATASETS" in message


def test_missing_folder(tmp_path):
    """A registered set that was never downloaded."""
    root = str(tmp_path / "gone")
    register_image_folder("gone_set", root)
    assert f"'gone_set' needs {root!r}, which does not exist" in line([], ["gone_set"])


def test_detection_set():
    """Configs for detection and classification get mixed up."""
    assert line(["coco_2017_train"]).startswith("'coco_2017_train' is no image folder")


def test_nothing_given():
    """An empty list of classes would build a classifier without outputs."""
    assert line([]).startswith("no data sets are given")


def test_a_class_of_two_lines(tmp_path):
    """The folder's name is the class's, and breaks each list that it stands in."""
    touch(tmp_path, "lines/a\nb/1.jpg")
    assert line(["lines"]) == (
        r"'lines': the class name 'a\nb' has a line break or another control character; rename the "
        "class"
    )


@pytest.mark.parametrize(
    "empty, named",
    [
        ("b", "'b'"),
        ("bcd", "'b', 'c', 'd'"),
        ("bcdef", "'b', 'c', 'd' and 2 more"),
    ],
)
def test_classes_without_images(tmp_path, empty, named):
    """torchvision finds them only after it has listed all files of all the others."""
    touch(tmp_path, "t/a/1.jpg", *(f"t/{c}/deep/1.jpg.part" for c in empty))
    assert line(["t"]).startswith(f"'t': no images in {named} of {str(tmp_path / 't')!r}; remove")


@pytest.mark.parametrize(
    "train, val, only",
    [
        ("abc", "ab", "only in 'train': 'c'"),
        ("ab", "abcdef", "only in 'val': 'c', 'd', 'e' and 1 more"),
        ("abc", "abd", "only in 'train': 'c'; only in 'val': 'd'"),
    ],
)
def test_different_classes(tmp_path, train, val, only):
    """Labels would mean one thing in training and another in the evaluation."""
    touch(tmp_path, *(f"train/{c}/1.jpg" for c in train), *(f"val/{c}/1.jpg" for c in val))
    message = line(["train"], ["val"])
    assert message.startswith(f"'train' and 'val' have different classes ({only});")


def test_two_training_sets(tmp_path):
    """Sets that are trained on together must agree as well."""
    touch(tmp_path, "one/a/1.jpg", "two/a/1.jpg", "two/b/1.jpg")
    assert "'one' and 'two' have different classes (only in 'two': 'b')" in line(["one", "two"])


def test_unreadable_folder(tmp_path, monkeypatch):
    """A failing disk is no traceback either."""
    touch(tmp_path, "t/a/1.jpg")
    refused = PermissionError(13, "Permission denied", str(tmp_path / "t" / "a"))
    monkeypatch.setattr(image_folder, "_has_image", lambda folder: (_ for _ in ()).throw(refused))
    assert re.match(r"'t': .*Permission denied: .*/t/a'", line(["t"]))


def test_damaged_built_in_set(tmp_path, monkeypatch):
    """The way out of a damaged set must reach the user in one line."""
    config = ClassificationShapesConfig(num_train=6, num_val=6)
    folder = builtin.make_dataset(tmp_path, config)
    (folder / "manifest.json").unlink()
    monkeypatch.setattr(builtin, "_checked", set())
    builtin.register_shapes(str(tmp_path), config, prefix="damaged")
    assert re.match(r"'damaged_train': .* Delete that folder", line(["damaged_train"]))


def test_check_lists_no_files(tmp_path, monkeypatch):
    """ImageNet's 1.28 million files on a network disk would take minutes to list."""
    touch(tmp_path, *(f"t/{c}/{i}.jpg" for c in "abc" for i in range(50)))
    seen = []
    real = image_folder.is_image_file
    monkeypatch.setattr(image_folder, "is_image_file", lambda n: seen.append(n) or real(n))
    monkeypatch.delattr(image_folder, "ImageFolder")
    register_folders(["t"])
    assert check_image_folders(["t"], ["t"]) == ["a", "b", "c"]
    assert len(seen) == 3
