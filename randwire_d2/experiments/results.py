"""Table 5, and the accuracies of Tables 2 and 3, from the folders of finished runs."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate

from ..classification import add_classification_config
from ..config import add_randwire_config, generator_from_config, merge_in_one_line
from ..report import read_metrics
from ..wiring import NetworkGenerator, NetworkSpec, graph_label
from .paper import TABLE_2, TABLE_3, TABLE_5

# The names in metrics.json, with the paper's titles of its columns.
DETECTION = {f"bbox/{name}": name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
CLASSIFICATION = {"classification/top1": "top-1", "classification/top5": "top-5"}

# What the paper trained on: the data sets, and the images that a training sees.
COCO = ("coco_2017_train", "coco_2017_val")
IMAGENET = ("imagenet_train", "imagenet_val")
SCHEDULE_1X = 90_000 * 16
EPOCH = 1_281_167


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        network: as the paper names it, where it is one of the paper's.
        data: the set that was tested, and the images that the training saw, in thousands.
        task: ``DETECTION`` or ``CLASSIFICATION``.
        paper: the paper's figures, in the order of the task; None for another network, other data
            or another schedule.
    """

    network: str
    data: str
    task: tuple[str, ...]
    paper: tuple[str, ...] | None


@dataclass(frozen=True)
class Result:
    """A run.

    Attributes:
        values: its last evaluation, in the order of the group's task; None of an unfinished run.
        progress: the part of the training that is done, 0 … 1.
    """

    folder: Path
    group: Group
    values: tuple[float, ...] | None
    progress: float


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The OUTPUT_DIRs of trainings among some folders, and below them.

    Raises:
        ValueError: one of the paths has none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        below = sorted(config.parent for config in Path(path).rglob("config.yaml"))
        if not below:
            raise ValueError(
                f"{os.fspath(path)!r} is no OUTPUT_DIR of a training, and holds none: there is no "
                "config.yaml in it or below"
            )
        found |= dict.fromkeys(below)
    return list(found)


def read_result(folder: Path) -> Result:
    """What a run has reached.

    Raises:
        ValueError: its config.yaml is none of this project's.
    """
    cfg = get_cfg()
    add_randwire_config(cfg)
    add_classification_config(cfg)
    path = str(folder / "config.yaml")
    # It may be somebody else's: no tags that run code.
    merge_in_one_line(path, lambda: cfg.merge_from_file(path, allow_unsafe=False))
    is_classifier = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    names = CLASSIFICATION if is_classifier else DETECTION
    group = _group(cfg, folder, is_classifier, tuple(names))
    try:
        metrics = read_metrics(folder / "metrics.json")
    except (OSError, ValueError):  # it has not begun
        return Result(folder, group, None, 0.0)
    last = max(metrics)
    end = cfg.SOLVER.MAX_ITER - 1
    values = tuple(metrics[last][name] for name in names if name in metrics[last])
    finished = last >= end and len(values) == len(names)
    return Result(folder, group, values if finished else None, min(last / max(end, 1), 1.0))


def _group(cfg: CfgNode, folder: Path, is_classifier: bool, names: tuple[str, ...]) -> Group:
    network = _network(cfg, folder)
    sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    paper: tuple[str, ...] | None = None
    if is_classifier and sets == IMAGENET and cfg.INPUT.TEST_CROP_SIZE == 224:
        tables = {250: TABLE_2, 100: TABLE_3}
        table = tables.get(images // EPOCH, ())
        paper = next(((row.top1, row.top5) for row in table if row.network == network), None)
    elif sets == COCO and images == SCHEDULE_1X:
        paper = next((tuple(row[1:]) for row in TABLE_5 if row.network == network), None)
    data = f"{', '.join(cfg.DATASETS.TEST)}; {images / 1000:,.0f}k images"
    return Group(network, data, names, paper)


def _network(cfg: CfgNode, folder: Path) -> str:
    if "randwire" not in cfg.MODEL.BACKBONE.NAME:
        resnets = cfg.MODEL.RESNETS
        groups, width = resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP
        names = {(1, 64): f"ResNet-{resnets.DEPTH}", (32, 4): f"ResNeXt-{resnets.DEPTH}"}
        return names.get((groups, width), f"ResNet-{resnets.DEPTH} {groups}×{width}d")
    node = cfg.MODEL.RANDWIRE
    if node.SPEC_FILE:
        spec = _read_spec(cfg, folder)
        if spec is None:
            return f"RandWire of {node.SPEC_FILE}"
        generator = NetworkGenerator(spec.regime, spec.channels, node_op=spec.node_op)
        if not any(generator(seed) == spec for seed in range(1, 6)):  # the paper's seeds
            return f"RandWire {spec.fingerprint[:12]}"
    else:
        generator = generator_from_config(cfg)
    plain = NetworkGenerator(generator.regime, generator.channels)
    if generator == plain:
        return f"RandWire-WS, C={generator.channels}"
    label = graph_label(generator.graph, generator.graph_params)
    return (
        f"RandWire-{label}, {generator.regime}, N={generator.num_nodes}, C={generator.channels}, "
        f"{generator.node_op}"
    )


def _read_spec(cfg: CfgNode, folder: Path) -> NetworkSpec | None:
    for path in (Path(cfg.MODEL.RANDWIRE.SPEC_FILE), folder / "spec.json"):
        if path.is_file():
            return NetworkSpec.from_json(path.read_text())
    return None


def to_markdown(results: Sequence[Result]) -> str:
    """A table per task, the paper's row below each network of its, and what is not finished."""
    parts = []
    for task in (DETECTION, CLASSIFICATION):
        rows = []
        for group, runs in _grouped(results, tuple(task)).items():
            columns = list(zip(*runs))
            seeds = "" if len(runs) == 1 else f", {len(runs)} runs"
            here = [f"here{seeds}", group.data, *map(_mean_and_std, columns)]
            rows.append([group.network, *here])
            if group.paper:
                rows.append(["", "paper", "", *group.paper])
        if rows:
            header = ["network", "", "data", *task.values()]
            rows = [list(map(str, row)) for row in rows]
            parts.append(tabulate(rows, header, tablefmt="pipe", disable_numparse=True))
    unfinished = [result for result in results if result.values is None]
    if unfinished:
        lines = [f"- {r.folder} ({r.group.network}): {r.progress:.0%} done" for r in unfinished]
        parts.append("\n".join([f"{len(unfinished)} runs are not finished:", *lines]))
    return "\n\n".join(parts)


def _grouped(
    results: Sequence[Result], task: tuple[str, ...]
) -> dict[Group, list[tuple[float, ...]]]:
    groups: dict[Group, list[tuple[float, ...]]] = {}
    for result in results:
        if result.group.task == task and result.values is not None:
            groups.setdefault(result.group, []).append(result.values)
    return groups


def _mean_and_std(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):  # such as APl, of a set without large objects
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values):.2f}"


def to_json(results: Sequence[Result]) -> str:
    """Every run by itself."""
    titles = {**DETECTION, **CLASSIFICATION}

    def named(group: Group, values: Sequence[Any] | None) -> dict[str, Any] | None:
        if values is None:
            return None
        return {titles[name]: value for name, value in zip(group.task, values)}

    return json.dumps(
        [
            {
                "folder": str(result.folder),
                "network": result.group.network,
                "data": result.group.data,
                "progress": result.progress,
                "values": named(result.group, result.values),
                "paper": named(result.group, result.group.paper),
            }
            for result in results
        ],
        indent=1,
    )
