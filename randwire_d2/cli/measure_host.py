"""Measure what a training step costs the host, without a GPU: replayed, launched, node by node.

    python tools/measure_host.py [--rounds 31] [--detection]

It needs Triton. randwire_d2/benchmark/host.py explains what replaces the GPU, and what that leaves
out.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from tabulate import tabulate

from ..benchmark.host import measure_host, pretend_to_have_a_gpu
from ..benchmark.models import MODELS
from ..benchmark.timing import ratio
from ..wiring import NetworkGenerator
from .frame import at_least, framed, parser_of

SCRIPT = "measure_host.py"

CHANNELS = 5  # the launches are those of 109 channels


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "--rounds", type=at_least(1), default=31, help="how often each is timed (default: 31)"
    )
    parser.add_argument(
        "--detection",
        action="store_true",
        help="measure a detector's backbone with FrozenBN (default: a classifier)",
    )
    return parser.parse_args(argv)


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)
    try:
        pretend_to_have_a_gpu()
    except ImportError as e:
        raise ImportError(f"{e}; Triton comes with PyTorch for CUDA") from e
    generator = NetworkGenerator(channels=CHANNELS)
    seconds, launches = measure_host(generator, args.detection, args.rounds)
    rows = []
    for name, own in seconds.items():
        low, middle, high = (f"{x:.2f}" for x in sorted(ratio(own, seconds["randwire-plain"])))
        times = f"{1e3 * statistics.median(own):.1f}", f"{middle} ({low} … {high})"
        rows.append((MODELS[name], *times, launches[name]))
    print(tabulate(rows, ["step", "host, ms", "ratio", "Triton launches"], tablefmt="pipe"))
