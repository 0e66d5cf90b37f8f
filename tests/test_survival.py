"""Nothing is lost: damaged files, full disks, losses that are no number, second processes."""

import errno
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, get_event_storage
from helpers import (
    PATIENCE,
    ROOT,
    assert_equal,
    draw_image_folders,
    in_two_processes,
    raises_one_line,
    wait_until,
)
from label_formats import write_sound
from tensorboard.summary.writer.event_file_writer import _AsyncWriter
from torch import Tensor, nn
from torch._utils import ExceptionWrapper
from torch.amp import GradScaler
from torch.utils.data import DataLoader, Dataset

from randwire_d2 import upstream
from randwire_d2.benchmark.memory import MemoryWatch
from randwire_d2.checkpoint import RandWireCheckpointer, load_checkpoint
from randwire_d2.classification.data import read_image
from randwire_d2.cli import measure_memory
from randwire_d2.cli.measure_memory import watch_prediction, watch_training
from randwire_d2.config import detector_config
from randwire_d2.data.images import patience
from randwire_d2.data.images.patience import DiskGone, PatientMapper
from randwire_d2.engine import (
    argument_parser,
    check_output,
    load_config,
    train_or_evaluate,
)
from randwire_d2.engine.config.keys import YAML_KEYS
from randwire_d2.engine.config.weights import check_resumed
from randwire_d2.engine.hooks import best, finite
from randwire_d2.engine.hooks.best import Patience
from randwire_d2.engine.hooks.finite import FiniteTrainer, FiniteWeights
from randwire_d2.engine.hooks.saving import PeriodicCheckpointer, PeriodicWriter
from randwire_d2.engine.processes import failures
from randwire_d2.engine.processes.failures import explained
from randwire_d2.engine.processes.lock import locked
from randwire_d2.engine.processes.signals import StopOnSignal
from randwire_d2.engine.trainer import in_parallel
from randwire_d2.garbage import uncollected
from randwire_d2.runs import RunFolder, evaluation_config
from randwire_d2.upstream import hush_upstream
from randwire_d2.weight_files import checksum
from randwire_d2.weight_files.checksum import DamagedFile, check_whole, is_whole

# -------------------------------------------------------------------------------------------------
# Checkpoints carry a checksum
# -------------------------------------------------------------------------------------------------


def save(folder: Path, *iterations: int) -> torch.nn.Module:
    """Checkpoints of a model, whose weights are the iteration."""
    model = torch.nn.Linear(3, 2)
    checkpointer = RandWireCheckpointer(model, str(folder))
    for iteration in iterations:
        torch.nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return model


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def resume(folder: Path) -> Any:
    model = torch.nn.Linear(3, 2)
    rest = RandWireCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    assert (model.weight == rest["iteration"]).all()
    return rest["iteration"]


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """Wrong: a region of the file, such as the archive's directory, is not in the checksum."""
    save(tmp_path, 1)
    path = tmp_path / "model_0000001.pth"
    content = path.read_bytes()
    check_whole(path)
    for position in [*range(0, len(content), 17), *range(len(content) - 95, len(content))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert not is_whole(path), position
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        assert not is_whole(path), length


def test_a_flipped_weight_is_not_loaded(tmp_path: Path) -> None:
    """Wrong: as torch.load does, the wrong weights are taken without a word."""
    save(tmp_path, 1)
    path = tmp_path / "model_0000001.pth"
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(n for n in archive.namelist() if n.endswith("data/0")))
    flip(path, path.read_bytes().index(content) + 3)
    assert torch.load(path, weights_only=True)["model"]["weight"][0, 0] != 1, "torch.load looks?"
    with pytest.raises(DamagedFile, match=r"model_0000001.pth is damaged"):
        load_checkpoint(str(path))
    with pytest.raises(DamagedFile):
        RandWireCheckpointer(torch.nn.Linear(3, 2)).load(str(path))


def test_a_resumed_training_reads_its_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: each check ahead of it takes the checksum again, seconds of a large file; or a file
    that has changed since is loaded, though it has the same size and time."""
    digest, read = checksum._digest, []
    monkeypatch.setattr(checksum, "_digest", lambda *a: read.append(a) or digest(*a))
    model, path = save(tmp_path, 1), tmp_path / "model_0000001.pth"
    os.utime(path, (1, 1))
    check_resumed(RunFolder(tmp_path), model, ())
    assert resume(tmp_path) == 1 and len(read) == 1
    before = path.stat().st_ctime_ns
    flip(path, 1000)
    os.utime(path, (1, 1))
    while path.stat().st_ctime_ns == before:  # within a tick of the clock
        os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="no checkpoint of .* is whole"):
        resume(tmp_path)


def test_checkpoints_with_a_checksum_load_elsewhere_and_others_here(tmp_path: Path) -> None:
    """Wrong: Detectron2 or torch.load(mmap=True) can't read them, or theirs are refused here."""
    model = save(tmp_path, 4)
    path = str(tmp_path / "model_0000004.pth")
    other = torch.nn.Linear(3, 2)
    DetectionCheckpointer(other).load(path)
    assert torch.equal(other.weight, model.weight)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(mapped["model"]["weight"], model.weight)
    for name, kind in (("plain", {}), ("old", {"_use_new_zipfile_serialization": False})):
        theirs = str(tmp_path / f"{name}.pth")
        torch.save(mapped["model"], theirs, **kind)
        assert torch.equal(load_checkpoint(theirs)["model"]["weight"], model.weight)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone", "unnamed", "stranger's"])
