"""Data by path in several processes: one reads labels and images, and all have the same."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from helpers import PATIENCE, ROOT, raises_one_line
from label_formats import FORMATS, TRAIN, VAL, write_sound
from launching import LAUNCHERS, run_in_two
from torch.distributed import HashStore

from randwire_d2.data import labelled_images
from randwire_d2.data.detection import by_path
from randwire_d2.data.images import probing
from randwire_d2.engine import argument_parser, launch, load_config, register_data
from randwire_d2.engine.config import datasets
from randwire_d2.engine.config.datasets import check_same_data
from randwire_d2.engine.processes import torchrun
from randwire_d2.engine.processes.torchrun import Launched
from randwire_d2.engine.train_loader import detection_train_loader
from randwire_d2.engine.trainer import PreciseBN, Trainer

SHAPES = str(ROOT / "configs" / "faster_rcnn_randwire_shapes.yaml")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The image files that are looked at, in a process that has not looked at any."""
    looked, look = [], probing._look

    def counted(path: str, num_bytes: int) -> probing.ImageFile:
        looked.append(path)
        return look(path, num_bytes)

    monkeypatch.setattr(probing, "_look", counted)
    for module, known in ((probing, "_found"), (probing, "_told"), (by_path, "_told")):
        monkeypatch.setattr(module, known, {})
    yield looked


def load(given: list[str]) -> Any:
    return load_config(argument_parser().parse_args(["--config-file", SHAPES, *given]))


def forget(cfg: Any) -> None:
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)


def records(cfg: Any) -> list[list[dict[str, Any]]]:
    return [labelled_images(n).records for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_one_process_has_seen_others_need_not_look_at(
    kind: str, looks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: each process reads all labels and images, or has others where one is damaged in
    between."""
    given = write_sound(tmp_path / "data")[kind]
    folder = tmp_path / "data" / "JPEGImages"
    (folder / "train2.jpg").write_bytes(b"damaged")
    (folder / "train3.jpg").unlink()
    cfg = load(given)
    assert Counter(looks) == dict.fromkeys(map(str, folder.glob("*.jpg")), 1)
    before = records(cfg)
    assert [len(split) for split in before] == [TRAIN - 2, VAL]
    packed = pickle.dumps(datasets.known())
    looks.clear()
    forget(cfg)
    monkeypatch.setattr(probing, "_found", {})  # as in another process
    (folder / "train1.jpg").unlink()
    (folder / "train2.jpg").write_bytes((folder / "train4.jpg").read_bytes())
    datasets.take_known(pickle.loads(packed))
    with monkeypatch.context() as patched:
        patched.setattr(by_path, "find_splits", None)
        register_data(cfg)
    assert (records(cfg), looks) == (before, [])
    DatasetCatalog.get(cfg.DATASETS.TRAIN[0])  # what is asked for does not stay, and is read again
    assert (records(cfg), looks) == (before, [])
    datasets.take_known(pickle.loads(packed))
    assert not by_path._told  # of what is registered, nothing is kept a second time


def test_who_only_waits_for_processes_keeps_no_labels(tmp_path: Path) -> None:
    """Wrong: gigabytes are kept of them for as long as the training lasts, beside those of the
    processes that train."""
    cfg = load(["--data", write_sound(tmp_path / "data")["yolo"][1]])
    before = records(cfg)
    with launch._file_of_known() as path:
        assert not by_path.read_labels()
        told = pickle.loads(Path(path).read_bytes())[1]
    assert [told[n].records for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)] == before
    assert records(cfg) == before


def test_evaluations_read_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: each evaluation reads the labels, and asks the disk for each image."""
    cfg = load(["--data", write_sound(tmp_path / "data")["yolo"][1]])
    monkeypatch.setattr(probing, "probe", None)
    found = [DatasetCatalog.get(cfg.DATASETS.TEST[0]) for _ in range(3)]
    assert [len(records) for records in found] == [VAL] * 3


def test_precise_statistics_read_no_labels_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: each process reads all labels a second time, and has the images' dicts twice; or the
    statistics are of other images than those with which the training begins."""
    keys = {
        "TEST.PRECISE_BN.ENABLED": True, "MODEL.WEIGHTS": "", "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RANDWIRE.NORM": "BN", "MODEL.RANDWIRE.CHANNELS": 8, "SOLVER.IMS_PER_BATCH": 2,
        "DATALOADER.NUM_WORKERS": 1, "SEED": 1, "OUTPUT_DIR": tmp_path / "run",
    }  # fmt: skip
    given = ["--data", write_sound(tmp_path / "data")["yolo"][1]]
    cfg = load([*given, *(str(part) for pair in keys.items() for part in pair)])
    monkeypatch.setattr(by_path, "clean", None)
    trainer = Trainer(cfg)
    (hook,) = (hook for hook in trainer._hooks if isinstance(hook, PreciseBN))
    precise, training = hook._data_loader, trainer._trainer.data_loader
    training.start_iter = 2
    assert (precise.start_iter, precise._num_workers, training._num_workers) == (0, 0, 1)
    monkeypatch.undo()
    names = [
        [item["file_name"] for batch in islice(loader, 2) for item in batch]
        for loader in (precise, detection_train_loader(cfg))
    ]
    assert names[0] == names[1] and len(names[0]) == 4


def in_four_processes(
    work: Callable[[Launched], Any], monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """What ``work`` returns, or raises, in each of the processes of two machines."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=PATIENCE))
    monkeypatch.setattr(torchrun, "_store", lambda launched: store)

    def one(rank: int) -> Any:
        try:
            return work(Launched(rank, rank % 2, 4, 2))
        except (ValueError, SystemExit) as e:
            return str(e)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(4)))


