"""Table 5, and the accuracies of Tables 2 and 3, from the folders of finished runs."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from ..config import (
    drawn_network,
    family,
    generator_from_config,
    is_classifier,
    spec_from_config,
)
from ..runs import RunFolder
from ..wiring import NetworkGenerator, NetworkSpec, graph_label
from .paper import TABLE_2, TABLE_3, TABLE_5

# The names in metrics.json, with the paper's titles of its columns.
DETECTION = {f"bbox/{name}": name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
CLASSIFICATION = {"classification/top1": "top-1", "classification/top5": "top-5"}

# The paper's trainings. SCHEDULE is none of the config's keys: images, and the rate per image.
RECIPE_OF_TABLE_5 = {
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MIN_SIZE_TEST": 800,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.MASK_ON": False,
    "MODEL.KEYPOINT_ON": False,
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "SOLVER.IMS_PER_BATCH · MAX_ITER": 90_000 * 16,
    "SOLVER.IMS_PER_BATCH · STEPS": (60_000 * 16, 80_000 * 16),
    "SOLVER.BASE_LR / IMS_PER_BATCH": 0.02 / 16,
}
RECIPE_OF_IMAGENET = {
    "DATASETS.TRAIN": ("imagenet_train",),
    "DATASETS.TEST": ("imagenet_val",),
    "INPUT.TEST_CROP_SIZE": 224,
}
EPOCH = 1_281_167
# Keys in which the runs of one row may differ: seeds, places, speed. The network is in its name.
NO_RECIPE = re.compile(
    r"(.+\.)?(SEED|NUM_WORKERS|EVAL_PERIOD|CHECKPOINT_PERIOD|CHECKPOINTS_TO_KEEP|VIS_PERIOD)"
    r"|OUTPUT_DIR|CUDNN_BENCHMARK|MODEL\.(WEIGHTS|DEVICE)|TEST\.(EXPECTED_RESULTS|IMS_PER_PROCESS)"
    r"|MODEL\.RANDWIRE\.(?!NORM$|OUT_FEATURES$|EDGE_DROP_PROB$).+"
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        network: as the paper names it, where it is one of the paper's.
        data: the set that was tested, and the images that the training saw, in thousands.
        recipe: the other keys of the config, and their values.
        task: ``DETECTION`` or ``CLASSIFICATION``.
        paper: the paper's figures, in the order of the task; None for another network, or one that
            was trained in another way.
        unlike: where the paper has the network, the keys in which its training was another one.
    """

    network: str
    data: str
    recipe: tuple[tuple[str, str], ...]
    task: tuple[str, ...]
    paper: tuple[str, ...] | None
    unlike: tuple[str, ...]


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
    found: dict[Path, Path] = {}  # a folder that is named twice is one run
    for path in paths:
        below = sorted(config.parent for config in Path(path).rglob("config.yaml"))
        if not below:
            raise ValueError(
                f"{os.fspath(path)!r} is no OUTPUT_DIR of a training, and holds none: there is no "
                "config.yaml in it or below"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_result(folder: Path) -> Result:
    """What a run has reached.

    Raises:
        ValueError: its config.yaml is none of this project's.
    """
    run = RunFolder(folder)
    cfg = run.config()
    names = CLASSIFICATION if is_classifier(cfg) else DETECTION
    group = _group(cfg, folder, tuple(names))
    progress = run.progress()
    values = tuple(progress.last[name] for name in names if name in progress.last)
    finished = progress.done == 1 and len(values) == len(names)
    return Result(folder, group, values if finished else None, progress.done)


def _group(cfg: CfgNode, folder: Path, names: tuple[str, ...]) -> Group:
    network = _network(cfg, folder)
    solver, keys = cfg.SOLVER, dict(_flat(cfg))
    batch = solver.IMS_PER_BATCH
    images = batch * solver.MAX_ITER
    paper: dict[str, tuple[str, ...]]
    if is_classifier(cfg):
        tables = {250: TABLE_2, 100: TABLE_3}
        paper = {row.network: (row.top1, row.top5) for row in tables.get(images // EPOCH, ())}
        wanted: dict[str, Any] = RECIPE_OF_IMAGENET
    else:
        paper = {row.network: tuple(row[1:]) for row in TABLE_5}
        node = family(cfg) or "RESNETS"
        backbone = f"build_{node.lower().rstrip('s')}_fpn_backbone"
        wanted = {
            **RECIPE_OF_TABLE_5,
            f"MODEL.{node}.NORM": "FrozenBN",
            "MODEL.BACKBONE.NAME": backbone,
        }
        keys["SOLVER.IMS_PER_BATCH · MAX_ITER"] = images
        keys["SOLVER.IMS_PER_BATCH · STEPS"] = tuple(batch * step for step in solver.STEPS)
        keys["SOLVER.BASE_LR / IMS_PER_BATCH"] = solver.BASE_LR / batch
    unlike = tuple(key for key, value in wanted.items() if not _same(keys[key], value))
    return Group(
        network=network,
        data=f"{', '.join(cfg.DATASETS.TEST)}; {images / 1000:,.0f}k images",
        recipe=(
            *((key, str(value)) for key, value in _flat(cfg) if not NO_RECIPE.fullmatch(key)),
            # Not which ones: each seed may have its own.
            ("MODEL.WEIGHTS", "given" if cfg.MODEL.WEIGHTS else "none"),
        ),
        task=names,
        paper=None if unlike else paper.get(network),
        unlike=unlike if network in paper else (),
    )


def _flat(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(node.items()):
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return math.isclose(value, wanted)
    return (tuple(value) if isinstance(value, list) else value) == wanted


def _network(cfg: CfgNode, folder: Path) -> str:
    if family(cfg) != "RANDWIRE":
        resnets = cfg.MODEL.RESNETS
        groups, width = resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP
        names = {(1, 64): f"ResNet-{resnets.DEPTH}", (32, 4): f"ResNeXt-{resnets.DEPTH}"}
        return names.get((groups, width), f"ResNet-{resnets.DEPTH} {groups}×{width}d")
    node = cfg.MODEL.RANDWIRE
    if drawn_network(cfg):
        spec = _read_spec(cfg, folder)
        if spec is None:
            return f"RandWire of {node.SPEC_FILE}"
        # A spec does not say who drew it: perhaps the config's generator, or the paper's.
        drawn_by = [NetworkGenerator(spec.regime, spec.channels, node_op=spec.node_op)]
        with suppress(ValueError):  # these keys are not read where there is a spec
            drawn_by.append(generator_from_config(cfg))
        seeds = (node.SEED, *range(1, 6))  # the paper's are 1 … 5
        known = [g for g in drawn_by if any(_draws(g, seed, spec) for seed in seeds)]
        if not known:
            return f"RandWire {spec.fingerprint[:12]}"
        generator = known[0]
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


def _draws(generator: NetworkGenerator, seed: int, spec: NetworkSpec) -> bool:
    try:
        return generator(seed) == spec
    except ValueError:  # such as K ≥ N
        return False


def _read_spec(cfg: CfgNode, folder: Path) -> NetworkSpec | None:
    if cfg.MODEL.RANDWIRE.SPEC:
        return spec_from_config(cfg)
    for path in (Path(cfg.MODEL.RANDWIRE.SPEC_FILE), folder / "spec.json"):
        if path.is_file():
            return NetworkSpec.from_json(path.read_text())
    return None


def to_markdown(results: Sequence[Result]) -> str:
    """A table per task, the paper's row below each network of its, and what is not finished."""
    parts = []
    for task in (DETECTION, CLASSIFICATION):
        rows = []
        groups = _grouped(results, tuple(task))
        for group, runs in groups.items():
            columns = list(zip(*runs))
            seeds = "" if len(runs) == 1 else f", {len(runs)} runs"
            data = "; ".join([group.data, *_differences(group, groups)])
            rows.append([group.network, f"here{seeds}", data, *map(_mean_and_std, columns)])
            if group.paper:
                rows.append(["", "paper", "", *group.paper])
        if rows:
            header = ["network", "", "data", *task.values()]
            rows = [list(map(str, row)) for row in rows]
            parts.append(tabulate(rows, header, tablefmt="pipe", disable_numparse=True))
    others = {r.group: r for r in results if r.group.unlike and r.values is not None}.values()
    if others:
        lines = [f"- {r.folder} ({r.group.network}): {', '.join(r.group.unlike)}" for r in others]
        parts.append("\n".join(["The paper trained with other values of:", *lines]))
    unfinished = [result for result in results if result.values is None]
    if unfinished:
        lines = [f"- {r.folder} ({r.group.network}): {_how_far(r)}" for r in unfinished]
        parts.append("\n".join([f"Not finished ({len(unfinished)}):", *lines]))
    return "\n\n".join(parts)


def _grouped(
    results: Sequence[Result], task: tuple[str, ...]
) -> dict[Group, list[tuple[float, ...]]]:
    groups: dict[Group, list[tuple[float, ...]]] = {}
    for result in results:
        if result.group.task == task and result.values is not None:
            groups.setdefault(result.group, []).append(result.values)
    return groups


def _differences(group: Group, groups: Iterable[Group]) -> list[str]:
    """What tells the rows of one network on the same data apart."""
    others = [g for g in groups if (g.network, g.data) == (group.network, group.data)]
    common = set.intersection(*(set(g.recipe) for g in others))
    return [f"{key} {value}" for key, value in group.recipe if (key, value) not in common]


def _how_far(result: Result) -> str:
    missing = f", but {next(iter(result.group.task))} is missing" if result.progress == 1 else ""
    return f"{result.progress:.0%} done{missing}"


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
                "unlike_paper": result.group.unlike,
            }
            for result in results
        ],
        indent=1,
    )