def test_resume_falls_back_to_the_newest_whole_checkpoint(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: it goes on from damaged weights, from an older one than it must, or not at all, or
    does not say so."""
    save(tmp_path, 1, 2, 3)
    os.utime(tmp_path / "model_0000001.pth", (2**32, 2**32))  # the clock was wrong, or a copy's is
    last = tmp_path / "model_0000003.pth"
    if harm == "flip":
        flip(last, last.stat().st_size // 2)
    elif harm == "gone":
        last.unlink()
    elif harm == "unnamed":
        (tmp_path / "last_checkpoint").write_text("")
    elif harm == "stranger's":
        torch.save({"model": {}}, last)
    else:
        os.truncate(last, 0 if harm == "empty" else last.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "randwire_d2.runs"):
        found = resume(tmp_path)
    assert found == (3 if harm == "unnamed" else 2)
    assert f"the newest checkpoint that is whole is {tmp_path}/model_000000{found}" in caplog.text


def test_the_checkpoint_to_use_is_of_the_longer_training(tmp_path: Path) -> None:
    """Wrong: a prediction amid a training takes the weights of the shorter one before it."""
    checkpointer, run = RandWireCheckpointer(save(tmp_path, 1), str(tmp_path)), RunFolder(tmp_path)
    checkpointer.save("model_final", iteration=2)
    assert run.checkpoint() == run.final_checkpoint
    save(tmp_path, 3)
    assert run.checkpoint().name == "model_0000003.pth"
    checkpointer.save("model_final", iteration=4)
    assert run.checkpoint() == run.final_checkpoint
    (tmp_path / "last_checkpoint").unlink()  # someone's copy
    assert run.checkpoint() == run.final_checkpoint


@pytest.mark.parametrize("named", ["model_0000001.pth", "model_final.pth"])
@pytest.mark.parametrize(
    "stranger",
    [{"model": {}}, [1], {"iteration": FloatingPointError}, {"iteration": "last"}, "no torch file"],
)
def test_no_whole_checkpoint_is_said_in_one_line(
    named: str, stranger: object, tmp_path: Path
) -> None:
    """Wrong: a traceback of the missing iteration; or a training goes on from its first one."""
    save(tmp_path, 1)
    os.truncate(tmp_path / "model_0000001.pth", 9)
    torch.save(stranger, tmp_path / "model_final.pth")  # weights under a name of ours
    if isinstance(stranger, str):
        with zipfile.ZipFile(tmp_path / "model_final.pth", "w") as archive:
            archive.writestr("readme", stranger)
    (tmp_path / "last_checkpoint").write_text(named)
    expected = "has no iteration" if named == "model_final.pth" else "model_0000001.pth is"
    with raises_one_line(ValueError, match=f"{expected}.*: no checkpoint of .* is whole; train"):
        resume(tmp_path)


def test_machines_without_a_common_folder_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: one of them begins anew and the other goes on, and they wait for each other."""
    checkpointer = RandWireCheckpointer(save(tmp_path, 3), str(tmp_path))
    monkeypatch.setattr(comm, "all_gather", lambda own: [own, False])
    with raises_one_line(ValueError, match="of 2 processes, but not for 1: .*same folder"):
        checkpointer.resume_or_load("", resume=True)


def test_the_last_whole_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    """Wrong: with CHECKPOINTS_TO_KEEP 1 the old one is deleted though the new one is damaged."""
    checkpointer = RandWireCheckpointer(torch.nn.Linear(3, 2), str(tmp_path))
    hook = PeriodicCheckpointer(checkpointer, 1, max_to_keep=1)
    write = checkpointer.save

    def save_and_harm(name: str, **kwargs: Any) -> None:
        write(name, **kwargs)
        if name == "model_0000001":
            flip(tmp_path / f"{name}.pth", 700)

    checkpointer.save = save_and_harm
    left = []
    for iteration in range(3):
        hook.step(iteration)
        left.append([int(p.stem[-7:]) for p in sorted(tmp_path.glob("model_*.pth"))])
    assert left == [[0], [0, 1], [2]]
    assert RunFolder(tmp_path).last_checkpoint.name == "model_0000002.pth"


def test_a_resumed_training_keeps_no_more_checkpoints(tmp_path: Path) -> None:
    """Wrong: each time that a training is resumed, a checkpoint stays for ever; or one goes that
    is newer than where it was resumed from, which the next resumption may need."""
    checkpointer = RandWireCheckpointer(torch.nn.Linear(3, 2), str(tmp_path))
    checkpointer.save("model_final", iteration=9)
    left = []
    for start in (0, 3, 6, 2):
        hook = PeriodicCheckpointer(checkpointer, 1, max_to_keep=2)
        hook.trainer = SimpleNamespace(max_iter=9, start_iter=start)
        hook.before_train()
        for iteration in range(start, start + 3):
            hook.step(iteration)
        left.append([*RunFolder(tmp_path).periodic_checkpoints()])
    assert left == [[1, 2], [4, 5], [7, 8], [3, 4, 7, 8]]
    assert RunFolder(tmp_path).final_checkpoint.is_file()


# -------------------------------------------------------------------------------------------------
# A disk that is full
# -------------------------------------------------------------------------------------------------

FULL = 200_000  # bytes


def save_on_a_full_disk(folder: Path) -> None:
    """The second checkpoint is larger than what the folder takes.

    Wrong: half a file stays, the older one is lost, or PyTorch's riddle is all that is said.
    """
    model = torch.nn.Linear(100, 100)
    checkpointer = RandWireCheckpointer(model, str(folder))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.add_checkpointable("more", torch.nn.Linear(500, 500))
    with raises_one_line(OSError, match="model_0000002.pth can't be written") as e:
        checkpointer.save("model_0000002", iteration=2)
    assert "it needs 1.0 MB" in str(e.value) and "free" in str(e.value)
    assert sorted(os.listdir(folder)) == ["last_checkpoint", "model_0000001.pth"]
    rest = RandWireCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    assert rest["iteration"] == 1


@contextmanager
def full_disk() -> Iterator[None]:
    """Within it, no file can have more than ``FULL`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    with full_disk():
        save_on_a_full_disk(tmp_path)


def run_on_a_small_disk(
    code: str, folder: str | Path, size: int | str
) -> subprocess.CompletedProcess[str]:
    """Run Python code, whose argument is a folder, where a file system of this size is mounted."""
    command = f'mount -t tmpfs -o size={size} tmpfs "$0" && {sys.executable} -c "$CODE" "$0"'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CODE": code}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, folder], env=env, capture_output=True, text=True
    )
    if "permitted" in done.stderr or "permission" in done.stderr:
        pytest.skip("only root may mount a file system")
    return done


@pytest.mark.slow
def test_a_full_file_system_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    code = "import sys, test_survival as t; t.save_on_a_full_disk(t.Path(sys.argv[1]))"
    done = run_on_a_small_disk(code, tmp_path, FULL)
    assert done.returncode == 0, done.stderr[-2000:]


def test_too_little_room_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the training ends in the night, and nobody was warned in the evening."""
    hook = PeriodicCheckpointer(RandWireCheckpointer(torch.nn.Linear(9, 9), str(tmp_path)), 1)
    hook.trainer = SimpleNamespace(max_iter=1, start_iter=0)
    for free, said in ((1500, 0), (1400, 1)):  # two times 90 weights and their momenta
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        hook.before_train()
        assert caplog.text.count("there is no room for two") == said


def test_figures_that_cannot_be_written_end_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = PeriodicWriter([JSONWriter(str(tmp_path / "metrics.json"))], 1)
    hook.trainer = SimpleNamespace(iter=0, max_iter=9)
    with EventStorage() as storage, full_disk():
        for _ in range(3):
            storage.put_scalar("x" * FULL, 1.0)
            hook.after_step()
            storage.step()
        assert caplog.text.count("JSONWriter can't write") == 1
        hook.after_train()


def test_a_value_of_an_earlier_iteration_leaves_the_last_evaluation(tmp_path: Path) -> None:
    """Wrong: a step without a loss, as SKIP_NONFINITE has it, or without objects is evaluated; the
    line of an older loss, behind that of the evaluation, passes for a training that was resumed
    there, which has it all before it."""
    for start in (0, 4):  # the second one was resumed
        hook = PeriodicWriter([JSONWriter(str(tmp_path / "metrics.json"))], 4, 4)
        hook.trainer = SimpleNamespace(
            start_iter=start, max_iter=9, cfg=SimpleNamespace(OUTPUT_DIR=str(tmp_path)),
            earlier_max_iter=9,
        )  # fmt: skip
        with EventStorage(start) as storage:
            if start:
                for i in range(3):
                    storage.put_scalar("loss", 1.0, cur_iter=i)  # as KeepMedians does
            hook.before_train()
            for hook.trainer.iter in range(start, start + 4):
                storage.iter = hook.trainer.iter
                storage.put_scalar("anchors", 1.0)
                if hook.trainer.iter < 3:
                    storage.put_scalar("loss", 1.0)
                if hook.trainer.iter % 4 == 3:
                    storage.put_scalar("bbox/AP", 40.0, smoothing_hint=False)
                hook.after_step()
            hook.after_train()
    assert [*RunFolder(tmp_path).metrics()] == [2, 3, 7]
    assert RunFolder(tmp_path).evaluations("bbox/AP") == [(3, 40.0), (7, 40.0)]


# -------------------------------------------------------------------------------------------------
# Losses that are no number
# -------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Its loss is what its images say; its norm keeps statistics of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        x = torch.stack([image["x"] for image in batch])
        if torch.isinf(x).any():
            raise FloatingPointError("Predicted boxes contain Inf/NaN. Training has diverged.")
        return {"loss_a": (self.norm(x) * x).mean(), "loss_b": x.square().mean() / 9}


def batches(values: list[float], rank: int = 0) -> list[list[dict[str, Any]]]:
    names = [f"{i}_{rank}_a.jpg" for i in range(len(values))]
    return [
        [{"file_name": name, "x": torch.tensor([value])}, {"x": torch.tensor([value + 1])}]
        for name, value in zip(names, values)
    ]


def train(
    values: list[float], skip: int = 0, rank: int = 0, folder: Path | None = None, lr: float = 0.1
) -> dict[str, Tensor]:
    """The model after an iteration of each value; weights and statistics."""
    torch.manual_seed(0)
    model = Norm()
    wrapped = in_parallel(model, on_cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    trainer = FiniteTrainer(wrapped, batches(values, rank), optimizer)
    trainer.skip_nonfinite = skip
    if folder is not None:
        trainer.checkpointer = RandWireCheckpointer(model, str(folder))
        trainer.checkpointer.save("model_0000000", iteration=0)
    trainer.train(0, len(values))
    return model.state_dict()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["loss", "inside"])
def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, bad: float) -> None:
    """Wrong: it goes on for a while, or says neither when, nor with what, nor what is left."""
    with raises_one_line(FloatingPointError) as e:
        train([1.0, 2.0, bad, 3.0], folder=tmp_path)
    for words in (
        "the loss of iteration 2 is not finite", "2_0_a.jpg", "SOLVER.SKIP_NONFINITE",
        f"The last good checkpoint is {tmp_path / 'model_0000000.pth'}",
    ):  # fmt: skip
        assert words in str(e.value)
    with pytest.raises(FloatingPointError, match="There is no checkpoint before it"):
        train([bad])