def test_the_first_process_of_a_machine_looks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: another one looks, too, or waits forever, a large answer does not arrive, or it stays
    in the store, which is in memory as long as the training."""
    made = []

    def make(launched: Launched) -> tuple[int, bytes]:
        made.append(launched.rank)
        return launched.rank, np.random.default_rng(launched.rank).bytes(3_000_000)

    found = in_four_processes(lambda one: one.share("bytes", lambda: make(one)), monkeypatch)
    assert sorted(made) == [0, 2]
    assert found[0] == found[1] and found[2] == found[3]
    assert [rank for rank, _ in found] == [0, 0, 2, 2] and len(found[0][1]) == 3_000_000
    assert torchrun._store(Launched(0, 0, 4, 2)).num_keys() < 20


def test_each_call_shares_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a program's second data set is the first one again, or the processes wait for what was
    removed of that."""
    sets = ["first", "a longer second", "3rd"]

    def work(one: Launched) -> list[str]:
        return [one.share("labels", partial(str, name)) for name in sets]

    found = in_four_processes(work, monkeypatch)
    assert found == [sets] * 4


def test_one_process_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: all labels are in its memory once more."""
    there = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1,
             "MASTER_ADDR": "", "MASTER_PORT": 1}  # fmt: skip
    monkeypatch.setattr(Launched, "share", None)
    for environment in ({}, there):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        assert torchrun.made_once("labels", Launched.here, take=pytest.fail) == Launched.here()


def test_what_one_process_refuses_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the others wait for a process that has ended, be it by an error of packing or by the
    code of a data set that exits."""

    def refuse() -> Any:
        raise ValueError("'data' has no images")

    def leave() -> Any:
        raise SystemExit("'data' has no images")

    class Unpackable:
        def __reduce__(self) -> Any:
            return refuse()

    for make in (refuse, leave, Unpackable):
        found = in_four_processes(lambda one, make=make: one.share("images", make), monkeypatch)
        assert found == ["'data' has no images"] * 4


def test_processes_with_other_data_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: machines whose copies differ train on different lists, each its own."""
    cfg = load(write_sound(tmp_path / "data")["coco"])
    monkeypatch.setattr(datasets.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(datasets.comm, "all_gather", lambda mine: [mine, mine])
    check_same_data(cfg)
    first: list[Any] = []
    monkeypatch.setattr(datasets.comm, "all_gather", lambda mine: first.append(mine) or [mine])
    check_same_data(cfg)
    labelled_images(cfg.DATASETS.TRAIN[0]).records[3]["annotations"][0]["bbox"][2] += 1
    monkeypatch.setattr(datasets.comm, "all_gather", lambda mine: [*first, mine])
    with raises_one_line(ValueError, match="6 images, 12 boxes .* give all machines the same") as e:
        check_same_data(cfg)
    assert "process 1 (" in str(e.value)


# Each Python process with this on its path writes which images and labels it looks at.
HOOK = """
import os, sys
def watch(name, args):
    ends = (".jpg", ".txt")
    if name == "open" and str(args[0]).endswith(ends) and "JPEGImages" in str(args[0]):
        if sys._getframe(1).f_code.co_name in ("_look", "open"):  # not a training
            with open(os.environ["SEEN"], "a") as file:
                file.write(str(args[0]) + "\\n")
sys.addaudithook(watch)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_training_looks_at_each_file_once(launcher: str, tmp_path: Path) -> None:
    """Wrong: as many times as there are processes; or these are no group, each trains alone."""
    given = ["--config-file", SHAPES, *write_sound(tmp_path / "data")["yolo"]]
    keys = [
        "MODEL.RANDWIRE.FUSED", "off", "MODEL.RANDWIRE.CHANNELS", 8, "SOLVER.MAX_ITER", 1,
        "SOLVER.IMS_PER_BATCH", 2, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", tmp_path / "run",
    ]  # fmt: skip
    run_in_two("train_net.py", given, keys, launcher, HOOK, tmp_path)
    assert "World size: 2" in (tmp_path / "log0").read_text()
    looked = Counter((tmp_path / "seen").read_text().splitlines())
    assert len(looked) == 2 * (TRAIN + VAL)
    assert set(looked.values()) == {2 if launcher == "two machines" else 1}
