#!/usr/bin/env python
"""Convert a checkpoint into Detectron2's layout, and prove it by running both networks.

    python tools/convert_checkpoint.py SOURCE OUTPUT [options] [KEY VALUE ...]

SOURCE is this project's classifier or detector, a ResNe(X)t of torchvision or Detectron2, or a
RandWire of seungwonpark/RandWireNN or JiaminRen/RandWireNN; OUTPUT ends in .pth, .pkl or
.safetensors. It is written only if a detector that loads it computes the features of SOURCE's own
network. KEY VALUE pairs go into that detector's config.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from randwire_d2.checkpoint import Preprocessing
from randwire_d2.conversion import LAYOUTS, Conversion, convert, read_image
from randwire_d2.wiring import NetworkSpec


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint to convert")
    parser.add_argument("output", metavar="OUTPUT", help="the file to write")
    parser.add_argument(
        "--layout", choices=["auto", *LAYOUTS], default="auto", help="SOURCE's (auto: by its keys)"
    )
    parser.add_argument(
        "--to",
        choices=["fpn", "bare"],
        default="fpn",
        help="the names inside an FPN (backbone.bottom_up.…), or of a detector's plain backbone",
    )
    parser.add_argument(
        "--graphs",
        action="append",
        default=[],
        metavar="PATH",
        help="the wiring of a public layout. seungwonpark: the folder of its text files, or the "
        "three files, each with --graphs. jiaminren: the folder of conv2.yaml … conv5.yaml, or "
        "the training config; without it, the graphs are drawn as MODEL.RANDWIRE says",
    )
    parser.add_argument("--input-format", choices=["RGB", "BGR"], help="of SOURCE's images")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--pixel-{name}",
            type=float,
            nargs=3,
            metavar=("C1", "C2", "C3"),
            help=f"the {name} of SOURCE's images, of values 0 … 255, in the order of its channels",
        )
    parser.add_argument(
        "--config-file",
        help="the config of the detector to verify in, as you will train it; by default a Faster "
        "R-CNN with SOURCE's preprocessing",
    )
    parser.add_argument(
        "--spec-output", metavar="FILE", help="write the wiring too: MODEL.RANDWIRE.SPEC_FILE"
    )
    parser.add_argument("--image", metavar="FILE", help="the image to verify with")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on unless --no-verify",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys")
    args = parser.parse_intermixed_args(argv)
    given = [args.input_format, args.pixel_mean, args.pixel_std]
    if any(given) and not all(given):
        parser.error("--input-format, --pixel-mean and --pixel-std come together")
    return args


def report(done: Conversion, config_file: str | None) -> str:
    """What was read, used and left, what was proved, and how to train with it."""
    source, verification = done.source, done.verification
    network = source.network
    if isinstance(network, NetworkSpec):
        what = f"RandWire, {network.regime} regime, C={network.channels}, {network.fingerprint}"
    else:
        what = "ResNet " + ", ".join(f"{k} {v}" for k, v in vars(network).items())
    lines = [
        f"source    layout {source.layout}: {what}",
        f"used      {source.used} keys of the source, for {done.keys} in the output",
        f"unused    {_counts(source.unused)}",
    ]
    if verification is not None:
        lines.append(f"loaded    {verification.loaded} keys, by Detectron2's checkpointer")
        lines.append(f"missing   {_counts(verification.missing)}: initialised anew")
        if verification.left:
            lines.append(f"left      {_counts(verification.left)}: not in the config's backbone")
        differences = ", ".join(f"{k} {v:.1e}" for k, v in verification.differences.items())
        lines.append(f"verified  largest relative differences: {differences}")
    else:
        lines.append("verified  no")
    lines += [f"note      {note}" for note in source.notes]
    lines.append(f"written   {done.output}")
    if done.spec_file is not None:
        lines.append(f"spec      {done.spec_file}")
    return "\n".join([*lines, training(done, config_file)])


def training(done: Conversion, config_file: str | None) -> str:
    """The command that trains with the result; its keys, where Detectron2 can't read the format."""
    if done.output.endswith(".safetensors"):
        return f"needs     {shlex.join(done.options)}; to train, convert to .pth or .pkl"
    command = ["python", "tools/train_net.py"]
    if config_file is not None or done.to == "fpn":
        command += ["--config-file", config_file or "configs/Base-RCNN-FPN-1x.yaml"]
    if done.needs_spec and done.spec_file is None:
        command.append("--config-from-weights")
    return f"train     {shlex.join([*command, *done.options])}"


def _counts(parts: dict[str, int]) -> str:
    return "; ".join(f"{part} ({count} keys)" for part, count in parts.items()) or "none"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        preprocessing = None
        if args.input_format:
            preprocessing = Preprocessing(
                args.input_format, tuple(args.pixel_mean), tuple(args.pixel_std)
            )
        done = convert(
            args.source,
            args.output,
            layout=args.layout,
            to=args.to,
            graphs=args.graphs,
            preprocessing=preprocessing,
            config_file=args.config_file,
            options=args.opts,
            spec_output=args.spec_output,
            image=None if args.image is None else read_image(args.image),
            verified=args.verify,
        )
    except (ValueError, OSError) as e:
        sys.exit(f"convert_checkpoint.py: error: {' '.join(str(e).split())}")
    print(report(done, args.config_file))


if __name__ == "__main__":
    main()
