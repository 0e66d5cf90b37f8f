"""Tables 2 to 5 from the folders of runs: trainings and evaluations, beside the paper's numbers."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from ..config import is_classifier
from ..runs import RunFolder
from .networks import network_name, wiring_of
from .paper_recipe import (
    TRAINING_KEY,
    Recipe,
    Reference,
    find_reference,
    join_recipes,
    read_recipe,
)
from .tables import finite, mean_and_std

# The names in metrics.json -> the paper's column titles.
DETECTION = {f"bbox/{name}": name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
CLASSIFICATION = {"classification/top1": "top-1", "classification/top5": "top-5"}


@dataclass(frozen=True)
class Group:
    """Trainings, or evaluations of trainings, that differ only in their seeds.

    Attributes:
        kind: ``"training"`` or ``"evaluation"``.
        network: the network's name, in the paper's words if it is one of the paper's.
        data: the test set, and the number of images that the training saw, in thousands if there
            are many.
        recipe: the keys on which a result depends, and their values.
        task: the names of the results, those of ``DETECTION`` or ``CLASSIFICATION``.
        reference: the paper's row of the network; None if the paper has none.
    """

    kind: str
    network: str
    data: str
    recipe: tuple[tuple[str, str], ...]
    task: tuple[str, ...]
    reference: Reference | None


@dataclass(frozen=True)
class Result:
    """A training, or an evaluation.

    Attributes:
        values: its last results, in the order of the group's task; None if it is not finished.
        progress: the finished part of it, 0 … 1.
        weights: the checkpoint that was evaluated; ``""`` for a training.
        seeds: what distinguishes the training from others of its group; a copy or a repetition of
            the training has the same.
    """

    folder: Path
    group: Group
    values: tuple[float, ...] | None
    progress: float
    weights: str = ""
    seeds: tuple[str, ...] = ()


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Result], dict[Path, str]]:
    """Read all trainings and evaluations in some folders and below them.

    Returns:
        the results; and for each folder that can't be read, the reason, such as another project's
        config.yaml or a damaged results.json.

    Raises:
        ValueError: one of the paths contains no run, or none of the runs can be read.
    """
    results, unreadable = [], {}
    for folder in find_runs(paths):
        try:
            results.append(read_result(folder))
        # Another project's config.yaml must not stop the reading of the other runs.
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())
            unreadable[folder] = reason.removeprefix(f"{folder}/")
    if not results:
        (first, reason), *others = unreadable.items()
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(f"no run can be read: {first}: {reason}{more}")
    return results, unreadable


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The folders of runs, which have a config.yaml, in some folders and below them.

    Raises:
        ValueError: one of the paths contains no config.yaml.
    """
    found: dict[Path, Path] = {}  # a folder that is given twice is one run
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
    """Read the result of a training or an evaluation.

    Raises:
        ValueError: its config.yaml is not this project's, or its results.json is damaged.
        OSError: a file can't be read.
    """
    run = RunFolder(folder)
    return _read_evaluation(run) if run.is_evaluation else _read_training(run)


def _read_training(run: RunFolder) -> Result:
    cfg, progress = run.config(), run.progress()
    group = _group("training", cfg, cfg, read_recipe(cfg))
    values = _values(group.task, progress.last) if progress.done == 1 else None
    return Result(run.path, group, values, progress.done, seeds=_seeds(run, cfg))


def _seeds(run: RunFolder, cfg: CfgNode) -> tuple[str, ...]:
    """``Result.seeds`` of a training."""
    seeds = (str(cfg.SEED), wiring_of(cfg), cfg.MODEL.WEIGHTS)
    if cfg.SEED >= 0:
        return seeds
    # Each run has drawn a seed that was not recorded. Its last losses and times identify it.
    last = run.progress().last
    return (*seeds, str(sorted(last.items())) if last else str(run.path.resolve()))


