"""Write a classifier's images as tar shards in webdataset's layout: few large files.

    python tools/make_shards.py imagenet_train datasets/imagenet_shards/train
    python tools/make_shards.py my/images/val my/shards/val --images 1000

Shards help if a disk or a network reads millions of small files slowly. Train on them with
DATASETS.TRAIN "('imagenet_shards/train',)", or a pattern: "('shards/train-{000000..000127}.tar',)".
"""

from collections.abc import Sequence

from ..data.classification.shard_writer import make_shards
from .frame import framed, parser_of

SCRIPT = "make_shards.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; exit with status 1 and one line if nothing could be written."""
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="a folder with one folder of images per class, or the name of a registered data set",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--images", type=int, default=10_000, help="images per shard (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    shards = make_shards(args.dataset, args.folder, args.images)
    print(f"{args.folder} holds {len(shards)} shards and the names of their classes")
