"""Reports of finished trainings: the pictures of one run, and groups of runs compared."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from tabulate import tabulate

from ..config import family, is_classifier, spec_from_config
from ..drawing.curves import Metrics, plot_groups, plot_training, series_of
from ..drawing.detections import draw_detections
from ..drawing.network import draw_network
from ..drawing.style import save_figure
from ..runs import RunFolder
from .config.metric import set_prefix


def write_report(
    run_dir: str | os.PathLike[str], picture_dir: str | os.PathLike[str]
) -> tuple[Path, ...]:
    """Draw a run's training.png, the wiring.png of its RandWire and, for a detector with COCO's
    evaluation, its detections.png; return the files that were written.

    Args:
        run_dir: the OUTPUT_DIR of a training that has ended.
        picture_dir: the folder to write the pictures into.

    Raises:
        FileNotFoundError: a file that a finished run has is missing.
        ValueError: the content of a file is not as expected.
    """
    run, picture_dir = RunFolder(run_dir), Path(picture_dir)
    cfg, metrics = run.config(), run.metrics()
    figures = {"training.png": _plot_training(cfg, metrics)}
    # With several test sets, only the detections of the last one are kept.
    for test in cfg.DATASETS.TEST[-1:]:
        kind = MetadataCatalog.get(test).get("evaluator_type", "coco")
        if kind.startswith("coco") and not is_classifier(cfg):
            figures["detections.png"] = draw_detections(test, run.detections_file)
    if family(cfg) == "RANDWIRE":
        figures["wiring.png"] = draw_network(spec_from_config(cfg))
    return tuple(save_figure(figure, picture_dir / name) for name, figure in figures.items())


def _plot_training(cfg: CfgNode, metrics: Metrics) -> Figure:
    prefix = set_prefix(cfg)
    if is_classifier(cfg):
        names = {"top-5": "classification/top5", "top-1": "classification/top1"}
        title = "Accuracy on the validation set, %"
    else:
        names = {"AP50": "bbox/AP50", "AP": "bbox/AP"}
        title = "Box AP on the validation set"
    return plot_training(metrics, title, {name: prefix + key for name, key in names.items()})


@dataclass(frozen=True)
class Comparison:
    """The result of ``write_comparison``.

    Attributes:
        table: a Markdown table with one row per group; for each metric, it has the mean ± the
            sample standard deviation over the runs, and the value of each run.
        picture: the file with a plot of the metrics of all runs over their iterations.
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
        groups: for the name of each group, the OUTPUT_DIRs of its runs, at least two.
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
