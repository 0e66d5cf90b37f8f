"""The command ``randwire-d2``: its subcommands, and its name in messages to users.

A checkout has a script in tools/ for each; both call ``main`` of the module in randwire_d2/cli.

It imports nothing of this project: setup.py installs it as the package ``randwire_d2_command`` too,
so that ``randwire-d2 --help`` does not wait for PyTorch, as an import of randwire_d2 does.
"""

import argparse
import difflib
import functools
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Subcommand -> (the script in tools/, what it does).
TOOLS = {
    "train": ("train_net.py", "train or evaluate a detector"),
    "train-lazy": ("lazyconfig_train_net.py", "train or evaluate a detector from a LazyConfig"),
    "pretrain": ("pretrain_imagenet.py", "train or evaluate a classifier"),
    "make-shards": ("make_shards.py", "write a classifier's images as tar shards"),
    "convert": ("convert_checkpoint.py", "convert a checkpoint into a detector's backbone"),
    "predict": ("predict.py", "predict with a checkpoint: images, folders, videos or a data set"),
    "export": ("export_model.py", "write a model for ONNX Runtime, libtorch or torch.export"),
    "publish": ("publish_model.py", "write a trained model into a folder with a model card"),
    "analyze-results": ("analyze_results.py", "show what a detector gets right and wrong"),
    "browse-data": ("browse_data.py", "look at a detector's data before training"),
    "analyze-model": ("analyze_model.py", "count parameters and multiply-adds; Tables 1 to 4"),
    "benchmark": ("benchmark.py", "compare the memory and time of RandWire and ResNets"),
    "draw-wiring": ("draw_wiring.py", "draw networks and random graphs"),
    "compare-generators": ("compare_generators.py", "run a sweep: Figures 3 and 6, Tables 2 to 5"),
    "collect-results": ("collect_results.py", "write tables of runs beside the paper's numbers"),
    "damage-graph": ("damage_graph.py", "remove nodes and edges of trained networks; Figure 5"),
    "demo": ("demo.py", "pretrain, convert and fine-tune on the built-in data"),
    "check-gpu": ("check_gpu.py", "find out whether the GPU runs the fused operators"),
    "measure-gpu": ("measure_gpu.py", "measure what the fused operators gain on a GPU"),
    "measure-host": (
        "measure_host.py",
        "measure what a training step costs the host, without a GPU",
    ),
    "measure-memory": ("measure_memory.py", "find out whether a training's memory grows"),
    "inspect-kernels": ("inspect_kernels.py", "count what the compiled Triton kernels need"),
}
_SUBCOMMANDS = {script: name for name, (script, _) in TOOLS.items()}
_COMMAND = "randwire-d2"
_MODULE = ("randwire_d2", "__main__.py")
_OURS = "pretrain_imagenet.py"
# The environment variable of a process that runs the user's own script, which calls a sweep's
# ``main``: the module of the tool that is to run instead.
TOOL = "RANDWIRE_D2_TOOL"
_CHECKOUT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``randwire-d2``; ``argv`` is a subcommand and its arguments, by default sys.argv[1:]."""
    listing = "\n".join(f"  {name:19} {what}" for name, (_, what) in TOOLS.items())
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        usage="%(prog)s COMMAND ...",
        description="Randomly wired networks as a Detectron2 backbone.",
        epilog=f"commands, each with --help:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = functools.partial(refuse_usage, parser)  # type: ignore[method-assign]
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    given = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(given[:1]).command
    if name not in TOOLS:
        near = " or ".join(map(repr, difflib.get_close_matches(name, TOOLS)))
        hint = f"did you mean {near}?" if near else f"there are {', '.join(TOOLS)}"
        parser.error(f"there is no command {name!r}: {hint}")
    try:
        module = importlib.import_module(f"randwire_d2.cli.{name.replace('-', '_')}")
    except ImportError as e:  # Detectron2, or another requirement, is missing
        sys.exit(f"{_COMMAND}: error: {' '.join(str(e).split())}")
    module.main(given[1:])


def refuse_usage(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Handle a wrong command line: end the process with a message of one line and status 2."""
    parser.exit(2, f"{parser.prog}: error: {' '.join(message.split())}; see --help\n")


def in_users_words(text: str) -> str:
    """Adapt a text that names scripts of tools/, such as "python tools/train_net.py", to the user.

    For users of ``randwire-d2``, or without a checkout, it becomes "randwire-d2 train".
    """
    if not _is_command():
        return text
    return re.sub(
        r"(?:python )?\btools/(\w+\.py)\b",
        lambda found: (
            f"{_COMMAND} {_SUBCOMMANDS[found[1]]}" if found[1] in _SUBCOMMANDS else found[0]
        ),
        text,
    )


def command_of(script: str, arguments: Sequence[str], parts: Sequence[str]) -> str:
    """The command line of a tool, in the user's words.

    Args:
        parts: names that a script of the user must register before it calls the tool; if there are
            any, the result is that call.
    """
    if parts:
        call = f"randwire_d2.cli.{module_of(script)}.main({[*arguments]})"
        return f"{call}, in a script that registers {', '.join(parts)}"
    return in_users_words(shlex.join(["python", f"tools/{script}", *arguments]))


def module_of(script: str) -> str:
    """The name of a tool's module in randwire_d2/cli."""
    return _SUBCOMMANDS[script].replace("-", "_")


def program(script: str) -> str:
    """The name of a tool in its usage and its errors: "train_net.py", or "randwire-d2 train"."""
    return in_users_words(f"tools/{script}").removeprefix("tools/")


def process(script: str) -> list[str]:
    """The command that starts a tool: the script beside the running one, or the package's."""
    folder = _scripts()
    if folder is not None and (folder / script).is_file():
        return [sys.executable, str(folder / script)]
    return [sys.executable, "-m", "randwire_d2", _SUBCOMMANDS[script]]


def own_script() -> str | None:
    """The running script if it is the user's own and calls a tool's ``main``; else None."""
    started = Path(sys.argv[0])
    is_ours = _scripts() is not None or started.parts[-2:] == _MODULE
    return sys.argv[0] if started.suffix == ".py" and started.is_file() and not is_ours else None


def _scripts() -> Path | None:
    """The folder of the running script if it is one of the tools; else None."""
    started = Path(sys.argv[0])
    # Detectron2 and its users have a train_net.py and a demo.py, too, but not beside ``_OURS``.
    is_ours = started.name in _SUBCOMMANDS and started.with_name(_OURS).is_file()
    return started.resolve().parent if is_ours else None


def _is_command() -> bool:
    if _scripts() is not None:
        return False
    started = Path(sys.argv[0])
    if started.stem == _COMMAND or started.parts[-2:] == _MODULE:
        return True
    return not (_CHECKOUT / "tools" / _OURS).is_file()  # called from Python
