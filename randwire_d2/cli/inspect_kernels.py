"""Count registers, spills, barriers and instructions of the compiled Triton kernels.

    python tools/inspect_kernels.py --channels 109 112 --inputs 1 4 12 [--dtype float16]

It needs Triton, but no GPU. It counts the instructions of the code, where a loop counts once.
"""

import argparse
from collections.abc import Sequence

import torch
from tabulate import tabulate

from ..ops.probe import OPERATORS, Case
from .frame import at_least, framed, parser_of

SCRIPT = "inspect_kernels.py"

DTYPES = ("float16", "bfloat16", "float32")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "--operators",
        nargs="+",
        choices=OPERATORS,
        default=OPERATORS,
        help="the operators (default: all)",
    )
    for name, default, what in (
        ("inputs", [1, 4], "the numbers of a node's inputs (default: 1 4)"),
        ("channels", [109], "the values of C (default: 109)"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=at_least(1), default=default, help=what)
    parser.add_argument(
        "--stride", type=int, choices=(1, 2), default=1, help="the stride (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="the type of the activations (default: float16)",
    )
    parser.add_argument(
        "--capability",
        type=at_least(70),
        default=90,
        help="the compute capability of the GPU: 80 for 8.0; at least 70 (default: 90)",
    )
    return parser.parse_args(argv)


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        from randwire_d2.ops.compiled import Compiled, compile_kernels
    except ImportError as e:
        raise ImportError(f"{e}; Triton comes with PyTorch for CUDA") from e
    rows = []
    for channels in args.channels:
        for n in args.inputs:
            case = Case(n, True, args.stride, (8, 8), channels, getattr(torch, args.dtype))
            rows += [
                (channels, n, *found)
                for found in compile_kernels(case, args.operators, args.capability)
            ]
    print(tabulate(rows, ["C", "inputs", *Compiled._fields], tablefmt="pipe"))
