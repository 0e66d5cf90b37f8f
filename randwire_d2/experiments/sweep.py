"""Sweeps: generators × node operations × seeds, each a run of tools/pretrain_imagenet.py.

A sweep is a YAML file (configs/sweeps) with these keys, and ``_BASE_`` as in Detectron2's configs:

    config: the classifier's config, relative to the sweep's file
    generators: labels such as WS(4, 0.75); Figure 3's columns
    seeds: of both the wiring and the training
    node_ops: node operations (default: the config's)
    channels: C of the config's node operation (default: the config's)
    multiply_adds: in place of ``channels``, what each generator's networks have on average
    options: more keys of the config

"We adjust the factor C to keep the complexity of all alternative networks" (§4.1, "Node
operations"): an operation other than the config's gets, for each generator, the C whose networks
have the nearest multiply-adds, on average over the seeds.
"""

import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from detectron2.config import CfgNode

from ..config import classifier_config, merge_config, merge_in_one_line
from ..files import atomic_open
from ..runs import RunFolder
from ..wiring import (
    NODE_OP_COMPLEXITY_REGISTRY,
    NetworkGenerator,
    complexity,
    find_channels,
    graph_label,
    parse_graph,
)

KEYS = ("config", "generators", "seeds", "node_ops", "channels", "multiply_adds", "options")
METRIC = "classification/top1"

State = Literal["finished", "failed", "running", "unfinished"]


@dataclass(frozen=True)
class Setting:
    """A bar of Figure 3, or a point of Figure 6: what several seeds are drawn from.

    Attributes:
        generator: its label, such as ``"WS(4, 0.75)"``.
        node_op: the operation of every node.
        channels: C.
        flops: the multiply-adds of its networks, on average over the sweep's seeds.
    """

    generator: str
    node_op: str
    channels: int
    flops: float


@dataclass(frozen=True)
class Status:
    """What a run's folder says.

    Attributes:
        state: ``"failed"`` is a training that ended by itself, without its result; one that was
            killed together with its sweep is ``"unfinished"``.
        progress: the part of the training that is done, 0 … 1.
        top1: of a finished run, in %.
        reason: of a failed run, the last thing that it said.
    """

    state: State
    progress: float = 0.0
    top1: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Run:
    """One network of a setting.

    Attributes:
        seed: of the wiring and of the training.
        folder: the training's OUTPUT_DIR.
        arguments: of tools/pretrain_imagenet.py.
        identity: its whole config, as text, but for the keys that do not change the result.
    """

    setting: Setting
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    identity: str

    def check(self) -> None:
        """
        Raises:
            ValueError: the folder holds another run: of another sweep, or of this one before it was
                changed.
        """
        path = self.folder / "sweep.yaml"
        if path.is_file() and (text := path.read_text()) != self.identity:
            theirs = text.splitlines()
            changed = [line.strip() for line in self.identity.splitlines() if line not in theirs]
            raise ValueError(
                f"{self.folder} holds a run of another config than this sweep's, where it is now "
                f"{'; '.join(changed[:5])}: choose another --output, or remove that folder"
            )

    def claim(self) -> None:
        """Make the folder this run's, for all sweeps to come."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_open(self.folder / "sweep.yaml") as f:
            f.write(self.identity)

    @property
    def failure(self) -> Path:
        """The file in which a failed training leaves the end of its output."""
        return self.folder / "failed.txt"

    @property
    def lock(self) -> Path:
        """The file whose lock the training's process holds, even if its sweep was killed."""
        return self.folder / "lock"

    def status(self) -> Status:
        folder = RunFolder(self.folder)
        progress = folder.progress()
        top1 = progress.last.get(METRIC)
        if progress.done == 1 and top1 is not None and folder.final_checkpoint.is_file():
            return Status("finished", 1.0, top1)
        if self.failure.is_file():
            # How it ended, and the end of its output.
            lines = self.failure.read_text(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()] or [""]
            killed = said[0].startswith("killed")
            return Status("failed", progress.done, reason=said[0] if killed else said[-1])
        return Status("running" if _is_locked(self.lock) else "unfinished", progress.done)


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def load_sweep(
    path: str | Path, output: str | Path, options: Sequence[str] = (), num_gpus: int = 1
) -> list[Run]:
    """The runs of a sweep, seed by seed: a sweep that is not over yet compares all generators.

    Args:
        path: the sweep's YAML.
        output: the folder that holds the runs' folders.
        options: KEY VALUE pairs, after the sweep's own.
        num_gpus: the processes of each run; on a CPU too.

    Raises:
        OSError: the file, or the config that it names, can't be read.
        ValueError: a key or a value is wrong; the message names it.
    """
    sweep = _read(path)
    for key, value in (sweep.get("options") or {}).items():
        options = [key, str(value), *options]
    config = Path(path).parent / sweep["config"]
    cfg = _read_config(config, options)
    settings = _settings(sweep, cfg)
    # The machine that it runs on does not change a network's result.
    cfg.merge_from_list(["OUTPUT_DIR", "", "MODEL.DEVICE", "", "DATALOADER.NUM_WORKERS", 0])
    shared = cfg.dump()
    runs = []
    for seed in sweep["seeds"]:
        for setting in settings:
            folder = Path(output, setting.node_op, _as_file_name(setting.generator), f"seed{seed}")
            arguments = ["--config-file", str(config.resolve())]
            if num_gpus > 1:
                # Each run finds a port of its own.
                arguments += ["--num-gpus", str(num_gpus), "--dist-url", "auto"]
            network = _network_options(setting, cfg, seed)
            arguments += [*options, *network, "OUTPUT_DIR", str(folder)]
            identity = "\n".join([shared, *map(": ".join, zip(network[::2], network[1::2]))])
            runs.append(Run(setting, seed, folder, tuple(arguments), identity))
    return runs


