"""Sweeps: configs or generators × node operations × seeds, each a run of a training tool.

A sweep is a YAML file (configs/sweeps) with these keys, and ``_BASE_`` as in Detectron2's configs:

    config: a classifier's or a detector's config, relative to the sweep's file; or a list of them
    seeds: of both the wiring and the training
    generators: labels such as WS(4, 0.75), Figure 3's columns, in place of the config's generator
    node_ops: with generators, the node operations (default: the config's)
    channels: with generators, the C of all of them with the config's node operation
    multiply_adds: in place of channels, the mean multiply-adds of each generator's networks
    pretrained: another sweep, relative to this file: each run starts from the weights of that
        sweep's run of the same network; its output must be beside this sweep's --output
    evaluate: True, to evaluate those weights and train nothing
    options: more keys of the configs

MODEL.WEIGHTS in the options replaces ``pretrained``, and may contain {channels} and {seed}. If
detectors start from another sweep's classifiers, these are converted first.

"We adjust the factor C to keep the complexity of all alternative networks" (§4.1, "Node
operations"), and the paper's generators differ by ±2% (§3.2). So without ``channels`` and
``multiply_adds``, each generator and operation gets the C whose networks have the multiply-adds
nearest to those of the config's own networks, both on average over the seeds.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from detectron2.config import CfgNode

from ..config import (
    classifier_config,
    detector_config,
    drawn_network,
    family,
    forget_other_generators,
    generator_from_config,
    is_classifier,
    merge_config,
    merge_in_one_line,
)
from ..runs import RunFolder
from ..text import brief
from ..wiring import (
    NODE_OP_COMPLEXITY_REGISTRY,
    NetworkGenerator,
    complexity,
    find_channels,
    graph_label,
    parse_graph,
)
from ..yaml_tags import check_yaml
from .sweep_run import BACKBONE, Run, Setting, Weights

# The types of the values of keys, or of the elements of their lists.
TYPES: dict[str, tuple[type, ...]] = {
    "config": (str,), "seeds": (int,), "generators": (str,), "node_ops": (str,),
    "channels": (int,), "multiply_adds": (int, float), "pretrained": (str,), "evaluate": (bool,),
    "options": (dict,),
}  # fmt: skip
# Keys that need ``generators``; without generators, a sweep runs its configs' own networks.
OF_GENERATORS = ("node_ops", "channels", "multiply_adds")
# The config's keys that a sweep's keys set in each run; the last three only if the sweep has them.
GIVEN = {
    "seeds": ("SEED", "MODEL.RANDWIRE.SEED"),
    "--output": ("OUTPUT_DIR",),
    "node_ops": ("MODEL.RANDWIRE.NODE_OP",),
    "channels": ("MODEL.RANDWIRE.CHANNELS",),
    "multiply_adds": ("MODEL.RANDWIRE.CHANNELS",),
}
# The config's keys that describe a detector when converted weights are verified in it.
DESCRIBES = re.compile(r"INPUT\..+|MODEL\.(?!WEIGHTS$|DEVICE$|CLASSIFIER\.).+")


def load_sweep(
    path: str | Path, output: str | Path, options: Sequence[str] = (), num_gpus: int = 1
) -> list[Run]:
    """The runs of a sweep, seed by seed, so that an unfinished sweep compares all generators.

    Args:
        path: the sweep's YAML.
        output: the folder that contains the runs' folders.
        options: KEY VALUE pairs, applied after the sweep's own.
        num_gpus: the number of processes of each run, also on a CPU.

    Raises:
        OSError: the file, or the config that it names, can't be read.
        ValueError: a key or a value is wrong; the message names it.
    """
    path, output = Path(path), Path(output)
    sweep = _read(path)
    for key, value in (sweep.get("options") or {}).items():
        options = [key, str(value), *options]
    for source in ("--output", *sweep):
        for key in GIVEN.get(source, ()):
            if key in options[::2]:
                raise ValueError(f"{path}: {key} is given by the sweep's {source}; change that")
    pretrained = None
    if "pretrained" in sweep:
        pretrained = _Pretrained(path.parent / str(sweep["pretrained"]), output.parent)
    runs: list[Run] = []
    for name in sweep["config"]:
        experiment = _Experiment(path.parent / name, sweep, options, num_gpus, pretrained)
        runs += experiment.runs(output)
    folders = {run.folder for run in runs}
    if len(folders) < len(runs):
        raise ValueError(f"{path}: its configs, or its generators, must differ in their names")
    return sorted(runs, key=lambda run: sweep["seeds"].index(run.seed))


def _read(path: Path) -> dict[str, Any]:
    """Read and check a sweep's file; ``config`` becomes a list."""
    sweep: dict[str, Any] = {}

    def merge() -> None:
        check_yaml(path)
        sweep.update(CfgNode.load_yaml_with_base(str(path)))

    merge_in_one_line(str(path), merge)
    unknown = set(sweep) - set(TYPES)
    if unknown:
        raise ValueError(
            f"{path}: unknown keys {brief(sorted(map(str, unknown)))}; known are {list(TYPES)}"
        )
    compares = "generators" in sweep
    for key in ("config", "seeds", *(["generators"] if compares else [])):
        if not sweep.get(key):
            raise ValueError(f"{path}: the key {key!r} is missing or empty")
    if isinstance(sweep["config"], str):
        sweep["config"] = [sweep["config"]]
    for key in ("config", "generators", "seeds", "node_ops"):
        values = sweep.get(key, [])
        if not isinstance(values, list) or len({str(v) for v in values}) < len(values):
            raise ValueError(
                f"{path}: {key} must be a list without repetitions; got {brief(values)}"
            )
    for key, types in TYPES.items():
        values = sweep.get(key)
        for value in values if isinstance(values, list) else [values] if key in sweep else []:
            if type(value) not in types:  # Python takes True for an int
                kinds = " or ".join(kind.__name__ for kind in types)
                raise ValueError(f"{path}: {key} takes {kinds}; got {brief(value)}")
    if compares and len(sweep["config"]) > 1:
        raise ValueError(f"{path}: generators are compared with one config, not several")
    lonely = [key for key in OF_GENERATORS if key in sweep and not compares]
    if lonely:
        raise ValueError(f"{path}: {', '.join(lonely)} go with generators, which are missing")
    if "channels" in sweep and "multiply_adds" in sweep:
        raise ValueError(f"{path}: channels and multiply_adds exclude each other")
    return sweep


