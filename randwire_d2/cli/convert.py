"""Convert a checkpoint, and verify the result by running both networks.

    python tools/convert_checkpoint.py SOURCE OUTPUT [options] [KEY VALUE ...]

SOURCE is this project's classifier or detector, a ResNe(X)t of torchvision or Detectron2, or a
RandWire of seungwonpark/RandWireNN or JiaminRen/RandWireNN. OUTPUT ends in .pth, .pkl or
.safetensors. It contains the backbone for a detector or, with --to classifier, a RandWire's whole
classifier for tools/pretrain_imagenet.py. To verify it, the tool loads it into a detector or
classifier, whose config the KEY VALUE pairs change. OUTPUT is written only if that network computes
the same features as SOURCE's own network, and a classifier also the same logits.
"""

import argparse
import shlex
from collections.abc import Sequence

from ..checkpoint import Preprocessing
from ..command import in_users_words
from ..conversion import LAYOUTS, Conversion, convert, read_image
from ..wiring import NetworkSpec
from .frame import framed, parser_of

SCRIPT = "convert_checkpoint.py"

# The base configs in printed commands.
DETECTOR, CLASSIFIER = "configs/Base-RCNN-FPN-1x.yaml", "configs/imagenet/Base-ImageNet.yaml"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint to convert")
    parser.add_argument("output", metavar="OUTPUT", help="the file to write")
    parser.add_argument(
        "--layout",
        choices=["auto", *LAYOUTS],
        default="auto",
        help="the layout of SOURCE; auto finds it by the names of the weights",
    )
    parser.add_argument(
        "--to",
        choices=["fpn", "bare", "classifier"],
        default="fpn",
        help="what the weights are for: fpn is a backbone inside an FPN, bare is a detector's "
        "plain backbone, classifier is a RandWire with its 1280-d layer and its fc layer "
        "(default: fpn)",
    )
    parser.add_argument(
        "--graphs",
        action="append",
        default=[],
        metavar="PATH",
        help="the wiring of a public layout. For seungwonpark: the folder of the text files, or "
        "the three files, each with --graphs. For jiaminren: the folder of conv2.yaml … "
        "conv5.yaml, or the training config; without --graphs, MODEL.RANDWIRE says how to draw "
        "the graphs",
    )
    _add_preprocessing(parser)
    parser.add_argument(
        "--config-file",
        help="the config of the detector or classifier that you will train; the result is verified "
        "in it (default: a Faster R-CNN, or a classifier, with SOURCE's preprocessing)",
    )
    parser.add_argument(
        "--spec-output",
        metavar="FILE",
        help="write the wiring to this file (for MODEL.RANDWIRE.SPEC_FILE)",
    )
    parser.add_argument("--image", metavar="FILE", help="the image to verify with")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run both networks, and write nothing if they differ (default: --verify)",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="keys of the config, and their values"
    )
    args = parser.parse_intermixed_args(argv)
    given = [args.input_format, args.pixel_mean, args.pixel_std]
    if any(given) and not all(given):
        parser.error("--input-format, --pixel-mean and --pixel-std come together")
    return args


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-format",
        choices=["RGB", "BGR"],
        help="the order of the channels of SOURCE's images",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--pixel-{name}",
            type=float,
            nargs=3,
            metavar=("C1", "C2", "C3"),
            help=f"the {name} of SOURCE's images for each channel, for values 0 … 255",
        )


def report(done: Conversion, config_file: str | None) -> str:
    """The report: the keys used and unused, the verification, the output, and how to use it."""
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
    return "\n".join([*lines, command(done, config_file)])


def command(done: Conversion, config_file: str | None) -> str:
    """The command that uses the result; for .safetensors, the config keys that it needs."""
    if done.output.endswith(".safetensors"):
        return f"needs     {shlex.join(done.options)}; to use it, convert it to .pth or .pkl"
    if done.to == "classifier":
        use, tool, base = "evaluate", ["tools/pretrain_imagenet.py", "--eval-only"], CLASSIFIER
    else:
        use, tool = "train", ["tools/train_net.py"]
        base = DETECTOR if done.to == "fpn" else ""
    config_file = config_file or base
    if config_file:
        tool += ["--config-file", config_file]
    if done.config_from_weights:
        tool.append("--config-from-weights")
    return f"{use:9} {in_users_words(shlex.join(['python', *tool, *done.options]))}"


def _counts(parts: dict[str, int]) -> str:
    return "; ".join(f"{part} ({count} keys)" for part, count in parts.items()) or "none"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
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
    print(report(done, args.config_file))
