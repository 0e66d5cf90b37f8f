"""Look at a detector's data before training: counts, faults, and a picture.

    python tools/browse_data.py --data PATH [--output data.png] [--config-file FILE] [KEY VALUE ...]

It reads the data sets that tools/train_net.py would read; the validation split may be missing. The
picture shows images with their boxes and masks, and below them the same images after the config's
augmentation.
"""

from collections.abc import Sequence

from detectron2.utils.env import seed_all_rng

from ..drawing.samples import draw_samples
from ..drawing.style import check_format, save_figure
from ..engine import data_config, look_at_data
from .frame import OF_TRAININGS, at_least, framed, training_parser

SCRIPT = "browse_data.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = training_parser(SCRIPT, __doc__, without=OF_TRAININGS)
    parser.add_argument("--output", default="data.png", help="the picture (default: %(default)s)")
    parser.add_argument(
        "--images",
        type=at_least(1),
        default=8,
        help="how many images it shows at most (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_format(args.output, "--output")
    cfg = data_config(args)
    print(look_at_data(cfg))
    if cfg.DATASETS.PATH and not cfg.DATASETS.TEST:
        print(
            "There is no validation split: to train, name one with --data-val, or hold back a "
            "tenth of the images with DATASETS.HOLD_BACK 0.1"
        )
    seed_all_rng(max(cfg.SEED, 0))
    figure = draw_samples(cfg, cfg.DATASETS.TRAIN[0], args.images)
    print(f"Picture: {save_figure(figure, args.output)}")
