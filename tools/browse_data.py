#!/usr/bin/env python
"""Look at the data of a detector before it is trained: numbers, faults, and a picture.

    python tools/browse_data.py --data PATH [--output data.png] [--config-file FILE] [KEY VALUE ...]

The data sets are those that tools/train_net.py would train with. The picture has images with their
boxes and masks, and below them what the config's augmentation makes of them.
"""

import sys

from detectron2.utils.env import seed_all_rng

from randwire_d2.drawing.samples import draw_samples
from randwire_d2.drawing.style import check_format, save_figure
from randwire_d2.engine import argument_parser, data_config, look_at_data

if __name__ == "__main__":
    parser = argument_parser(epilog=__doc__)
    parser.add_argument("--output", default="data.png", help="the picture (default %(default)s)")
    parser.add_argument("--images", type=int, default=8, help="in it, at most")
    args = parser.parse_args()
    try:
        check_format(args.output, "--output")
        cfg = data_config(args)
        print(look_at_data(cfg))
        seed_all_rng(max(cfg.SEED, 0))
        figure = draw_samples(cfg, cfg.DATASETS.TRAIN[0], args.images)
    except ValueError as e:
        sys.exit(f"browse_data.py: error: {e}")
    print(f"Picture: {save_figure(figure, args.output)}")
