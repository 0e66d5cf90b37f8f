"""What every command line has: a name, a description in its user's words, errors of one line."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from ..command import in_users_words, process, program

if TYPE_CHECKING:
    from ..engine.slurm import Task


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return in_users_words(super().format_help())


def parser_of(script: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """The parser of a tool.

    Args:
        script: its name in tools/.
        description: its module's docstring.
    """
    return _Parser(
        prog=program(script),
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def training_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The parser of a tool that has the options of Detectron2's training tools."""
    from ..engine import argument_parser  # not for tools that draw

    parser = argument_parser(epilog=in_users_words(description))
    parser.prog = program(script)
    return parser


def task_of(script: str, argv: Sequence[str] | None) -> "Task":
    """What Slurm would run of this command line."""
    from ..engine.slurm import Task

    return Task(process(script), sys.argv[1:] if argv is None else argv)


@contextmanager
def errors_in_one_line(
    script: str, kinds: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Exit with a line on stderr and the status 1, in place of errors that the user can mend."""
    try:
        yield
    except kinds as e:
        fail(script, e)


def fail(script: str, reason: object) -> NoReturn:
    """Exit with a line on stderr and the status 1."""
    sys.exit(f"{program(script)}: error: {in_users_words(' '.join(str(reason).split()))}")


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command that was given, to be kept beside its results."""
    given = sys.argv[1:] if argv is None else argv
    return " ".join([in_users_words(f"python tools/{script}"), *map(shlex.quote, given)])
