"""Text from users and other programs: parsing JSON, and quoting it in messages, short and on one
line."""

import difflib
import json
import reprlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MOST_NAMED = 3  # of many things, in one message
_MOST = 160  # characters
_ALIKE = 0.7  # of difflib's 0 … 1

_repr = reprlib.Repr()
_repr.maxlevel = 2  # what holds itself twice at each level would be written without end
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def brief(value: object) -> str:
    """The repr of a value, shortened in the middle if it is long, on one line."""
    try:
        return one_line(_repr.repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} with a number of thousands of digits"


def one_line(text: object, most: int = _MOST) -> str:
    """A text, such as another library's error, on one line of at most ``most`` characters, without
    unprintable ones."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 8 * most]).split())
    return line if len(line) <= most else f"{line[: most - 2]} …"


def named(things: Collection[object], *, most: int = 5000, number: int | None = None) -> str:
    """The first of some things, and how many more there are.

    Args:
        most: the most characters of each; the default is for pairs of paths.
        number: the number of all things, if only the first are given.
    """
    few = [one_line(thing, most) for thing, _ in zip(things, range(MOST_NAMED))]
    more = (number or len(things)) - len(few)
    return ", ".join(few) + (f" and {more} more" if more else "")


@contextmanager
def prefixed(
    subject: object, kinds: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """Turn errors of some kinds in the block into ValueErrors that begin with a subject."""
    try:
        yield
    except kinds as e:
        raise ValueError(f"{subject}: {e}") from e


def check_one_line(source: str, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a class name has a line break, or another control character, which would break
            each list, table and message that it stands in; one line.
    """
    for name in names:
        if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
            raise ValueError(
                f"{source!r}: the class name {brief(name)} has a line break or another control "
                "character; rename the class"
            )


def parse_json(text: str | bytes) -> Any:
    """
    Raises:
        ValueError: the text is not JSON, or nested too deep for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError(f"it is nested too deep ({e})") from e


def no_python(json: str) -> str:
    """JSON as the value of a config's key: indented below an empty line, it is still JSON, but no
    Python. Yacs evaluates a text that is when it reads a file, and refuses the dict that it gets.
    """
    return f"\n {json}"


def similar(name: str, known: Iterable[str]) -> str:
    """The known names that may have been meant, for the end of a message; "" if there are none.

    The last parts of config keys must be similar, too, because all keys of a node begin alike.
    """
    last = str(name).rpartition(".")[2]
    near = [
        other
        for other, end in ((other, other.rpartition(".")[2]) for other in known)
        if end.endswith(f"_{last}") or difflib.get_close_matches(last, [end], cutoff=_ALIKE)
    ]
    matches = difflib.get_close_matches(str(name), near, cutoff=_ALIKE)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
