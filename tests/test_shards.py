"""Tar shards: the same samples as the folder that they were made of, read with no more than the
standard library, and every line that a damaged one gets."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from helpers import ROOT, draw_image_folders, raises_one_line, refusal, run_tool

from randwire_d2.classification.data import TestImages, TrainingStream
from randwire_d2.config import classifier_config
from randwire_d2.data.classification import image_folder, shards
from randwire_d2.data.classification.image_folder import (
    check_image_folders,
    image_folder_classes,
    register_folders,
)
from randwire_d2.data.classification.shard_writer import make_shards
from randwire_d2.data.classification.shards import find_shards, read_shards
from randwire_d2.inference.inputs import files_as_inputs

TestImages.__test__ = False  # named as pytest's own
CIFAR = ROOT.parent / "shared/data/cifar10.tar.gz"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test notes of shards lies in its own folder."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "DATASETS_ROOT", str(tmp_path))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images, one of them broken, and their shards; to be read only."""
    root = tmp_path_factory.mktemp("source")
    draw_image_folders(root, train=5, val=2)
    (root / "train/b/cut.jpg").write_bytes(b"\xff\xd8\xff")
    for split in ("train", "val"):
        make_shards(str(root / split), root / "shards" / split, images=6)
    return root


def write(path: Path, *samples: dict[str, str | bytes]) -> Path:
    """A shard of webdataset's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as out:
        for sample in samples:
            out.write(sample)
    return path


def sample(key: str, label: bytes, **more: bytes) -> dict[str, str | bytes]:
    return {"__key__": key, "jpg": b"image", "cls": label, **more}


def line(*names: str | Path) -> str:
    """The one line that refuses these data sets."""
    register_folders(map(str, names))
    with raises_one_line(ValueError) as e:
        check_image_folders([*map(str, names)], [])
    return str(e.value)


def content(records: list[dict]) -> list[tuple[bytes, int]]:
    found = []
    for record in records:
        with PathManager.open(record["file_name"], "rb") as f:
            found.append((f.read(), record["label"]))
    return found


# -------------------------------------------------------------------------------------------------
# The same samples
# -------------------------------------------------------------------------------------------------


def test_shards_are_their_folder(source: Path) -> None:
    """Wrong: shards have other images, labels, classes or another order than their folder."""
    folder, tars = str(source / "train"), str(source / "shards/train")
    assert [Path(p).name for p in find_shards(tars)] == [f"shard-{i:06}.tar" for i in range(3)]
    register_folders([folder, tars])
    assert check_image_folders([folder], [tars]) == ["a", "b", "c"]
    assert image_folder_classes(tars) == ["a", "b", "c"]
    found = content(DatasetCatalog.get(tars))
    assert len(found) == 16 and found == content(DatasetCatalog.get(folder))
    assert MetadataCatalog.get(tars).classes == ["a", "b", "c"]
    names = files_as_inputs([record["file_name"] for record in DatasetCatalog.get(tars)])
    assert [i.name.rpartition("/")[2] for i in names] == [f"{i:08}" for i in range(16)]


def test_shards_of_shards(source: Path, tmp_path: Path) -> None:
    """Wrong: shards of another size can't be made of shards, or lose what is in them."""
    (one,) = make_shards(str(source / "shards/train"), tmp_path / "one", images=16)
    found = content(read_shards([str(one)])[0])
    assert found == content(read_shards(find_shards(str(source / "shards/train")))[0])


def test_the_stream_is_the_folders(source: Path) -> None:
    """Wrong: at some position, of any epoch, training gets another image or augmentation, or
    replaces the broken one by another; or a test does."""
    folder, tars = str(source / "train"), str(source / "shards/train")
    register_folders([folder, tars])
    cfg = classifier_config()
    cfg.INPUT.TRAIN_CROP_SIZE = cfg.INPUT.TEST_CROP_SIZE = 16
    streams = [TrainingStream(DatasetCatalog.get(name), cfg, seed=3) for name in (folder, tars)]
    broken = 0
    for position in (40, *range(32), 7):  # any order, as after a resume
        one, other = (stream[position] for stream in streams)
        assert torch.equal(one["image"], other["image"]), position
        assert (one["label"], one["broken"]) == (other["label"], other["broken"])
        broken += one["broken"]
    assert broken >= 2
    tests = [TestImages(DatasetCatalog.get(name), cfg) for name in (folder, tars)]
    for i in range(16):
        assert torch.equal(tests[0][i]["image"], tests[1][i]["image"])
        assert tests[0][i]["label"] == tests[1][i]["label"]


