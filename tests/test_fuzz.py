"""Every parser of strangers' files, against thousands of damaged and hostile ones (``fuzzing``).

``pytest -s -m slow tests/test_fuzz.py`` prints how many cases each parser had.
"""

import base64
import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from fuzzing import CANARY, VALUES, Parser, Tried, changed, damaged, try_cases
from helpers import ROOT
from hypothesis import strategies as st
from PIL import Image
from tabulate import tabulate
from test_malformed_data import write_sound

from randwire_d2 import NetworkGenerator, RandWire
from randwire_d2.checkpoint import (
    Classes,
    RandWireCheckpointer,
    entries_of,
    load_checkpoint,
    stored_config,
)
from randwire_d2.cli.measure_gpu import read_parts
from randwire_d2.config import (
    classifier_config,
    detector_config,
    merge_config,
    merge_file,
    merge_text,
    spec_from_config,
)
from randwire_d2.conversion import Target, graphs, read_checkpoint, read_image, read_source
from randwire_d2.data.classification.shards import read_shards
from randwire_d2.data.detection.inspection import clean
from randwire_d2.data.formats.layouts import find_splits
from randwire_d2.data.images.probing import probe
from randwire_d2.data.images.reading import read_rgb
from randwire_d2.error_analysis.report import write_analysis
from randwire_d2.error_analysis.source import Source
from randwire_d2.experiments.sweep import load_sweep
from randwire_d2.export import format_of
from randwire_d2.inference.deployment.export import export_model
from randwire_d2.inference.inputs import Video
from randwire_d2.inference.models.loading import load_model
from randwire_d2.inference.prediction.output import finished_inputs
from randwire_d2.pretrained import is_pretrained, read_folder
from randwire_d2.runs import RunFolder
from randwire_d2.weight_files.safetensors_file import safetensors_bytes

FAST, THOROUGH = 8, 300  # cases of each parser
SPEC = NetworkGenerator("small", 2, 3, "WS", {"k": 2, "p": 0.75})(1)
HOSTILE_YAML = [
    f"!!python/object/apply:os.mkdir [{CANARY}]".encode(),
    f"!!python/object/apply:eval ['__import__(\"os\").mkdir(\"{CANARY}\")']".encode(),
    b"!!python/name:os.system", b"&a [*a]", b"[" * 300, b"{a: " * 100, b"!!int ''", b"!!bool x",
    b"!!timestamp x", b"!!binary x", b"\n<<: [*a, *a]\n", b"- - - -", b"9" * 5000, b"\xff\xfe",
    b"_BASE_: config.yaml\n", b"? [a]\n: b\n", b"\n---\n", b"0x", b".inf",
]  # fmt: skip
HOSTILE_JSON = [
    b"[" * 300,
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\xff",
    b"\\ud800",
    b'"',
    b"-1",
    b"null",
]


