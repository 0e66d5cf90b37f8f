"""The results of a sweep: Figure 3's bars and Figure 6's series, or rows of Tables 2 to 5."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import correlation, mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from ..drawing.style import COLORS, INK, plots, style_axes
from ..wiring import parse_graph
from .paper import FIGURE_3, FIGURE_6_PEARSON
from .results import read_result
from .results import to_json as runs_to_json
from .results import to_markdown as runs_to_markdown
from .sweep_run import Run, Setting, Status
from .tables import finite, mean_and_std


@dataclass(frozen=True)
class Report:
    """The results of a sweep so far.

    Attributes:
        table: Markdown, with a list of unfinished runs and the reasons.
        data: all results, as JSON.
        figure: None if no run is finished, or if the sweep compares no generators.
    """

    table: str
    data: str
    figure: Figure | None


def report(runs: Sequence[Run]) -> Report:
    """Report a sweep: Figure 3 or 6 if it compares generators, else its rows of Tables 2 to 5."""
    if any(run.setting.config for run in runs):
        states = [(run, run.status()) for run in runs]
        finished = [run.result for run, status in states if status.state == "finished"]
        rows = [read_result(result.path) for result in finished if result is not None]
        missing = "\n".join(_not_finished(states))
        table = "\n\n".join(part for part in (runs_to_markdown(rows), missing) if part)
        return Report(table, runs_to_json(rows), None)
    results = collect(runs)
    figure = None
    if any(result.is_drawn for result in results):
        several = len({result.setting.node_op for result in results}) > 1
        figure = (plot_operations if several else plot_bars)(results)
    return Report(to_markdown(results), to_json(results), figure)


@dataclass(frozen=True)
class Result:
    """A setting with its runs.

    Attributes:
        runs: the runs with their status, in the order of the seeds.
    """

    setting: Setting
    runs: tuple[tuple[Run, Status], ...]

    @property
    def scores(self) -> list[float]:
        """The accuracies, or APs, of the finished runs, in %."""
        return [status.score for _, status in self.runs if status.score is not None]

    @property
    def is_drawn(self) -> bool:
        """Whether there is a finite mean: the AP of a detector that finds nothing is NaN."""
        return bool(self.scores) and all(map(math.isfinite, self.scores))

    @property
    def classifies(self) -> bool:
        """Whether the networks are classifiers, and not detectors."""
        return self.runs[0][0].classifies

    @property
    def group(self) -> str:
        """The random graph model; the non-random WS(K, 0) are a group of their own (Figure 3)."""
        graph, params = parse_graph(self.setting.generator)
        return "WS, P=0" if graph == "WS" and params["p"] == 0 else graph


def collect(runs: Sequence[Run]) -> list[Result]:
    """The settings of a sweep in Figure 3's order: by group, the non-random at the right."""
    found: dict[Setting, list[tuple[Run, Status]]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append((run, run.status()))
    results = [Result(setting, tuple(states)) for setting, states in found.items()]
    groups = list(dict.fromkeys(result.group for result in results))
    groups.sort(key=lambda group: group == "WS, P=0")
    generators = list(dict.fromkeys(result.setting.generator for result in results))

    def place(result: Result) -> tuple[int, int]:
        return groups.index(result.group), generators.index(result.setting.generator)

    return sorted(results, key=place)


def to_markdown(results: Sequence[Result]) -> str:
    """A row per setting, then correlations, then unfinished runs with the reasons."""
    several = len({result.setting.node_op for result in results}) > 1
    rows = []
    for result in results:
        setting, scores = result.setting, result.scores
        row: list[str] = [setting.generator, *([setting.node_op] if several else [])]
        row += [str(setting.channels), f"{setting.flops / 1e6:,.1f}"]
        row += [f"{len(scores)} of {len(result.runs)}", mean_and_std(scores, 1)]
        row += [", ".join(f"{value:.1f}" for value in scores)]
        # The paper's numbers are for separable convolutions.
        told = FIGURE_3.get(setting.generator) if result.classifies else None
        comparable = told and (not several or setting.node_op == "sep_conv3x3")
        row += [f"{told}" if comparable else ""]
        rows.append(row)
    header = ["generator", *(["operation"] if several else []), "C", "multiply-adds (M)", "runs"]
    header += [f"{_score(results)}: mean ± std", "each", "Figure 3, ImageNet"]
    table = tabulate(rows, header, tablefmt="pipe", disable_numparse=True)
    between = " … ".join(map(str, FIGURE_6_PEARSON))
    correlations = [
        f"Pearson correlation of {a} and {b}: {r:.2f} over {n} generators (paper: {between})"
        for a, b, r, n in pearson(results)
    ]
    missing = _not_finished([pair for result in results for pair in result.runs])
    return "\n".join([table, *correlations, *missing])


def _not_finished(runs: Sequence[tuple[Run, Status]]) -> list[str]:
    """A title, and a line for each run without a result, with the reason; empty if all have one."""
    lines = []
    for run, status in runs:
        if status.state != "finished":
            why = f": {status.reason}" if status.reason else ""
            lines.append(f"- {run.folder}: {status.state} at {status.progress:.0%}{why}")
    return [f"Not finished ({len(lines)}):", *lines] if lines else []


def to_json(results: Sequence[Result]) -> str:
    """All results as JSON."""
    return json.dumps(
        {
            "settings": [
                {
                    **vars(result.setting),
                    "runs": [
                        {
                            "seed": run.seed,
                            "folder": str(run.folder),
                            **vars(status),
                            "score": finite(status.score),
                        }
                        for run, status in result.runs
                    ],
                }
                for result in results
            ],
            "pearson": [
                {"series": [a, b], "correlation": r, "generators": n}
                for a, b, r, n in pearson(results)
            ],
        },
        indent=1,
    )


def pearson(results: Sequence[Result]) -> list[tuple[str, str, float, int]]:
    """Pearson's correlation of the mean accuracies of each two operations, over the generators.

    Returns:
        (operation, operation, correlation, the number of generators that both have) for each pair
        with a defined correlation: three generators at least, and means that differ.
    """
    series = _series(results)
    found = []
    for a, b in combinations(series, 2):
        common = [generator for generator in series[a] if generator in series[b]]
        xs, ys = ([series[op][generator] for generator in common] for op in (a, b))
        if len(common) > 2 and len(set(xs)) > 1 and len(set(ys)) > 1:
            found.append((a, b, correlation(xs, ys), len(common)))
    return found


def _series(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    series: dict[str, dict[str, float]] = {}
    for result in results:
        if result.is_drawn:
            of_op = series.setdefault(result.setting.node_op, {})
            of_op[result.setting.generator] = mean(result.scores)
    return series


def _score(results: Sequence[Result]) -> str:
    return "top-1 (%)" if all(result.classifies for result in results) else "AP"


def plot_bars(results: Sequence[Result]) -> Figure:
    """Plot Figure 3: a bar per setting, mean and standard deviation, tagged with P, M or (K, P).

    Every run is a dot beside its bar. All settings must have the same operation, and at least one a
    mean.
    """
    drawn = [result for result in results if result.is_drawn]
    figure, ax = _figure(max(6.0, 1.5 + 0.62 * len(drawn)))
    groups = list(dict.fromkeys(result.group for result in drawn))
    lowest = min(min(result.scores) for result in drawn)
    highest = max(max(result.scores) for result in drawn)
    room = max(highest - lowest, 0.5)
    floor = max(0.0, lowest - 0.35 * room)
    tags: list[str] = []
    x: list[float] = []
    for result in drawn:
        at = len(x) + 0.6 * groups.index(result.group)  # a gap between groups
        color = COLORS[groups.index(result.group) % len(COLORS)]
        centre = mean(result.scores)
        error = stdev(result.scores) if len(result.scores) > 1 else 0
        ax.bar(at, centre - floor, 0.72, floor, color=color, alpha=0.75)
        ax.errorbar(at, centre, error, color=INK, capsize=4, linewidth=1.4)
        spread = [
            at + 0.22 * (i / max(len(result.scores) - 1, 1) - 0.5)
            for i in range(len(result.scores))
        ]
        ax.plot(spread, result.scores, "o", color="white", markeredgecolor=INK, markersize=4)
        top = max(centre + error, max(result.scores))
        ax.text(at, top + 0.04 * room, f"{centre:.1f}", ha="center", color=INK, fontsize=10)
        tags.append(_tag(result.setting.generator))
        x.append(at)
    ax.set_xticks(x, tags, rotation=45 if max(map(len, tags)) > 4 and len(tags) > 8 else 0)
    ax.margins(x=0.04)
    ax.set_ylim(floor, highest + 0.25 * room)
    ax.set_ylabel(_score(drawn), color=INK)
    for group in groups:
        at = mean(x[i] for i, result in enumerate(drawn) if result.group == group)
        ax.annotate(
            group,
            (at, 0),
            (0, -34 if len(tags) <= 8 else -48),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=COLORS[groups.index(group) % len(COLORS)],
            weight="bold",
            fontsize=12,
        )
    return figure


def _tag(generator: str) -> str:
    return generator.partition("(")[2].rstrip(")") or generator


def plot_operations(results: Sequence[Result]) -> Figure:
    """Plot Figure 6: a column per generator, sorted by the first operation, a point per operation.

    At least one setting must have a mean.
    """
    series = _series(results)
    first = next(iter(series.values()))
    columns = sorted(first, key=lambda generator: -first[generator])
    columns += [g for g in dict.fromkeys(g for s in series.values() for g in s) if g not in first]
    figure, ax = _figure(max(6.0, 1.5 + 0.5 * len(columns)))
    for (node_op, means), color, marker in zip(series.items(), COLORS, "osD^vPX*"):
        x = [i for i, generator in enumerate(columns) if generator in means]
        y = [means[columns[i]] for i in x]
        ax.plot(x, y, marker, linestyle=":", color=color, label=node_op, markersize=7)
    ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_ylabel(f"{_score(results)}, mean over seeds", color=INK)
    ax.legend(frameon=False)
    return figure


def _figure(width: float) -> tuple[Figure, Axes]:
    figure, ((ax,),) = plots(width, 4.8)
    style_axes(ax, grid="y")
    return figure, ax
