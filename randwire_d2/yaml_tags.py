"""Check YAML from untrusted sources: its size is limited, and its tags may only compute numbers.

If a file has Python tags, Detectron2 reads it with PyYAML's ``unsafe_load``, which calls any
function that a tag names. Its own RetinaNet config needs one such tag, an ``eval`` of a list of
anchor sizes. So a file is checked before it is loaded.

A few lines of aliases can stand for more values than fit in memory (a list of ten times a list of
ten times …), so every alias counts as all the values that it stands for.
"""

import ast
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from .text import one_line

_EVAL = "tag:yaml.org,2002:python/object/apply:eval"
# The tags that safe_load constructs, and the one that yacs writes for a tuple.
_PLAIN = {
    f"tag:yaml.org,2002:{name}"
    for name in (
        "null", "bool", "int", "float", "binary", "timestamp", "str", "seq", "map", "merge",
        "value", "python/tuple",
    )
}  # fmt: skip
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
MOST_STEPS = 10_000  # in one expression
LARGEST = 2**63  # a power beyond this could take any time and memory
MOST_CHARACTERS = 2**22  # in a file; a config with the largest spec (wiring/limits.py) has fewer
MOST_VALUES = 50_000  # in a file, aliases expanded; 21,841 class names with their numbers fit
MOST_LEVELS = 50  # of nesting
MOST_BASES = 100  # in a config; fvcore reads each as often as it is named


class LimitedLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader with the limits above; all its errors are YAMLErrors."""

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"it has more than {MOST_CHARACTERS:,} characters")
        super().__init__(text)
        self._values = self._level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self._values, self._level = self._values + 1, self._level + 1
        if self._values > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values")
        if self._level > MOST_LEVELS:
            raise yaml.YAMLError(f"it is nested too deep, more than {MOST_LEVELS} levels")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def compose_document(self) -> yaml.Node:
        root = super().compose_document()
        if _written_out(root, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return root

    def construct_document(self, node: yaml.Node) -> Any:
        try:
            return super().construct_document(node)
        # A tag's text is no value of its type: !!bool perhaps, !!int "", !!timestamp never.
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as e:
            raise yaml.YAMLError(f"a tag's value is none of it ({type(e).__name__}: {e})") from e


class _BaseLoader(LimitedLoader):
    """Construct everything that ``_check`` allows, but None for an eval."""


_BaseLoader.add_constructor(_EVAL, lambda loader, node: None)
_BaseLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values of a node, where an alias counts as the values it stands for."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.YAMLError("an alias stands for what it is a part of")
        return known[id(node)]
    known[id(node)] = 0
    known[id(node)] = 1 + sum(_written_out(part, known) for part in _parts(node))
    return known[id(node)]


def _parts(node: yaml.Node) -> Sequence[yaml.Node]:
    """The keys and values of a mapping, or the values of a list; empty for other nodes."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def load_yaml(text: str) -> Any:
    """Load a YAML document of plain values.

    Raises:
        yaml.YAMLError: the text is no YAML, has Python tags, or exceeds the limits.
    """
    return yaml.load(text, Loader=LimitedLoader)


def compose_yaml(text: str) -> yaml.Node | None:
    """Parse a YAML document into nodes, with any tags; no values are constructed.

    Raises:
        yaml.YAMLError: the text is no YAML, or exceeds the limits.
    """
    node: yaml.Node | None = yaml.compose(text, Loader=LimitedLoader)
    return node


def check_yaml(path: str | os.PathLike[str]) -> None:
    """Check the tags of a config file and of all its ``_BASE_`` files.

    Args:
        path: a path or URL that Detectron2's PathManager can open.

    Raises:
        ValueError: a tag would run code, a file is no YAML, too large or its own _BASE_, or there
            are too many files; one line that names the file.
        OSError: a file can't be read.
    """
    waiting: list[tuple[str, ...]] = [(os.fspath(path),)]  # each after the files that name it
    for looked in count():
        if not waiting:
            return
        *above, path = line = waiting.pop()
        if path in above:
            raise ValueError(f"{path} is its own _BASE_")
        if looked > MOST_BASES:
            raise ValueError(f"{line[0]} names more than {MOST_BASES} files as _BASE_")
        with PathManager.open(path, "r") as f:
            try:
                root = compose_yaml(f.read(MOST_CHARACTERS + 1))
                _check(path, root)
                bases = _bases(root)
            except (yaml.YAMLError, UnicodeDecodeError) as e:
                raise ValueError(f"{path} is no YAML of a config: {one_line(e)}") from e
        waiting += [(*line, _beside(path, base)) for base in bases]


