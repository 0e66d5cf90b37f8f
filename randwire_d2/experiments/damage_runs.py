"""Figure 5: the accuracy that trained networks lose with one node, or with one edge (§4.1)."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..checkpoint import check_wiring, load_checkpoint
from ..classification import ImageClassifier, load_config
from ..classification.data import UNREADABLE, build_test_loader
from ..config import drawn_network, generator_from_config, spec_from_config
from ..drawing.style import BLUE, GREY, INK, RED, plots, style_axes
from ..engine import argument_parser
from ..files import atomic_open
from ..modeling import RandWireClassifier
from ..wiring import graph_label
from .damage import KINDS, Damage, Work, all_damages, count_correct, count_work

TIMED_BATCHES = 5  # on which the intact network is timed
ORANGE = "#E69F00"  # Okabe and Ito's, as the colours of wiring.draw
AXES = {"node": "output degree of the removed node", "edge": "input degree of the edge's target"}


@dataclass
class Counts:
    """What was found so far, as it lies on disk.

    Attributes:
        done: the images that were looked at, the first ones.
        images: those of them that can be read.
        intact: how many of these the intact network classifies correctly (top-1).
        damaged: the same for each damage.
        seconds: that all this took, without reading images.
        full_seconds, full_images: the time of full evaluations of the intact network, and of how
            many images.
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
    """A trained network, ready to be damaged.

    Attributes:
        folder: of the training.
        label: the generator, such as ``"WS(4, 0.75)"``, or the name of its SPEC_FILE.
        cfg: its config.
        model: in eval mode, with its weights.
        damages: each of them will be evaluated alone.
        images: of the test set.
        work: the multiply-adds for one image.
        identity: all that the counts depend on.
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
        """The file of the counts; another checkpoint, other images or damages have another one."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"damage_{digest[:12]}.json"


@dataclass(frozen=True)
class Damaged:
    """The outcome of a run.

    Attributes:
        top1: the accuracy of the intact network, in %.
        losses: ∆ of each damage: the points of accuracy lost.
        shared_seconds: that the evaluation took, without reading images.
        full_seconds: that as many full evaluations as there are damages would take.
    """

    folder: str
    label: str
    identity: Mapping[str, Any]
    images: int
    top1: float
    damages: list[Damage]
    losses: list[float]
    work: Work
    shared_seconds: float
    full_seconds: float
    counts: Counts = field(repr=False)

    def mean_loss(self, kind: str) -> float:
        """The mean ∆ of all nodes or all edges; NaN if there are none."""
        losses = [loss for d, loss in zip(self.damages, self.losses) if d.kind == kind]
        return float(np.mean(losses)) if losses else float("nan")


