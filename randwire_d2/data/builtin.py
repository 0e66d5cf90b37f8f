"""The built-in detection set: written on first use, checked, registered in Detectron2.

Importing this module registers ``randwire_shapes_train`` and ``randwire_shapes_val``. Like
Detectron2's own data sets they lie under ``$DETECTRON2_DATASETS`` (default ``datasets``), and like
there the variable is read once, on import.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import NativePathHandler, file_lock
from PIL import Image

from .shapes import CLASSES, Scene, ShapesConfig, draw_scene

VERSION = 1  # of the drawing: raise it whenever the same config gives other images than before
SPLITS = ("train", "val")
LOG_PERIOD = 3.0  # seconds
# At 128x128, a tenth of PNG's time to encode and half its time to decode. Full chroma, because
# colour alone separates many objects from what lies behind them.
JPEG_OPTIONS: dict[str, Any] = {"quality": 95, "subsampling": 0}

logger = logging.getLogger(__name__)
_checked: set[Path] = set()  # the sets whose content this process has verified


def draw_image(config: ShapesConfig, split: str, index: int) -> Scene:
    """Draw one image of a split; each depends on the config, its split and its index alone."""
    seed = (config.seed, SPLITS.index(split), index)
    return draw_scene(config, np.random.Generator(np.random.PCG64(seed)))


def dataset_folder(root: str | Path, config: ShapesConfig) -> Path:
    """Where the set lies under ``root``; the name tells version, seed and config."""
    return Path(root) / f"randwire_shapes_v{VERSION}_seed{config.seed}_{config.digest}"


def make_dataset(root: str | Path, config: ShapesConfig) -> Path:
    """Write the set under ``root`` unless it is there, check it, and return its folder.

    The folder appears whole, by a rename, or not at all; processes that start at once end with
    one set. What is in it: train/*.jpg, val/*.jpg, annotations/instances_{train,val}.json
    (COCO's format) and manifest.json. The check costs a fraction of a second, once per process.

    Raises:
        RuntimeError: the content is not what was written.
    """
    folder = dataset_folder(root, config)
    if folder in _checked:
        return folder
    if not folder.exists():
        logger.info(f"Making the built-in data set {folder}, or waiting for the process that does")
        with file_lock(str(folder)):  # the system frees it when its holder dies
            if not folder.exists():
                part = folder.with_name(folder.name + ".part")
                if part.exists():  # its writer was killed, or we would not have the lock
                    shutil.rmtree(part)
                _write(part, config)
                part.rename(folder)
    _check(folder)
    _checked.add(folder)
    return folder


def register_shapes(root: str, config: ShapesConfig, prefix: str = "randwire_shapes") -> None:
    """Register ``{prefix}_train`` and ``{prefix}_val``; nothing is drawn before it is needed.

    Does nothing where they are registered already, so that reloading this module is harmless.
    """
    if f"{prefix}_train" in DatasetCatalog:
        return
    folder = dataset_folder(root, config)
    metadata = {
        "thing_classes": list(CLASSES),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(CLASSES))},
    }
    for split in SPLITS:
        json_file = str(folder / "annotations" / f"instances_{split}.json")
        register_coco_instances(f"{prefix}_{split}", metadata, json_file, str(folder / split))
    PathManager.register_handler(_ShapesHandler(root, config))


class _ShapesHandler(NativePathHandler):
    """Makes the set when Detectron2 first asks for a file in its folder.

    Both readers of the annotations, load_coco_json and COCOEvaluator, ask PathManager for them;
    so whichever comes first finds them, and metadata.json_file is a plain path.
    """

    def __init__(self, root: str, config: ShapesConfig) -> None:
        super().__init__()
        self._root, self._config = root, config

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{dataset_folder(self._root, self._config)}{os.sep}"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        make_dataset(self._root, self._config)
        return super()._get_local_path(path, force=force, **kwargs)


# -------------------------------------------------------------------------------------------------
# Writing and checking
# -------------------------------------------------------------------------------------------------


def _write(folder: Path, config: ShapesConfig) -> None:
    sizes = {"train": config.num_train, "val": config.num_val}
    total, done = sum(sizes.values()), 0
    start = logged = time.monotonic()
    (folder / "annotations").mkdir(parents=True)
    for split, size in sizes.items():
        (folder / split).mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(size):
            scene = draw_image(config, split, index)
            image = _image_record(index, config)
            Image.fromarray(scene.image).save(folder / split / image["file_name"], **JPEG_OPTIONS)
            images.append(image)
            annotations += coco_annotations(scene, image["id"], first_id=len(annotations) + 1)
            done += 1
            if time.monotonic() - logged > LOG_PERIOD:
                logged = time.monotonic()
                left = (logged - start) / done * (total - done)
                logger.info(f"Drew {done} of {total} images, {left:.0f} seconds left")
        content = {
            "info": {"description": "randwire_d2 shapes", "version": str(VERSION)},
            "licenses": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
            "images": images,
            "annotations": annotations,
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    manifest = {"version": VERSION, "config": asdict(config), "sha256": _content_hash(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    logger.info(f"Drew {total} images in {time.monotonic() - start:.1f} seconds")


def _image_record(index: int, config: ShapesConfig) -> dict:
    size = config.image_size
    return {"id": index + 1, "file_name": f"{index:06d}.jpg", "height": size, "width": size}


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """A scene's objects in COCO's format, numbered from ``first_id`` on."""
    annotations = []
    for i, o in enumerate(scene.objects):
        # GEOS's versions differ in the order of vertices and in the sign of 0.
        pieces = shapely.get_parts(o.visible.normalize())
        rings = [shapely.get_coordinates(p.exterior)[:-1] + 0.0 for p in pieces]
        vertices = np.concatenate(rings)
        x0, y0 = vertices.min(axis=0).tolist()
        x1, y1 = vertices.max(axis=0).tolist()
        annotations.append(
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": o.category + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": o.visible.area,
                "segmentation": [ring.ravel().tolist() for ring in rings],
                "iscrowd": 0,
            }
        )
    return annotations


def _content_hash(folder: Path) -> str:
    """The sha256 of all names and contents but the manifest's."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name != "manifest.json":
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def _check(folder: Path) -> None:
    try:
        expected = json.loads((folder / "manifest.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        expected = None
    if _content_hash(folder) != expected:
        raise RuntimeError(
            f"The built-in data set in {folder} is not as it was written (files changed, missing "
            f"or added). Delete that folder; it will be drawn again."
        )


register_shapes(
    os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), config=ShapesConfig()
)
