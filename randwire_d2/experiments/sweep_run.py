"""A run of a sweep: one network, trained or evaluated in its own folder, and its state."""

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import atomic_open
from ..runs import RunFolder
from ..text import one_line

State = Literal["finished", "failed", "running", "unfinished"]

BACKBONE = "backbone.pth"  # in a run's folder: its initial weights, converted


@dataclass(frozen=True)
class Setting:
    """What the seeds of a result share: a bar of Figure 3, a point of Figure 6, a row of Table 3.

    Attributes:
        generator: the label of the generator, such as ``"WS(4, 0.75)"``.
        node_op: the operation of every node.
        channels: C.
        flops: the multiply-adds of the networks as classifiers, on average over the sweep's seeds.
        config: the name of the config if the sweep compares no generators; else ``""``.
    """

    generator: str
    node_op: str
    channels: int
    flops: float
    config: str


@dataclass(frozen=True)
class Status:
    """The status of a run, read from its folder.

    Attributes:
        state: ``"failed"`` is a run that ended by itself, without its result; one that was killed
            together with its sweep is ``"unfinished"``.
        progress: the finished part of the training, 0 … 1.
        score: top-1 accuracy or AP, in %; None if the run is not finished.
        reason: if the run failed, the last line of its output, or the signal that killed it; if it
            is unfinished, why its config.yaml can't be read.
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
        sweep: the command that trains it, if it is another sweep's.
        config: a digest of that sweep's config for it.
        conversion: arguments of tools/convert_checkpoint.py, which converts a classifier's
            checkpoint to a detector's backbone; ``()`` if the file is loaded without conversion.
    """

    file: str
    sweep: str = ""
    config: str = ""
    conversion: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One network of a setting.

    Attributes:
        seed: the seed of the wiring and of the training.
        folder: its OUTPUT_DIR.
        arguments: the arguments of the tool that trains or evaluates it.
        classifies: whether the network is a classifier, and not a detector.
        identity: its whole config as text, without the keys that do not change the result.
        weights: its initial weights; None for a run from scratch.
        evaluates: whether it only evaluates its weights, and trains nothing.
        on_cpu: whether it runs on a CPU.
        workers: the number of workers that read images, of each of its processes.
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
    workers: int = 0

    def check(self) -> None:
        """Check that the folder is free, or this run's.

        Raises:
            ValueError: the folder contains a run of another sweep, or of this one before a change.
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
        """Create the folder and record this run's identity in it, which ``check`` compares."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_open(self.folder / "sweep.yaml") as f:
            f.write(self.identity)

    @property
    def tool(self) -> str:
        """The script in tools/ that trains or evaluates it."""
        return "pretrain_imagenet.py" if self.classifies else "train_net.py"

    @property
    def metric(self) -> str:
        """The metric for comparing runs, by its name in metrics.json."""
        return "classification/top1" if self.classifies else "bbox/AP"

    @property
    def is_converted(self) -> bool:
        """Whether the converted weights exist."""
        # In a classifier's folder, backbone.pth is made from its results, not its initial weights.
        return not self.classifies and (self.folder / BACKBONE).is_file()

    @property
    def can_start(self) -> bool:
        """Whether the initial weights exist, if it needs any."""
        if self.weights is None or self.is_converted or "://" in self.weights.file:
            return True
        return Path(self.weights.file).is_file()

    @property
    def failure(self) -> Path:
        """The file with the end of a failed run's output."""
        return self.folder / "failed.txt"

    @property
    def lock(self) -> Path:
        """The file whose lock the run's process holds, even if its sweep was killed."""
        return self.folder / "lock"

    @property
    def result(self) -> RunFolder | None:
        """The folder of its result: the training's; for ``evaluates``, the last evaluation's."""
        folder = RunFolder(self.folder)
        return folder.last_evaluation() if self.evaluates else folder

    def status(self) -> Status:
        progress, score = self._progress()
        if score is not None:
            return Status("finished", 1.0, score)
        if self.failure.is_file():
            # The file begins with how the run ended; the end of its output follows.
            lines = self.failure.read_text(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()] or [""]
            killed = said[0].startswith("killed")
            return Status("failed", progress, reason=said[0] if killed else said[-1])
        if _is_locked(self.lock):
            return Status("running", progress)
        return Status("unfinished", progress, reason=self._damage())

    def _damage(self) -> str:
        """Why its config.yaml can't be read, so that no progress is known; "" if it can."""
        try:
            RunFolder(self.folder).config()
        except FileNotFoundError:  # it has not begun
            return ""
        except (OSError, ValueError) as e:
            return one_line(e)
        return ""

    def _progress(self) -> tuple[float, float | None]:
        """The finished part of the run, 0 … 1, and its score; None if it is not finished."""
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
    """Check that the initial weights of all unfinished runs exist.

    Raises:
        ValueError: some are missing; the message says how to train them.
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
        with open(path, "r+") as f:  # writable: NFS needs that for an exclusive lock
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, or its file system has no locks
        return False
    return False
