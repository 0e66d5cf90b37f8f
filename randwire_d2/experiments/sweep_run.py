"""A run of a sweep: one network, trained or evaluated in a folder of its own, and its state."""

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import atomic_open
from ..runs import RunFolder

State = Literal["finished", "failed", "running", "unfinished"]

BACKBONE = "backbone.pth"  # in a run's folder: the checkpoint that it starts from, converted


@dataclass(frozen=True)
class Setting:
    """What several seeds are drawn from: a bar of Figure 3, a point of Figure 6, a row of Table 3.

    Attributes:
        generator: its label, such as ``"WS(4, 0.75)"``.
        node_op: the operation of every node.
        channels: C.
        flops: the multiply-adds of its networks as classifiers, on average over the sweep's seeds.
        config: the name of its config, where the sweep compares no generators; else ``""``.
    """

    generator: str
    node_op: str
    channels: int
    flops: float
    config: str


@dataclass(frozen=True)
class Status:
    """What a run's folder says.

    Attributes:
        state: ``"failed"`` is a run that ended by itself, without its result; one that was killed
            together with its sweep is ``"unfinished"``.
        progress: the part of the training that is done, 0 … 1.
        score: of a finished run, its top-1 accuracy or AP, in %.
        reason: of a failed run, the last thing that it said.
    """

    state: State
    progress: float
    score: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Weights:
    """The checkpoint that a run starts from.

    Attributes:
        file: its path or URL, before any conversion.
        sweep: the command that trains it, if another sweep does.
        conversion: arguments of tools/convert_checkpoint.py, which makes a detector's backbone of
            a classifier's checkpoint; ``()`` if the file is loaded as it is.
    """

    file: str
    sweep: str = ""
    conversion: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One network of a setting.

    Attributes:
        seed: of the wiring and of the training.
        folder: its OUTPUT_DIR.
        arguments: of the tool that trains or evaluates it.
        classifies: whether it is a classifier's, and not a detector's.
        identity: its whole config, as text, but for the keys that do not change the result.
        weights: what it starts from; None of a run from scratch.
        evaluates: whether it evaluates its weights, and trains nothing.
        on_cpu: whether it needs no GPU.
    """

    setting: Setting
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    classifies: bool
    identity: str
    weights: Weights | None = None
    evaluates: bool = False
    on_cpu: bool = False

    def check(self) -> None:
        """
        Raises:
            ValueError: the folder holds another run: of another sweep, or of this one before it was
                changed.
        """
        path = self.folder / "sweep.yaml"
        if path.is_file() and (text := path.read_text()) != self.identity:
            ours, theirs = self.identity.splitlines(), text.splitlines()
            changed = [line.strip() for line in ours if line not in theirs]
            changed += [f"without {line.strip()}" for line in theirs if line not in ours]
            raise ValueError(
                f"{self.folder} holds a run of another config than this sweep's, where it is now "
                f"{'; '.join(changed[:5])}: choose another --output, or remove that folder"
            )

    def claim(self) -> None:
        """Make the folder this run's, for all sweeps to come."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_open(self.folder / "sweep.yaml") as f:
            f.write(self.identity)

    @property
    def tool(self) -> str:
        """The script in tools/ that trains or evaluates it."""
        return "pretrain_imagenet.py" if self.classifies else "train_net.py"

    @property
    def metric(self) -> str:
        """What it is compared by, under its name in metrics.json."""
        return "classification/top1" if self.classifies else "bbox/AP"

    @property
    def is_converted(self) -> bool:
        """Whether its weights are there in the form that it loads."""
        # A classifier's own is what it became.
        return not self.classifies and (self.folder / BACKBONE).is_file()

    @property
    def can_start(self) -> bool:
        """Whether the weights that it starts from are there, if it needs any."""
        if self.weights is None or self.is_converted or "://" in self.weights.file:
            return True
        return Path(self.weights.file).is_file()

    @property
    def failure(self) -> Path:
        """The file in which a failed run leaves the end of its output."""
        return self.folder / "failed.txt"

    @property
    def lock(self) -> Path:
        """The file whose lock the run's process holds, even if its sweep was killed."""
        return self.folder / "lock"

    @property
    def result(self) -> RunFolder | None:
        """Where its result stands: the evaluation, once it is there, or the training."""
        folder = RunFolder(self.folder)
        return folder.last_evaluation() if self.evaluates else folder

    def status(self) -> Status:
        progress, score = self._progress()
        if score is not None:
            return Status("finished", 1.0, score)
        if self.failure.is_file():
            # How it ended, and the end of its output.
            lines = self.failure.read_text(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()] or [""]
            killed = said[0].startswith("killed")
            return Status("failed", progress, reason=said[0] if killed else said[-1])
        return Status("running" if _is_locked(self.lock) else "unfinished", progress)

    def _progress(self) -> tuple[float, float | None]:
        """How far the run is, 0 … 1, and its score, once it is finished."""
        run = self.result
        if run is None:
            return 0.0, None
        if self.evaluates:
            task, name = self.metric.split("/")
            return 1.0, run.evaluation().results.get(task, {}).get(name)
        progress = run.progress()
        finished = progress.done == 1 and run.final_checkpoint.is_file()
        return progress.done, progress.last.get(self.metric) if finished else None


def check_weights(runs: Sequence[Run]) -> None:
    """
    Raises:
        ValueError: not all weights are there that the unfinished runs start from; it says how to
            train them.
    """
    lacking = [run.weights for run in runs if not run.can_start and run.status().score is None]
    weights = next(filter(None, lacking), None)
    if weights is None:
        return
    train = f"train them first, {weights.sweep}; or " if weights.sweep else ""
    raise ValueError(
        f"the weights that {len(lacking)} of {len(runs)} runs start from are missing, such as "
        f"{weights.file}: {train}say where they are, like MODEL.WEIGHTS "
        "'networks/c{channels}_seed{seed}.pth'"
    )


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "r+") as f:  # to write: else NFS locks nothing
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it is not there, or its disk has no locks
        return False
    return False