def load_run(
    folder: str | Path,
    opts: Sequence[str] = (),
    weights: str | Path | None = None,
    kinds: Sequence[str] = KINDS,
    max_images: int | None = None,
) -> DamageRun:
    """Load a network that tools/pretrain_imagenet.py trained, and check all that it needs.

    Args:
        folder: the OUTPUT_DIR of the training.
        opts: KEY VALUE pairs for its config.
        weights: its model_final.pth by default.
        kinds: of damage, some of ``KINDS``.
        max_images: spread evenly over the test set, which lists class after class; by default all.

    Raises:
        ValueError: something is missing, or does not belong together; one line.
    """
    folder = Path(folder)
    config, weights = folder / "config.yaml", Path(weights or folder / "model_final.pth")
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; give the OUTPUT_DIR of a training that "
                "tools/pretrain_imagenet.py has finished"
            )
    if max_images is not None and max_images < 1:
        raise ValueError(f"the number of images must be at least 1; got {max_images}")
    flags = ["--eval-only", "--config-file", str(config), *opts, "MODEL.WEIGHTS", str(weights)]
    try:
        cfg = load_config(argument_parser().parse_args(flags))
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"{folder}: the loss is that on one data set, but DATASETS.TEST has "
            f"{list(cfg.DATASETS.TEST)}; add DATASETS.TEST \"('NAME',)\""
        )
    model = _load_model(cfg, weights)
    spec = model.network.backbone.spec
    damages = all_damages(spec, kinds)
    if not damages:
        raise ValueError(f"{folder}: its random graphs have no {' and no '.join(kinds)} to remove")
    (dataset_name,) = cfg.DATASETS.TEST
    images: Any = build_test_loader(cfg, dataset_name).dataset
    count = min(max_images or len(images), len(images))
    size = cfg.INPUT.TEST_CROP_SIZE
    identity = {
        "fingerprint": spec.fingerprint,
        "weights": _sha256(weights),
        "dataset": dataset_name,
        "of_images": len(images),
        "images": count,
        "size": size,
        "ratio": cfg.INPUT.TEST_CROP_RATIO,
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


def _label(cfg: CfgNode) -> str:
    if drawn_network(cfg):
        return Path(cfg.MODEL.RANDWIRE.SPEC_FILE).stem or spec_from_config(cfg).fingerprint[:12]
    generator = generator_from_config(cfg)
    return graph_label(generator.graph, generator.graph_params)


def _load_model(cfg: CfgNode, weights: Path) -> Any:
    """The model of a config with these weights, all of them, in eval mode."""
    model = build_model(cfg).eval()
    if not isinstance(model.network, RandWireClassifier):
        raise ValueError(
            f"{weights}: MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}, which has no random "
            "graph to damage; give a RandWire"
        )
    try:
        checkpoint = load_checkpoint(str(weights))
        check_wiring(model, checkpoint)
        model.load_state_dict(checkpoint["model"])
    except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{weights} is no checkpoint of its config's network: {reason}") from e
    return model


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------
# Evaluation
# -------------------------------------------------------------------------------------------------


def evaluate(run: DamageRun) -> Damaged:
    """Evaluate every damage, all in one pass over the images; progress goes to stderr.

    The counts are written after every batch, into ``run.state_file``. Where that file is there,
    the evaluation goes on with the first image that it does not count.

    Raises:
        ValueError: no image can be read, or the state file is damaged itself.
        OSError: the state file can't be written.
    """
    counts = _read_counts(run)
    _write_counts(run, counts)  # rather now than after the first batch, if it can't be written
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
    loss_per_image = 100 / counts.images
    return Damaged(
        folder=str(run.folder),
        label=run.label,
        identity=run.identity,
        images=counts.images,
        top1=counts.intact * loss_per_image,
        damages=run.damages,
        losses=[(counts.intact - correct) * loss_per_image for correct in counts.damaged],
        work=run.work,
        shared_seconds=counts.seconds,
        full_seconds=counts.full_seconds / counts.full_images * counts.done * len(run.damages),
        counts=counts,
    )


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
        state = json.loads(run.state_file.read_text())
        counts = Counts(**state["counts"])
        if state["identity"] != run.identity or len(counts.damaged) != len(run.damages):
            raise ValueError("it belongs to something else")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{run.state_file}: {e}; remove this file to evaluate anew") from e
    return counts


def _write_counts(run: DamageRun, counts: Counts) -> None:
    with atomic_open(run.state_file) as f:
        json.dump({"identity": run.identity, "counts": asdict(counts)}, f)


# -------------------------------------------------------------------------------------------------
# Results
# -------------------------------------------------------------------------------------------------

Groups = dict[str, dict[int, list[float]]]


def by_degree(outcomes: Sequence[Damaged], kind: str) -> Groups:
    """The losses of one kind: label → degree → ∆ of each; runs of one generator are pooled."""
    groups: Groups = {outcome.label: {} for outcome in outcomes}
    for outcome in outcomes:
        for damage, loss in zip(outcome.damages, outcome.losses, strict=True):
            if damage.kind == kind:
                groups[outcome.label].setdefault(damage.degree, []).append(loss)
    return {label: dict(sorted(degrees.items())) for label, degrees in groups.items()}


def to_markdown(outcomes: Sequence[Damaged]) -> str:
    """Tables of the runs and of the losses over the degrees, and the work that sharing saved."""
    kinds = [kind for kind in KINDS if any(d.kind == kind for o in outcomes for d in o.damages)]
    runs = [
        [o.folder, o.label, o.images, o.top1, *(o.mean_loss(kind) for kind in kinds)]
        for o in outcomes
    ]
    headers = ["run", "generator", "images", "top-1, %", *(f"mean ∆, one {k} less" for k in kinds)]
    parts = [tabulate(runs, headers, tablefmt="pipe", floatfmt=".2f")]
    for kind in kinds:
        rows = [
            [label, degree, len(losses), np.mean(losses), *_quartiles(losses)]
            for label, degrees in by_degree(outcomes, kind).items()
            for degree, losses in degrees.items()
        ]
        headers = ["generator", AXES[kind], f"{kind}s", "mean ∆", "quartile", "median", "quartile"]
        parts.append(tabulate(rows, headers, tablefmt="pipe", floatfmt=".2f"))
    parts += [_savings(outcome) for outcome in outcomes]
    return "\n\n".join(parts)


def _savings(o: Damaged) -> str:
    n, images = len(o.damages), o.counts.done
    return (
        f"{o.folder}: {n} damages took {o.shared_seconds:.1f} s; {n} full evaluations would take "
        f"about {o.full_seconds:.1f} s ({1000 * o.full_seconds / n / images:.2f} ms per image, "
        f"measured on {o.counts.full_images}): {o.full_seconds / o.shared_seconds:.2f} times less. "
        f"Multiply-adds per image: {o.work.shared / 1e6:.0f} M instead of {n} × "
        f"{o.work.full / 1e6:.1f} M: {n * o.work.full / o.work.shared:.2f} times less."
    )


def to_json(outcomes: Sequence[Damaged], command: str) -> str:
    """Everything: of each run the accuracy, and each damage with the images it leaves correct."""
    runs = [
        {
            "folder": o.folder,
            "generator": o.label,
            "identity": o.identity,
            "images": o.images,
            "top1": o.top1,
            "damages": [
                {**d._asdict(), "kind": d.kind, "correct": correct, "loss": loss}
                for d, correct, loss in zip(o.damages, o.counts.damaged, o.losses, strict=True)
            ],
            "multiply_adds": {"shared": o.work.shared, "full": o.work.full * len(o.damages)},
            "seconds": {"shared": o.shared_seconds, "full": o.full_seconds},
        }
        for o in outcomes
    ]
    return json.dumps({"command": command, "runs": runs}, indent=1)


def _quartiles(losses: Sequence[float]) -> list[float]:
    return [float(q) for q in np.percentile(losses, (25, 50, 75))]


def plot_damage(outcomes: Sequence[Damaged]) -> Figure:
    """Figure 5: a column for each generator, nodes above edges, a box for each degree."""
    kinds = [kind for kind in KINDS if any(d.kind == kind for o in outcomes for d in o.damages)]
    groups = {kind: by_degree(outcomes, kind) for kind in kinds}
    columns = list(groups[kinds[0]])
    size = (1.2 + 4 * len(columns), 0.7 + 3.4 * len(kinds))
    figure, axes = plots(*size, len(kinds), len(columns), sharey="row")
    figure.set_dpi(120)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    for row, kind in zip(axes, kinds):
        row[0].set_ylabel(f"loss ∆ with one {kind} less, points", color=INK)
        for ax, label in zip(row, columns):
            _plot_boxes(ax, groups[kind][label])
            ax.set_xlabel(AXES[kind], color=INK)
            style_axes(ax, grid="y")
    for ax, label in zip(axes[0], columns):
        runs = [o for o in outcomes if o.label == label]
        top1 = np.mean([o.top1 for o in runs])
        networks = "network" if len(runs) == 1 else "networks"
        ax.set_title(
            f"{label}: {len(runs)} {networks}, intact {top1:.1f}%",
            loc="left",
            color=INK,
            weight="bold",
        )
    figure.legend(
        handles=[
            Line2D([], [], marker="o", color=RED, linestyle="", markersize=7, label="mean"),
            Line2D([], [], color=GREY, linewidth=3, label="median"),
            Patch(color=ORANGE, alpha=0.55, label="interquartile range"),
            Line2D([], [], marker="o", color=BLUE, linestyle="", markersize=3, label="one damage"),
        ],
        loc="outside lower center",
        ncols=4 if len(columns) > 1 else 2,
        frameon=False,
    )
    return figure


def _plot_boxes(ax: Axes, degrees: Mapping[int, Sequence[float]]) -> None:
    ax.use_sticky_edges = False  # those of bars, which would cut off what lies at their ends
    spread = np.random.default_rng(0)  # the same picture each time
    for degree, losses in degrees.items():
        low, median, high = _quartiles(losses)
        ax.bar(degree, high - low, 0.7, low, color=ORANGE, alpha=0.55)
        x = degree + spread.uniform(-0.28, 0.28, len(losses))
        ax.scatter(x, losses, s=9, color=BLUE, alpha=0.65, linewidths=0, zorder=2)
        ax.hlines(median, degree - 0.35, degree + 0.35, color=GREY, linewidth=3, zorder=3)
        ax.scatter(degree, np.mean(losses), s=48, color=RED, edgecolors="white", zorder=4)
    if degrees:
        middle = (min(degrees) + max(degrees)) / 2
        half = max((max(degrees) - min(degrees)) / 2, 2) + 0.8  # a single degree is no wide box
        ax.set_xlim(max(middle - half, -0.8), middle + half)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