def test_a_network_that_diverges_in_one_process_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: the training ends with Detectron2's own words and a list of images."""
    monkeypatch.setattr(finite, "comm", SimpleNamespace(get_world_size=lambda: 2))
    with pytest.raises(FloatingPointError) as e:
        train([float("inf")])
    assert str(e.value) == (
        "iteration 0: Predicted boxes contain Inf/NaN of 0_0_a.jpg. Look at the images, or lower "
        "SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
    )


def test_many_images_are_named_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: the line in which a training ends has hundreds of names, or nobody learns the last."""
    trainer = FiniteTrainer(model := Norm(), [[]], torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.image_names = lambda batch, iteration: map(str, range(finite.NAMED + 2))
    bad = {"file_name": "a.jpg", "x": torch.tensor([float("nan")])}
    trainer._data_loader_iter_obj = iter([[bad, bad]])
    with pytest.raises(FloatingPointError, match=r"of 0, 1, 2, 3, 4, 5, 6, 7 and 2 more\."):
        trainer.train(0, 1)
    assert caplog.messages[0] == "The images of iteration 0: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"


class Step(HookBase):
    """What a hook finds after the backward pass, and what is written of the step."""

    found: tuple[Any, ...] = ()

    def after_backward(self) -> None:
        trainer: Any = self.trainer
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        self.found = (gradients, [p.detach().clone() for p in trainer.model.parameters()])

    def after_step(self) -> None:
        written = get_event_storage().latest()
        times = {name: value for name, (value, _) in written.items() if "time" in name}
        assert "data_time" in times and all(0 <= value < 1000 for value in times.values())
        self.found += ({name: value for name, value in written.items() if name not in times},)


def test_a_step_is_one_of_detectron2s() -> None:
    """Wrong: hooks see no gradients, or weights after the step; or a loss is not written, or is not
    the number that it is elsewhere."""
    found = []
    for kind in (SimpleTrainer, FiniteTrainer):
        model = Norm()
        trainer = kind(model, batches([1.0]), torch.optim.SGD(model.parameters(), lr=0.1))
        if kind is FiniteTrainer:
            trainer.figures = lambda: {"train_top1": torch.tensor(0.5)}
        trainer.register_hooks([step := Step()])
        trainer.train(0, 1)
        found.append(step.found)
    (theirs, theirs_before, written), (ours, ours_before, ours_written) = found
    assert all(map(torch.equal, theirs + theirs_before, ours + ours_before))
    assert ours_written.pop("train_top1")[0] == 0.5
    assert ours_written == written and "total_loss" in written


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["loss", "inside"])
def test_a_step_that_is_skipped_leaves_no_trace(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: its gradient is applied, or a norm's statistics are NaN from then on; or it counts
    those that are not in a row, or allows one too many; or the log says nothing of it."""
    assert_equal(train([1.0, bad, bad, 2.0, bad, 3.0], skip=2), train([1.0, 2.0, 3.0]))
    numbers = [re.findall(r"skipped, number (\d) in a row \(\S+ 2\)", m) for m in caplog.messages]
    assert numbers == [["1"], ["2"], ["1"]]
    with pytest.raises(FloatingPointError, match="iteration 3 is not finite"):
        train([1.0, bad, bad, bad, 2.0], skip=2)


