"""Draw wirings: whole networks as in Figure 1 of the paper, random graphs as in Figure 4.

    python tools/draw_wiring.py --config-file configs/imagenet/randwire_c109_100ep.yaml \\
        --seeds 1 2 3 --output wiring.png
    python tools/draw_wiring.py --checkpoint model_final.pth --output wiring.svg
    python tools/draw_wiring.py --spec network.json --layout columns --output wiring.pdf
    python tools/draw_wiring.py --grid "ER(0.2)" "BA(5)" "WS(4, 0.75)" --seeds 1 2 3 4 5 \\
        --nodes 32 --output grid.png

A network is drawn from the image down to the classifier; several networks are drawn side by side.
Input nodes are blue, output nodes are red, and nodes that are both are half blue, half red. Squares
are the extra nodes that join the stages. A grid has a row for each generator, a column for each
seed, and no extra nodes.
"""

import argparse
import os
from collections.abc import Sequence

from matplotlib.figure import Figure
from tqdm import tqdm

from ..checkpoint import Wiring
from ..config import (
    classifier_config,
    drawn_network,
    family,
    generator_from_config,
    merge_config,
    spec_from_config,
)
from ..conversion import read_checkpoint
from ..drawing.dag_layout import layout_dag
from ..drawing.grid import draw_grid, draw_networks
from ..drawing.network import draw_network
from ..drawing.style import FORMATS, check_format, save_figure
from ..runs import RunFolder
from ..text import prefixed
from ..wiring import Dag, NetworkSpec, graph_label, parse_graph, random_graph
from ..wiring.limits import MOST_CHARACTERS
from .frame import framed, parser_of

SCRIPT = "draw_wiring.py"

GRID = ("ER(0.2)", "ER(0.6)", "BA(1)", "BA(5)", "WS(4, 0)", "WS(4, 0.75)")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__, "%(prog)s SOURCE --output FILE [options] [KEY VALUE ...]")
    group = parser.add_argument_group("the source, which is one of these")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config-file",
        metavar="FILE",
        help="the config of a classifier or a detector with a RandWire",
    )
    source.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="FILE_OR_RUN",
        help="checkpoints that carry their wiring, or the OUTPUT_DIR of trainings",
    )
    source.add_argument(
        "--spec", nargs="+", metavar="FILE", help="JSON files of networks, as to_json writes them"
    )
    source.add_argument(
        "--grid",
        nargs="*",
        metavar="GENERATOR",
        help=f"generators as the paper writes them (default: {' '.join(map(repr, GRID))})",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help=f"the picture; the file ends in {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="the seeds (default: the config's seed; with --grid: 1 2 3 4 5)",
    )
    parser.add_argument(
        "--nodes", type=int, help="N, the nodes of each random graph of --grid (default: 32)"
    )
    parser.add_argument(
        "--layout",
        choices=("stacked", "columns"),
        help="the order of a network's stages: stacked, or in columns from left to right with the "
        "indices of the nodes, which takes only one network (default: stacked)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys of the config and their new values"
    )
    return parser.parse_intermixed_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse options that can't be combined, before any work."""
    check_format(args.output, "--output")
    is_grid, is_config = args.grid is not None, args.config_file is not None
    for given, fits, name, source in (
        (args.opts, is_config, "KEY VALUE", "--config-file"),
        (args.seeds, is_config or is_grid, "--seeds", "--config-file or --grid"),
        (args.nodes is not None, is_grid, "--nodes", "--grid; a config has its NUM_NODES"),
        (args.layout, not is_grid, "--layout", "networks, not --grid"),
    ):  # fmt: skip
        if given and not fits:
            raise ValueError(f"{name} is for {source}")


def networks_of_config(args: argparse.Namespace) -> tuple[str, dict[str, NetworkSpec]]:
    """The name of the config's generator, and its networks by their titles."""
    cfg = classifier_config()
    merge_config(cfg, args.config_file, args.opts)
    name, node = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RANDWIRE
    if family(cfg) != "RANDWIRE":
        raise ValueError(f"{args.config_file}: MODEL.BACKBONE.NAME {name!r} is no RandWire")
    if drawn := drawn_network(cfg):
        if args.seeds:
            raise ValueError(f"{drawn} is one network; leave out --seeds")
        spec = spec_from_config(cfg)
        return "RandWire", {spec.fingerprint[:12]: spec}
    generator = generator_from_config(cfg)
    specs = {}
    for seed in args.seeds or [node.SEED]:
        node.SEED = seed
        specs[f"seed {seed}"] = spec_from_config(cfg)
    return graph_label(generator.graph, generator.graph_params), specs


def read_spec(path: str) -> NetworkSpec:
    with prefixed(f"{path!r}"), open(path, encoding="utf-8") as f:
        return NetworkSpec.from_json(f.read(MOST_CHARACTERS + 1))


def read_wiring(path: str) -> NetworkSpec:
    if os.path.isdir(path):
        path = str(RunFolder(path).checkpoint())
    entries = read_checkpoint(path).rest
    with prefixed(f"{path!r}"):
        wiring = Wiring.of(entries)
    if wiring is None:
        raise ValueError(f"{path!r} does not hold its wiring; draw its config, with --config-file")
    return wiring.spec


def draw(args: argparse.Namespace) -> Figure:
    if args.grid is not None:
        seeds = dict.fromkeys(args.seeds or range(1, 6))
        nodes = 32 if args.nodes is None else args.nodes
        rows = {}
        for model, params in map(parse_graph, args.grid or GRID):
            graphs = [random_graph(model, nodes, seed, **params) for seed in seeds]
            rows[graph_label(model, params)] = [Dag.from_graph(graph) for graph in graphs]
        for dag in tqdm([dag for row in rows.values() for dag in row], unit="graph", leave=False):
            layout_dag(dag, extra=False)  # takes most of the time; cached for draw_grid
        return draw_grid(rows, [f"seed {s}" for s in seeds])
    if args.config_file is not None:
        name, networks = networks_of_config(args)
    else:
        read, paths = (read_spec, args.spec) if args.spec else (read_wiring, args.checkpoint)
        specs = [read(path) for path in paths]
        name, networks = "RandWire", {spec.fingerprint[:12]: spec for spec in specs}
    if args.layout == "columns":
        if len(networks) > 1:
            raise ValueError(f"--layout columns draws one network; got {len(networks)}")
        return draw_network(next(iter(networks.values())))
    return draw_networks(list(networks.values()), list(networks), name)


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check(args)
    print(f"Picture: {save_figure(draw(args), args.output, palette=True)}")
