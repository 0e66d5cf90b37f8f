"""Figure 5's runs: trained networks, evaluated without one node or one edge (§4.1)."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..checkpoint import EMA_KEY, Preprocessing, check_wiring, load_checkpoint
from ..classification import ImageClassifier, load_config
from ..classification.data import UNREADABLE, build_test_loader
from ..config import drawn_network, generator_from_config, spec_from_config
from ..engine import argument_parser
from ..files import atomic_open
from ..modeling import RandWireClassifier
from ..runs import RunFolder
from ..text import one_line, parse_json, prefixed
from ..wiring import graph_label
from .damage import KINDS, Damage, Work, all_damages, count_correct, count_work

TIMED_BATCHES = 5  # batches for timing the intact network


@dataclass
class Counts:
    """The counts so far, as they are on disk.

    Attributes:
        damaged: for each damage, the number of images classified correctly (top-1).
        done: the number of the run's images that were evaluated; they are the first ones.
        images: the number of these that can be read.
        intact: the number of these that the intact network classifies correctly.
        seconds: the time of all evaluations, without reading images.
        full_seconds: the time of full evaluations of the intact network, on ``full_images``.
    """

    damaged: list[int]
    done: int = 0
    images: int = 0
    intact: int = 0
    seconds: float = 0.0
    full_seconds: float = 0.0
    full_images: int = 0


@dataclass(frozen=True)
class DamageRun:
    """A trained network, with the damages and the images to evaluate it with.

    Attributes:
        folder: the OUTPUT_DIR of the training.
        label: the generator, such as ``"WS(4, 0.75)"``, or the name of its SPEC_FILE.
        cfg: the config of the training.
        model: the network in eval mode, with its weights.
        damages: the damages, each applied alone.
        images: the images of the test set that are evaluated.
        work: the multiply-adds for one image.
        identity: everything that the counts depend on.
    """

    folder: Path
    label: str
    cfg: CfgNode
    model: ImageClassifier
    damages: list[Damage]
    images: Dataset
    work: Work
    identity: Mapping[str, Any]

    @property
    def state_file(self) -> Path:
        """The file of the counts; its name depends on checkpoint, images and damages."""
        digest = _sha256(json.dumps(self.identity, sort_keys=True).encode())
        return self.folder / f"damage_{digest[:12]}.json"


class Damaged(NamedTuple):
    """The outcome of a run."""

    run: DamageRun
    counts: Counts

    @property
    def top1(self) -> float:
        """The accuracy of the intact network, in %."""
        return 100 * self.counts.intact / self.counts.images

    @property
    def losses(self) -> list[float]:
        """∆ of each damage: the loss of accuracy, in percentage points."""
        counts = self.counts
        return [100 * (counts.intact - kept) / counts.images for kept in counts.damaged]

    @property
    def full_seconds(self) -> float:
        """The estimated time of one full evaluation per damage, in seconds."""
        counts = self.counts
        return counts.full_seconds / counts.full_images * counts.done * len(counts.damaged)

    def mean_loss(self, kind: str) -> float:
        """The mean ∆ of all nodes or all edges; NaN if there are none."""
        losses = [loss for d, loss in zip(self.run.damages, self.losses) if d.kind == kind]
        return float(np.mean(losses)) if losses else float("nan")


def load_run(
    folder: str | Path,
    opts: Sequence[str] = (),
    weights: str | Path | None = None,
    kinds: Sequence[str] = KINDS,
    max_images: int | None = None,
) -> DamageRun:
    """Load a network that tools/pretrain_imagenet.py trained, and check its files and images.

    Args:
        folder: the OUTPUT_DIR of the training.
        opts: KEY VALUE pairs for its config.
        weights: the checkpoint; by default its model_final.pth.
        kinds: the kinds of damage, some of ``KINDS``.
        max_images: how many images to evaluate, by default all; they are spread evenly over the
            test set, which lists class after class.

    Raises:
        ValueError: a file is missing, or weights, config and images do not match; one line.
    """
    folder = Path(folder)
    weights = Path(weights or RunFolder(folder).final_checkpoint)
    if max_images is not None and max_images < 1:
        raise ValueError(f"the number of images must be at least 1; got {max_images}")
    cfg = _read_config(folder, weights, opts)
    (dataset_name,) = cfg.DATASETS.TEST
    model = _load_model(cfg, weights)
    spec = model.network.backbone.spec
    damages = all_damages(spec, kinds)
    if not damages:
        raise ValueError(f"{folder}: its random graphs have no {' and no '.join(kinds)} to remove")
    images: Any = build_test_loader(cfg, dataset_name).dataset
    count = min(max_images or len(images), len(images))
    size = cfg.INPUT.TEST_CROP_SIZE
    identity = {
        "fingerprint": spec.fingerprint,
        "weights": _sha256(weights.read_bytes()),
        "head_relu": cfg.MODEL.CLASSIFIER.HEAD_RELU,
        "dataset": dataset_name,
        # The same name may mean other images later, with another DETECTRON2_DATASETS, for example.
        "listing": _sha256(repr([(r["file_name"], r["label"]) for r in images.records]).encode()),
        "of_images": len(images),
        "images": count,
        "size": size,
        "ratio": cfg.INPUT.TEST_CROP_RATIO,
        **Preprocessing.from_config(cfg).to_dict(),
        "kinds": list(kinds),
    }
    return DamageRun(
        folder=folder,
        label=_label(cfg),
        cfg=cfg,
        model=model,
        damages=damages,
        images=Subset(images, [i * len(images) // count for i in range(count)]),
        work=count_work(spec, damages, size, size, cfg.MODEL.CLASSIFIER.NUM_CLASSES),
        identity=identity,
    )


def tell_apart(runs: Sequence[DamageRun]) -> list[DamageRun]:
    """Extend equal labels of runs that one column of the figure must not pool: those that differ in
    regime, N, operation or test set. C may differ.

    Raises:
        ValueError: two runs have the same weights and images, and would count twice.
    """
    folders: dict[str, Path] = {}
    for run in runs:
        first = folders.setdefault(run.state_file.name, run.folder)
        if first is not run.folder:
            raise ValueError(
                f"{run.folder} has the same weights and images as {first}: give only one"
            )
    kinds = {run.folder: _kind(run) for run in runs}
    labelled = []
    for run in runs:
        alike = [kinds[other.folder] for other in runs if other.label == run.label]
        differ = [own for own, *all_ in zip(kinds[run.folder], *alike) if len({*all_}) > 1]
        labelled.append(replace(run, label=", ".join([run.label, *differ])))
    return labelled


def _kind(run: DamageRun) -> tuple[str, ...]:
    network: Any = run.model.network
    spec = network.backbone.spec
    return (
        spec.regime,
        f"N={max(dag.num_nodes for dag in spec.dags)}",
        spec.node_op,
        str(run.identity["dataset"]),
        # Two networks may have files of the same name.
        spec.fingerprint[:12] if drawn_network(run.cfg) else "",
    )


def _read_config(folder: Path, weights: Path, opts: Sequence[str]) -> CfgNode:
    """The config of a training, changed to evaluate the weights on one data set."""
    config = RunFolder(folder).config_file
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; give the OUTPUT_DIR of a training that "
                "tools/pretrain_imagenet.py has finished"
            )
    flags = ["--eval-only", "--config-file", str(config), *opts, "MODEL.WEIGHTS", str(weights)]
    with prefixed(folder):
        cfg = load_config(argument_parser().parse_args(flags))
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"{folder}: the loss is that on one data set, but DATASETS.TEST has "
            f"{list(cfg.DATASETS.TEST)}; add DATASETS.TEST \"('NAME',)\""
        )
    return cfg


def _label(cfg: CfgNode) -> str:
    if drawn_network(cfg):
        return Path(cfg.MODEL.RANDWIRE.SPEC_FILE).stem or spec_from_config(cfg).fingerprint[:12]
    generator = generator_from_config(cfg)
    return graph_label(generator.graph, generator.graph_params)


def _load_model(cfg: CfgNode, weights: Path) -> Any:
    """Build a config's model in eval mode and load all of its weights: with SOLVER.EMA the average,
    which the training's own evaluations tested."""
    model = build_model(cfg).eval()
    if not isinstance(model.network, RandWireClassifier):
        raise ValueError(
            f"{weights}: MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}, which has no random "
            "graph to damage; give a RandWire"
        )
    try:
        checkpoint = load_checkpoint(str(weights))
        check_wiring(model, checkpoint)
        model.load_state_dict(checkpoint.get(EMA_KEY, checkpoint["model"]))
    except (RuntimeError, ValueError) as e:
        raise ValueError(
            f"{weights} is no checkpoint of its config's network: {one_line(e, 1000)}"
        ) from e
    return model


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def evaluate(run: DamageRun) -> Damaged:
    """Evaluate all damages in one pass over the images; progress goes to stderr.

    The counts are written into ``run.state_file`` after every batch. If that file exists, the
    evaluation resumes with the first image that it does not count.

    Raises:
        ValueError: no image can be read, or the state file is damaged.
        OSError: the state file can't be written.
    """
    counts = _read_counts(run)
    _write_counts(run, counts)  # fail now, not after the first batch, if it can't be written
    total = int(run.identity["images"])
    todo = Subset(run.images, range(counts.done, total))
    loader = DataLoader(
        todo,
        batch_size=run.cfg.TEST.IMS_PER_PROCESS,
        num_workers=run.cfg.DATALOADER.NUM_WORKERS if len(todo) else 0,
        pin_memory=run.cfg.MODEL.DEVICE.startswith("cuda"),
    )
    bar = tqdm(
        total=total * len(run.damages),
        initial=counts.done * len(run.damages),
        desc=f"{run.folder}: {len(run.damages)} damages × {total} images",
        unit="",
        unit_scale=True,
        smoothing=0.05,
    )
    with bar:
        for i, batch in enumerate(loader):
            _count_batch(run, batch, counts, timed=i < TIMED_BATCHES, bar=bar)
            _write_counts(run, counts)
    if not counts.images:
        name = run.identity["dataset"]
        raise ValueError(f"{run.folder}: none of the images of {name!r} can be read")
    return Damaged(run, counts)