def test_webdataset_reads_what_is_written(source: Path) -> None:
    """Wrong: the shards are no webdataset's, and of use to nobody else."""
    pattern = str(source / "shards/train/shard-{000000..000002}.tar")
    found = [
        (s.get("png") or s["jpg"], int(s["cls"]))
        for s in webdataset.WebDataset(pattern, shardshuffle=False)
    ]
    register_folders([str(source / "train")])
    assert found == content(DatasetCatalog.get(str(source / "train")))


def test_shards_of_others(tmp_path: Path) -> None:
    """Wrong: what users have can't be read: json beside the images, keys with folders and dots,
    macOS's notes amid a sample, numbers for classes, shards of several series in one folder."""
    write(
        tmp_path / "set/train-08.tar",
        sample("some.where/0", b"1\n", json=b"{}", **{"seg.png": b"mask"}),
        {"__key__": "notes", "txt": b"no sample"},
        {"__key__": "x/1", "jpeg": b"other", "cls": b"0"},
    )
    with tarfile.open(tmp_path / "set/train-09.tar", "w") as out:  # as macOS's own tar writes it
        for name, data in {
            "._2.cls": b"",
            "2.cls": b"2",
            "._2.jpg": b"",
            "2.jpg": b"image",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    write(tmp_path / "set/val-0.tar", *(sample(str(i), b"%d" % i) for i in range(3)))
    train, val = "set/train-{08..09}.tar", "set/val-0.tar"
    register_folders([train, val])
    assert check_image_folders([train], [val]) == ["0", "1", "2"]
    assert content(DatasetCatalog.get(train)) == [(b"image", 1), (b"other", 0), (b"image", 2)]
    assert len(find_shards(str(tmp_path / "set"))) == 3
    assert find_shards("a-{0..1}-{8..10}.tar") == [
        f"a-{i}-{j}.tar" for i in (0, 1) for j in (8, 9, 10)
    ]


def test_a_folder_of_classes_stays_one(tmp_path: Path) -> None:
    """Wrong: the archives that ImageNet comes in, left beside its folders, take their place."""
    draw_image_folders(tmp_path, train=1, val=1)
    write(tmp_path / "train/n01440764.tar", sample("0", b"0"))
    register_folders(["train"])
    assert check_image_folders(["train"], []) == ["a", "b", "c"]


def test_a_shard_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: 140 GB are looked through in every process, or a changed file is taken for the old."""
    path = write(tmp_path / "s/0.tar", sample("0", b"0"))
    opened = []
    real = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda shard: opened.append(shard) or real(shard))

    def read() -> list[tuple[bytes, int]]:
        return content(read_shards([str(path)])[0])

    assert read() == read() == [(b"image", 0)] and len(opened) == 1
    (kept,) = (tmp_path / "cache").glob("**/*.json")
    kept.write_text(kept.read_text()[:-9])  # a disk was full
    assert read() == [(b"image", 0)] and len(opened) == 2
    os.utime(path, ns=(0, 0))
    assert read() == [(b"image", 0)] and len(opened) == 3
    write(path, sample("0", b"0"), sample("1", b"1"))
    assert len(read()) == 2
    assert json.loads(kept.read_text())["samples"][1][3] == 1


# -------------------------------------------------------------------------------------------------
# Refused
# -------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2800])


def _at_a_members_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2048])


def _bad_header(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[2048 + 20] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize(
    "damage", [_cut, _at_a_members_end, _bad_header, lambda path: path.write_bytes(b"")]
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """Wrong: training loses what lies behind the damage without a word, or fails in mid-epoch."""
    write(tmp_path / "s/0.tar", sample("0", b"0"))
    path = write(tmp_path / "s/1.tar", sample("0", b"0"), sample("1", b"1"))
    damage(path)
    assert line("s").startswith(f"the shard {str(path)!r} is damaged")


@pytest.mark.parametrize(
    "bad, said",
    [
        ([{"__key__": "k", "jpg": b""}], "the sample 'k' has jpg; it needs"),
        ([{"__key__": "k", "cls": b"0"}], "the sample 'k' has cls; it needs"),
        ([sample("k", b"0", png=b"")], "the sample 'k' has cls, jpg, png; it needs"),
        ([sample("k", b"0"), sample("k", b"0")], "the sample 'k' has cls, cls, jpg, jpg"),
        ([sample("k", b"cat")], "the label of 'k' is b'cat'; it must be a number"),
        ([sample("k", b"-1")], "the label of 'k' is b'-1'"),
        ([{"__key__": "k", "txt": b""}], "no sample is in"),
        ([sample("k", b"1")], "no images in '0'; labels begin with 0"),
    ],
)
def test_another_layout(tmp_path: Path, bad: list[dict[str, str | bytes]], said: str) -> None:
    """Wrong: what is no labelled image is left out, or trained on under a wrong label."""
    path = write(tmp_path / "s/0.tar", *bad)
    message = line("s")
    assert said in message and (str(path) in message or "'s'" in message)


def test_missing_shards(tmp_path: Path) -> None:
    """Wrong: an incomplete download is trained on."""
    write(tmp_path / "s-0.tar", sample("0", b"0"))
    missing = str(tmp_path / "s-1.tar")
    assert line("s-{0..1}.tar") == f"the shard {missing!r} can't be read: No such file or directory"
    assert "no data set 't-{0..1}.tar' is registered" in line("t-{0..1}.tar")


def test_class_names(tmp_path: Path) -> None:
    """Wrong: a label without a name, or names in another order in training and test."""
    for name in "xy":
        write(tmp_path / name / "0.tar", sample("0", b"0"), sample("1", b"1"))
        (tmp_path / name / "classes.txt").write_text("b\na\n" if name == "x" else "a\nb\n")
    assert line("x", "y").startswith("'x' and 'y' have the same classes in another order")
    (tmp_path / "x/classes.txt").write_text("b\n")
    assert "has a label of 1 or more, but the classes.txt" in line("x")
    (tmp_path / "x/classes.txt").write_text("b\nb\n")
    assert "names the class 'b' twice" in line("x")


def test_gzip_is_no_shard(tmp_path: Path) -> None:
    """Wrong: a compressed file under the name of a tar file ends in a traceback."""
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s/0.tar", "w:gz") as out:
        info = tarfile.TarInfo("0.jpg")
        info.size = 5
        out.addfile(info, io.BytesIO(b"image"))
    assert "0.tar' is damaged, or no tar file" in line("s")


# -------------------------------------------------------------------------------------------------
# The tool
# -------------------------------------------------------------------------------------------------


def test_the_tool_writes_shards_once(source: Path, tmp_path: Path) -> None:
    """Wrong: the command does something else than the function, leaves half a folder, or writes
    over what is there."""
    given = [source / "val", tmp_path / "shards", "--images", 4]
    said = run_tool("make_shards.py", *given, log=tmp_path / "log")
    assert "holds 2 shards" in said
    for name in ("shard-000000.tar", "classes.txt"):
        made = (tmp_path / "shards" / name).read_bytes()
        assert name.endswith("tar") or made == (source / "shards/val" / name).read_bytes()
    assert len(read_shards(find_shards(str(tmp_path / "shards")))[0]) == 6
    said = refusal("make_shards.py", *given, log=tmp_path / "log")
    assert "exists; name a new folder" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "log", "shards"]


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_file(), reason="no CIFAR-10 in ../shared/data")
def test_cifar_10(tmp_path: Path) -> None:
    """Wrong: of real images, some are lost or changed on their way into shards and out of them."""
    with tarfile.open(CIFAR) as archive:
        val = [member for member in archive if member.name.startswith("cifar10/val/")]
        archive.extractall(tmp_path, val, filter="data")
    folder = str(tmp_path / "cifar10/val")
    tars = [str(path) for path in make_shards(folder, tmp_path / "shards", images=3000)]
    records, classes = read_shards(tars)
    assert len(tars) == 4 and len(records) == 10_000
    assert classes == image_folder_classes(folder)
    assert content(records) == content(DatasetCatalog.get(folder))
