"""Tables of complexity: the paper's Tables 1 to 4, the parts of a network, the C for a target."""

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from statistics import mean
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config import classifier_config, drawn_network, family
from ..modeling.image_classifier import build_network
from ..wiring import (
    Complexity,
    ConvSpec,
    NetworkGenerator,
    StageSpec,
    complexity,
    find_channels,
    graph_label,
)
from ..wiring.network import HEAD_CHANNELS
from .paper import TABLE_2, TABLE_3, TABLE_4
from .parts import Part, module_parts, network_parts, total_cost
from .tables import Quantity, Table

SEEDS = (1, 2, 3, 4, 5)  # the paper's five networks
DEFINITION = (
    "Multiply-adds of convolutions, fc layers and weighted sums; activations: elements that "
    "convolutions and fc layers put out."
)


def table_1() -> Table:
    """The layers of both regimes in terms of N and C, with output sizes for 224×224 pixels."""
    columns = {}
    for regime in ("small", "regular"):
        generator = NetworkGenerator(regime, channels=2)
        columns[regime] = [_in_symbols(layer, generator) for layer in generator(1).layers]
    rows = []
    for i, (small, regular) in enumerate(zip(columns["small"], columns["regular"], strict=True)):
        size = 224 // 2 ** (i + 1)
        rows.append(
            {
                "stage": f"conv{i + 1}",
                "here": "stem" if i == 0 else f"res{i + 1}",
                "output": (size, size),
                "small regime": small,
                "regular regime": regular,
            }
        )
    head = {"stage": "classifier", "here": "head", "output": (1, 1)}
    for text in (f"1×1 conv, {HEAD_CHANNELS}-d", "global average pool, 1000-d fc, softmax"):
        rows.append({**head, "small regime": text, "regular regime": text})
    return Table("Table 1: RandWire architectures", rows)


def _in_symbols(layer: ConvSpec | StageSpec, generator: NetworkGenerator) -> str:
    def symbol(name: str, number: int, of: int) -> str:
        ratio = Fraction(number, of)
        times = "" if ratio.numerator == 1 else str(ratio.numerator)
        return f"{times}{name}" + ("" if ratio.denominator == 1 else f"/{ratio.denominator}")

    channels = symbol("C", layer.channels, generator.channels)
    if isinstance(layer, StageSpec):
        nodes = symbol("N", layer.dag.num_nodes, generator.num_nodes)
        return f"random wiring {nodes}, {channels}"
    return f"3×3 conv, {channels}"


# By table: title, rows, regime, image size, and unit of the multiply-adds.
_PAPER = {
    2: ("small computation regime, 250 epochs", TABLE_2, "small", 224, "M"),
    3: ("regular computation regime, 100 epochs", TABLE_3, "regular", 224, "B"),
    4: ("large computation regime, Table 3's network tested at 320×320",
        TABLE_4, "regular", 320, "B"),
}  # fmt: skip
PAPER_TABLES = (1, *_PAPER)


def paper_table(number: int, seeds: Sequence[int] = SEEDS) -> Table:
    """One of the paper's Tables 1 to 4: its numbers, and the ones counted here beside them."""
    if number == 1:
        return table_1()
    title, networks, regime, size, flops_unit = _PAPER[number]
    rows = []
    for printed in networks:
        costs = _count(printed.network, regime, size, seeds)
        top1, top5 = printed.accuracies
        row: dict[str, Any] = {
            "network": printed.network,
            "paper: top-1": top1,
            "paper: top-5": top5,
        }
        for name, attribute, unit in (
            ("multiply-adds", "flops", flops_unit),
            ("parameters", "params", "M"),
        ):
            paper = getattr(printed, attribute)
            # Print two digits more than the paper.
            digits = [len(part.partition(".")[2]) + 2 for part in paper.split("±")]
            values = tuple(getattr(cost, attribute) for cost in costs)
            counted = Quantity(values, unit, (digits[0], digits[-1])) if costs else None
            row[name] = counted
            row[f"{name}: paper"] = f"{paper} {unit}"
            row[f"{name}: which is"] = counted.against(paper) if counted else None
        row["activations"] = Quantity(tuple(cost.activations for cost in costs)) if costs else None
        rows.append(row)
    note = (
        f"RandWire-WS: seeds {', '.join(map(str, seeds))}; accuracies are the paper's. Which is: "
        "the paper's number is the counted one rounded, or cut off, or not what that rounds to. "
        f"{DEFINITION}"
    )
    return Table(f"Table {number}: {title}", rows, note)