class Code:
    """What an attacker's pickle does."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


CODE = [Code(os.mkdir, CANARY), Code(eval, f"__import__('os').mkdir({CANARY!r})")]

# -------------------------------------------------------------------------------------------------
# Text: specs, configs, sweeps, graphs, runs
# -------------------------------------------------------------------------------------------------


def json_cases(value: Any) -> st.SearchStrategy[bytes]:
    as_json = changed(value).map(lambda v: json.dumps(v).encode())
    return as_json | damaged([json.dumps(value).encode()], HOSTILE_JSON)


def yaml_cases(value: Any) -> st.SearchStrategy[bytes]:
    as_yaml = changed(value).map(lambda v: yaml.safe_dump(v).encode())
    text = yaml.safe_dump(value).encode()
    return as_yaml | damaged([text], HOSTILE_YAML)


def read_spec_file(folder: Path) -> None:
    cfg = detector_config()
    cfg.MODEL.RANDWIRE.SPEC_FILE = str(folder / "spec.json")
    spec_from_config(cfg)


def read_config_file(folder: Path) -> None:
    cfg = detector_config()
    merge_file(cfg, "config.yaml")
    spec_from_config(cfg)


def read_options(folder: Path) -> None:
    values = (folder / "values").read_bytes().decode(errors="replace").split("\n")
    keys = ["MODEL.RANDWIRE.NUM_NODES", "MODEL.RANDWIRE.WS.K", "SEED", "MODEL.PIXEL_MEAN"]
    cfg = detector_config()
    merge_config(cfg, "", [text for pair in zip(keys, values) for text in pair])
    spec_from_config(cfg)


def flat(config: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "configs" / config).read_text())
    value.pop("_BASE_")
    return json.loads(json.dumps(value))


SWEEP = {
    "config": "classifier.yaml", "generators": ["ER(0.2)", "BA(2)", "WS(4, 0.75)", "NAS(5)"],
    "seeds": [1, 2], "node_ops": ["sep_conv3x3", "conv3x3"], "channels": 8,
    "options": {"MODEL.RANDWIRE.NUM_NODES": 8},
}  # fmt: skip
GRAPH = {"_adj": {0: {1: {}, 2: {}}, 1: {0: {}, 2: {}}, 2: {0: {}, 1: {}}}, "graph": {}}
TRAINING = {"NET": {"net_type": "small", "channels": 8, "nodes": 5}, "G": {"graph_model": "WS",
            "seed": 1, "K": 4, "P": 0.75}}  # fmt: skip
RESULTS = {"weights": "model.pth", "training": "/a", "results": {"bbox": {"AP": 41.2}}}
METRICS = {"iteration": 19, "total_loss": 1.5, "bbox/AP": 20.0}
WIRING = {"spec": SPEC.to_json(), "fingerprint": SPEC.fingerprint}
WEIGHTS = safetensors_bytes({"weight": torch.zeros(2)}, {"randwire": WIRING})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
PUBLISHED = {"randwire_d2_format": 1, "kind": "RandWire", "sha256": SHA256, "options": {},
             "entries": {"randwire": WIRING}}  # fmt: skip


def draw_training(folder: Path) -> None:
    values = graphs.read_training_config(folder / "training.yaml")
    params = {key: value for key, value in values.items() if key in ("K", "P", "M")}
    graphs.draw(values["graph_model"], values["nodes"], values["seed"], params)


def put_classifier_config(folder: Path) -> None:
    shutil.copytree(ROOT / "configs" / "imagenet", folder, dirs_exist_ok=True)
    (folder / "randwire_c78_100ep.yaml").rename(folder / "classifier.yaml")


TEXTS = {
    "spec JSON": Parser("spec.json", json_cases(json.loads(SPEC.to_json())), (read_spec_file,)),
    "config YAML": Parser(
        "config.yaml", yaml_cases(flat("faster_rcnn_randwire_shapes.yaml")), (read_config_file,)
    ),
    "KEY VALUE": Parser(
        "values",
        damaged([b"32\n4\n1\n(0.75,)\n"], [*HOSTILE_JSON, b"(" * 300, b"f'{1}'", b"1 if 1 else 2"]),
        (read_options,),
    ),
    "sweep YAML": Parser(
        "sweep.yaml",
        yaml_cases(SWEEP),
        (lambda folder: load_sweep(folder / "sweep.yaml", folder / "output"),),
        put_classifier_config,
    ),
    "graph, text": Parser(
        "graph.txt",
        damaged([b"4\n4\n0 1\n0 2\n1 3\n2 3\n"], [b"9" * 5000, b"1000000000", b"-1"]),
        (lambda folder: graphs.read_text(folder / "graph.txt"),),
    ),
    "graph, YAML": Parser(
        "graph.yaml",
        damaged([yaml.safe_dump(GRAPH).encode()], HOSTILE_YAML)
        | changed(GRAPH["_adj"]).map(lambda v: yaml.safe_dump({"_adj": v}).encode()),
        (lambda folder: graphs.read_yaml(folder / "graph.yaml"),),
    ),
    "graphs' training config": Parser("training.yaml", yaml_cases(TRAINING), (draw_training,)),
    "results.json": Parser(
        "results.json", json_cases(RESULTS), (lambda folder: RunFolder(folder).evaluation(),)
    ),
    "metrics.json": Parser(
        "metrics.json",
        json_cases(METRICS),
        (lambda f: RunFolder(f).metrics(), lambda f: RunFolder(f).evaluations("bbox/AP")),
    ),
    "published config.json": Parser(
        "config.json",
        json_cases(PUBLISHED),
        (read_folder,),
        lambda folder: (folder / "model.safetensors").write_bytes(WEIGHTS),
    ),
}

BRACKETS: dict[str, Callable[[Path], object]] = {
    "spec.json": read_spec_file,
    "config.json": is_pretrained,
    "metrics.json": lambda folder: RunFolder(folder).progress().last,
    "results.json": lambda folder: RunFolder(folder).evaluation(),
    "stages.json": lambda folder: RunFolder(folder).slower_stages(),
    "images.json": finished_inputs,
    "gpu.json": lambda folder: read_parts(folder, {}),
    "analysis.json": lambda folder: write_analysis(Source("", folder / "results.json", folder)),
}


@pytest.mark.parametrize("file", BRACKETS)
def test_brackets_without_end(file: str, tmp_path: Path) -> None:
    """Wrong: JSON that is nested deeper than Python calls itself is a bug of ours, it says."""
    for name in (file, "results.json"):
        (tmp_path / name).write_text("[" * 10**5)
    with suppress(ValueError, OSError):
        assert not BRACKETS[file](tmp_path)


# -------------------------------------------------------------------------------------------------
# Checkpoints
# -------------------------------------------------------------------------------------------------


@cache
def backbone() -> RandWire:
    return RandWire(SPEC)


def whole_checkpoint() -> dict[str, Any]:
    cfg = detector_config()
    merge_file(cfg, str(ROOT / "configs" / "faster_rcnn_randwire_shapes.yaml"))
    classes = Classes(["cat", "dog"], [1, 7], {"names": ["sky"], "ids": [9]})
    entries = entries_of(backbone(), cfg, classes)
    entries["config"] = "MODEL: {RANDWIRE: {CHANNELS: 2}}\nVERSION: 2\n"
    images = {"input_format": "RGB", "pixel_mean": [1.0, 2.0, 3.0], "pixel_std": [4.0, 5.0, 6.0]}
    state = {name: value.clone() for name, value in backbone().state_dict().items()}
    return {"model": state, **entries, "preprocessing": images, "iteration": 3}


EXPANDED = torch.zeros(1).expand(10**12)
HOSTILE_TENSORS = [
    EXPANDED,
    torch.empty(10**6, 10**6, device="meta"),
    torch.zeros(2, 2).to_sparse(),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(0),
    torch.zeros(2, dtype=torch.bool),
]


@cache
def saved(suffix: str) -> bytes:
    return save(whole_checkpoint(), suffix, 2)


def save(content: Any, suffix: str, protocol: int) -> bytes:
    """A checkpoint's bytes; of what its format does not take, those of a pickle."""
    buffer = io.BytesIO()
    try:
        if suffix == ".safetensors":
            entries = {k: v for k, v in content.items() if k != "model"}
            return safetensors_bytes(content["model"], entries)
        if suffix == ".pkl":
            arrays = {k: np.asarray(v) for k, v in content["model"].items()}
            author = {"__author__": "test"} if protocol else {}
            return pickle.dumps({**content, "model": arrays, **author}, protocol)
        if suffix == ".pyth":
            content = {"model_state": content["model"], "epoch": 1}
        zipped = suffix != ".old.pth"
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    except Exception:
        return pickle.dumps(content if not isinstance(content, torch.Tensor) else 0, protocol)
    return buffer.getvalue()


