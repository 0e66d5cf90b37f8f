"""Find out whether this machine's GPU runs the fused operators, rightly and fast.

    python tools/check_gpu.py [--output report.json]

It holds every operator against its definition in double precision, in float32, float16 and
bfloat16; runs a stage of the paper's network fused and node by node, and times both; replays it as
CUDA graphs of several sizes, and compares; and repeats the first under NVIDIA's compute-sanitizer,
where that is installed. Whatever a kernel does, this script survives it. It takes some minutes,
most of which a compiler needs; kernels stay in its cache for the training. The report is what a bug
report needs. The exit status is 1 if something fails.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from ..benchmark.health import examine, summary
from ..devices import device_here, usable_device
from ..files import check_file, write_or_print
from .frame import at_least, framed, parser_of, say

SCRIPT = "check_gpu.py"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument("--output", metavar="FILE", help="write the report to this file, as JSON")
    parser.add_argument(
        "--device", default="cuda", help="the device, such as cuda:1 (default: cuda)"
    )
    one = at_least(1)
    parser.add_argument("--channels", type=one, default=109, help="the width C (default: 109)")
    parser.add_argument(
        "--batch", type=one, default=32, help="the number of images that are timed (default: 32)"
    )
    return parser.parse_args(argv)


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = usable_device("--device", args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "there is no GPU that PyTorch can use: see what nvidia-smi says, and whether this "
            f"PyTorch ({torch.__version__}) is built for CUDA"
        )
    device_here("--device", args.device)  # else all that is examined would be said to fail
    if args.output:
        check_file("--output", args.output)
    report = examine(args.device, args.channels, args.batch, say)
    if args.output:
        write_or_print(json.dumps(report, indent=1), args.output)
    print("\n".join(summary(report)))
    sys.exit(0 if report["works"] else 1)
