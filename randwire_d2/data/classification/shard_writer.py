"""A classifier's data set, such as a folder of images, as tar shards of webdataset's layout."""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ...files import atomic_folder
from .image_folder import check_image_folders, register_folders
from .shards import CLASSES_FILE, image_type


def make_shards(dataset: str, folder: str | os.PathLike[str], images: int = 10_000) -> list[Path]:
    """Write a classifier's data set as ``shard-000000.tar``, … and ``classes.txt`` into a folder.

    The samples are the files' own bytes, in the data set's order. So a training on the shards gets
    exactly the same images as one on the data set.

    Args:
        dataset: a folder with one folder of images per class, or the name of a data set.
        folder: a new folder; it gets its name when it is complete.
        images: the number of images in each shard; the last one may have fewer.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: the data set can't be read, the folder exists, or webdataset is not installed;
            one line.
    """
    try:
        from webdataset import ShardWriter
    except ImportError as e:
        raise ValueError("shards are written by webdataset: pip install webdataset") from e
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{str(folder)!r} exists; name a new folder")
    if images < 1:
        raise ValueError(f"a shard has at least 1 image; got {images}")
    register_folders([dataset])
    classes = check_image_folders([dataset], [])
    if odd := [name for name in classes if name != name.strip() or "\n" in name]:
        raise ValueError(f"{dataset!r}: {odd[0]!r} can't be a line of {CLASSES_FILE}; rename it")
    with atomic_folder(folder) as part:
        pattern = str(part / "shard-").replace("%", "%%") + "%06d.tar"
        # With a fixed time, equal images make equal shards.
        with ShardWriter(pattern, images, float("inf"), verbose=0, encoder=False, mtime=0) as out:
            records = DatasetCatalog.get(dataset)
            for i, record in enumerate(tqdm(records, unit="image", leave=False)):
                with PathManager.open(record["file_name"], "rb") as f:
                    image = {image_type(record["file_name"]): f.read()}
                    label = str(record["label"]).encode()
                    out.write({"__key__": f"{i:08}", **image, "cls": label})
        (part / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes), "utf-8")
    return sorted(folder.glob("*.tar"))
