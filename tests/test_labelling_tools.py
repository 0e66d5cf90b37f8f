"""The folders that labelling tools and converters write are found by their path alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import raises_one_line
from label_formats import write_sound

from randwire_d2.data.formats.layouts import find_splits

SPLITS = ("train", "val")
CLASSES = "cat\ndog\n"


class Export:
    """Writes parts of a sound data set where a tool writes them."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source, self.root = source, root

    def names(self, split: str) -> list[str]:
        return [image["file_name"] for image in self.coco(split)["images"]]

    def coco(self, split: str) -> dict:
        return json.loads((self.source / f"{split}.json").read_text())

    def put(self, split: str, folder: str, *suffixes: str) -> None:
        """Copy a split's images (.jpg), YOLO's labels (.txt) or VOC's (.xml) into a folder."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name in self.names(split):
            for suffix in suffixes:
                place = "Annotations" if suffix == ".xml" else "JPEGImages"
                path = (self.source / place / name).with_suffix(suffix)
                shutil.copy(path, self.root / folder)

    def write(self, path: str, content: str | dict) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (self.root / path).write_text(text)

    def labelme(self, split: str, folder: str, images: str = "") -> None:
        """Write a split's labels; ``images`` leads from their folder to that of the images."""
        content = self.coco(split)
        for image in content["images"]:
            shapes = []
            for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                x, y, w, h = a["bbox"]
                label = CLASSES.split()[a["category_id"] - 1]
                points = [[x + w, y], [x, y + h]]  # any two opposite corners
                shapes.append({"label": label, "points": points, "shape_type": "rectangle"})
            path = f"{folder}/{Path(image['file_name']).stem}.json"
            size = {"imageHeight": image["height"], "imageWidth": image["width"]}
            name = {"imagePath": images + image["file_name"], "imageData": None}
            self.write(path, {"version": "5.5.0", "shapes": shapes, **name, **size})

    def yolo(self, images: str, labels: str) -> None:
        for split in SPLITS:
            self.put(split, images.format(split), ".jpg")
            self.put(split, labels.format(split), ".txt")


def coco_of_cvat(to: Export) -> None:
    to.put("train", "images/default", ".jpg")
    for task in ("instances", "image_info", "person_keypoints"):
        to.write(f"annotations/{task}_default.json", to.coco("train"))


def coco_of_subsets(to: Export) -> None:
    for split, name in zip(SPLITS, ("Train", "Validation")):
        to.put(split, f"images/{name}", ".jpg")
        to.write(f"annotations/instances_{name}.json", to.coco(split))


def coco_of_label_studio(to: Export) -> None:
    content = to.coco("train")
    for image in content["images"]:
        image["file_name"] = f"images\\{image['file_name']}"  # on Windows
    to.put("train", "images", ".jpg")
    to.write("result.json", content)


def coco_of_fiftyone(to: Export) -> None:
    for split in SPLITS:
        to.put(split, f"{split}/data", ".jpg")
        to.write(f"{split}/labels.json", to.coco(split))


def coco_by_names(to: Export) -> None:
    for split in SPLITS:
        to.put(split, "images", ".jpg")
        to.write(f"my_{split}.json", to.coco(split))
    to.write("latest_test.json", to.coco("val"))
    to.write("licenses.json", {"licenses": []})


def yolo_of_cvat(to: Export) -> None:
    to.write("obj.names", CLASSES)
    for split, name in zip(SPLITS, ("train", "valid")):
        to.put(split, f"obj_{name}_data", ".jpg", ".txt")
        to.write(f"{name}.txt", "\n".join(f"data/obj_{name}_data/{n}" for n in to.names(split)))


def yolo_of_label_studio(to: Export) -> None:
    to.put("train", "images", ".jpg")
    to.put("train", "labels", ".txt")
    to.write("classes.txt", CLASSES)
    to.write("notes.json", {"categories": [], "info": {}})