def _beside(path: str, base: str) -> str:
    """The path where fvcore looks for a _BASE_ that the file at ``path`` names."""
    base = os.path.expanduser(base) if base.startswith("~") else base
    is_whole = base.startswith(("/", "https://", "http://"))
    return base if is_whole else os.path.join(os.path.dirname(path), base)


def _bases(root: yaml.Node | None) -> list[str]:
    """The files that a document, checked by ``_check``, names as _BASE_. PyYAML constructs them,
    because a ``<<`` can contain the key, and ``!!str {=: name}`` is a string."""
    values = root and _BaseLoader("").construct_document(root)
    bases = values.get("_BASE_") if isinstance(values, dict) else None
    bases = bases if isinstance(bases, list) else [bases]
    return [base for base in bases if isinstance(base, str)]


def _check(path: str, root: yaml.Node | None) -> None:
    """Check the tags of a document; ValueError names one that may run code."""
    nodes, seen = [root] if root is not None else [], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias, perhaps to itself
            continue
        seen.add(id(node))
        if node.tag == _EVAL:
            _check_expression(path, node)
        elif node.tag not in _PLAIN:
            name = one_line(node.tag.removeprefix("tag:yaml.org,2002:"))
            raise ValueError(
                f"{path}, line {node.start_mark.line + 1}: the tag {name!r} may run code, and is "
                "not read; write the value that it stands for"
            )
        nodes += _parts(node)


def _check_expression(path: str, node: yaml.Node) -> None:
    arguments = node.value if isinstance(node, yaml.SequenceNode) else []
    # With another tag, such as !!binary, the evaluated text would differ from the written text.
    is_text = [argument.tag for argument in arguments] == ["tag:yaml.org,2002:str"]
    text = arguments[0].value if is_text else None
    try:
        if not isinstance(text, str):
            raise ValueError("it takes one text")
        _compute(ast.parse(text.strip(), mode="eval").body, {}, count())
    except (ValueError, SyntaxError, ArithmeticError, MemoryError, RecursionError) as e:
        raise ValueError(
            f"{path}, line {node.start_mark.line + 1}: an eval may hold arithmetic and list "
            f"comprehensions of numbers only: {one_line(e)}; write the value that it stands for"
        ) from e


def _compute(node: ast.expr, names: Mapping[str, Any], steps: Iterator[int]) -> Any:
    """Evaluate an expression that has only numbers, operators, lists and comprehensions.

    Args:
        names: the values of the comprehensions' variables.
        steps: counts the steps of the whole computation.

    Raises:
        ValueError: the expression has something else, too many steps, or too large numbers.
    """
    if next(steps) >= MOST_STEPS:
        raise ValueError(f"it takes more than {MOST_STEPS} steps")

    def number(part: ast.expr) -> Any:
        value = _compute(part, names, steps)
        if not isinstance(value, (int, float)) or abs(value) > LARGEST:
            raise ValueError(f"{ast.unparse(part)!r} is no number below 2 ** 63")
        return value

    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_compute(part, names, steps) for part in parts]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = number(left), number(right)
            if isinstance(op, ast.Pow) and abs(b) > 1 and float(abs(a)) ** abs(b) > LARGEST:
                raise ValueError(f"{a} ** {b} is too large")
            return _OPERATORS[type(op)](a, b)
        case ast.ListComp(
            elt=element,
            generators=[ast.comprehension(target=ast.Name(id=name), ifs=[], is_async=0) as loop],
        ):
            items = _compute(loop.iter, names, steps)
            if not isinstance(items, list):
                raise ValueError(f"{ast.unparse(loop.iter)!r} is no list")
            return [_compute(element, {**names, name: item}, steps) for item in items]
    raise ValueError(f"{ast.unparse(node)!r} is neither")