def _read(path: str | Path) -> dict[str, Any]:
    sweep: dict[str, Any] = {}
    merge_in_one_line(str(path), lambda: sweep.update(CfgNode.load_yaml_with_base(str(path))))
    unknown = set(sweep) - set(KEYS)
    if unknown:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {list(KEYS)}")
    for key in ("config", "generators", "seeds"):
        if not sweep.get(key):
            raise ValueError(f"{path}: the key {key!r} is missing or empty")
    for key in ("generators", "seeds", "node_ops"):
        values = sweep.get(key, [])
        if not isinstance(values, list) or len({str(v) for v in values}) < len(values):
            raise ValueError(f"{path}: {key} must be a list without repetitions; got {values!r}")
    if "channels" in sweep and "multiply_adds" in sweep:
        raise ValueError(f"{path}: channels and multiply_adds exclude each other")
    return sweep


def _read_config(path: Path, options: Sequence[str]) -> CfgNode:
    cfg = classifier_config()
    merge_config(cfg, path, options)
    if cfg.MODEL.BACKBONE.NAME != "build_randwire_backbone":
        raise ValueError(f"{path}: a sweep is of RandWires; got {cfg.MODEL.BACKBONE.NAME!r}")
    return cfg


def _settings(sweep: dict[str, Any], cfg: CfgNode) -> list[Setting]:
    node = cfg.MODEL.RANDWIRE
    size = cfg.INPUT.TEST_CROP_SIZE
    shape = {"height": size, "width": size, "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES}
    seeds = sweep["seeds"]
    channels = sweep.get("channels", node.CHANNELS)
    settings = []
    for node_op in sweep.get("node_ops") or [node.NODE_OP]:
        if node_op not in NODE_OP_COMPLEXITY_REGISTRY:
            known = sorted(name for name, _ in NODE_OP_COMPLEXITY_REGISTRY)
            raise ValueError(f"unknown node operation {node_op!r}; known are {known}")
        for label in sweep["generators"]:
            graph, params = parse_graph(label)
            base = NetworkGenerator(
                node.REGIME, channels, node.NUM_NODES, graph, params, node.NODE_OP
            )
            target = sweep.get("multiply_adds")
            if target is None:
                target = mean(complexity(base(seed), **shape).flops for seed in seeds)
            if node_op == node.NODE_OP and "multiply_adds" not in sweep:
                chosen = channels
            else:
                generator = NetworkGenerator(
                    node.REGIME, channels, node.NUM_NODES, graph, params, node_op
                )
                chosen = find_channels(generator, target, seeds, **shape)
            generator = NetworkGenerator(
                node.REGIME, chosen, node.NUM_NODES, graph, params, node_op
            )
            flops = mean(complexity(generator(seed), **shape).flops for seed in seeds)
            settings.append(Setting(graph_label(graph, params), node_op, chosen, flops))
    return settings


def _network_options(setting: Setting, cfg: CfgNode, seed: int) -> list[str]:
    graph, params = parse_graph(setting.generator)
    node = cfg.MODEL.RANDWIRE.get(graph)
    if not isinstance(node, CfgNode) and params:
        raise ValueError(f"{graph} has no parameters in the config: add MODEL.RANDWIRE.{graph}")
    options: list[Any] = ["MODEL.RANDWIRE.GRAPH", graph]
    for name, value in params.items():
        # yacs takes no 0 for a float.
        options += [f"MODEL.RANDWIRE.{graph}.{name.upper()}", type(node[name.upper()])(value)]
    options += ["MODEL.RANDWIRE.NODE_OP", setting.node_op]
    options += ["MODEL.RANDWIRE.CHANNELS", setting.channels]
    options += ["MODEL.RANDWIRE.SEED", seed, "SEED", seed]
    # What a sweep wants of a finished run is its last checkpoint.
    options += ["SOLVER.CHECKPOINTS_TO_KEEP", 1]
    return [str(option) for option in options]


def _as_file_name(label: str) -> str:
    """WS(4, 0.75) as WS_4_0.75: no shell minds it."""
    return re.sub(r"[^\w.]+", "_", label).strip("_")