def _count(network: str, regime: str, size: int, seeds: Sequence[int]) -> list[Complexity]:
    """The complexity of a row's networks; empty if they can't be built here."""
    if match := re.fullmatch(r"RandWire-WS, C=(\d+)", network):
        generator = NetworkGenerator(regime, int(match[1]))
        return [complexity(generator(seed), size, size) for seed in seeds]
    if match := re.fullmatch(r"ResNe(X?)t-(\d+)", network):
        cfg = classifier_config()
        groups, width = (32, 4) if match[1] else (1, 64)  # "ResNeXt is the 32×4 version"
        cfg.merge_from_list(
            ["MODEL.RESNETS.DEPTH", int(match[2]), "MODEL.RESNETS.OUT_FEATURES", ["res5"]]
            + ["MODEL.RESNETS.NUM_GROUPS", groups, "MODEL.RESNETS.WIDTH_PER_GROUP", width]
            + ["MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.NORM", "BN"]
        )
        return [total_cost(module_parts(build_network(cfg), torch.zeros(1, 3, size, size)))]
    return []


def seeds_of(cfg: CfgNode, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds for drawing a config's networks: the given ones; the config's own if none are given
    or if the network is no RandWire.

    Raises:
        ValueError: seeds are given, but the config names a RandWire that was drawn already.
    """
    if not seeds or family(cfg) != "RANDWIRE":
        return [cfg.MODEL.RANDWIRE.SEED]
    if drawn := drawn_network(cfg):
        raise ValueError(f"{drawn} is one network: leave the seeds out, or set that key to ''")
    return seeds


def count_config(cfg: CfgNode, height: int, width: int, seed: int) -> list[Part]:
    """``network_parts`` of the network that a config draws with a seed."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RANDWIRE.SEED = seed
    return network_parts(cfg, height, width)


def _quantities(costs: Sequence[Complexity]) -> dict[str, Quantity]:
    return {
        "parameters": Quantity(tuple(cost.params for cost in costs)),
        "multiply-adds": Quantity(tuple(cost.flops for cost in costs), digits=(1, 1)),
        "activations": Quantity(tuple(cost.activations for cost in costs)),
    }


def part_table(title: str, counted: Sequence[Sequence[Part]], note: str) -> Table:
    """A row for each part of a network, and the total; means if there are several networks."""
    rows = []
    for same in zip(*counted, strict=True):
        first = same[0]
        edges = [part.edges for part in same if part.edges is not None]
        rows.append(
            {
                "part": first.name,
                "output": first.output,
                "channels": first.channels,
                "nodes": first.nodes,
                "edges": Quantity(tuple(edges), "", (0, 0)) if len(set(edges)) > 1 else first.edges,
                "RoIs": first.rois,
                **_quantities([part.cost for part in same]),
            }
        )
    total = dict.fromkeys(rows[0])
    rows.append({**total, "part": "total", **_quantities([total_cost(parts) for parts in counted])})
    return Table(title, rows, f"{note}{DEFINITION}")


def network_table(
    networks: Sequence[tuple[str, tuple[int, int], Sequence[Sequence[Part]]]], note: str
) -> Table:
    """A row for each config; ``networks`` has (name, (height, width), each network's parts)."""
    rows = [
        {
            "config": name,
            "size": size,
            "networks": len(counted) if len(counted) > 1 else None,
            **_quantities([total_cost(parts) for parts in counted]),
        }
        for name, size, counted in networks
    ]
    return Table("The networks of configs", rows, f"{note}{DEFINITION}")


def channels_table(
    generators: Sequence[NetworkGenerator],
    target: float,
    seeds: Sequence[int],
    height: int,
    width: int,
    num_classes: int = 1000,
) -> Table:
    """For each generator, the C whose networks have the multiply-adds nearest to a target.

    Raises:
        ValueError: there is no such C; see ``find_channels``.
    """
    rows = []
    for generator in generators:
        size = (height, width, num_classes)
        channels = find_channels(generator, target, seeds, *size)
        drawn = replace(generator, channels=channels)
        costs = [complexity(drawn(seed), *size) for seed in seeds]
        off = mean(cost.flops for cost in costs) / target - 1
        rows.append(
            {
                "generator": graph_label(generator.graph, generator.graph_params),
                "N": generator.num_nodes,
                "node operation": generator.node_op,
                "C": channels,
                **_quantities(costs),
                "off the target": f"{100 * off:+.2f}%",
            }
        )
    return Table(
        f"C for {target / 1e6:,.1f} M multiply-adds, {generators[0].regime} regime, "
        f"{height}×{width}, {num_classes} classes",
        rows,
        f"Seeds {', '.join(map(str, seeds))}. {DEFINITION}",
    )
