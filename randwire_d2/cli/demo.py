"""Run the whole path on the built-in data: pretrain, convert, fine-tune, evaluate, draw.

    python tools/demo.py [--output output/demo] [--seed 1] [KEY VALUE ...]
    python tools/demo.py --transfer [--output output/transfer] [KEY VALUE ...]

It runs tools/pretrain_imagenet.py, which writes a detector's backbone. Then it runs
tools/train_net.py with the KEY VALUE pairs, which draws detections.png, training.png and
wiring.png. Each time, it removes its earlier runs in OUTPUT/run, and trains anew. With --transfer
it does this with three seeds, also trains the detectors from scratch, and compares the two.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..command import in_users_words, process
from ..config_files import get_config_file
from ..engine.report import write_comparison
from ..experiments.trainings import end
from ..files import check_folder
from ..runs import RunFolder
from .frame import framed, parser_of

SCRIPT = "demo.py"
MARK = "made_by_demo.txt"  # the content of a folder with this file may be removed
SEEDS = (1, 2, 3)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "--output", type=Path, help="the folder (default: output/demo, or output/transfer)"
    )
    parser.add_argument(
        "--config",
        default=get_config_file("faster_rcnn_randwire_shapes.yaml"),
        help="the detector's config (default: faster_rcnn_randwire_shapes.yaml)",
    )
    parser.add_argument(
        "--pretrain-config",
        default=get_config_file("shapes/randwire_pretrain.yaml"),
        help="the classifier's config, with the same backbone (default: "
        "shapes/randwire_pretrain.yaml)",
    )
    parser.add_argument(
        "--pretrain-opts",
        default="",
        metavar="'KEY VALUE ...'",
        help="KEY VALUE pairs for the classifier",
    )
    parser.add_argument(
        "--seed", type=int, help="the seed of the trainings (default: the configs')"
    )
    parser.add_argument(
        "--transfer", action="store_true", help="compare with detectors from scratch"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the detector")
    args = parser.parse_args(argv)
    args.output = args.output or Path("output", "transfer" if args.transfer else "demo")
    return args


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; the content of an existing one is removed only if it has the mark."""
    check_folder("--output", folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise ValueError(
                f"{folder} is not empty and not from a demo; move it away, or choose another "
                "--output"
            )
        for entry in folder.iterdir():  # the mark stays, in case this is interrupted
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARK:
                entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(
        in_users_words("tools/demo.py made this folder, and removes it when it runs again.\n")
    )


def run_tool(name: str, *args: object) -> None:
    """Run a tool; exit if it fails. The tool is ended if this process is interrupted."""
    given = [*map(str, args)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # shows progress at once, in order
    print(f"$ {in_users_words(f'python tools/{name}')} {shlex.join(given)}", flush=True)
    child = subprocess.Popen([*process(name), *given], env=environment)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        end(child)
    if status:
        sys.exit(status if status > 0 else 128 - status)  # as shells report a signal


def pretrain(args: argparse.Namespace, run_dir: Path, seed: int | None) -> Path:
    """Train the classifier, and return the file with the detector's backbone."""
    classifier = run_dir / "pretrain"
    pairs = [] if seed is None else ["SEED", seed]
    opts = [*shlex.split(args.pretrain_opts), *pairs, "OUTPUT_DIR", classifier]
    run_tool("pretrain_imagenet.py", "--config-file", args.pretrain_config, *opts)
    return classifier / "backbone.pth"


def detect(args: argparse.Namespace, run_dir: Path, weights: Path | None, seed: int | None) -> None:
    flags = [] if weights is None else ["--config-from-weights"]
    pairs = [*args.opts, "OUTPUT_DIR", run_dir]
    if weights is not None:
        pairs += ["MODEL.WEIGHTS", weights]
    if seed is not None:
        pairs += ["SEED", seed]
    run_tool("train_net.py", "--config-file", args.config, *flags, *pairs)


def demo(args: argparse.Namespace, run_dir: Path) -> None:
    detect(args, run_dir / "detector", pretrain(args, run_dir, args.seed), args.seed)
    run = RunFolder(run_dir / "detector")
    ap, ap50 = (run.evaluations(f"bbox/{name}")[-1][1] for name in ("AP", "AP50"))
    print(f"AP {ap:.1f}, AP50 {ap50:.1f} on the validation set")
    print_paths([Path(shutil.copy(picture, args.output)) for picture in run.path.glob("*.png")])


def transfer(args: argparse.Namespace, run_dir: Path) -> None:
    runs: dict[str, list[Path]] = {"from scratch": [], "pretrained": []}
    for seed in SEEDS:
        of_seed = run_dir / f"seed{seed}"
        backbone = pretrain(args, of_seed, seed)
        for name, weights in (("from scratch", None), ("pretrained", backbone)):
            runs[name].append(of_seed / name.replace(" ", "_"))
            detect(args, runs[name][-1], weights, seed)
    comparison = write_comparison(runs, ("bbox/AP", "bbox/AP50"), args.output / "transfer.png")
    print(comparison.table)
    print_paths([comparison.picture])


def print_paths(paths: Sequence[Path]) -> None:
    print("Pictures: " + "  ".join(map(os.fspath, paths)))


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_dir = args.output / "run"
    fresh_folder(run_dir)
    transfer(args, run_dir) if args.transfer else demo(args, run_dir)
