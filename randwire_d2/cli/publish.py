"""Write a trained model into a folder that others can use.

The folder contains the weights (.safetensors), config.json, and a model card (README.md) with the
data, the recipe, the figures and the command from the run's record.

    python tools/publish_model.py output/my_run published
    python tools/publish_model.py output/imagenet/randwire_c109_100ep/backbone.pth published

randwire_d2.from_pretrained(FOLDER) loads the model. The tool uploads nothing; to upload the folder:
hf upload OWNER/NAME FOLDER. Then MODEL.WEIGHTS hf://OWNER/NAME starts a training from it.
"""

import argparse
from collections.abc import Sequence

from ..inference.publish import publish
from .frame import framed, parser_of

SCRIPT = "publish_model.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; exit with status 1 and one line if nothing could be written."""
    args = _parse_args(argv)
    folder = publish(args.source, args.folder, overwrite=args.overwrite)
    print(f"{folder} holds the model; see its README.md. To upload: hf upload OWNER/NAME {folder}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="the OUTPUT_DIR of a training (its model_best.pth, else model_final.pth, else its "
        "last checkpoint), or a checkpoint, such as a pretraining's backbone.pth",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the same names in FOLDER"
    )
    return parser.parse_args(argv)
