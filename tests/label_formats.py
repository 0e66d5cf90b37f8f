"""The same labelled images in COCO's, YOLO's and Pascal VOC's formats, side by side in a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from randwire_d2.engine import Trainer

FORMATS = ("coco", "yolo", "voc")
Content = dict[str, Any]  # of a file in COCO's format
WIDTH, HEIGHT, TRAIN, VAL = 48, 32, 6, 2  # of ``write_sound``


def average_precision(
    cfg: CfgNode, folder: Path, noise: float = 0, crowds: bool = True
) -> dict[str, float]:
    """The AP, by task, of detections that are the validation set's labels, with or without crowds,
    moved by some pixels."""
    folder.mkdir(exist_ok=True)
    test, rng = cfg.DATASETS.TEST[0], np.random.default_rng(0)
    evaluator = Trainer.build_evaluator(cfg, test, str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(test):
        own = [a for a in record["annotations"] if crowds or not a["iscrowd"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in own]
        found = Instances((record["height"], record["width"]))
        moves = rng.normal(0, noise, (len(boxes), 1))
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4) + moves)
        found.scores = torch.tensor(rng.random(len(boxes)))
        found.pred_classes = torch.tensor([a["category_id"] for a in own])
        if cfg.MODEL.KEYPOINT_ON:
            points = torch.tensor([a["keypoints"] for a in own])
            found.pred_keypoints = points.view(len(own), -1, 3)
        evaluator.process([record], [{"instances": found}])
    return {task: result["AP"] for task, result in evaluator.evaluate().items()}


def write_formats(root: Path, splits: dict[str, tuple[Content, Path]]) -> dict[str, list[str]]:
    """Write the splits "train" and "val" in all formats, over the same image files.

    Args:
        splits: what a COCO file says, and the folder of its images. Polygons, of one ring each, go
            to COCO's and YOLO's files.

    Returns:
        From a format to the arguments of train_net.py that name the data.
    """
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = [c["name"] for c in splits["train"][0]["categories"]]
    for split, (content, images) in splits.items():
        (root / f"{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            shutil.copy(images / image["file_name"], root / "JPEGImages")
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        listed = [f"JPEGImages/{image['file_name']}" for image in content["images"]]
        (root / f"{split}.txt").write_text("\n".join(listed))
        _write_labels(root, content)
    lists = {split: f"{split}.txt" for split in splits}
    (root / "data.yaml").write_text(json.dumps({**lists, "names": names}))  # JSON is YAML
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:::\n" + "".join(f"{n}:::\n" for n in names)
    )
    return {
        "coco": ["--data", f"{root}/train.json:{root}/JPEGImages",
                 "--data-val", f"{root}/val.json:{root}/JPEGImages"],
        "yolo": ["--data", f"{root}/data.yaml"],
        "voc": ["--data", f"{root}/Annotations"],
    }  # fmt: skip


def _write_labels(root: Path, content: Content) -> None:
    index = {c["id"]: i for i, c in enumerate(content["categories"])}
    for image in content["images"]:
        size, stem = (image["width"], image["height"]), Path(image["file_name"]).stem
        lines, objects = [], []
        for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            category, (x, y, w, h) = index[a["category_id"]], a["bbox"]
            values = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
            if "segmentation" in a:
                values = [v / size[i % 2] for i, v in enumerate(a["segmentation"][0])]
            lines.append(" ".join(map(str, [category, *values])))
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
            name = content["categories"][category]["name"]
            objects.append(f"<object><name>{name}</name><bndbox>{box}</bndbox></object>")
        (root / "JPEGImages" / f"{stem}.txt").write_text("\n".join(lines) + "\n")
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
            f"{''.join(objects)}</annotation>"
        )


def simplified(content: Content, polygons: bool = False) -> Content:
    """What all formats can hold: boxes to a thousandth of a pixel, and no crowds.

    Args:
        polygons: keep the objects that have one polygon, and make their boxes its extent.
    """
    annotations = []
    for a in content["annotations"]:
        kept = {k: a[k] for k in ("id", "image_id", "category_id", "iscrowd", "area")}
        kept["bbox"] = [round(v, 3) for v in a["bbox"]]
        if polygons and (a["iscrowd"] or len(a["segmentation"]) != 1):
            continue
        if polygons:
            points = [round(v, 3) for v in a["segmentation"][0]]
            kept["segmentation"] = [points]
            left, top = min(points[::2]), min(points[1::2])
            width, height = max(points[::2]) - left, max(points[1::2]) - top
            kept["bbox"] = [left, top, round(width, 3), round(height, 3)]
        if not a["iscrowd"]:
            annotations.append(kept)
    return {**content, "annotations": annotations}


def write_sound(root: Path) -> dict[str, list[str]]:
    """Six images for training and two for validation, in every format, two boxes each."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, number in (("train", TRAIN), ("val", VAL)):
        folder = root.parent / split
        folder.mkdir()
        images, annotations = [], []
        for i in range(1, number + 1):
            name = f"{split}{i}.jpg"
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            images.append({"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for category, x in ((1, 4.0), (2, 20.0)):
                ids = {"id": len(annotations) + 1, "image_id": i, "category_id": category}
                annotations.append({**ids, "bbox": [x, 6.0, 12.0, 10.0], "iscrowd": 0})
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        splits[split] = content, folder
    return write_formats(root, splits)
