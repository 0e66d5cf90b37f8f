"""Images of stick figures with their keypoints, as COCO's files, Roboflow's and YOLO's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

Content = dict[str, Any]  # of a file in COCO's format
NAMES = ["head", "left_hand", "right_hand", "left_foot", "right_foot"]
SKELETON = [[1, 2], [1, 3], [1, 4], [1, 5]]
FLIP_IDX = [0, 2, 1, 4, 3]
SIDE = 96  # pixels of an image


def draw_figures(folder: Path, number: int, seed: int) -> Content:
    """Draw images of one or two figures each: the left hand and foot are red, the right ones blue.

    The first figure's right foot is hidden (1), every fourth one's left hand is not labelled (0).
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], list[dict[str, Any]]()
    for i in range(1, number + 1):
        image = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(90, 160, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for place in range(1 + i % 2):
            size = int(rng.integers(32, 44))
            left, top = int(rng.integers(2, 46 - size + 2)) + 48 * place, int(rng.integers(4, 48))
            x, y = (left + size * np.array([0.5, 0.95, 0.05, 0.75, 0.25]),
                    top + size * np.array([0.1, 0.45, 0.45, 0.95, 0.95]))  # fmt: skip
            moved = rng.integers(-3, 4, (2, 5))
            points = np.stack([x, y], 1).astype(int) + moved.T
            middle = tuple(points[0] + (0, size // 2))
            for (a, b), color in zip(points.tolist(), ["white", "red", "blue", "red", "blue"]):
                draw.line([middle, (a, b)], fill="black", width=2)
                draw.ellipse([a - 4, b - 4, a + 4, b + 4], fill=color)
            visible = [2, 2, 2, 2, 1 if not annotations else 2]
            if len(annotations) % 4 == 3:
                visible[1], points[1] = 0, 0
            low, high = points[np.array(visible) > 0].min(0) - 5, points.max(0) + 5
            box = [*low.tolist(), *(high - low).tolist()]
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                "bbox": box, "area": box[2] * box[3], "num_keypoints": sum(v > 0 for v in visible),
                "keypoints": [n for point, v in zip(points.tolist(), visible) for n in (*point, v)],
            })  # fmt: skip
        image.save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
    category = {"id": 1, "name": "figure", "keypoints": NAMES, "skeleton": SKELETON}
    return {"images": images, "annotations": annotations, "categories": [category]}


def write_coco(root: Path, train: int = 8, val: int = 4) -> Path:
    """In COCO's layout."""
    (root / "annotations").mkdir(parents=True)
    for seed, (split, number) in enumerate((("train", train), ("val", val))):
        content = draw_figures(root / split, number, seed)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def contents(root: Path) -> dict[str, Content]:
    return {
        split: json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train", "val")
    }


def write_roboflow(root: Path, coco: Path) -> Path:
    """The same images: ids from 0 on, and a category above the others that nothing has."""
    for split, content in contents(coco).items():
        folder = root / ("valid" if split == "val" else split)
        folder.mkdir(parents=True)
        for image in content["images"]:
            (folder / image["file_name"]).symlink_to(coco / split / image["file_name"])
        for annotation in content["annotations"]:
            annotation["id"] -= 1
        root_category = {"id": 0, "name": "figures", "supercategory": "none"}
        content["categories"][0]["supercategory"] = "figures"
        content["categories"].insert(0, root_category)
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def write_yolo(root: Path, coco: Path, **others: Any) -> Path:
    """The same images, and what else data.yaml is to say."""
    for split, content in contents(coco).items():
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for image in content["images"]:
            name, lines = image["file_name"], []
            (root / "images" / split / name).symlink_to(coco / split / name)
            for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                x, y, w, h = a["bbox"]
                values = [(x + w / 2) / SIDE, (y + h / 2) / SIDE, w / SIDE, h / SIDE]
                values += [v if i % 3 == 2 else v / SIDE for i, v in enumerate(a["keypoints"])]
                lines.append(" ".join(map(str, [0, *values])))
            label = root / "labels" / split / f"{Path(name).stem}.txt"
            label.write_text("\n".join(lines))
    about = {"train": "images/train", "val": "images/val", "names": ["figure"],
             "kpt_shape": [5, 3], "flip_idx": FLIP_IDX, **others}  # fmt: skip
    (root / "data.yaml").write_text(yaml.safe_dump(about))
    return root