def checkpoint_cases(suffix: str) -> st.SearchStrategy[bytes]:
    hostile = VALUES | st.sampled_from(CODE)
    if suffix in (".pth", ".old.pth", ".pyth"):
        hostile |= st.sampled_from(HOSTILE_TENSORS)
    # Not at once: a process that collects tests should not build a network.
    structured = st.deferred(
        lambda: st.builds(
            save, changed(whole_checkpoint(), hostile), st.just(suffix), st.integers(0, 5)
        )
    )
    return structured | st.deferred(lambda: damaged([saved(suffix)], PICKLES))


PICKLES = [
    b"r\xff\xff\xff\x7f", b"\x95" + b"\xff" * 7 + b"\x3f", b"\x8e" + b"\xff" * 6 + b"\0\0",
    b"cposix\nmkdir\n", b"c__builtin__\neval\n", b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x7f\x85R",
    b"2" * 50 + b"\x87", b"(" * 300, b"b", b"R", b"\x81", b".",
]  # fmt: skip


def read_entries(name: str, folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder / name))
    for stored in (stored_config, Classes.of):
        stored(checkpoint)


def load_into_model(name: str, folder: Path) -> None:
    RandWireCheckpointer(copy.deepcopy(backbone())).load(str(folder / name))


def convert(name: str, folder: Path) -> None:
    target = Target(None, [], "bare")
    read_source(read_checkpoint(folder / name), target=target)