def yolo_of_labelimg(to: Export) -> None:
    to.put("train", ".", ".jpg", ".txt")
    to.write("classes.txt", CLASSES)


def yolo_with_the_classes_among_the_labels(to: Export) -> None:
    to.yolo("images/{}", "labels/{}")
    to.write("labels/classes.txt", CLASSES)


def yolo_of_ultralytics(to: Export) -> None:
    to.yolo("images/{}", "labels/{}")
    paths = {"path": "../datasets/mine", "train": "images/train", "val": "images/val"}
    to.write("mine.yaml", "".join(f"{k}: {v}\n" for k, v in paths.items()) + "names: [cat, dog]\n")


def yolo_of_another_machine(to: Export) -> None:
    to.yolo("images/{}", "labels/{}")
    to.write("data.yaml", {"train": "/content/mine/images/train", "val": "C:\\mine\\images\\val",
                           "names": ["cat", "dog"]})  # fmt: skip


def yolo_of_lists_of_another_machine(to: Export) -> None:
    to.yolo("images/{}", "labels/{}")
    for split in SPLITS:
        lines = [f"/content/mine/images/{split}/{name}\n" for name in to.names(split)]
        to.write(f"{split}.txt", "".join(lines))
    to.write("data.yaml", {"train": "train.txt", "val": "val.txt", "names": ["cat", "dog"]})


def yolo_of_supervision(to: Export) -> None:
    to.put("train", "images", ".jpg")
    to.put("train", "labels", ".txt")
    to.write("data.yaml", {"nc": 2, "names": ["cat", "dog"]})


def voc_of_labelimg(to: Export) -> None:
    to.put("train", ".", ".jpg", ".xml")


def voc_of_roboflow(to: Export) -> None:
    for split, name in zip(SPLITS, ("train", "valid")):
        to.put(split, name, ".jpg", ".xml")


def voc_in_lower_case(to: Export) -> None:
    to.put("train", "annotations", ".xml")
    to.put("train", "images", ".jpg")


def voc_of_cvat(to: Export) -> None:
    for split, name in zip(SPLITS, ("Train", "Validation")):
        to.put(split, "JPEGImages", ".jpg")
        to.put(split, "Annotations", ".xml")
        stems = [Path(name).stem for name in to.names(split)]
        to.write(f"ImageSets/Main/{name}.txt", "\n".join(stems))


def labelme_beside_the_images(to: Export) -> None:
    to.put("train", ".", ".jpg")
    to.labelme("train", ".")


def labelme_of_windows(to: Export) -> None:
    to.put("train", "images", ".jpg")
    to.labelme("train", "labels", "..\\images\\")


def labelme_of_another_machine(to: Export) -> None:
    to.put("train", "images", ".jpg")
    to.labelme("train", "json", "C:\\Users\\me\\photos\\")


def labelme_in_subfolders(to: Export) -> None:
    to.put("train", "photos", ".jpg")
    to.labelme("train", "photos/first")
    for path in sorted((to.root / "photos" / "first").iterdir())[3:]:
        (to.root / "photos" / "more").mkdir(exist_ok=True)
        path.rename(to.root / "photos" / "more" / path.name)


def labelme_in_splits(to: Export) -> None:
    for split, name in zip(SPLITS, ("train", "val")):
        to.put(split, name, ".jpg")
        to.labelme(split, name)


ONE = (coco_of_cvat, coco_of_label_studio, yolo_of_label_studio, yolo_of_labelimg,
       yolo_of_supervision, voc_of_labelimg, voc_in_lower_case, labelme_beside_the_images,
       labelme_of_windows, labelme_of_another_machine, labelme_in_subfolders)  # fmt: skip
TWO = (coco_of_subsets, coco_of_fiftyone, coco_by_names, yolo_of_cvat, yolo_of_ultralytics,
       yolo_with_the_classes_among_the_labels, yolo_of_another_machine,
       yolo_of_lists_of_another_machine, voc_of_roboflow, voc_of_cvat,
       labelme_in_splits)  # fmt: skip


