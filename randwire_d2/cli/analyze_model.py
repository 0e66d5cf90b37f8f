"""Count parameters and multiply-adds of the paper's or a config's networks, or find C for a target.

    python tools/analyze_model.py
    python tools/analyze_model.py --tables 3 --format markdown
    python tools/analyze_model.py --config-file configs/imagenet/[rRX]*.yaml
    python tools/analyze_model.py --config-file configs/imagenet/randwire_c109_100ep.yaml \\
        --seeds 1 2 3 4 5 --size 320
    python tools/analyze_model.py --config-file configs/faster_rcnn_randwire_c109_fpn_1x.yaml
    python tools/analyze_model.py --target 583M --regime small --graph "BA(5)" --nodes 32 \\
        --node-op conv3x3 max_pool3x3
    python tools/analyze_model.py --target 4B \\
        --config-file configs/imagenet/randwire_c109_100ep.yaml MODEL.RANDWIRE.NUM_NODES 16

Without options, the tool prints the paper's tables, with its own counts beside the paper's numbers.
With one config, it prints the parts of the network; with several, a row for each. A classifier is
counted at INPUT.TEST_CROP_SIZE. A detector is counted at INPUT.MIN_SIZE_TEST and 5/3 of it, in
multiples of 32 (800 × 1344), without weights, with as many proposals and detections as the config
allows. RandWire classifiers are counted from their specs, everything else with fvcore while it
runs. A multiply-add is one FLOP, as in the paper.

With --target, the tool finds C, "the nearest integer such that target model complexity is met", on
average over the seeds, for each node operation.
"""

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import (
    classifier_config,
    family,
    generator_from_config,
    is_classifier,
    merge_config,
)
from ..engine import split_pairs
from ..experiments.analysis import (
    PAPER_TABLES,
    SEEDS,
    channels_table,
    count_config,
    network_table,
    paper_table,
    part_table,
    seeds_of,
)
from ..experiments.parts import default_size
from ..experiments.tables import Table
from ..files import check_file, write_or_print
from ..wiring import NODE_OP_COMPLEXITY_REGISTRY, NetworkGenerator, parse_graph
from .frame import at_least, command_line, framed, parser_of

SCRIPT = "analyze_model.py"


