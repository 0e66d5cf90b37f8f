"""A classifier's images: listed once in a run, whatever it has of processes and evaluations."""

import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog
from helpers import raises_one_line
from launching import C78, LAUNCHERS, arguments, run_in_two, small

from randwire_d2.classification import ClassificationTrainer, load_config
from randwire_d2.data.classification import image_folder, listing
from randwire_d2.data.classification.shard_writer import make_shards
from randwire_d2.engine import argument_parser, train_or_evaluate
from randwire_d2.engine.config import datasets
from randwire_d2.engine.config.datasets import check_same_data

TRAIN, VAL = 42, 18  # images of ``folders``


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folders, or files of classes beside shards, that are listed, by this process."""
    done: list[str] = []
    monkeypatch.setattr(listing, "_kept", {})
    list_folder, read_shards = image_folder.ImageFolder, image_folder.read_shards

    def folder(root: str, **options: Any) -> Any:
        done.append(Path(root).name)
        return list_folder(root, **options)

    def shards(files: list[str]) -> Any:
        done.append(Path(files[0]).parent.name)
        return read_shards(files)

    monkeypatch.setattr(image_folder, "ImageFolder", folder)
    monkeypatch.setattr(image_folder, "read_shards", shards)
    yield done


def parse(folders: Path, output: Path, *options: object) -> Any:
    given = ["--config-file", C78, *small(folders), "OUTPUT_DIR", output, *options]
    return argument_parser().parse_args([*map(str, given)])


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_a_training_lists_its_images_once(
    kind: str, folders: Path, tmp_path: Path, listings: list[str]
) -> None:
    """Wrong: the training, its count of images, each evaluation of accuracy and of losses, and
    precise statistics list the folders, each for itself."""
    looks = 0
    if kind == "shards":
        for split in ("train", "val"):
            make_shards(str(folders / split), tmp_path / split, images=20)
        listings.clear()
        folders, looks = tmp_path, 1  # whether each label has an image is seen nowhere else
    args = parse(
        folders, tmp_path / "run", "SOLVER.EPOCHS", 1, "TEST.EVAL_PERIOD", 2, "TEST.LOSS", True,
        "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2,
    )  # fmt: skip
    train_or_evaluate(load_config(args), args, ClassificationTrainer)
    assert Counter(listings) == {"train": 1 + looks, "val": 1 + looks}


def test_what_one_process_has_listed_others_need_not_list(
    folders: Path, tmp_path: Path, listings: list[str]
) -> None:
    """Wrong: each process lists all, or has other images, where one came or went in between."""
    shutil.copytree(folders, tmp_path / "images")
    cfg = load_config(parse(tmp_path / "images", tmp_path / "run"))
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    before = [[*listing.listed_images([name])] for name in names]
    assert before == [[*DatasetCatalog.get(name)] for name in names]
    both = listing.listed_images(names)
    assert [both[i] for i in range(len(both))] == [*before[0], *before[1]]
    packed = pickle.dumps(listing.known_listings())
    for name in names:  # as in another process
        DatasetCatalog.remove(name)
    listing._kept.clear()
    listings.clear()
    shutil.rmtree(tmp_path / "images")
    listing.take_listings(pickle.loads(packed))
    assert [[*listing.listed_images([name])] for name in names] == before
    assert listing.count_listed() == dict(zip(names, (TRAIN, VAL)))
    assert ClassificationTrainer.classes(cfg).names == ["a", "b", "c"]
    assert len(ClassificationTrainer.build_test_loader(cfg, names[1]).dataset) == VAL
    assert listings == []


def test_a_new_config_lists_anew(folders: Path, tmp_path: Path) -> None:
    """Wrong: a second training in a process sees the files of the first."""
    shutil.copytree(folders, tmp_path / "images")
    for number in (TRAIN, TRAIN - 1):
        cfg = load_config(parse(tmp_path / "images", tmp_path / "run"))
        assert len(listing.listed_images(cfg.DATASETS.TRAIN)) == number
        (tmp_path / "images" / "train" / "a" / "3.png").unlink(missing_ok=True)


def test_a_disk_that_fails_is_one_line(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listings: list[str]
) -> None:
    """Which ``Launched.share`` raises in all processes. Wrong: an error that some have alone."""

    def fail(root: str, **_: Any) -> None:
        raise OSError(5, "Input/output error", root)

    monkeypatch.setattr(image_folder, "ImageFolder", fail)
    with pytest.raises(ValueError, match=r"^'.*/train': .*Input/output error: '.*/train'$"):
        load_config(parse(folders, tmp_path / "run"))


def test_machines_with_other_images_are_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listings: list[str]
) -> None:
    """Wrong: their epochs have other lengths, so that they train on other images, and one of them
    waits for the other at the end."""
    cfg = load_config(parse(folders, tmp_path / "run"))
    first: list[Any] = []
    monkeypatch.setattr(datasets.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(datasets.comm, "all_gather", lambda mine: first.append(mine) or [mine])
    check_same_data(cfg)
    listing._kept[cfg.DATASETS.TRAIN[0]] = listing._kept[cfg.DATASETS.TEST[0]]
    monkeypatch.setattr(datasets.comm, "all_gather", lambda mine: [*first, mine])
    with raises_one_line(ValueError, match="a data set is not the same for all processes") as e:
        check_same_data(cfg)
    assert f"sees {TRAIN} images of '{folders}/train'" in str(e.value)
    assert f"sees {VAL} images of '{folders}/train'" in str(e.value)


# Each Python process with this on its path writes which folders torchvision lists.
HOOK = """
import os, sys
def watch(name, args):
    if name == "os.scandir" and sys._getframe(1).f_code.co_name in ("walk", "_walk"):
        with open(os.environ["SEEN"], "a") as file:
            file.write(f"{args[0]}\\n")
sys.addaudithook(watch)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_lists_each_folder_once(launcher: str, folders: Path, tmp_path: Path) -> None:
    """Wrong: as many times as there are processes, and evaluations."""
    flag, config, *keys = arguments(folders, tmp_path / "run")
    keys += ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1]
    run_in_two("pretrain_imagenet.py", [flag, config], keys, launcher, HOOK, tmp_path)
    seen = Counter((tmp_path / "seen").read_text().splitlines())
    classes = {str(path) for path in folders.glob("*/*")}
    assert len(classes) == 6
    once = 2 if launcher == "two machines" else 1
    assert {path: seen[path] for path in classes} == dict.fromkeys(classes, once)
