"""What others wrote, as part of a message: on one line, and not longer than a reader's patience."""

import reprlib

_MOST = 160  # characters

_repr = reprlib.Repr()
_repr.maxlevel = 2  # what holds itself twice at each level would be written without end
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def brief(value: object) -> str:
    """A value as Python writes it, or its beginning and its end."""
    try:
        return one_line(_repr.repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} with a number of thousands of digits"


def one_line(text: object, most: int = _MOST) -> str:
    """A text, such as another library's error, or its beginning; of what is printed only."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 8 * most]).split())
    return line if len(line) <= most else f"{line[: most - 2]} …"


def no_python(json: str) -> str:
    """JSON as the value of a config's key: indented below an empty line, it is still JSON, but no
    Python. Yacs evaluates a text that is when it reads a file, and refuses the dict that it gets.
    """
    return f"\n {json}"
