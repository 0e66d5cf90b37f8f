"""Archives of TorchScript and torch.export: whether they hold a graph and no more.

torch.export evaluates expressions, calls functions by name and loads libraries that a file holds.
So what a graph of this project has no need of is refused before it reads the file.
"""

import ast
import json
import re
import zipfile
from typing import Any

# The parts of a program of torch.export, below the archive's name.
_PARTS = (
    r"models/\w+\.json|data/(constants|weights)/((tensor|weight)_\d+|\w+_config\.json)|"
    r"data/sample_inputs/\w+\.pt|extra/\w+|\.data/\w+|\w+"
)
# What its nodes call: operators of tensors, and of sizes.
_TARGETS = (
    r"torch\.ops\.aten\.(?!from_file)[\w.]+|torch\.sym_\w+|"
    r"_operator\.(add|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|pow|sub|truediv)"
)
# Names in the expressions of sizes, sympy's, and in the guards, Python's: of no function that does
# anything but compute.
_NAMES = {
    "Add", "And", "CeilDiv", "CleanDiv", "Eq", "FloatTrueDiv", "FloorDiv", "Ge", "Gt",
    "IntTrueDiv", "Integer", "L", "Le", "Lt", "Max", "Min", "Mod", "Mul", "Ne", "Not", "Or", "Pow",
    "PythonMod", "Rational", "Symbol", "ToFloat", "TruncToInt", "abs", "ceil", "float", "floor",
    "int", "math", "max", "min", "size", "trunc",
}  # fmt: skip


def holds_code(path: str) -> bool:
    """Whether a file is TorchScript, and not what torch.save writes."""
    return zipfile.is_zipfile(path) and any("/code/" in name for name in _names(path))


def metadata_in(path: str) -> list[str]:
    """The keys of the metadata in an archive, in TorchScript's or torch.export's place."""
    found = (re.fullmatch(r"[^/]*/extra/(?:metadata/)?(\w+)", name) for name in _names(path))
    return [match[1] for match in found if match]


def check_program(path: str) -> None:
    """
    Raises:
        ValueError: a program of torch.export holds more than a graph.
    """
    names = _names(path)
    if len({name.lower() for name in names}) < len(names):  # PyTorch may read the other one
        raise ValueError("two of its parts have one name")
    for name in names:
        if not re.fullmatch(rf"[^/]*/({_PARTS})", name):
            raise ValueError(f"it holds {name!r}, which is no part of a graph")
    with zipfile.ZipFile(path) as archive:
        for name in names:
            if "/models/" in name:
                _check_graph(json.loads(archive.read(name)))


def _names(path: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _check_graph(part: Any, key: str = "") -> None:
    """Look at all parts of a program's JSON."""
    if isinstance(part, dict):
        for name, value in part.items():
            _check_graph(value, name)
    elif isinstance(part, list):
        for value in part:
            _check_graph(value, key)
    elif key == "target" and not re.fullmatch(_TARGETS, str(part)):
        raise ValueError(f"it calls {part!r}, which is no operator of a graph")
    elif key in ("expr_str", "guards_code") and not _is_arithmetic(str(part)):
        raise ValueError(f"it evaluates {str(part)[:80]!r}, which is no arithmetic of sizes")


def _is_arithmetic(text: str) -> bool:
    nodes = [*ast.walk(ast.parse(text, mode="eval"))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    # A text that is more than a name would be evaluated in its turn.
    words = all(re.fullmatch(r"\w+", text) for text in texts if isinstance(text, str))
    return words and names <= _NAMES
