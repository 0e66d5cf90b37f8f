"""Find out whether this machine's GPU runs the fused operators correctly, and how fast.

    python tools/check_gpu.py [--output report.json]

The tool makes these checks:

- It compares every operator with its definition in double precision, in float32, float16 and
  bfloat16.
- It runs a stage of the paper's network fused and node by node, compares the results, and times
  both.
- It replays the stage as CUDA graphs of several sizes, and compares the results.
- It repeats the first check under NVIDIA's compute-sanitizer, if that is installed.

It survives a kernel that crashes. It takes some minutes, mostly to compile kernels, which a
training then finds in the compiler's cache. Attach the report to a bug report. The exit status is
1 if something fails.
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
    parser.add_argument("--output", metavar="FILE", help="write the report to this JSON file")
    parser.add_argument(
        "--device", default="cuda", help="the device, such as cuda:1 (default: cuda)"
    )
    one = at_least(1)
    parser.add_argument("--channels", type=one, default=109, help="the width C (default: 109)")
    parser.add_argument(
        "--batch", type=one, default=32, help="the number of images for the times (default: 32)"
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
    device_here("--device", args.device)  # otherwise every check would be reported as failed
    check_file("--output", args.output)
    report = examine(args.device, args.channels, args.batch, say)
    if args.output:
        write_or_print(json.dumps(report, indent=1), args.output)
    print("\n".join(summary(report)))
    sys.exit(0 if report["works"] else 1)