def _read_evaluation(run: RunFolder) -> Result:
    cfg = run.config()
    recipe = read_recipe(cfg)
    if not run.results_file.is_file():
        return Result(run.path, _group("evaluation", cfg, None, recipe), None, 0.0)
    evaluation = run.evaluation()
    weights = Path(evaluation.weights)
    seeds: tuple[str, ...] = (evaluation.weights,)
    try:
        if evaluation.training is None:
            raise ValueError(f"no training's config.yaml lies beside {weights}")
        training = RunFolder(evaluation.training)
        trained = training.config()
    except (OSError, ValueError) as e:
        group = _group("evaluation", cfg, None, recipe)
        reference = group.reference and replace(
            group.reference,
            differences=(),
            unknown=f"how its weights were trained can't be told: {' '.join(str(e).split())}",
        )
        # It is unknown whether other weights are another seed of the same training.
        known = [item for item in group.recipe if not TRAINING_KEY.fullmatch(item[0])]
        weights_alone = (*known, ("MODEL.WEIGHTS", evaluation.weights))
        group = replace(group, recipe=weights_alone, reference=reference)
    else:
        recipe = join_recipes(read_recipe(trained), recipe)
        if weights.name != training.final_checkpoint.name:  # an earlier checkpoint
            recipe["MODEL.WEIGHTS"] += f", tested with {weights.name}"
        group = _group("evaluation", cfg, trained, recipe)
        seeds = _seeds(training, trained)
    values = _values(group.task, flatten_results_dict(evaluation.results))
    return Result(run.path, group, values, 1.0, evaluation.weights, seeds)


def _group(kind: str, test: CfgNode, training: CfgNode | None, recipe: Recipe) -> Group:
    network = network_name(test if training is None else training)
    data = ", ".join(test.DATASETS.TEST)
    if is_classifier(test):
        size = test.INPUT.TEST_CROP_SIZE
        data += f", {size}×{size}"
    if training is not None:
        images = training.SOLVER.IMS_PER_BATCH * training.SOLVER.MAX_ITER
        count = f"{images / 1000:,.0f}k" if images >= 10_000 else f"{images:,}"
        data += f"; trained on {count} images"
    return Group(
        kind=kind,
        network=network,
        data=data,
        recipe=tuple((key, str(value)) for key, value in sorted(recipe.items())),
        task=tuple(CLASSIFICATION if is_classifier(test) else DETECTION),
        reference=find_reference(network, recipe),
    )


def _values(task: Sequence[str], found: Mapping[str, float]) -> tuple[float, ...] | None:
    return tuple(found[name] for name in task) if all(name in found for name in task) else None


def to_markdown(results: Sequence[Result], unreadable: Mapping[Path, str] | None = None) -> str:
    """A table per task, with the paper's row below each comparable group; then lists of differences
    from the paper, unfinished runs, runs that repeat another one, and unreadable folders."""
    parts = [table for task in (DETECTION, CLASSIFICATION) if (table := _table(results, task))]
    # One result represents its group.
    found = {result.group: result for result in results if result.values is not None}.values()
    others = [r for r in found if r.group.reference and not r.group.reference.comparable]
    if others:
        lines = [line for result in others for line in _why_not(result)]
        parts.append("\n".join(["Not trained or tested as in the paper:", *lines]))
    unfinished = [result for result in results if result.values is None]
    if unfinished:
        lines = [f"- {r.folder} ({r.group.network}): {_how_far(r)}" for r in unfinished]
        parts.append("\n".join([f"Not finished ({len(unfinished)}):", *lines]))
    if repeats := find_repeats(results):
        lines = [f"- {folder}: as {counted}" for folder, counted in repeats.items()]
        title = f"Copies and repetitions, which count as no further seeds ({len(repeats)}):"
        parts.append("\n".join([title, *lines]))
    if unreadable:
        lines = [f"- {folder}: {reason}" for folder, reason in unreadable.items()]
        parts.append("\n".join([f"Not readable ({len(unreadable)}):", *lines]))
    return "\n\n".join(parts)


