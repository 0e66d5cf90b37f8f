#!/usr/bin/env python
"""Train a small RandWire detector on the built-in data set, and draw what came of it.

    python tools/demo.py [--output output/demo] [--seed 1] [KEY VALUE ...]

It runs tools/train_net.py, then draws detections.png, training.png and wiring.png. Each time it
trains anew; the run of the time before, in OUTPUT/run, is removed.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / "configs" / "faster_rcnn_randwire_shapes.yaml"
MARK = "made_by_demo.txt"  # in a folder that may be removed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="a folder")
    parser.add_argument("--config", type=Path, default=CONFIG, help="a config of train_net.py")
    parser.add_argument("--seed", type=int, help="of the weights and the order of the images")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for train_net.py")
    return parser.parse_args()


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; one that is there is removed only if this script made it."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            sys.exit(
                f"demo.py: error: {folder} is not empty and not from a demo; move it away, or "
                "choose another --output"
            )
        for entry in folder.iterdir():  # the mark stays, should this be interrupted
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARK:
                entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(
        "tools/demo.py made this folder, and removes it when it runs again.\n"
    )


def train(args: argparse.Namespace, run_dir: Path) -> int:
    """Run train_net.py; its exit status. It ends with this process, whatever ends that."""
    command = [sys.executable, str(TOOLS / "train_net.py"), "--config-file", str(args.config)]
    command += args.opts
    if args.seed is not None:
        command += ["SEED", str(args.seed)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # progress at once, in order
    child = subprocess.Popen([*command, "OUTPUT_DIR", str(run_dir)], env=environment)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_dir = args.output / "run"
    fresh_folder(run_dir)
    try:
        status = train(args, run_dir)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if status:
        sys.exit(status if status > 0 else 128 - status)  # a signal, as shells have it

    print("Drawing the pictures ...", flush=True)
    from randwire_d2.report import write_report  # seconds to import: not before the training

    try:
        report = write_report(run_dir, args.output)
    except (OSError, ValueError) as e:
        sys.exit(f"demo.py: error: {e}")
    print(f"AP {report.ap:.1f}, AP50 {report.ap50:.1f} on the validation set")
    print("Pictures: " + "  ".join(os.fspath(path) for path in report.pictures))


if __name__ == "__main__":
    main()