class _Pretrained:
    """The runs of another sweep, whose final checkpoints are this sweep's initial weights.

    Args:
        path: the other sweep's YAML.
        root: the folder that contains the other sweep's --output, named after its file.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        output = root / path.stem
        self.command = f"python tools/compare_generators.py {path}"
        if output != Path("output", path.stem):
            self.command += f" --output {output}"
        self.runs: dict[tuple[Any, ...], Run] = {}
        for run in load_sweep(path, output):
            if self.runs.setdefault(self._network(run.setting, run.seed), run) is not run:
                raise ValueError(f"{path}: {run.setting} has two runs of seed {run.seed}")

    @staticmethod
    def _network(setting: Setting, seed: int) -> tuple[Any, ...]:
        return setting.generator, setting.node_op, setting.channels, seed

    def __call__(self, setting: Setting, seed: int) -> Run:
        """The run of a network.

        Raises:
            ValueError: the other sweep has no such run.
        """
        try:
            return self.runs[self._network(setting, seed)]
        except KeyError:
            raise ValueError(
                f"{self.path}: none of its runs is of {setting.generator}, {setting.node_op}, "
                f"C={setting.channels}, seed {seed}"
            ) from None


class _Experiment:
    """One config of a sweep."""

    def __init__(
        self,
        path: Path,
        sweep: Mapping[str, Any],
        options: Sequence[str],
        num_gpus: int,
        pretrained: _Pretrained | None,
    ) -> None:
        self.path = path
        self.sweep = sweep
        self.seeds: list[int] = sweep["seeds"]
        self.options = options
        self.num_gpus = num_gpus
        self.pretrained = pretrained
        self.cfg = _read_config(path, options)
        self.evaluates = bool(sweep.get("evaluate"))
        if self.evaluates and pretrained is None and not self.cfg.MODEL.WEIGHTS:
            raise ValueError("evaluate needs pretrained, or MODEL.WEIGHTS among the options")

    def runs(self, output: Path) -> list[Run]:
        return [
            self._run(setting, seed, output) for setting in self._settings() for seed in self.seeds
        ]

    def _settings(self) -> list[Setting]:
        own = generator_from_config(self.cfg)
        if "generators" not in self.sweep:
            return [self._setting(own, self.path.stem)]
        settings = []
        for node_op in self.sweep.get("node_ops") or [own.node_op]:
            if node_op not in NODE_OP_COMPLEXITY_REGISTRY:
                known = sorted(name for name, _ in NODE_OP_COMPLEXITY_REGISTRY)
                raise ValueError(
                    f"unknown node operation {brief(node_op)}; known are {known}; the cost of one "
                    "of your own must be in NODE_OP_COMPLEXITY_REGISTRY"
                )
            for label in self.sweep["generators"]:
                graph, params = parse_graph(label)
                generator = replace(own, graph=graph, graph_params=params)
                settings.append(self._setting(self._adjusted(generator, node_op)))
        return settings

    @cached_property
    def _target(self) -> float:
        given = self.sweep.get("multiply_adds")
        # Ask the config's own generator last: it may have no network with another N.
        return self._flops(generator_from_config(self.cfg)) if given is None else given

    def _adjusted(self, generator: NetworkGenerator, node_op: str) -> NetworkGenerator:
        """The generator with a node operation, and with the C for comparable multiply-adds."""
        if "channels" in self.sweep:
            generator = replace(generator, channels=self.sweep["channels"])
            if node_op == generator.node_op:
                return generator
            target = self._flops(generator)
        else:
            target = self._target
        generator = replace(generator, node_op=node_op)
        channels = find_channels(generator, target, self.seeds, **self._shape)
        return replace(generator, channels=channels)

    def _setting(self, generator: NetworkGenerator, config: str = "") -> Setting:
        label = graph_label(generator.graph, generator.graph_params)
        flops = self._flops(generator)
        return Setting(label, generator.node_op, generator.channels, flops, config)

    def _flops(self, generator: NetworkGenerator) -> float:
        return mean(complexity(generator(seed), **self._shape).flops for seed in self.seeds)

    @property
    def _shape(self) -> dict[str, int]:
        """Arguments for ``complexity``: image size and classes; for detectors, its defaults."""
        if not is_classifier(self.cfg):
            return {}
        size = self.cfg.INPUT.TEST_CROP_SIZE
        return {"height": size, "width": size, "num_classes": self.cfg.MODEL.CLASSIFIER.NUM_CLASSES}

    def _run(self, setting: Setting, seed: int, output: Path) -> Run:
        generator = Path(setting.node_op, _as_file_name(setting.generator))
        folder = output / (setting.config or generator) / f"seed{seed}"
        network = _network_options(setting, self.cfg, seed)
        weights = self._weights(setting, seed, network, folder)
        arguments = ["--config-file", str(self.path.resolve())]
        if self.num_gpus > 1:
            arguments += ["--num-gpus", str(self.num_gpus)]
        arguments += [*self.options, *network]
        identity = [self._identity, *map(": ".join, zip(network[::2], network[1::2]))]
        if weights is not None:
            # Results of weights that are trained in another way now are not this sweep's.
            identity += [f"a pretrained network of config {weights.config}"] * bool(weights.config)
            file = folder / BACKBONE if weights.conversion else weights.file
            arguments += ["MODEL.WEIGHTS", str(file)]
        return Run(
            setting=setting,
            seed=seed,
            folder=folder,
            arguments=(*arguments, "OUTPUT_DIR", str(folder)),
            classifies=is_classifier(self.cfg),
            identity="\n".join(identity),
            weights=weights,
            evaluates=self.evaluates,
            on_cpu=self.cfg.MODEL.DEVICE == "cpu",
            workers=self.cfg.DATALOADER.NUM_WORKERS,
        )

    @cached_property
    def _identity(self) -> str:
        """The settings of all runs that change a network's result, as text; without the machine."""
        cfg = self.cfg.clone()
        cfg.merge_from_list(["OUTPUT_DIR", "", "MODEL.DEVICE", "", "DATALOADER.NUM_WORKERS", 0])
        del cfg.SOLVER["HANG_TIMEOUT"]
        forget_other_generators(cfg)  # each run has the parameters of its own
        start = [key for key in ("pretrained", "evaluate") if key in self.sweep]
        return "\n".join([*(f"{key}: {self.sweep[key]}" for key in start), cfg.dump()])

    def _weights(
        self, setting: Setting, seed: int, network: Sequence[str], folder: Path
    ) -> Weights | None:
        # Each seed starts from its own network's weights, not from those in the config.
        own = self.pretrained is None or "MODEL.WEIGHTS" in self.options
        if own and (given := self.cfg.MODEL.WEIGHTS):
            for name, value in (("{channels}", setting.channels), ("{seed}", seed)):
                given = given.replace(name, str(value))
            return Weights(given)
        if self.pretrained is None:
            return None
        source = self.pretrained(setting, seed)
        file = str(RunFolder(source.folder).final_checkpoint)
        config = hashlib.sha256(source.identity.encode()).hexdigest()[:12]
        if is_classifier(self.cfg) or not source.classifies:
            return Weights(file, self.pretrained.command, config)
        options = [*self.options, *network]
        pairs = zip(options[::2], options[1::2])
        described = [text for pair in pairs if DESCRIBES.fullmatch(pair[0]) for text in pair]
        to = "fpn" if "fpn" in self.cfg.MODEL.BACKBONE.NAME else "bare"
        conversion = [file, str(folder / BACKBONE), "--to", to, "--config-file", str(self.path)]
        return Weights(file, self.pretrained.command, config, (*conversion, *described))