def boxes(split: str, path: str, path_val: str = "") -> dict[str, list]:
    """The classes and boxes of a split by the name of the image, which exists."""
    images = find_splits(path, path_val)[split]()
    assert images.classes == ("cat", "dog") and not images.faults
    assert all(Path(record["file_name"]).is_file() for record in images.records)
    return {
        Path(record["file_name"]).name: [
            (a["category_id"], a["bbox"]) for a in record["annotations"]
        ]
        for record in images.records
    }


@pytest.mark.parametrize("write", [*ONE, *TWO])
def test_an_export_is_found_by_its_folder(write: Callable[[Export], None], tmp_path: Path) -> None:
    """Wrong: it is refused, or gives other images, boxes or splits than the tool wrote."""
    write_sound(tmp_path / "sound")
    write(Export(tmp_path / "sound", tmp_path / "mine"))
    for own in [p for p in (tmp_path / "mine").rglob("*.*") if p.suffix in (".xml", ".json")]:
        own.with_name(f"._{own.name}").write_bytes(b"\0\5\x16\7")  # macOS's metadata of a file
    given, path = str(tmp_path / "sound" / "data.yaml"), str(tmp_path / "mine")
    splits = SPLITS if write in TWO else SPLITS[:1]
    assert set(find_splits(path)) == set(splits)
    for split in splits:
        assert boxes(split, path) == boxes(split, given)
    if write is coco_of_label_studio:
        assert boxes("train", f"{path}/result.json:{path}/images") == boxes("train", given)


@pytest.mark.parametrize("write, valid", [(voc_of_roboflow, "valid"), (labelme_in_splits, "val")])
def test_the_classes_are_those_of_the_training_folder(
    write: Callable[[Export], None], valid: str, tmp_path: Path
) -> None:
    """Wrong: a validation folder without a dog makes other classes of the same names."""
    write_sound(tmp_path / "sound")
    write(Export(tmp_path / "sound", tmp_path / "mine"))
    for path in (tmp_path / "mine" / valid).glob("*[ln]"):  # .xml, .json
        path.write_text(path.read_text().replace("cat", "dog"))
    train, val = str(tmp_path / "mine" / "train"), str(tmp_path / "mine" / valid)
    for found in (boxes("val", str(tmp_path / "mine")), boxes("val", train, val)):
        assert [category for own in found.values() for category, _ in own] == [1, 1] * len(found)


def test_what_the_formats_prescribe_takes_precedence(tmp_path: Path) -> None:
    """Wrong: a folder that was read before is ambiguous because of a file beside its labels."""
    write_sound(tmp_path / "sound")
    to = Export(tmp_path / "sound", tmp_path / "mine")
    voc_of_cvat(to)
    to.write("classes.txt", CLASSES)
    to.write("all.json", to.coco("train"))
    assert boxes("val", str(to.root)) == boxes("val", str(tmp_path / "sound" / "data.yaml"))


def test_labels_twice_or_in_another_format_are_named(tmp_path: Path) -> None:
    """Wrong: one of two exports is taken by chance, or a known format is only unknown."""
    write_sound(tmp_path / "sound")
    to = Export(tmp_path / "sound", tmp_path / "mine")
    voc_of_labelimg(to)
    yolo_of_labelimg(to)
    with raises_one_line(ValueError, match="holds YOLO and VOC"):
        find_splits(str(to.root))
    assert boxes("train", str(to.root / "classes.txt"))
    to = Export(tmp_path / "sound", tmp_path / "own")
    to.write("annotations.xml", "<annotations/>")
    to.write("images/1.jpg", "")
    with raises_one_line(ValueError, match="export as COCO"):
        find_splits(str(to.root))
    to.write("obj.names", CLASSES)
    with raises_one_line(ValueError, match="has no obj_train_data"):
        find_splits(str(to.root))