READS = (read_entries, load_into_model, convert)
CHECKPOINTS = {
    f"checkpoint, {label or suffix}": Parser(
        f"model{suffix}",
        checkpoint_cases(suffix),
        tuple(partial(read, f"model{suffix}") for read in READS[: 1 if suffix == ".pyth" else 3]),
    )
    for suffix, label in ((".pth", ""), (".old.pth", ".pth before 1.6"), (".pkl", ""),
                          (".pyth", ""), (".safetensors", ""))
}  # fmt: skip

CLASSIFIER = {
    "MODEL": {
        "META_ARCHITECTURE": "ImageClassifier", "BACKBONE": {"NAME": "build_randwire_backbone"},
        "RANDWIRE": {"REGIME": "small", "CHANNELS": 2, "NUM_NODES": 3, "WS": {"K": 2, "P": 0.75},
                     "NORM": "BN", "FUSED": "off", "OUT_FEATURES": ["res5"], "INIT": "fan_in"},
        "CLASSIFIER": {"NUM_CLASSES": 2, "DROPOUT": 0.0, "HEAD_RELU": False},
    },
    "INPUT": {"FORMAT": "RGB", "TEST_CROP_SIZE": 32, "TEST_CROP_RATIO": 0.875},
    "VERSION": 2,
}  # fmt: skip


@cache
def classifier_weights() -> dict[str, torch.Tensor]:
    cfg = classifier_config()
    merge_text(cfg, yaml.safe_dump(CLASSIFIER), "CLASSIFIER")
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg).state_dict()


def save_model(config: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": classifier_weights(), "config": yaml.safe_dump(config)}, buffer)
    return buffer.getvalue()


MODELS = {
    "a model's config": Parser(
        "model.pth",
        changed(CLASSIFIER).map(save_model),
        (lambda folder: load_model(folder / "model.pth", "cpu"),),
    ),
}

# -------------------------------------------------------------------------------------------------
# Exported files
# -------------------------------------------------------------------------------------------------


@cache
def exported(suffix: str) -> tuple[bytes, dict[str, str]]:
    """A classifier's file, and its metadata."""
    folder = Path(os.environ["DETECTRON2_DATASETS"])
    (folder / "fuzz.pth").write_bytes(save_model(CLASSIFIER))
    file = folder / f"fuzz{suffix}"
    export_model(folder / "fuzz.pth", file)
    written_as = format_of(str(file))
    assert written_as is not None
    return file.read_bytes(), written_as.read(str(file))[1]


def with_metadata(suffix: str, metadata: Any) -> bytes:
    """The file with other metadata."""
    content, _ = exported(suffix)
    items = metadata.items() if isinstance(metadata, dict) else ()
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in items}
    if suffix == ".onnx":
        model = onnx.load_model_from_string(content)
        onnx.helper.set_model_props(model, {k: v.replace("\ud800", "") for k, v in texts.items()})
        written: bytes = model.SerializeToString()
        return written
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            key = name.rsplit("/", 1)[-1]
            if "/extra/" not in name or key in texts:
                new.writestr(name, texts[key] if "/extra/" in name else old.read(name))
    return buffer.getvalue()


@cache
def other_files(suffix: str) -> list[bytes]:
    """Of another kind, under the name of an exported one."""
    kinds = [exported(other)[0] for other in EXPORTS if other != suffix]
    return [*kinds, b"", b"PK", b"text\n", png(8, 8), shard([("a.jpg", b"1")]), archive(),
            saved(".pth"), saved(".pkl"), saved(".safetensors"), zipped(b"1"),
            pickle.dumps(CODE[0]), zipped(pickle.dumps(CODE[0]))]  # fmt: skip