def _read_config(path: Path, options: Sequence[str]) -> CfgNode:
    cfg = classifier_config()
    merge_config(cfg, path, options)
    if not is_classifier(cfg):  # a detector's tool has fewer keys
        cfg = detector_config()
        merge_config(cfg, path, options)
    if family(cfg) != "RANDWIRE":
        raise ValueError(f"{path}: a sweep is of RandWires; got {cfg.MODEL.BACKBONE.NAME!r}")
    if drawn := drawn_network(cfg):
        raise ValueError(f"{path}: {drawn} is one network, and a sweep draws others by its seeds")
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"{path}: DATASETS.TEST must be one data set, by which runs are compared; got "
            f"{cfg.DATASETS.TEST}"
        )
    return cfg


def _network_options(setting: Setting, cfg: CfgNode, seed: int) -> list[str]:
    graph, params = parse_graph(setting.generator)
    node = cfg.MODEL.RANDWIRE.get(graph)
    if not isinstance(node, CfgNode) and params:
        raise ValueError(f"{graph} has no parameters in the config: add MODEL.RANDWIRE.{graph}")
    options: list[Any] = ["MODEL.RANDWIRE.GRAPH", graph]
    for name, value in params.items():
        # yacs does not accept 0 for a float.
        options += [f"MODEL.RANDWIRE.{graph}.{name.upper()}", type(node[name.upper()])(value)]
    options += ["MODEL.RANDWIRE.NODE_OP", setting.node_op]
    options += ["MODEL.RANDWIRE.CHANNELS", setting.channels]
    options += ["MODEL.RANDWIRE.SEED", seed, "SEED", seed]
    # A sweep needs only the last checkpoint of a finished run.
    options += ["SOLVER.CHECKPOINTS_TO_KEEP", 1]
    return [str(option) for option in options]


def _as_file_name(label: str) -> str:
    """A file name without special characters of shells: WS_4_0.75 for WS(4, 0.75)."""
    return re.sub(r"[^\w.]+", "_", label).strip("_")
