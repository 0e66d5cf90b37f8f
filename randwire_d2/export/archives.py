"""Archives of TorchScript and torch.export: check that a file contains a graph and nothing else.

torch.export evaluates expressions, calls functions by name and loads libraries that are in a file.
So a file with anything that graphs of this project do not need is refused before that.
"""

import ast
import json
import re
import zipfile
from typing import Any

# The files in an archive of torch.export, below the archive's name.
_PARTS = (
    r"models/\w+\.json|data/(constants|weights)/((tensor|weight)_\d+|\w+_config\.json)|"
    r"data/sample_inputs/\w+\.pt|extra/\w+|\.data/\w+|\w+"
)
# The targets of the program's nodes: operators on tensors, and on sizes.
_TARGETS = (
    r"torch\.ops\.aten\.(?!from_file)[\w.]+|torch\.sym_\w+|"
    r"_operator\.(add|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|pow|sub|truediv)"
)
# The names allowed in sympy's expressions of sizes and in Python's guards: their functions do
# nothing but compute.
_NAMES = {
    "Add", "And", "CeilDiv", "CleanDiv", "Eq", "FloatTrueDiv", "FloorDiv", "Ge", "Gt",
    "IntTrueDiv", "Integer", "L", "Le", "Lt", "Max", "Min", "Mod", "Mul", "Ne", "Not", "Or", "Pow",
    "PythonMod", "Rational", "Symbol", "ToFloat", "TruncToInt", "abs", "ceil", "float", "floor",
    "int", "math", "max", "min", "size", "trunc",
}  # fmt: skip


def holds_code(path: str) -> bool:
    """Whether a file is TorchScript, and not a checkpoint of torch.save."""
    return zipfile.is_zipfile(path) and any("/code/" in name for name in _names(path))


def metadata_in(path: str) -> list[str]:
    """The keys of the metadata in an archive of TorchScript or torch.export."""
    found = (re.fullmatch(r"[^/]*/extra/(?:metadata/)?(\w+)", name) for name in _names(path))
    return [match[1] for match in found if match]


def check_program(path: str) -> None:
    """Check an archive of torch.export before PyTorch reads it.

    Raises:
        ValueError: it contains more than a graph.
    """
    names = _names(path)
    if len({name.lower() for name in names}) < len(names):  # PyTorch might read either of the two
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
    """Check the JSON of a program recursively; a ValueError names what is not a graph's."""
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
    # A string that is more than a name would be evaluated as an expression, too.
    words = all(re.fullmatch(r"\w+", text) for text in texts if isinstance(text, str))
    return words and names <= _NAMES