def zipped(content: bytes) -> bytes:
    """An archive of the parts' names of torch's, with other content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/x.py", "version", "models/model.json",
                     "archive_format", "data/constants/x.pt", "data/weights/model.pt"):  # fmt: skip
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return buffer.getvalue()


def export_cases(suffix: str) -> st.SearchStrategy[bytes]:
    return st.deferred(
        lambda: (
            damaged([exported(suffix)[0]])
            | changed(exported(suffix)[1]).map(partial(with_metadata, suffix))
            | st.sampled_from(other_files(suffix))
        )
    )


def run_exported(name: str, folder: Path) -> None:
    model = load_model(folder / name, "cpu")
    model.predict([model.prepare(np.zeros((40, 48, 3), np.uint8))])


EXPORTS = (".onnx", ".ts", ".pt2")
EXPORTED = {
    f"exported {suffix}": Parser(
        f"model{suffix}", export_cases(suffix), (partial(run_exported, f"model{suffix}"),)
    )
    for suffix in EXPORTS
}

# -------------------------------------------------------------------------------------------------
# Labels
# -------------------------------------------------------------------------------------------------


def put_labels(folder: Path) -> None:
    if not (folder / "data").exists():
        write_sound(folder / "data")
        (folder / "data" / "labelme").mkdir()


def read_splits(path: str, folder: Path) -> None:
    for reader in find_splits(str(folder / path)).values():
        clean(reader())


COCO = {
    "images": [{"id": i, "file_name": f"train{i}.jpg", "height": 32, "width": 48} for i in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 9], "iscrowd": 0, "area": 90,
         "segmentation": [[1, 2, 9, 2, 9, 9]]},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [1, 2, 10, 9], "iscrowd": 1,
         "segmentation": {"size": [32, 48], "counts": [5, 1530, 1]}},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "pet"}],
}  # fmt: skip
DATA_YAML = {"names": {0: "cat", 1: "dog"}, "nc": 2, "train": "train.txt", "path": "."}
LABELS = b"0 0.5 0.5 0.1 0.1\n1 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4\n"
VOC = (
    b"<annotation><size><width>48</width><height>32</height></size><object><name>cat</name><bndbox>"
    b"<xmin>5</xmin><ymin>7</ymin><xmax>16</xmax><ymax>16</ymax></bndbox></object></annotation>"
)
PNG = base64.b64encode(cv2.imencode(".png", np.full((2, 3), 255, np.uint8))[1]).decode()
LABELME = {
    "shapes": [
        {"label": "cat", "points": [[1, 2], [9.5, 8]], "shape_type": "rectangle", "group_id": None},
        {"label": "dog", "points": [[1, 2], [3, 3]], "shape_type": "mask", "mask": PNG},
        {"label": "dog", "points": [[9, 9], [12, 9], [9, 14]], "group_id": 1, "flags": {}},
        {"label": "dog", "points": [[19, 9], [22, 9]], "shape_type": "circle", "group_id": 1},
    ],
    "imagePath": "../JPEGImages/train1.jpg", "imageHeight": 32, "imageWidth": 48,
}  # fmt: skip
ENTITIES = [
    b'<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>',
    b'<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]>',
    b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">',
    b"&c;", b"&f;", b"<a>" * 3000, b"<?xml version='1.0' encoding='utf-7'?>", b"nan", b"1e999",
    b"<?xml version='1.0' encoding='none'?>", b"<!--", b"\xff\xfe", b"9" * 5000,
]  # fmt: skip
NUMBERS = [b"nan", b"inf", b"1e999", b"-1", b"9" * 5000, b"\0", b"0.5 " * 2000, b"\xff"]


def shard(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def shard_cases() -> st.SearchStrategy[bytes]:
    names = st.sampled_from(["a.cls", "a.jpg", "a.png", "b.cls", "b.jpg", "x/y.jpg", "x/y.cls"])
    content = st.sampled_from([b"1", b"12", *NUMBERS, b"9" * 9, b"\n", b"a", b""])
    member = st.tuples(names | st.text(max_size=150), content | st.binary(max_size=40))
    valid = shard(
        [("a.jpg", b"\xff\xd8\xff"), ("a.cls", b"1"), ("b.cls", b"0"), ("b.png", b"\x89")]
    )
    return st.lists(member, max_size=6).map(shard) | damaged([valid])


def read_shard(folder: Path) -> None:
    os.environ["FVCORE_CACHE"] = str(folder / "cache")
    for record in read_shards([str(folder / "0.tar")])[0]:
        with PathManager.open(record["file_name"], "rb") as f:
            f.read()


def labels(file: str, cases: st.SearchStrategy[bytes], path: str) -> Parser:
    return Parser(f"data/{file}", cases, (partial(read_splits, path),), put_labels)


LABELLED = {
    "COCO JSON": labels("few.json", json_cases(COCO), "data/few.json:data/JPEGImages"),
    "YOLO data.yaml": labels(
        "data.yaml",
        yaml_cases(DATA_YAML) | damaged([b"names: [cat, dog]\ntrain: train.txt"], HOSTILE_YAML),
        "data/data.yaml",
    ),
    "YOLO labels": labels("JPEGImages/train1.txt", damaged([LABELS], NUMBERS), "data/data.yaml"),
    "tar shard": Parser("0.tar", shard_cases(), (read_shard,)),
    "LabelMe JSON": labels("labelme/a.json", json_cases(LABELME), "data/labelme"),
    "VOC XML": labels("Annotations/train1.xml", damaged([VOC], ENTITIES), "data/Annotations"),
}

# -------------------------------------------------------------------------------------------------
# Images and videos
# -------------------------------------------------------------------------------------------------


@cache
def image_files() -> list[bytes]:
    """A file of each kind that torchvision's folders admit, and of the unusual ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 66, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    turned = image.getexif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [image.rotate(90), image]}
    palette = image.convert("P")
    palette.info["transparency"] = 3
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "JPEG", {}), (image, "JPEG", {"exif": turned, "progressive": True}),
        (image.convert("CMYK"), "JPEG", {}), (image, "PNG", {}), (image, "PNG", frames),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (palette, "PNG", {"transparency": 3}), (image.convert("LA"), "PNG", {}),
        (image, "GIF", frames), (image, "WEBP", {"lossless": True}), (image, "WEBP", frames),
        (image, "BMP", {}), (image, "PPM", {}), (image, "TIFF", {"compression": "tiff_lzw"}),
    ]  # fmt: skip
    files = []
    for source, kind, options in kinds:
        buffer = io.BytesIO()
        source.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def probe_as_read(folder: Path) -> None:
    """What the look at a file's ends says of it, training must find."""
    found = probe(str(folder / "image.png"))
    assert (found.size is None) == bool(found.error) and len(found.error) < 300


