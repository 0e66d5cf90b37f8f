"""A detector's training goes on to the bit where it was stopped: its images, and all that is drawn.

tests/test_resume_processes.py does the same to processes, with SIGKILL.
"""

import argparse
import json
import shutil
import weakref
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling.meta_arch import retinanet
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.nn import sigmoid_focal_loss
from helpers import ROOT, assert_equal, draw_boxes, raises_one_line
from torch.utils.data import IterableDataset

from randwire_d2.data.detection import augmentation
from randwire_d2.engine import Trainer, argument_parser, load_config, train_or_evaluate
from randwire_d2.engine.train_loader import TrainLoader, detection_train_loader
from randwire_d2.garbage import uncollected

SHAPES = ROOT / "configs/faster_rcnn_randwire_shapes.yaml"
ITERATIONS, STOP = 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in COCO's layout, of images of both orientations."""
    return str(draw_boxes(tmp_path_factory.mktemp("boxes")))


def config(data: str, *options: object) -> CfgNode:
    given = [
        "--config-file", SHAPES, "--data", data, "MODEL.RANDWIRE.CHANNELS", 8,
        "MODEL.RANDWIRE.NUM_NODES", 6, "MODEL.RANDWIRE.FUSED", "on", "SOLVER.IMS_PER_BATCH", 4,
        "SOLVER.WARMUP_ITERS", 2, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", STOP,
        "INPUT.MIN_SIZE_TRAIN", "(48, 64, 80)", "INPUT.MAX_SIZE_TRAIN", 120, "SEED", 3,
        *(() if "SOLVER.EPOCHS" in options else ("SOLVER.MAX_ITER", ITERATIONS)), *options,
    ]  # fmt: skip
    cfg = load_config(argument_parser().parse_args([*map(str, given)]))
    cfg.defrost()
    # Detectron2 reads them, and not every version has a default.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.7
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(cfg.DATASETS.TRAIN[0], 1.5)]
    cfg.freeze()
    return cfg


# -------------------------------------------------------------------------------------------------
# The images
# -------------------------------------------------------------------------------------------------


def seen(cfg: CfgNode, start: int, end: int) -> list[Any]:
    """What the loader gives in some iterations."""
    loader = detection_train_loader(cfg)
    loader.start_iter = start
    return [
        [(d["file_name"], d["image"], d["instances"].gt_boxes.tensor) for d in batch]
        for batch in islice(loader, end - start)
    ]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("DATALOADER.ASPECT_RATIO_GROUPING", False, "INPUT.CROP.ENABLED", True),
        ("INPUT.LSJ.SIZE", 64),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
         "DATALOADER.REPEAT_THRESHOLD", 0.9),
        ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
        ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"),
    ],
    ids=["grouped", "ungrouped", "lsj", "repeat", "subset", "weighted"],
)  # fmt: skip
def test_images_are_a_function_of_seed_and_position(data: str, options: tuple[object, ...]) -> None:
    """Wrong: workers, random numbers that others draw, or where the stream is entered change which
    images an iteration sees, or how they are augmented; or the seed does not."""
    seed_all_rng(1)
    whole = seen(config(data, "DATALOADER.NUM_WORKERS", 0, *options), 0, 9)
    seed_all_rng(2)
    assert_equal(seen(config(data, "DATALOADER.NUM_WORKERS", 2, *options), 6, 9), whole[6:])
    other = seen(config(data, "SEED", 4, *options), 0, 9)
    assert [b[0][0] for b in other] != [b[0][0] for b in whole]
    # Seen again, an image is augmented in another way.
    views: dict[str, list[torch.Tensor]] = {}
    for name, image, _ in (d for batch in whole for d in batch):
        views.setdefault(name, []).append(image)
    pairs = [images[:2] for images in views.values() if len(images) > 1]
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def places(cfg: CfgNode, number: int) -> list[list[tuple[int, int]]]:
    loader = detection_train_loader(cfg)
    assert isinstance(loader, TrainLoader)
    return list(islice(loader.batches(), number))


def test_batches_have_one_orientation_and_lose_no_image(data: str) -> None:
    """Wrong: upright and wide images are padded to squares, an image is left out or seen twice, or
    ungrouped images are not in the sampler's order."""
    batches = places(config(data), 40)
    assert {len(batch) for batch in batches} == {4}
    upright = [{index % 3 == 0 for _, index in batch} for batch in batches]
    assert all(len(kinds) == 1 for kinds in upright) and {True} in upright and {False} in upright
    positions = sorted(position for batch in batches for position, _ in batch)
    assert len(set(positions)) == 160 and positions[-1] < 160 + 2 * 3
    free = places(config(data, "DATALOADER.ASPECT_RATIO_GROUPING", False), 40)
    assert [p for batch in free for p, _ in batch] == list(range(160))
    assert sorted(i for batch in free for _, i in batch)[:7] == [0] * 7  # 160 of 21 images


