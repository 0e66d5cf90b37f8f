"""The report of finished runs: their pictures, and groups of runs compared."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from tabulate import tabulate

from ..config import family, spec_from_config
from ..drawing.curves import plot_groups, plot_training, series_of
from ..drawing.detections import draw_detections
from ..drawing.networks import draw_network
from ..drawing.style import save_figure
from ..runs import RunFolder


@dataclass(frozen=True)
class Report:
    """What ``write_report`` found and wrote.

    Attributes:
        ap: the last evaluation's box AP (0 … 100), averaged over IoU 0.5 … 0.95.
        ap50: the same at IoU 0.5.
        pictures: the files written.
    """

    ap: float
    ap50: float
    pictures: tuple[Path, ...]


def write_report(run_dir: str | os.PathLike[str], picture_dir: str | os.PathLike[str]) -> Report:
    """Draw detections.png, training.png and, of a RandWire, wiring.png of a run.

    Args:
        run_dir: the OUTPUT_DIR of a training that has ended.
        picture_dir: where the pictures go.

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
        table: a line per group, each metric's mean ± sample standard deviation over its runs.
        picture: the metrics of all runs over their iterations.
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
        groups: a name to the OUTPUT_DIRs of its runs, at least two.
        names: the metrics, as in metrics.json.
        picture: the file to draw into.

    Raises:
        FileNotFoundError, ValueError: as ``RunFolder.metrics``, or a run without an evaluation.
    """
    runs = {
        group: {folder: RunFolder(folder).metrics() for folder in folders}
        for group, folders in groups.items()
    }
    rows = []
    for group, metrics in runs.items():
        row = [group, str(len(metrics))]
        for name in names:
            last = []
            for folder, written in metrics.items():
                _, values = series_of(written, name)
                if not values:
                    raise ValueError(f"{os.fspath(folder)} holds no evaluation ({name})")
                last.append(values[-1])
            row.append(
                f"{mean(last):.1f} ± {stdev(last):.1f} ({', '.join(f'{v:.1f}' for v in last)})"
            )
        rows.append(row)
    table = tabulate(rows, ["", "runs", *names], tablefmt="pipe")
    figure = plot_groups({group: [*metrics.values()] for group, metrics in runs.items()}, names)
    return Comparison(table, save_figure(figure, picture))
