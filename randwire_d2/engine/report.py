"""Reports of finished detector trainings: the pictures of one run, and groups of runs compared."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from tabulate import tabulate

from ..config import family, spec_from_config
from ..drawing.curves import Metrics, plot_groups, plot_training, series_of
from ..drawing.detections import draw_detections
from ..drawing.network import draw_network
from ..drawing.style import save_figure
from ..runs import RunFolder


@dataclass(frozen=True)
class Report:
    """What ``write_report`` found and wrote.

    Attributes:
        ap: the box AP of the last evaluation (0 … 100), averaged over IoU 0.5 … 0.95.
        ap50: the box AP at IoU 0.5.
        pictures: the files that were written.
    """

    ap: float
    ap50: float
    pictures: tuple[Path, ...]


def write_report(run_dir: str | os.PathLike[str], picture_dir: str | os.PathLike[str]) -> Report:
    """Draw the detections.png and training.png of a run, and the wiring.png of its RandWire.

    Args:
        run_dir: the OUTPUT_DIR of a training that has ended.
        picture_dir: the folder to write the pictures into.

    Raises:
        FileNotFoundError: a file that a finished run has is missing.
        ValueError: a file does not hold what it should.
    """
    run, picture_dir = RunFolder(run_dir), Path(picture_dir)
    cfg, metrics = run.config(), run.metrics()
    evaluations = [values for _, values in sorted(metrics.items()) if "bbox/AP" in values]
    if not evaluations:
        raise ValueError(
            f"{run.metrics_file} holds no evaluation (bbox/AP): the training has not ended; let "
            "it, with tools/train_net.py --resume"
        )
    figures = {
        "detections.png": draw_detections(cfg.DATASETS.TEST[-1], run.detections_file),
        "training.png": plot_training(metrics),
    }
    if family(cfg) == "RANDWIRE":
        figures["wiring.png"] = draw_network(spec_from_config(cfg))
    pictures = tuple(save_figure(figure, picture_dir / name) for name, figure in figures.items())
    return Report(evaluations[-1]["bbox/AP"], evaluations[-1]["bbox/AP50"], pictures)


@dataclass(frozen=True)
class Comparison:
    """What ``write_comparison`` found and wrote.

    Attributes:
        table: a Markdown table with a line for each group: of each metric, the mean ± the sample
            standard deviation over the runs, and the value of each run.
        picture: the file with the metrics of all runs over their iterations.
    """

    table: str
    picture: Path


def write_comparison(
    groups: Mapping[str, Sequence[str | os.PathLike[str]]],
    names: Sequence[str],
    picture: str | os.PathLike[str],
) -> Comparison:
    """Compare groups of runs, such as those of several seeds, by their last evaluations.

    Args:
        groups: from the name of a group to the OUTPUT_DIRs of its runs, at least two.
        names: the names of the metrics in metrics.json.
        picture: the file to draw into.

    Raises:
        FileNotFoundError: a run has no metrics.json.
        ValueError: a group has fewer than two runs, or a run has no evaluation.
    """
    for group, folders in groups.items():
        if len(folders) < 2:
            raise ValueError(
                f"the deviation within a group needs at least two runs; {group!r} has "
                f"{len(folders)}"
            )
    runs = {
        group: {os.fspath(folder): RunFolder(folder).metrics() for folder in folders}
        for group, folders in groups.items()
    }
    rows = [
        [group, str(len(metrics)), *(_last_values(metrics, name) for name in names)]
        for group, metrics in runs.items()
    ]
    table = tabulate(rows, ["", "runs", *names], tablefmt="pipe")
    figure = plot_groups({group: [*metrics.values()] for group, metrics in runs.items()}, names)
    return Comparison(table, save_figure(figure, picture))


def _last_values(runs: Mapping[str, Metrics], name: str) -> str:
    """A metric at the end of each run: mean ± sample standard deviation, and the values."""
    last = []
    for folder, metrics in runs.items():
        _, values = series_of(metrics, name)
        if not values:
            raise ValueError(
                f"{folder} holds no evaluation ({name}); let the training end, with "
                "tools/train_net.py --resume"
            )
        last.append(values[-1])
    return f"{mean(last):.1f} ± {stdev(last):.1f} ({', '.join(f'{v:.1f}' for v in last)})"
