"""Export a trained detector or classifier for ONNX Runtime, libtorch or torch.export.

    python tools/export_model.py output/my_run model.onnx
    python tools/export_model.py model_best.pth backbone.pt2 --part backbone
    python tools/export_model.py output/my_classifier int8.onnx --int8 --calibration my_images/train

Images may have any size; only for a backbone with its FPN, height and width must be multiples of
32. A classifier or a backbone takes any number of images at once. Batch norms are folded into the
convolutions. Before OUTPUT appears, it is run beside the model at three sizes and, if it takes
several images, with one and two. tools/predict.py takes OUTPUT instead of the checkpoint.
"""

import argparse
import os
from collections.abc import Sequence

from ..export import FORMATS, TOLERANCE
from ..inference.deployment.export import PARTS, export_model
from ..inference.deployment.quantised import LEAST_COMPARED, LEAST_EQUAL, MOST_IMAGES, export_int8
from .frame import framed, parser_of

SCRIPT = "export_model.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; exit with status 1 if nothing was written."""
    args = _parse_args(argv)
    if args.int8:
        _write_int8(args)
        return
    proof = export_model(args.source, args.output, args.format, part=args.part, images=args.images)
    size = os.path.getsize(args.output) / 1e6
    shapes = ", ".join("×".join(map(str, shape)) for shape in dict.fromkeys(proof.shapes))
    found = f", {proof.detections} detections" if proof.detections else ""
    print(
        f"{args.output}: {size:.1f} MB, {proof.folded} batch norms folded. The largest difference "
        f"from the model is {proof.difference:.2g} (at most {TOLERANCE:g}) on images of {shapes}"
        f"{found}"
    )


def _write_int8(args: argparse.Namespace) -> None:
    proof = export_int8(args.source, args.output, args.calibration)
    size = os.path.getsize(args.output) / 1e6
    print(
        f"{args.output}: {size:.1f} MB in int8, calibrated on {proof.images} images. It gives "
        f"{proof.equal:.1%} of {proof.images} others the checkpoint's class. To compare the "
        "accuracy on a labelled data set, run python tools/predict.py with --dataset on both"
    )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "source",
        metavar="CHECKPOINT_OR_RUN",
        help="a .pth file, or the OUTPUT_DIR of a training, whose best checkpoint is used",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="the file to write: .onnx, .ts or .pt (torchscript), or .pt2 (torch)",
    )
    parser.add_argument(
        "--format", choices=list(FORMATS), help="the format (default: that of OUTPUT's suffix)"
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="whole",
        help="the whole model, or its backbone with its FPN, for normalised images (default: "
        "whole)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files, folders or globs of images; the file is compared with the model on them, and "
        "on noise of three sizes",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="write a classifier whose convolutions compute in int8, for ONNX Runtime; "
        f"at least {LEAST_EQUAL:.0%}% of the classes that it finds must be the same",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="IMAGES",
        help=f"with --int8: files, folders or globs of at least {2 * LEAST_COMPARED} images like "
        f"those that it will get; up to {MOST_IMAGES} calibrate it, and as many are compared",
    )
    args = parser.parse_args(argv)
    if args.int8 != bool(args.calibration):
        parser.error("--int8 and --calibration go together")
    if args.int8 and (args.part != "whole" or args.images or args.format not in (None, "onnx")):
        parser.error(
            "--int8 goes with none of --part backbone, --images and other formats than onnx"
        )
    if args.images and args.part != "whole":
        parser.error("--images is for whole models")
    return args