def _table(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    rows = []
    groups = _grouped(results, tuple(titles))
    for group, runs in groups.items():
        runs_of_kind = {"training": "runs", "evaluation": "evaluations"}[group.kind]
        several = f", {len(runs)} {runs_of_kind}"
        one = ", evaluation" if group.kind == "evaluation" else ""
        here = f"here{several if len(runs) > 1 else one}"
        data = "; ".join([group.data, *_differences(group, groups)])
        reached = [mean_and_std(values, 2) for values in zip(*runs)]
        rows.append([group.network, here, data, *reached])
        if group.reference and group.reference.comparable:
            reference = group.reference
            rows.append(["", f"paper, Table {reference.table}", "", *reference.values])
    if not rows:
        return ""
    header = ["network", "", "data", *titles.values()]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def _grouped(
    results: Sequence[Result], task: tuple[str, ...]
) -> dict[Group, list[tuple[float, ...]]]:
    groups: dict[Group, list[tuple[float, ...]]] = {}
    repeats = find_repeats(results)
    for result in results:
        if result.group.task == task and result.values and result.folder not in repeats:
            groups.setdefault(result.group, []).append(result.values)
    return groups


def find_repeats(results: Iterable[Result]) -> dict[Path, Path]:
    """The folders of finished runs that repeat another run's seed -> the other run's folder.

    They are copies, repeated trainings of one seed, and second tests of one checkpoint, on another
    device for example. The first one counts.
    """
    first: dict[tuple[Group, tuple[str, ...]], Path] = {}
    repeats = {}
    for result in results:
        if result.values is not None:
            counted = first.setdefault((result.group, result.seeds), result.folder)
            if counted != result.folder:
                repeats[result.folder] = counted
    return repeats


def _differences(group: Group, groups: Iterable[Group]) -> list[str]:
    """The keys in which a group differs from others of the same network and data, with values."""
    others = [dict(g.recipe) for g in groups if (g.network, g.data) == (group.network, group.data)]
    return [
        f"{key} {value}"
        for key, value in group.recipe
        # An evaluation whose training is unknown has no training keys.
        if any(other.get(key, value) != value for other in others)
    ]


def _why_not(result: Result) -> list[str]:
    reference = result.group.reference
    assert reference is not None
    line = f"- {result.folder} ({result.group.network}, Table {reference.table}):"
    if reference.unknown:
        return [f"{line} {reference.unknown}"]
    return [line, *(f"  - {d.key}: {d.here}; the paper: {d.paper}" for d in reference.differences)]


def _how_far(result: Result) -> str:
    if result.group.kind == "evaluation" and not result.progress:
        return "an evaluation without results"
    missing = f", but {result.group.task[0]} is missing" if result.progress == 1 else ""
    return f"{result.progress:.0%} done{missing}"


def to_json(results: Sequence[Result], unreadable: Mapping[Path, str] | None = None) -> str:
    """Every run's result, and the unreadable folders, as JSON."""
    titles, repeats = {**DETECTION, **CLASSIFICATION}, find_repeats(results)

    def named(group: Group, values: Sequence[Any] | None) -> dict[str, Any] | None:
        if values is None:
            return None
        return {titles[name]: value for name, value in zip(group.task, values)}

    def compared(group: Group) -> dict[str, Any] | None:
        reference = group.reference
        if reference is None:
            return None
        return {
            "table": reference.table,
            "values": named(group, reference.values),
            "comparable": reference.comparable,
            "differences": [difference._asdict() for difference in reference.differences],
            "unknown": reference.unknown,
        }

    runs = [
        {
            "folder": str(result.folder),
            "kind": result.group.kind,
            "network": result.group.network,
            "data": result.group.data,
            "progress": result.progress,
            "weights": result.weights,
            "repeats": str(repeats[result.folder]) if result.folder in repeats else None,
            "values": named(result.group, result.values and [*map(finite, result.values)]),
            "paper": compared(result.group),
        }
        for result in results
    ]
    others = [
        {"folder": str(folder), "reason": reason} for folder, reason in (unreadable or {}).items()
    ]
    return json.dumps({"runs": runs, "unreadable": others}, indent=1)