@pytest.mark.parametrize("before", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16], ids=str)
def test_only_float16_needs_its_gradients_scaled(
    before: torch.dtype, after: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: bfloat16 looks for infinite gradients in every step, and waits for the answer; or a
    training that was saved with, or without, a scaler, or before there was AMP, does not go on."""
    # As on a GPU: elsewhere each scaler is off.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def trainer(precision: torch.dtype | None) -> FiniteTrainer:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return FiniteTrainer(model, [], optimizer, precision)

    first, second = trainer(before), trainer(after)
    assert second.grad_scaler.is_enabled() == (after == torch.float16)
    first.iter = 3
    without, scaled = trainer(None), first.state_dict()
    second.load_state_dict(without.state_dict())
    without.load_state_dict(scaled)
    for saved_with_a_scaler in (False, True):  # as every training once was
        state = first.state_dict()
        if saved_with_a_scaler:
            state["grad_scaler"] = {**GradScaler().state_dict(), "scale": 8.0}
        second.load_state_dict(state)
        assert second.iter == 3
    assert second.grad_scaler.get_scale() == (8.0 if after == torch.float16 else 1.0)


def test_float16_whose_gradients_are_never_finite_ends_the_training() -> None:
    """Wrong: it goes on to its end without a step, as the scaler skips all of them in silence."""
    model = Norm()
    model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    values = batches([1.0] * (finite.WINDOW + 1))
    trainer = FiniteTrainer(model, values, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.grad_scaler = GradScaler("cpu", init_scale=2.0**-100)  # after 116 such steps
    with raises_one_line(FloatingPointError, match="up to iteration 100, were finite in float16"):
        trainer.train(0, len(values))


class Cube(nn.Module):
    """Its loss notes the backward pass; in autocast's type."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self.done, self.linear = done, nn.Linear(1, 1)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        y = self.linear(batch)
        y.register_hook(lambda _: self.done.append(f"backward pass in {y.dtype}"))
        return {"loss": y.pow(3).mean()}


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_losses_are_on_their_way_ahead_of_the_backward_pass(
    precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: whoever reads them waits until a GPU has nothing left to do; or the types are not
    those of SOLVER.AMP."""
    done: list[str] = []

    class Losses(finite._Losses):
        def __init__(self, losses: Any, figures: Any) -> None:
            super().__init__(losses, figures)
            done.append("on the way")

        def read(self) -> Any:
            done.append("read")
            return super().read()

    monkeypatch.setattr(finite, "_Losses", Losses)
    model = Cube(done)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: done.append("step"))
    FiniteTrainer(model, [torch.ones(2, 1)], optimizer, precision).train(0, 1)
    backward = f"backward pass in {precision or torch.float32}"
    assert done == ["on the way", backward, "read", "step"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_cuda_does_not_wait_for_all_of_it() -> None:
    """Wrong: after each step a GPU is idle until the next one's first kernels are launched."""
    model = Cube([]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.ones(2, 1, device="cuda")
    trainer = FiniteTrainer(model, [batch] * 3, optimizer, torch.bfloat16)
    trainer.figures = lambda: {"train_top1": batch.mean()}
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer.train(0, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_one_of_two(rank: int, folder: Path) -> list[Any]:
    nan = float("nan")
    bad = [1.0, nan if rank else 5.0, 2.0]  # in the second process alone
    found: list[Any] = [train(bad, 1, rank), train([1.0, 2.0], 1, rank)]
    try:
        train(bad, 0, rank, folder / "run")
    except FloatingPointError as e:
        found.append(str(e))
    return found


@pytest.mark.slow
def test_all_processes_skip_and_stop_together(tmp_path: Path) -> None:
    """Wrong: the process whose own loss is finite applies the mean gradient, which is NaN, or waits
    for the other one without an end."""
    (tmp_path / "run").mkdir()
    first, second = in_two_processes(in_one_of_two, tmp_path)
    for skipped, without, said in (first, second):
        assert_equal(skipped, without)
        assert "iteration 1 is not finite" in said and "1_1_a.jpg" in said
        assert "1_0_a.jpg" not in said and "model_0000000.pth" in said


def with_figures(rank: int) -> float:
    model = Norm()
    trainer = FiniteTrainer(model, batches([1.0]), torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.figures = lambda: {"train_top1": torch.tensor(25.0 + 50 * rank)}
    trainer.train(0, 1)
    return trainer.storage.latest()["train_top1"][0]


def test_figures_are_those_of_the_whole_batch() -> None:
    """Wrong: the training accuracy in metrics.json is that of the first process's images."""
    assert in_two_processes(with_figures) == [50.0, 50.0]


def test_weights_that_are_no_numbers_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a finite loss had an infinite gradient, and what --resume goes on from is NaN; or
    steps with such weights are skipped, as if the next images could do better."""
    model = nn.Linear(1, 1)
    checkpointer = RandWireCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000003", iteration=3)
    hook = FiniteWeights(checkpointer, 2)
    nn.init.constant_(model.bias, float("nan"))
    hook.trainer = SimpleNamespace(iter=4, max_iter=9, keys=YAML_KEYS)
    hook.after_step()  # there is no checkpoint
    hook.trainer.iter = 5
    with pytest.raises(FloatingPointError, match=r"iteration 5, and are not saved.*0000003\.pth"):
        hook.after_step()

    # Nor where no iteration of a checkpoint ends: by a signal, or where patience is lost.
    files = sorted(os.listdir(tmp_path))
    training = SimpleNamespace(
        iter=6, start_iter=0, max_iter=9, checkpointer=checkpointer, keys=YAML_KEYS
    )
    monkeypatch.setattr(best, "is_exhausted", lambda *_: True)
    cfg = detector_config()
    cfg.TEST.EVAL_PERIOD = 1
    stop, patience = StopOnSignal(hook.check), Patience(cfg, hook.check)
    stop._got = signal.SIGTERM
    hook.trainer = stop.trainer = patience.trainer = training
    for leave in (patience.after_step, stop.before_step):
        with pytest.raises(FloatingPointError, match="are not saved"):
            leave()
    assert sorted(os.listdir(tmp_path)) == files

    norm = Norm()
    nn.init.constant_(norm.norm.bias, float("nan"))
    trainer = FiniteTrainer(norm, batches([1.0]), torch.optim.SGD(norm.parameters(), 0.1))
    trainer.skip_nonfinite = 9
    with pytest.raises(FloatingPointError, match="iteration 0 is not finite"):
        trainer.train(0, 1)


def test_a_spike_of_the_loss_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "randwire_d2.engine.hooks.finite"):
        train([1.0] * 30 + [40.0, 40.0] + [1.0] * 9, lr=0.0)
    (line,) = caplog.messages
    assert line.startswith("The loss of iteration 30 is ") and line.endswith("of 30_0_a.jpg")


def test_what_came_before_counts_after_an_interruption(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: a resumed training skips more steps in a row than are allowed, or notices no spike of
    its first iterations; or an older version's checkpoint is refused."""

    def trainer(values: list[float], state: dict[str, Any] | None = None) -> FiniteTrainer:
        made = FiniteTrainer(model := Norm(), batches(values), torch.optim.SGD(model.parameters()))
        made.skip_nonfinite = 2
        if state is not None:
            made.load_state_dict(state)
        return made

    before = trainer([1.0] * 30)
    before.train(0, 30)
    older = {"iteration": 29, "optimizer": before.optimizer.state_dict()}
    for state, spikes in ((before.state_dict(), 1), (older, 0)):
        caplog.clear()
        trainer([40.0], state).train(30, 31)
        assert len([m for m in caplog.messages if "times the median of the 30" in m]) == spikes
    before = trainer([1.0, math.nan, math.nan])
    before.train(0, 3)
    with pytest.raises(FloatingPointError, match="iteration 3 is not finite"):
        trainer([math.nan], before.state_dict()).train(3, 4)


# -------------------------------------------------------------------------------------------------
# Two processes in one folder
# -------------------------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    with locked(str(folder)):
        worker = os.fork()
        if not worker:  # as a loader's, it outlives the process
            time.sleep(PATIENCE)
            os._exit(0)
        (folder / "worker").write_text(str(worker))
        time.sleep(PATIENCE)


def test_a_second_training_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    """Wrong: two trainings overwrite each other's files; or one that was killed can't be resumed,
    for ever or until its workers have noticed; or nothing is said of who it is."""
    config = str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml")
    args = argument_parser().parse_args(["--config-file", config, "OUTPUT_DIR", str(tmp_path)])
    cfg = load_config(args)
    first = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,), daemon=True)
    first.start()
    assert first.pid is not None
    worker = tmp_path / "worker"
    wait_until(lambda: worker.is_file() and worker.read_text() != "")
    with raises_one_line(ValueError, match=f"in use by another training, process {first.pid} on"):
        train_or_evaluate(cfg, args)
    assert sorted(os.listdir(tmp_path)) == ["training.lock", "worker"], "something was written"
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with locked(str(tmp_path)):
        os.kill(int(worker.read_text()), signal.SIGKILL)


def test_a_second_evaluation_of_the_same_is_refused(tmp_path: Path) -> None:
    """Wrong: two at once write the same files; the second finds its results.json.tmp gone."""
    config = str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml")
    args = argument_parser().parse_args(["--config-file", config, "OUTPUT_DIR", str(tmp_path)])
    cfg, args.eval_only = load_config(args), True
    folder = Path(evaluation_config(cfg, resume=False).OUTPUT_DIR)
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    first = context.Process(target=hold, args=(folder,), daemon=True)
    first.start()
    worker = folder / "worker"
    wait_until(lambda: worker.is_file() and worker.read_text() != "")
    with raises_one_line(ValueError, match="in use by another evaluation, process"):
        train_or_evaluate(cfg, args)
    assert sorted(os.listdir(folder)) == ["training.lock", "worker"], "something was written"
    first.kill()
    os.kill(int(worker.read_text()), signal.SIGKILL)


def test_a_training_that_is_about_to_be_overwritten_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: who forgets --resume learns it from the checkpoints that are gone; or a training loses
    the weights that it is to start from."""
    for resume, eval_only in ((False, False), (True, False), (False, True)):
        check_output("KEY", str(tmp_path), Namespace(resume=resume, eval_only=eval_only), "")
        assert not caplog.messages
        (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    check_output("KEY", str(tmp_path), Namespace(resume=False, eval_only=False), "")
    (line,) = caplog.messages
    assert line.startswith(f"KEY '{tmp_path}' holds an earlier training") and "--resume" in line
    weights, below = tmp_path / "model_final.pth", tmp_path / "inference" / "x" / "model.pth"
    weights.write_text("")
    below.parent.mkdir(parents=True)
    relative = os.path.relpath(weights)
    for path in (relative, f"{relative}?matching_heuristics=True", str(below)):
        with pytest.raises(ValueError, match=f"{re.escape(path)}', from which .*: set another KEY"):
            given = Namespace(resume=False, eval_only=False)
            check_output("KEY", str(tmp_path), given, path)
    with pytest.raises(ValueError, match="name the weights' file by its path"):
        check_output("KEY", str(tmp_path), given, f"file://{weights}")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says = "OUTPUT_DIR .*run' can't be written .Not a directory"
    with pytest.raises(ValueError, match=says), locked(str(tmp_path / "file" / "run")):
        pass


# -------------------------------------------------------------------------------------------------
# Data: workers that are killed, a disk that is away
# -------------------------------------------------------------------------------------------------


class Killed(Dataset):
    """Images, one of which is the end of the worker that reads it."""

    def __len__(self) -> int:
        return 99

    def __getitem__(self, index: int) -> Tensor:
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3)


def test_the_end_of_a_worker_is_explained() -> None:
    """Wrong: "Connection reset by peer", or nothing but a number of a process, is said."""
    says = "a worker that reads images was killed.*lower DATALOADER.NUM_WORKERS 1"
    with raises_one_line(ChildProcessError, match=says):
        explained("DATALOADER.NUM_WORKERS 1", list, DataLoader(Killed(), num_workers=1))


def test_the_end_of_a_worker_may_be_told_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: PyTorch's own error, raised by its handler of signals on the way from the lost
    connection to its explanation, ends the training as a bug."""
    lost = compile("raise ConnectionResetError", "torch/utils/data/dataloader.py", "exec")
    waits: list[float] = []

    def handler(*_: object) -> None:
        sys.settrace(None)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def lose(calls: Iterator[int]) -> None:
        sys.settrace(lambda *_: handler() if next(calls, None) is None else None)
        exec(lost)

    clock = SimpleNamespace(sleep=lambda seconds: waits.append(seconds) or handler())
    monkeypatch.setattr(failures, "time", clock)
    with uncollected():  # what a finalizer of garbage raises, nobody sees
        for number in count():  # of functions that are called before the handler is
            with pytest.raises(ChildProcessError, match="a worker .* was killed .*pid 7"):
                explained("WORKERS 1", lose, iter(range(number)))
            if waits:
                break
    assert number > 3


@pytest.mark.parametrize("kind", [DiskGone, ValueError])
def test_what_a_worker_says_is_said_without_its_traceback(kind: type[Exception]) -> None:

    def read() -> None:
        try:
            raise kind("a.jpg can't be read:\ngone")
        except kind:  # as PyTorch hands it over
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with pytest.raises(kind, match="^a.jpg can't be read: gone$"):
        explained("", read)


def test_a_gpu_without_memory_is_explained() -> None:
    """Wrong: who has eight GPUs and a deadline is not told what takes less memory."""
    says = "CUDA out of memory. Tried 2 GiB: lower SOLVER.IMS.*RECOMPUTE True.*CUDA_GRAPHS False"
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB")
    with pytest.raises(MemoryError, match=says):
        explained("", mock.Mock(side_effect=error))


WITH_LITTLE_SHARED_MEMORY = """
import torch
from torch.utils.data import DataLoader
from randwire_d2.engine.processes.failures import explained

try:
    loader = DataLoader(torch.zeros(99, 1000, 1000), num_workers=1)
    explained("DATALOADER.NUM_WORKERS 1", list, loader)
except ChildProcessError as e:
    print(e)
"""


@pytest.mark.slow
def test_full_shared_memory_is_explained() -> None:
    done = run_on_a_small_disk(WITH_LITTLE_SHARED_MEMORY, "/dev/shm", "2m")
    assert "a worker has no room in /dev/shm" in done.stdout, done.stderr
    assert "--shm-size" in done.stdout and "lower DATALOADER.NUM_WORKERS 1" in done.stdout


def test_a_full_disk_is_said_of_any_file(tmp_path: Path) -> None:
    """Wrong: an evaluation's file that does not fit is taken for a bug; or whoever has trained in a
    process is told no more of what his own log can't write."""
    assert logging.raiseExceptions

    def write() -> None:
        with full_disk(), open(tmp_path / "instances_predictions.pth", "wb") as f:
            torch.save(torch.zeros(FULL), f)

    with raises_one_line(OSError, match=r"^a file can't be written \(.*make room"):
        explained("", write)
    assert logging.raiseExceptions


def test_the_log_has_no_traceback_of_a_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: the line that says what to do is lost among those of Detectron2's; or a bug's
    traceback is lost."""
    trainer = FiniteTrainer(Norm(), batches([1.0]), torch.optim.SGD(Norm().parameters(), 0.1))
    for error, has_traceback in ((OSError("the disk is full"), False), (KeyError("bug"), True)):
        caplog.clear()
        trainer.before_step = mock.Mock(side_effect=error)
        with pytest.raises(type(error)):
            explained("", trainer.train, 0, 1)
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert bool(record.exc_info) == has_traceback
        assert has_traceback or record.getMessage() == "The training ends: the disk is full"


@pytest.mark.parametrize(("error", "said"), [(OSError("full disk"), 0), (KeyError("bug"), 1)])
def test_a_full_disk_has_no_traceback_of_tensorboards_thread(
    error: Exception, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: it follows the tool's line that says what to do; or a bug's traceback is lost."""
    usual = mock.Mock()
    monkeypatch.setattr(threading, "excepthook", usual)
    monkeypatch.setattr(upstream, "_usual_excepthook", usual)
    hush_upstream()
    writer = _AsyncWriter(mock.Mock(write=mock.Mock(side_effect=error)))
    with suppress(type(error)):  # if the thread is faster
        writer.write(b"")
    writer._worker.join()
    with pytest.raises(type(error)):
        writer.write(b"")
    assert usual.call_count == said


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of images that comes back in the middle of the pauses, if it is renamed."""
    draw_image_folders(tmp_path / "disk", classes=("a",), train=2, val=1)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) % 3 == 0 and (tmp_path / "away").exists():
            (tmp_path / "away").rename(tmp_path / "disk")

    monkeypatch.setattr(patience.time, "sleep", sleep)
    monkeypatch.setattr(patience, "PAUSES", (1.0, 2.0, 4.0, 8.0))
    yield tmp_path / "disk"
    monkeypatch.undo()


def test_a_disk_that_returns_is_waited_for(disk: Path) -> None:
    """Wrong: a network disk that is away for seconds ends a training, or its images are skipped."""
    image = disk / "train" / "a" / "0.png"
    mapper = PatientMapper(detector_config(), is_train=False)
    for read in (read_image, lambda path: mapper({"file_name": path, "image_id": 0})["image"]):
        disk.rename(disk.with_name("away"))
        assert read(str(image)) is not None


def test_a_disk_that_stays_away_ends_in_a_line_and_a_missing_file_is_not_waited_for(
    disk: Path,
) -> None:
    image = disk / "train" / "a" / "0.png"
    image.unlink()
    assert read_image(str(image)) is None
    (disk / "train" / "a").rename(disk / "elsewhere")
    with raises_one_line(DiskGone, match=r"away for 15 s\. Bring it back.*--resume"):
        read_image(str(image))
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(DiskGone, match="Input/output error"):
        patience.patiently(mock.Mock(side_effect=error), str(disk / "x.jpg"))


# -------------------------------------------------------------------------------------------------
# Memory
# -------------------------------------------------------------------------------------------------


def test_no_tensor_stays_behind_an_iteration(tmp_path: Path) -> None:
    """Wrong: a training or a prediction keeps tensors of images that it has done with."""
    config = str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml")
    options = [
        "MODEL.RANDWIRE.CHANNELS", "4", "MODEL.RANDWIRE.NUM_NODES", "5",
        "MODEL.RANDWIRE.FUSED", "on", "INPUT.MIN_SIZE_TRAIN", "(48, 64)",
        "INPUT.MIN_SIZE_TEST", "48",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "8", "SOLVER.WARMUP_ITERS", "2",
        "SOLVER.SKIP_NONFINITE", "1", "SOLVER.EMA.DECAY", "0.9", "DATASETS.TEST", "()",
        "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(tmp_path),
    ]  # fmt: skip
    cfg = load_config(argument_parser().parse_args(["--config-file", config, *options]))
    for watch in (watch_training(cfg, 1), watch_prediction(cfg, 8, 1)):
        assert [s.iteration for s in watch.settled] == [2, 3, 4, 5, 6, 7]
        least, most = watch.tensors
        assert least == most, watch.samples


def test_memory_is_measured_on_data_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: --data is refused, or the training ends with an evaluation."""
    configs = []

    def watch(cfg: CfgNode, *_: int) -> MemoryWatch:
        configs.append(cfg)
        with MemoryWatch(8, 1) as watch:
            for iteration in range(8):
                watch.look(iteration)
        return watch

    monkeypatch.setattr(measure_memory, "watch_training", watch)
    monkeypatch.setattr(measure_memory, "watch_prediction", watch)
    config = str(ROOT / "configs/faster_rcnn_randwire_own_images.yaml")
    data = write_sound(tmp_path / "data")["coco"]
    measure_memory.main(["--config-file", config, "--iterations", "8", *data])
    assert [(len(cfg.DATASETS.TRAIN), cfg.DATASETS.TEST) for cfg in configs] == [(1, ())] * 2
    assert "| prediction |" in capsys.readouterr().out


def test_growth_is_noticed() -> None:
    """Else the two figures prove nothing: 1 MB and a tensor are kept in each iteration."""
    kept = []
    with MemoryWatch(40, 1) as watch:
        for iteration in range(40):
            kept.append(torch.ones(1 << 18))
            watch.look(iteration)
    least, most = watch.tensors
    assert (len(watch.settled), most - least) == (30, 29)
    # It may be none: what earlier tests have freed is used first.
    assert watch.slope < 1 << 21
