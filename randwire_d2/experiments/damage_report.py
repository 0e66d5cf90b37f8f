"""The paper's Figure 5 (§4.1, graph damage): its tables, its figure, and all results as JSON."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from ..drawing.style import BLUE, GREY, INK, ORANGE, RED, plots, style_axes
from .damage import KINDS
from .damage_runs import Damaged

AXES = {"node": "output degree of the removed node", "edge": "input degree of the edge's target"}

Groups = dict[str, dict[int, list[float]]]


def by_degree(outcomes: Sequence[Damaged], kind: str) -> Groups:
    """The losses of one kind of damage: label → degree → ∆s; runs of one generator are pooled."""
    groups: Groups = {outcome.run.label: {} for outcome in outcomes}
    for outcome in outcomes:
        for damage, loss in zip(outcome.run.damages, outcome.losses, strict=True):
            if damage.kind == kind:
                groups[outcome.run.label].setdefault(damage.degree, []).append(loss)
    return {label: dict(sorted(degrees.items())) for label, degrees in groups.items()}


def to_markdown(outcomes: Sequence[Damaged]) -> str:
    """Tables of the runs and of the losses over the degrees, and the work that sharing saved."""
    kinds = _kinds(outcomes)
    runs = [
        [
            str(o.run.folder),
            o.run.label,
            o.counts.images,
            o.top1,
            *(o.mean_loss(kind) for kind in kinds),
        ]
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


def _kinds(outcomes: Sequence[Damaged]) -> list[str]:
    return [kind for kind in KINDS if any(d.kind == kind for o in outcomes for d in o.run.damages)]


def _savings(o: Damaged) -> str:
    n, counts, work = len(o.run.damages), o.counts, o.run.work
    full = counts.full_seconds / counts.full_images  # of one image
    return (
        f"{o.run.folder}: {n} damages took {counts.seconds:.1f} s; {n} full evaluations would take "
        f"about {o.full_seconds:.1f} s ({1000 * full:.2f} ms per image, "
        f"measured on {counts.full_images}): {o.full_seconds / counts.seconds:.2f} times less. "
        f"Multiply-adds per image: {work.shared / 1e6:.0f} M instead of {n} × "
        f"{work.full / 1e6:.1f} M: {n * work.full / work.shared:.2f} times less."
    )


def to_json(outcomes: Sequence[Damaged], command: str) -> str:
    """All results: each run's accuracy, and the number of correct images with each damage."""
    runs = [
        {
            "folder": str(o.run.folder),
            "generator": o.run.label,
            "identity": o.run.identity,
            "images": o.counts.images,
            "top1": o.top1,
            "damages": [
                {**d._asdict(), "kind": d.kind, "correct": correct, "loss": loss}
                for d, correct, loss in zip(o.run.damages, o.counts.damaged, o.losses, strict=True)
            ],
            "multiply_adds": {
                "shared": o.run.work.shared,
                "full": o.run.work.full * len(o.run.damages),
            },
            "seconds": {"shared": o.counts.seconds, "full": o.full_seconds},
        }
        for o in outcomes
    ]
    return json.dumps({"command": command, "runs": runs}, indent=1)


def _quartiles(losses: Sequence[float]) -> list[float]:
    return [float(q) for q in np.percentile(losses, (25, 50, 75))]


def plot_damage(outcomes: Sequence[Damaged]) -> Figure:
    """Plot Figure 5: a column for each generator, nodes above edges, a box for each degree."""
    kinds = _kinds(outcomes)
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
        runs = [o for o in outcomes if o.run.label == label]
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
    ax.use_sticky_edges = False  # bars have sticky edges, which would cut off dots at their ends
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
        half = max((max(degrees) - min(degrees)) / 2, 2) + 0.8  # at least 2: a narrow box for one
        ax.set_xlim(max(middle - half, -0.8), middle + half)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
