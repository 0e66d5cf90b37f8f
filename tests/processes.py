"""What the tests of the command-line tools share: processes, their logs, images to train on."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def last_metrics(output: Path) -> dict[str, float]:
    """The last value of everything that was logged."""
    last: dict[str, float] = {}
    for line in (output / "metrics.json").read_text().splitlines():
        last.update(json.loads(line))
    return last


def draw_image_folders(
    root: Path, *, classes: Sequence[str] = ("a", "b", "c"), train: int = 14, val: int = 6
) -> None:
    """Write ``root/{train,val}/<class>/<i>.png``: noise of 40 × 48 pixels, as many per class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