def test_processes_share_the_batch_of_one(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: several processes see other images than one would, or other augmentations."""
    cfg = config(data, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    alone = seen(cfg, 3, 5)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own, own])
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(seen(cfg, 3, 5))
    assert_equal([first + second for first, second in zip(*shares)], alone)


def test_what_the_mapper_refuses_is_replaced_by_the_next(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: workers fall back to images of their own, or a search without an end."""
    plain = DatasetMapper.__call__

    def refuse(mapper: DatasetMapper, record: dict) -> Any:
        return plain(mapper, record) if record["image_id"] % 7 == bad else None

    monkeypatch.setattr(augmentation.DatasetMapper, "__call__", refuse)
    bad = 2
    found = [seen(config(data, "DATALOADER.NUM_WORKERS", n), 0, 3) for n in (0, 2)]
    assert_equal(found[1], found[0])
    assert {int(Path(name).stem) % 7 for batch in found[0] for name, _, _ in batch} == {2}
    bad = -1
    with pytest.raises(RuntimeError, match="100 training images in a row were refused, the last"):
        seen(config(data), 0, 1)


def test_a_stream_is_read_as_detectron2_does(
    data: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: images that can only be iterated over are refused, or taken for repeatable ones."""
    cfg = config(data)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return cycle(records)

    monkeypatch.setitem(DatasetCatalog.data, cfg.DATASETS.TRAIN[0], Stream)
    loader = detection_train_loader(cfg)
    assert not isinstance(loader, TrainLoader) and len(next(iter(loader))) == 4
    assert "can only be iterated over: a resumed training begins with" in caplog.text


# -------------------------------------------------------------------------------------------------
# The training
# -------------------------------------------------------------------------------------------------


class Quiet(Trainer):
    """Without what is not compared here."""

    @classmethod
    def test(cls, *args: Any) -> dict[str, Any]:
        return {}

    def conclude(self) -> None:
        pass


def train(cfg: CfgNode, seed: int) -> dict[str, Any]:
    """Train, or go on in a process of its own; what model_final.pth holds, but for the config."""
    seed_all_rng(seed)
    trainer = Quiet(cfg)
    trainer.resume_or_load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retinanet, "sigmoid_focal_loss_jit", new_script(sigmoid_focal_loss))
        trainer.train()
    file = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    del file["config"]
    return dict(file)


def new_script(function: Any) -> Any:
    """A script that has not run yet, as in a new process: for torch, of another function."""
    copy = FunctionType(function.__code__, function.__globals__, "f", function.__defaults__)
    copy.__annotations__ = function.__annotations__
    return torch.jit.script(copy)


def losses(folder: Path) -> dict[str, float]:
    *_, last = (json.loads(line) for line in (folder / "metrics.json").read_text().splitlines())
    return {k: v for k, v in last.items() if not k.endswith(("time", "seconds"))}


RETINANET = (
    "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME",
    "build_randwire_retinanet_fpn_backbone", "MODEL.RETINANET.NUM_CONVS", 1,
    "MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5']",
)  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "options"),
    [(3, ("SOLVER.EMA.DECAY", 0.5)), (-1, RETINANET)],
    ids=["faster_rcnn_ema", "retinanet_drawn_seed"],
)
def test_a_stopped_training_ends_with_the_same_bits(
    data: str, tmp_path: Path, seed: int, options: tuple[object, ...]
) -> None:
    """Wrong: after a stop, or with other workers, the weights, the momentum, the average,
    RetinaNet's normaliser, a seed that was drawn or the content of metrics.json differ; or a loss
    is rounded otherwise once TorchScript has seen it a few times."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    given = ("SEED", seed, *options)
    expected = train(config(data, "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", whole, *given), 5)
    resumed.mkdir()
    shutil.copy(whole / f"model_{STOP - 1:07}.pth", resumed)
    (resumed / "last_checkpoint").write_text(f"model_{STOP - 1:07}.pth")
    found = train(config(data, "DATALOADER.NUM_WORKERS", 2, "OUTPUT_DIR", resumed, *given), 6)
    assert_equal(found, expected)
    assert losses(resumed) == losses(whole)
    first = torch.load(resumed / f"model_{STOP - 1:07}.pth", weights_only=True)
    with pytest.raises(AssertionError):
        assert_equal(first["model"], expected["model"])


def test_a_schedule_is_that_of_its_batch(data: str, tmp_path: Path) -> None:
    """Wrong: a training in epochs is resumed with another batch, and goes on at the iteration and
    the rate of its first one. Or what may change is refused: the length alone, the batch of a
    schedule in iterations, whatever an older version wrote."""

    def resume(*options: object) -> Quiet:
        trainer = Quiet(config(data, "OUTPUT_DIR", tmp_path, *options))
        trainer.resume_or_load()
        return trainer

    epochs = ("SOLVER.EPOCHS", 2)
    begun = resume(*epochs)
    begun.iter = 1
    begun.checkpointer.save("model_0000001", iteration=1)
    assert resume(*epochs).start_iter == 2
    assert resume("SOLVER.EPOCHS", 3).start_iter == 2
    assert resume("SOLVER.MAX_ITER", 99).start_iter == 2
    assert resume("SOLVER.MAX_ITER", begun.max_iter, "SOLVER.IMS_PER_BATCH", 2).start_iter == 2
    says = "is 11 iterations of 4 images, this one 21 of 2. Set SOLVER.IMS_PER_BATCH 4 .on fewer"
    with pytest.raises(ValueError, match=says):
        resume(*epochs, "SOLVER.IMS_PER_BATCH", 2)
    # The batch of two processes' iterations is halved for one, and so would another one be.
    says = "this one 22 of 2. SOLVER.REFERENCE_WORLD_SIZE scales both: start as many processes"
    with pytest.raises(ValueError, match=says):
        resume("SOLVER.MAX_ITER", begun.max_iter, "SOLVER.REFERENCE_WORLD_SIZE", 2)
    file = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    del file["trainer"]["hooks"]["KeepSchedule"]
    torch.save(file, tmp_path / "model_0000001.pth")
    assert resume(*epochs, "SOLVER.IMS_PER_BATCH", 2).start_iter == 2


@pytest.mark.parametrize(
    "other",
    [
        ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 9),
        ("SOLVER.BIAS_LR_FACTOR", 2.0),
        ("SOLVER.MAX_ITER", 1),
        ("SOLVER.MAX_ITER", 1, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    ],
    ids=["schedule", "optimizer", "length", "steps"],
)
def test_who_is_refused_can_go_on_as_before(
    data: str, other: tuple[object, ...], tmp_path: Path
) -> None:
    """Wrong: a training that is shortened to less than it has done is said to have ended there; the
    config.yaml is that of a refused command, and later commands are compared with it; or a training
    that goes on keeps an old one."""
    args = argparse.Namespace(resume=True, eval_only=False)
    run = ("OUTPUT_DIR", tmp_path)
    first = Quiet(config(data, *run))
    first.iter, first.scheduler.last_epoch = 1, 2
    first.checkpointer.save("model_0000001", iteration=1)
    own = tmp_path / "config.yaml"
    own.write_text(first.cfg.dump())
    before = own.read_text()
    with pytest.raises(ValueError, match="^--resume: "):
        train_or_evaluate(config(data, *run, *other), args, Quiet)
    assert own.read_text() == before
    longer = config(data, *run, "SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.5)
    train_or_evaluate(longer, args, Quiet)
    assert own.read_text() == longer.dump()


def test_a_trainer_that_nobody_holds_is_gone(data: str, tmp_path: Path) -> None:
    """Wrong: a hook holds it, so that the workers that read its images outlive a training that was
    interrupted."""
    trainer = Quiet(config(data, "OUTPUT_DIR", tmp_path, "TEST.AUG.ENABLED", True))
    known = weakref.ref(trainer)
    with uncollected():
        del trainer
        assert known() is None


def test_a_training_goes_on_at_the_rate_of_its_config(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: someone lowers the rate after a divergence, and the training goes on at the
    checkpoint's rate without a word; one iteration has another schedule, such as the rate 0 of a
    training that had ended; or an optimizer is taken whose state does not fit, as config.yaml is by
    now another training's."""

    def resume(*options: object) -> Quiet:
        trainer = Quiet(config(data, "OUTPUT_DIR", tmp_path, "SOLVER.WARMUP_FACTOR", 0.5, *options))
        trainer.resume_or_load()
        return trainer

    def rates(trainer: Quiet) -> list[list[float]]:
        """Of the next two iterations."""
        found = [[group["lr"] for group in trainer.optimizer.param_groups]]
        trainer.scheduler.step()
        return [*found, [group["lr"] for group in trainer.optimizer.param_groups]]

    other = ("SOLVER.BIAS_LR_FACTOR", 2.0)  # the weights' and the biases' groups
    begun = resume("SOLVER.BASE_LR", 0.5, *other)
    begun.iter = 0
    begun.scheduler.step()  # as its hook does, ahead of the checkpoint
    begun.checkpointer.save("model_0000000", iteration=0)
    expected = rates(begun)
    assert rates(resume("SOLVER.BASE_LR", 0.5, *other)) == expected
    assert "learning rate" not in caplog.text
    found = rates(resume("SOLVER.BASE_LR", 0.0625, *other))
    assert "The learning rate is SOLVER.BASE_LR 0.0625 from here on; the checkpoint's was 0.5" in (
        caplog.text
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected) / 8)
    constant = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_FACTOR", 1.0)
    found = rates(resume("SOLVER.BASE_LR", 0.5, *other, *constant))
    assert found == [[group["initial_lr"] for group in begun.optimizer.param_groups]] * 2
    for options, says in (
        (("SOLVER.MOMENTUM", 0.5, *other), r"momentum 0.9 \(now 0.5\)"),
        ((), r"weights in 4 groups, .*\(now 2, .*, which its state fixes"),
    ):
        with raises_one_line(ValueError, match=says):
            resume("SOLVER.BASE_LR", 0.5, *options)
