"""What every command line has: a name, a description in its user's words, and one way to fail.

``framed`` is around each ``main``. What the user can mend ends in one line on stderr and the status
1, wrong options in one line and the status 2, as argparse has it, and a bug in its traceback, a
line that says so, and the status 70. With RANDWIRE_D2_TRACEBACK=1 the first has its traceback too.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NoReturn

import torch
from torch.multiprocessing import ProcessExitedException

from .. import __version__
from ..command import in_users_words, own_script, process, program, refuse_usage
from ..errors import is_mendable, raised_first
from ..runs import RunFolder
from ..upstream import hush_upstream, log_of_one_call

if TYPE_CHECKING:
    from ..engine.processes.slurm import Task

BUG = 70  # EX_SOFTWARE of sysexits.h

# Options of Detectron2's training tools, and Slurm's, that are no business of a tool that works in
# its own process and ends with what it prints.
OF_TRAININGS = (
    "resume", "eval_only", "num_gpus", "num_machines", "machine_rank", "dist_url",
    "slurm", "partition", "time_limit", "slurm_option", "renamed_class",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Parsers
# -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return in_users_words(super().format_help())

    def error(self, message: str) -> NoReturn:
        refuse_usage(self, message)


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


def training_parser(
    script: str,
    description: str,
    make: Callable[[str], argparse.ArgumentParser] | None = None,
    unshown: Sequence[str] = (),
    without: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """The parser of a tool that has the options of Detectron2's training tools.

    Args:
        make: makes it, with an epilog (default: ``engine.argument_parser``).
        unshown: the options that its help leaves out, by their names in the Namespace: those that
            the tool itself refuses.
        without: those that it does not have; what reads the Namespace finds their defaults there.
    """
    if make is None:
        from ..engine import argument_parser  # not for tools that draw

        make = argument_parser
    parser = make(in_users_words(description))
    parser.prog = program(script)
    for action in tuple(parser._actions):
        if action.dest in unshown:
            action.help = argparse.SUPPRESS
        if action.dest in without:
            parser.set_defaults(**{action.dest: action.default})
            action.container._remove_action(action)  # type: ignore[attr-defined]
            for option in action.option_strings:
                del parser._option_string_actions[option]
    parser.set_defaults(dist_url="auto")  # Detectron2's is one port for all trainings of a user
    parser.error = functools.partial(refuse_usage, parser)  # type: ignore[method-assign]
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number, and none below."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    number.__name__ = "int"  # as argparse calls it where it gets something else
    return number


def say(line: str) -> None:
    """Tell who waits what is being done."""
    print(line, file=sys.stderr, flush=True)


def task_of(script: str, argv: Sequence[str] | None) -> "Task":
    """What Slurm would run of this command line."""
    from ..engine.processes.slurm import Task

    own = own_script() if argv is None else None
    tool = [sys.executable, os.path.abspath(own)] if own else process(script)
    return Task(tool, sys.argv[1:] if argv is None else argv)


def command_line(script: str, argv: Sequence[str] | None, *flags: str) -> str:
    """The command that was given, to be kept beside its results, with flags before its own."""
    given = sys.argv[1:] if argv is None else argv
    own = own_script() if argv is None else None
    command = f"python {shlex.quote(own)}" if own else in_users_words(f"python tools/{script}")
    return " ".join([command, *flags, *map(shlex.quote, given)])


# -------------------------------------------------------------------------------------------------
# Errors
# -------------------------------------------------------------------------------------------------


def framed(script: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate the ``main`` of a tool: whatever it raises ends as this module says."""

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            # With arguments it was called by a program, which goes on.
            with _frame(script), nullcontext() if argv is None else log_of_one_call():
                main(argv)

        return run

    return decorate


@contextmanager
def training(
    script: str, argv: Sequence[str] | None, args: argparse.Namespace, folder: str
) -> Iterator[None]:
    """Around a training: the line of an error names its last checkpoint, and how to go on from it.

    A signal that ended it ends the process, too, but not the program that has called the tool: that
    gets a SystemExit, as of an error.

    Args:
        args: of ``training_parser``; they get the user's own script, if one was started.
        folder: the OUTPUT_DIR. What lies there already, and isn't resumed, is another training's.
    """
    args.script = own_script() if argv is None else None  # for the log, which a model card reads
    run = RunFolder(folder)
    before = None if args.resume else _last_write(run)

    def way_on(message: str) -> str:
        # What is refused as it was given says what to give instead.
        refused = message.startswith("--resume: ")
        if refused or args.eval_only or _last_write(run) in (None, before):
            return ""
        try:
            last = str(run.last_checkpoint)
        except ValueError:  # none is whole
            return ""
        named = "" if last in message else f"; the last checkpoint is {last}"
        command = command_line(script, argv, *(() if args.resume else ("--resume",)))
        return f"{named}; to go on from it: {command}"

    with _frame(script, way_on):
        try:
            yield
        except KeyboardInterrupt as e:
            if argv is None and (number := getattr(e, "number", 0)):  # of an Interrupted
                from ..engine.processes.signals import end_interrupted

                end_interrupted(number)
            raise


def _last_write(run: RunFolder) -> int | None:
    return (run.path / "last_checkpoint").stat().st_mtime_ns if run.can_resume else None


@contextmanager
def _frame(script: str, way_on: Callable[[str], str] = lambda message: "") -> Iterator[None]:
    hush_upstream()
    try:
        yield
    except KeyboardInterrupt as e:
        print(_line(script, "interrupted" + way_on("")), file=sys.stderr)
        sys.exit(128 + getattr(e, "number", signal.SIGINT))  # of an Interrupted
    except Exception as e:
        name, message = raised_first(e)
        # A child that was killed, or has said by itself why it exits.
        mendable = is_mendable(name, message) or isinstance(e, ProcessExitedException)
        if not mendable or os.environ.get("RANDWIRE_D2_TRACEBACK") == "1":
            traceback.print_exc()
        if mendable:
            line = _line(script, f"error: {(message or name).rstrip('.')}{way_on(message)}")
            sys.exit(1 if _said_by_one(line) else line)
        report = f"report it with this traceback, the command and {json.dumps(_versions())}"
        print(_line(script, f"bug: {name}: {message}; {report}{way_on(message)}"), file=sys.stderr)
        sys.exit(BUG)


def _said_by_one(line: str) -> bool:
    if "LOCAL_RANK" not in os.environ:
        return False
    from ..engine.processes.torchrun import said_once  # not for tools that draw

    return said_once(line)


def _line(script: str, text: str) -> str:
    return f"{program(script)}: {in_users_words(' '.join(text.split()))}"


def _versions() -> dict[str, str]:
    return {
        "randwire_d2": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