def multiply_adds(text: str) -> float:
    """Parse a number such as 580M, 4B or 4.0e9."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?)([MBG]?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"a number such as 580M, 4B or 4.0e9; got {text!r}")
    return float(match[1]) * {"": 1, "M": 1e6, "B": 1e9, "G": 1e9}[match[2]]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(
        SCRIPT, __doc__, "%(prog)s [--config-file CONFIG ... [KEY VALUE ...]] [options]"
    )
    add_networks(parser)
    add_generator(parser)
    out = parser.add_argument_group("output")
    out.add_argument(
        "--format",
        choices=("text", "markdown", "json"),
        default="text",
        help="the form of the tables (default: text)",
    )
    out.add_argument("--output", metavar="FILE", help="write to this file instead of printing")
    args = parser.parse_args(argv)
    args.config_file, args.opts = split_pairs(args.config_file)
    if wrong := wrong_usage(args):
        parser.error(wrong)
    return args


def add_networks(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is counted")
    what.add_argument(
        "--tables",
        type=int,
        nargs="+",
        choices=PAPER_TABLES,
        metavar="TABLE",
        help=f"the tables of the paper (default: {' '.join(map(str, PAPER_TABLES))})",
    )
    what.add_argument(
        "--config-file",
        nargs="+",
        default=[],
        metavar="CONFIG",
        help="configs of classifiers or detectors; KEY VALUE pairs after the last one "
        "change them all",
    )
    what.add_argument(
        "--target",
        type=multiply_adds,
        metavar="MULTIPLY_ADDS",
        help="find the C for a complexity such as 580M, 4B or 4.0e9",
    )
    what.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="the seeds of RandWires, for mean ± standard deviation (default: the config's seed, "
        "or 1 2 3 4 5 without a config)",
    )
    what.add_argument(
        "--size",
        type=at_least(1),
        nargs="+",
        metavar="PIXELS",
        help="the size of images, one number or height and width (default: the config's, or 224 "
        "without a config)",
    )


def add_generator(parser: argparse.ArgumentParser) -> None:
    drawn = parser.add_argument_group("the generator of --target, without a config")
    drawn.add_argument(
        "--regime", choices=("small", "regular"), help="a column of Table 1 (default: regular)"
    )
    drawn.add_argument("--graph", metavar="LABEL", help='the graph model (default: "WS(4, 0.75)")')
    drawn.add_argument("--nodes", type=int, help="N, the nodes of each random graph (default: 32)")
    drawn.add_argument(
        "--node-op",
        nargs="+",
        metavar="OP",
        help="the node operations (default: the config's, or all without a config)",
    )


def wrong_usage(args: argparse.Namespace) -> str:
    """The fault of options that argparse accepts one by one; "" if there is none."""
    if args.opts and not args.config_file:
        return f"--config-file: no file before {args.opts[0]}"
    if args.size is not None and len(args.size) > 2:
        return f"--size takes one or two numbers; got {len(args.size)}"
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        return f"--seeds must differ; got {' '.join(map(str, args.seeds))}"
    if args.tables and (args.config_file or args.target):
        return "--tables are the paper's: no --config-file, no --target"
    if args.size and not args.config_file and not args.target:
        return "--size needs --config-file or --target; the paper's tables have their own sizes"
    if args.node_op and not args.target:
        return "--node-op needs --target"
    for name in ("regime", "graph", "nodes"):
        if getattr(args, name) is not None and (args.config_file or not args.target):
            return f"--{name} needs --target, without --config-file"
    return ""


def read(path: str, opts: Sequence[str]) -> CfgNode:
    cfg = classifier_config()
    merge_config(cfg, path, opts)
    return cfg


def find(args: argparse.Namespace) -> list[Table]:
    """Tables of the C with which each generator meets args.target."""
    seeds, sizes = args.seeds or SEEDS, args.size or [224]
    if not args.config_file:
        graph, params = parse_graph(args.graph or "WS(4, 0.75)")
        nodes = 32 if args.nodes is None else args.nodes
        generators = [
            NetworkGenerator(args.regime or "regular", 2, nodes, graph, params, op)
            for op in args.node_op or [name for name, _ in NODE_OP_COMPLEXITY_REGISTRY]
        ]
        return [channels_table(generators, args.target, seeds, sizes[0], sizes[-1])]
    tables = []
    for path in args.config_file:
        cfg = read(path, args.opts)
        if not is_classifier(cfg) or family(cfg) != "RANDWIRE":
            raise ValueError(f"{path}: --target is for configs of RandWire classifiers")
        seeds_of(cfg, seeds)
        generator = generator_from_config(cfg)
        generators = [replace(generator, node_op=op) for op in args.node_op or [generator.node_op]]
        height, width = (sizes[0], sizes[-1]) if args.size else default_size(cfg)
        classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
        tables.append(channels_table(generators, args.target, seeds, height, width, classes))
    return tables


def count(args: argparse.Namespace) -> Table:
    """A table of the parts of one config, or of several configs, with a row for each."""
    configs = [(path, read(path, args.opts)) for path in args.config_file]
    seeds = [seeds_of(cfg, args.seeds or ()) for _, cfg in configs]
    networks = []
    with tqdm(total=sum(map(len, seeds)), unit="network", leave=False) as bar:
        for (path, cfg), drawn in zip(configs, seeds):
            height, width = (args.size[0], args.size[-1]) if args.size else default_size(cfg)
            counted = []
            for seed in drawn:
                bar.set_description(Path(path).stem)
                counted.append(count_config(cfg, height, width, seed))
                bar.update()
            networks.append((path, (height, width), counted))
    note = f"Seeds {', '.join(map(str, args.seeds))}. " if args.seeds else ""
    if not all(is_classifier(cfg) for _, cfg in configs):
        note += (
            "Of detectors, parameters include those of frozen norms, and heads see as many "
            "proposals and detections as the config has room for. "
        )
    if len(networks) > 1:
        return network_table(networks, note)
    return part_table(f"{path}, {height}×{width}", counted, note)


def print_tables(tables: Sequence[Table], form: str) -> str:
    """The text of the tables, followed by their notes, each of them once."""
    notes = dict.fromkeys(table.note for table in tables if table.note)
    texts = [table.to_text(form == "markdown") for table in tables]
    if form == "markdown":
        return "\n\n".join([*texts, *notes])
    return "\n\n".join([*texts, *(textwrap.fill(note, 100) for note in notes)])


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_file("--output", args.output)
    if args.target is not None:
        tables = find(args)
    elif args.config_file:
        tables = [count(args)]
    else:
        numbers = tqdm(args.tables or PAPER_TABLES, unit="table", leave=False)
        tables = [paper_table(number, args.seeds or SEEDS) for number in numbers]
    if args.format == "json":
        command = command_line(SCRIPT, argv)
        found = {"command": command, "tables": [table.to_json() for table in tables]}
        text = json.dumps(found, indent=1, ensure_ascii=False)
    else:
        text = print_tables(tables, args.format)
    write_or_print(text, args.output)