def _count_batch(
    run: DamageRun, batch: Mapping[str, torch.Tensor], counts: Counts, timed: bool, bar: tqdm
) -> None:
    model, labels = run.model, batch["label"]
    start = time.perf_counter()
    network: Any = model.network
    images = model.preprocess(batch["image"])
    intact, damaged = count_correct(
        network, images, labels, run.damages, progress=lambda: bar.update(len(labels))
    )
    seconds = time.perf_counter() - start
    if timed:
        for _ in range(2):  # the first prepares the kernels of these shapes
            start = time.perf_counter()
            with torch.no_grad():
                model(batch).argmax(1).cpu()
        counts.full_seconds += time.perf_counter() - start
        counts.full_images += len(labels)
    counts.seconds += seconds
    counts.done += len(labels)
    counts.images += int((labels != UNREADABLE).sum())
    counts.intact += intact
    counts.damaged = [a + b for a, b in zip(counts.damaged, damaged, strict=True)]


def _read_counts(run: DamageRun) -> Counts:
    if not run.state_file.is_file():
        return Counts([0] * len(run.damages))
    try:
        state = parse_json(run.state_file.read_text())
        counts = Counts(**state["counts"])
        if state["identity"] != run.identity or len(counts.damaged) != len(run.damages):
            raise ValueError("it belongs to something else")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{run.state_file}: {e}; remove this file to evaluate anew") from e
    return counts


def _write_counts(run: DamageRun, counts: Counts) -> None:
    with atomic_open(run.state_file) as f:
        json.dump({"identity": run.identity, "counts": asdict(counts)}, f)