@cache
def video_file() -> bytes:
    path = Path(os.environ["DETECTRON2_DATASETS"], "fuzz.avi")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return path.read_bytes()


def read_video(folder: Path) -> None:
    video = Video(str(folder / "video.avi"))
    try:
        for _ in range(20):
            if next(iter(video), None) is None:
                break
        video.check()
    finally:
        video.close()


MEDIA = {
    "images": Parser(
        "image.png",
        st.deferred(lambda: damaged(image_files())),
        (
            lambda folder: read_rgb(str(folder / "image.png")),
            lambda folder: read_image(str(folder / "image.png")),
            probe_as_read,
        ),
    ),
    "video": Parser("video.avi", st.deferred(lambda: damaged([video_file()])), (read_video,)),
}


def all_parsers() -> dict[str, Parser]:
    return {**TEXTS, **CHECKPOINTS, **MODELS, **LABELLED, **MEDIA}


def exported_files() -> dict[str, Parser]:
    return EXPORTED


def failures_of(found: dict[str, Tried]) -> str:
    return "\n".join(
        f"{name}: {failure}" for name, tried in found.items() for failure in tried.failures.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parsers", "number"), [(all_parsers, THOROUGH), (exported_files, THOROUGH // 5)]
)
def test_thousands_of_files(
    parsers: Callable[[], dict[str, Parser]], number: int, tmp_path: Path
) -> None:
    """The same, and the table of how many there were. (An exported file takes half a second.)"""
    found = try_cases(parsers, tmp_path, number)
    rows = [[name, t.cases, t.accepted, t.refused] for name, t in found.items()]
    total = ["all", *(sum(row[i] for row in rows) for i in (1, 2, 3))]
    print("\n" + tabulate([*rows, total], ["parser", "cases", "accepted", "refused"], "github"))
    assert not failures_of(found)
    assert all(tried.cases >= number and tried.accepted for tried in found.values())


