"""Damaged and hostile files for a parser, tried in a process of limited memory, and what it did.

A case is one content of one file. It is accepted, or refused by a ValueError or an OSError of one
line; nothing in it runs, and no more memory than ``MEMORY`` is asked for.
"""

import logging
import multiprocessing
import os
import re
import resource
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

MEMORY = 3 * 2**30  # bytes of address space; a thread takes 0.1 GB of it
LONGEST = 500  # characters of a refusal
UNBOUNDED = "MemoryError|allocate"  # in it: the limit refused, and not the parser
CANARY = "it_ran"  # what code in a file would make, in the working directory

# -------------------------------------------------------------------------------------------------
# Cases
# -------------------------------------------------------------------------------------------------

_NUMBERS = [b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80", b"\n"]
_EDITS = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "copy", "put", "overwrite"]),
    st.integers(0, 2**20),
    st.sampled_from(_NUMBERS) | st.binary(min_size=1, max_size=6),
)


def damaged(valid: Sequence[bytes], tokens: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """Valid files with one to four changes of their bytes: flipped, cut off, left out, doubled …

    Args:
        tokens: what may be put in, beside any bytes.
    """
    edits = _EDITS
    if tokens:
        edits |= st.tuples(st.just("put"), st.integers(0, 2**20), st.sampled_from(tokens))
    return st.builds(_damage, st.sampled_from(valid), st.lists(edits, min_size=1, max_size=4))


def _damage(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, new in edits:
        at = where % (len(content) + 1)
        size = 1 + where % 37
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << where % 8)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[at + size :]
        elif kind == "copy":
            content = content[: at + size] + content[at:]
        elif kind == "put":
            content = content[:at] + new + content[at:]
        elif kind == "overwrite":
            content = content[:at] + new + content[at + len(new) :]
    return content


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


_ATOMS: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1.5, 2**31, 2**63, 10**30, 10**6, 1e308, float("nan"),
    float("inf"), "", "a", "\0", "1", "é", "x" * 5000, "../..", "/", [], {}, [[]], [0, 1], {"a": 1},
    nested(30), nested(300), list(range(3000)), {str(i): i for i in range(500)},
]  # fmt: skip
VALUES = (
    st.sampled_from(_ATOMS)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(-3, 40), max_size=6)
)


@st.composite
def changed(draw: st.DrawFn, value: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A nested value with one to three of its parts replaced, left out, doubled or renamed."""
    holder = [_copy(value)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(holder))
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace"] * 5 + ["leave out", "rename", "double"]))
        if kind == "replace" or parent is holder:
            parent[key] = _copy(draw(values))
        elif kind == "leave out":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4)) if kind == "rename" else f"{key}_"] = _copy(
                parent[key]
            )
        else:
            parent.append(_copy(parent[key]))
    return holder[0]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _places(parent: Any, level: int = 0) -> Any:
    items = parent.items() if isinstance(parent, dict) else enumerate(parent)
    for key, value in list(items)[:60]:
        yield parent, key
        if isinstance(value, dict | list) and level < 8:
            yield from _places(value, level + 1)


# -------------------------------------------------------------------------------------------------
# Trying them
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parser:
    """What reads a file.

    Attributes:
        file: the name that each case gets.
        cases: its content.
        reads: each is called with the folder that the file lies in, the working directory.
        prepare: writes what must lie beside the file, once.
    """

    file: str
    cases: st.SearchStrategy[bytes]
    reads: tuple[Callable[[Path], object], ...]
    prepare: Callable[[Path], object] = lambda folder: None


@dataclass
class Tried:
    """What became of the cases of a parser: one is refused if one of its ``reads`` refuses it."""

    accepted: int = 0
    refused: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.accepted + self.refused


def try_cases(
    parsers: Callable[[], Mapping[str, Parser]], folder: Path, number: int
) -> dict[str, Tried]:
    """So many cases of each parser, in another process; each parser has a folder of its own.

    Hypothesis draws constants of the modules that are loaded, too: only in a process that loads
    what ``parsers`` needs, and nothing of other tests, are the cases always the same.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(parsers, folder, number, theirs))
    process.start()
    theirs.close()
    found: dict[str, Tried] = {}
    try:
        for name in parsers():
            found[name] = ours.recv()
    except EOFError:
        process.join()
        failure = f"reading a file of {name}, the process ended with {process.exitcode}"
        found[name] = Tried(failures={"": failure})
    process.join()
    return found


def _try_all(
    parsers: Callable[[], Mapping[str, Parser]], root: Path, number: int, answer: Connection
) -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what FFmpeg says of each broken frame
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for i, parser in enumerate(parsers().values()):
        folder = root / str(i)
        folder.mkdir()
        os.chdir(folder)
        answer.send(_try(parser, folder, number))


def _try(parser: Parser, folder: Path, number: int) -> Tried:
    parser.prepare(folder)
    tried = Tried()

    @settings(
        max_examples=number, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(parser.cases)
    def check(content: bytes) -> None:
        (folder / parser.file).write_bytes(content)
        accepted = [_accepts(read, folder, tried.failures) for read in parser.reads]
        if all(accepted):
            tried.accepted += 1
        else:
            tried.refused += 1
        if (folder / CANARY).exists():
            tried.failures[CANARY] = f"code in the file has run: {content!r}"

    try:
        check()
    except BaseException:
        tried.failures["the test itself"] = traceback.format_exc()
    return tried


def _accepts(read: Callable[[Path], object], folder: Path, failures: dict[str, str]) -> bool:
    try:
        read(folder)
        return True
    except (ValueError, OSError) as e:
        said, error = str(e), traceback.format_exc()
        if 0 < len(said) < LONGEST and "\n" not in said and not re.search(UNBOUNDED, said):
            return False
    except BaseException:
        error = traceback.format_exc()
    # Once for each place in the code.
    frames = re.findall(r'File ".*", line \d+', error)
    failures.setdefault(frames[-1], error[-3000:])
    return False


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
