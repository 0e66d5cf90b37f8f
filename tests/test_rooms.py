"""The layout of the package: what a room may import, so that it can be read without the others."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
from helpers import ROOT

PACKAGE = ROOT / "randwire_d2"


def imports(house: Path) -> Iterator[tuple[str, str]]:
    """(room, another one that a file of it imports); a room is a folder or file of the house."""
    rooms = {path.stem for path in house.iterdir() if not path.stem.startswith("_")}
    for path in house.rglob("*.py"):
        inside = path.relative_to(house).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(inside):
                named = [node.module.split(".")[0]] if node.module else [n.name for n in node.names]
                yield from ((inside[0], name) for name in named if name in rooms - {inside[0]})


def test_rooms_import_only_what_is_below_them() -> None:
    """Wrong: rooms import each other in a circle, so that none can be understood, or tested, alone;
    or what computes needs the tools."""
    for house in (PACKAGE, *(PACKAGE / name for name in ("data", "engine", "inference"))):
        graph = nx.DiGraph(imports(house))
        assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)
    graph = nx.DiGraph(imports(PACKAGE))
    assert set(graph.predecessors("cli")) <= {"__main__", "command"}
    folders = [room for room in graph if (PACKAGE / room / "__init__.py").exists()]
    assert not set(folders) & {*nx.descendants(graph, "wiring"), *nx.descendants(graph, "ops")}


def test_the_guide_lists_the_rooms_from_the_bottom_up() -> None:
    """Wrong: the table that newcomers read lacks a room, or a room imports from a lower row."""
    table = (ROOT / "GUIDE.md").read_text().split("| folder of `randwire_d2/` | content |")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    row_of = {room: i for i, row in enumerate(rows) for room in re.findall(r"`(\w+)`", row)}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert row_of.keys() == folders - {"command"}  # its name for messages is read everywhere
    found = [(room, other) for room, other in imports(PACKAGE) if {room, other} <= row_of.keys()]
    assert not {f"{a} imports {b}" for a, b in found if row_of[a] < row_of[b]}