def archive(**parts: bytes) -> bytes:
    """What torch.save writes of no tensors, with other parts."""
    buffer, changed_buffer = io.BytesIO(), io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(changed_buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, parts.pop(name.split("/")[-1].split(".")[0], old.read(name)))
        for name, content in parts.items():
            new.writestr(f"archive/{name}", content, zipfile.ZIP_DEFLATED)
    return changed_buffer.getvalue()


def claims(count: int, begin: bytes, end: bytes) -> bytes:
    return b"\x80\x02" + begin + b"\x8a\x08" + count.to_bytes(8, "little") + end


def png(width: int, height: int) -> bytes:
    """One that claims a size, with a whole checksum, and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"\0\0\0\r", header), (b"\0\0\0\0", b"IEND")]
    chunks = [size + part + struct.pack(">I", zlib.crc32(part)) for size, part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


TORCH_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
BOMBS: dict[str, tuple[str, Callable[[], bytes], str | None]] = {
    "a bytearray": ("model.pth", lambda: archive(data=claims(2**38, b"cbuiltins\nbytearray\n",
                                                             b"\x85R.")), "holds a bytearray"),
    "a compressed part": ("model.pth", lambda: archive(zeros=bytes(10**7)), "would unpack into"),
    "TorchScript": ("model.pth", lambda: archive(**{"constants.pkl": b""}), "TorchScript program"),
    "a tensor expanded": ("model.pth", lambda: save({"model": {"a": EXPANDED}}, ".pth", 2),
                          "more bytes than the file"),
    "an array's shape": ("model.pkl", lambda: claims(2**40, TORCH_ARRAY, b"\x85C\x01b\x87R."),
                         "does not begin as numpy"),
    "a place in the memo": ("model.pkl", lambda: b"\x80\x02}r\xff\xff\xff\x7f.", None),
    "protocol 5": ("model.pkl", lambda: b"\x80\x05\x96" + (2**38).to_bytes(8, "little"), "cut off"),
    "a frame": ("model.pkl", lambda: b"\x80\x04\x95" + b"\xff" * 7 + b"\x3f.", "cut off"),
    "a header of JSON": ("model.safetensors", lambda: (2**60).to_bytes(8, "little") + b"{}", ""),
    "a million nodes": ("spec.json", lambda: spec_json(num_nodes=10**6, edges=[]), "at most 1,024"),
    "a million edges": ("spec.json", lambda: spec_json(num_nodes=9, edges=[[0, 1]] * 10**6),
                        "at most 4,194,304"),
    "a C of a million": ("spec.json", lambda: spec_json(channels=10**6), "at most 1,024"),
    "too many weights": ("spec.json", lambda: spec_json(channels=1024, num_nodes=1000, edges=[]),
                         "weights of the 1×1 convolutions"),
    "60000 × 60000 pixels": ("image.png", lambda: png(60000, 60000), "decompression bomb"),
    "a side of 2³¹": ("image.png", lambda: png(2**31 - 1, 1), ""),
}  # fmt: skip


def spec_json(channels: int = 8, **stage: Any) -> bytes:
    value = json.loads(SPEC.to_json())
    value["stages"][-1] |= stage
    return json.dumps({**value, "channels": channels}).encode()


def read_bomb(file: str, says: str | None, folder: Path) -> None:
    try:
        if file == "spec.json":
            read_spec_file(folder)
        elif file == "image.png":
            read_rgb(file)
        else:
            read_entries(file, folder)
    except ValueError as e:
        assert says is not None and says in str(e), e
        raise
    assert says is None


def bombs() -> dict[str, Parser]:
    return {
        name: Parser(file, st.just(content()), (partial(read_bomb, file, says),))
        for name, (file, content, says) in BOMBS.items()
    }


def parsers_and_bombs() -> dict[str, Parser]:
    return all_parsers() | bombs()


def test_what_is_damaged_or_hostile_is_refused_in_one_line(tmp_path: Path) -> None:
    """Wrong: a traceback, a screenful, code that runs, or a file that fills the memory; or a file
    of some bytes that claims more than it holds fills it, or takes minutes."""
    found = try_cases(parsers_and_bombs, tmp_path, FAST)
    assert not failures_of(found)
    assert all(found[name].cases >= FAST for name in all_parsers())
    assert all(found[name].cases == 1 for name in BOMBS)  # there is but one of each
