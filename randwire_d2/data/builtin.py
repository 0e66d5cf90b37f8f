"""The built-in data sets: written on first use, checked, registered in Detectron2.

Importing this module registers ``randwire_shapes_train`` and ``randwire_shapes_val`` for detection
and ``randwire_shapes_cls_train`` and ``randwire_shapes_cls_val`` for classification. As with
Detectron2's own data sets, they are under ``$DETECTRON2_DATASETS`` (default ``datasets``), and the
variable is read once, on import.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import shapely
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import NativePathHandler, PathHandler, file_lock
from PIL import Image
from tqdm import tqdm

from ..files import atomic_folder
from ..text import parse_json
from .classification.image_folder import DATASETS_ROOT, register_image_folder
from .shapes import CLASSES, ClassificationShapesConfig, Scene, ShapesConfig, draw_scene

VERSION = 2  # raise it whenever the same config gives different images than before
SPLITS = ("train", "val")
# At these sizes JPEG takes a tenth of PNG's time to encode and half its time to decode. The chroma
# is not subsampled, because many objects differ from their background only in colour.
JPEG_OPTIONS: dict[str, Any] = {"quality": 95, "subsampling": 0}

logger = logging.getLogger(__name__)
_checked: set[Path] = set()  # the sets whose content this process has verified


def draw_image(config: ShapesConfig, split: str, index: int) -> Scene:
    """Draw one image of a split; it depends only on the config, the split and the index."""
    seed = (config.seed, SPLITS.index(split), index)
    rng = np.random.Generator(np.random.PCG64(seed))
    return draw_scene(config, rng, config.categories(index))


def dataset_folder(root: str | Path, config: ShapesConfig) -> Path:
    """The folder of a set under ``root``; its name depends on version, seed and config."""
    return Path(root) / f"{config.name}_v{VERSION}_seed{config.seed}_{config.digest}"


def make_dataset(root: str | Path, config: ShapesConfig) -> Path:
    """Write the set under ``root`` unless it exists, check it, and return its folder.

    The complete folder is renamed to its name at the end; processes that start at the same time
    share one set. For detection it has train/*.jpg, val/*.jpg,
    annotations/instances_{train,val}.json (COCO's format) and manifest.json; for classification,
    train/<class>/*.jpg, val/<class>/*.jpg (torchvision's ImageFolder) and manifest.json. The check
    takes a fraction of a second, once per process.

    Raises:
        ValueError: the content has changed since it was written.
    """
    folder = dataset_folder(root, config)
    if folder in _checked:
        return folder
    if not folder.exists():
        logger.info(f"Drawing the built-in data set {folder}, or waiting for the process that does")
        with file_lock(str(folder)):  # the system frees it when its holder dies
            if not folder.exists():
                with atomic_folder(folder) as part:
                    _write(part, config)
    _check(folder)
    _checked.add(folder)
    return folder


def register_shapes(root: str, config: ShapesConfig, prefix: str = "") -> None:
    """Register ``{prefix}_train`` and ``{prefix}_val``; the images are drawn when they are needed.

    The default prefix is the config's name. If the sets are already registered, nothing is done, so
    that reloading this module is harmless.
    """
    prefix = prefix or config.name
    if f"{prefix}_train" in DatasetCatalog:
        return
    folder = dataset_folder(root, config)
    for split in SPLITS:
        image_root = str(folder / split)
        if isinstance(config, ClassificationShapesConfig):
            register_image_folder(f"{prefix}_{split}", image_root)
        else:
            json_file = str(folder / "annotations" / f"instances_{split}.json")
            metadata = {
                "thing_classes": list(CLASSES),
                "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(CLASSES))},
            }
            register_coco_instances(f"{prefix}_{split}", metadata, json_file, image_root)
    PathManager.register_handler(_ShapesHandler(root, config))


class _ShapesHandler(PathHandler):
    """Makes the set when PathManager is first asked for a file in its folder.

    All readers ask PathManager for their files: load_coco_json and COCOEvaluator for the
    annotations, classification/image_folder.py for its folders. So the first reader makes the set,
    and the metadata's json_file and image_root are plain paths.

    It has a NativePathHandler but does not derive from it, because PathManager would use such a
    handler for every local path, not only for those in this folder.
    """

    def __init__(self, root: str, config: ShapesConfig) -> None:
        super().__init__()
        self._root, self._config = root, config
        self._native = NativePathHandler()

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{dataset_folder(self._root, self._config)}{os.sep}"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        make_dataset(self._root, self._config)
        return self._native._get_local_path(path, force=force, **kwargs)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return self._native._open(path, mode, buffering, **kwargs)


# -------------------------------------------------------------------------------------------------
# Writing and checking
# -------------------------------------------------------------------------------------------------


def _write(folder: Path, config: ShapesConfig) -> None:
    if isinstance(config, ClassificationShapesConfig):
        _write_image_folders(folder, config)
    else:
        _write_coco(folder, config)
    manifest = {"version": VERSION, "config": asdict(config), "sha256": _content_hash(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _draw_all(config: ShapesConfig) -> Iterator[tuple[str, int, Scene]]:
    """Draw all images; yield the split, index and scene of each. Progress goes to stderr."""
    sizes = {"train": config.num_train, "val": config.num_val}
    images = [(split, index) for split in SPLITS for index in range(sizes[split])]
    for split, index in tqdm(images, "Drawing", unit="image", mininterval=3):
        yield split, index, draw_image(config, split, index)


def _write_image_folders(folder: Path, config: ShapesConfig) -> None:
    for split in SPLITS:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
    for split, index, scene in _draw_all(config):
        name = CLASSES[scene.objects[0].category]
        _save(scene, folder / split / name / _file_name(index))


def _write_coco(folder: Path, config: ShapesConfig) -> None:
    images: dict[str, list[dict]] = {split: [] for split in SPLITS}
    annotations: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for name in (*SPLITS, "annotations"):
        (folder / name).mkdir()
    size = config.image_size
    for split, index, scene in _draw_all(config):
        name, image_id = _file_name(index), index + 1
        _save(scene, folder / split / name)
        images[split].append({"id": image_id, "file_name": name, "height": size, "width": size})
        first_id = len(annotations[split]) + 1
        annotations[split] += coco_annotations(scene, image_id, first_id)
    for split in SPLITS:
        content = {
            "info": {"description": "randwire_d2 shapes", "version": str(VERSION)},
            "licenses": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
            "images": images[split],
            "annotations": annotations[split],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _save(scene: Scene, path: Path) -> None:
    Image.fromarray(scene.image).save(path, **JPEG_OPTIONS)


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """The annotations of a scene's objects in COCO's format; their ids begin with ``first_id``."""
    annotations = []
    for i, o in enumerate(scene.objects):
        # Versions of GEOS differ in the order of vertices and in the sign of 0.
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
    """The sha256 of the names and contents of all files except the manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name != "manifest.json":
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def _check(folder: Path) -> None:
    try:
        expected = parse_json((folder / "manifest.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        expected = None
    if _content_hash(folder) != expected:
        raise ValueError(
            f"The built-in data set in {folder} is not as it was written (files changed, missing "
            f"or added). Delete that folder; it will be drawn again."
        )


for _config in (ShapesConfig(), ClassificationShapesConfig()):
    register_shapes(DATASETS_ROOT, _config)
