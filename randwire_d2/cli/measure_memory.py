"""Find out whether a training, or a prediction with its detector, needs more and more memory.

    python tools/measure_memory.py --config-file configs/faster_rcnn_randwire_shapes.yaml \\
        INPUT.MIN_SIZE_TRAIN "(64, 96, 128, 160)"

It trains without evaluation, then predicts, both on images of mixed sizes. It prints the slope of
the process's memory, and the number of living tensors. It needs Linux.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import TrainerBase, hooks
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

from ..benchmark.memory import MemoryWatch
from ..engine import Trainer, load_config, register_data
from ..files import check_file, write_or_print
from ..inference import load_detector
from .frame import OF_TRAININGS, at_least, command_line, framed, training_parser

SCRIPT = "measure_memory.py"
SAMPLES = 40  # over all iterations
IMAGES = 50  # predicted again and again


def watch_training(cfg: CfgNode, every: int) -> MemoryWatch:
    """Watch the memory of a training without evaluation; it writes model_final.pth."""
    register_data(cfg)
    with MemoryWatch(cfg.SOLVER.MAX_ITER, every) as watch:
        trainer = Trainer(cfg)
        look = hooks.CallbackHook(after_step=lambda trainer: watch.look(trainer.iter))
        trainer.register_hooks([look])  # after all other hooks
        trainer.resume_or_load(resume=False)
        TrainerBase.train(trainer, 0, cfg.SOLVER.MAX_ITER)
    return watch


def watch_prediction(cfg: CfgNode, iterations: int, every: int) -> MemoryWatch:
    """Watch the memory while the detector in OUTPUT_DIR predicts random crops, one at a time."""
    detector = load_detector(cfg.OUTPUT_DIR)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:IMAGES]
    images = [read_image(record["file_name"], "BGR") for record in records]
    rng = np.random.default_rng(0)
    with MemoryWatch(iterations, every) as watch:
        for iteration in range(iterations):
            image = images[iteration % len(images)]
            height, width = (rng.integers(size // 2, size + 1) for size in image.shape[:2])
            detector(image[:height, :width])
            watch.look(iteration)
    return watch


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = training_parser(SCRIPT, __doc__, without=OF_TRAININGS)
    parser.add_argument(
        "--iterations",
        type=at_least(8),
        default=2000,
        help="the iterations of the training, and of the prediction (default: 2000)",
    )
    parser.add_argument("--output", help="write all samples to this JSON file")
    args = parser.parse_args(argv)
    check_file("--output", args.output)
    given, every = args.iterations, max(args.iterations // SAMPLES, 1)
    with tempfile.TemporaryDirectory() as folder:
        args.opts += ["SOLVER.MAX_ITER", str(given), "SOLVER.EPOCHS", "0"]
        args.opts += ["TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", folder]
        cfg = load_config(args)
        cfg.defrost()
        cfg.DATASETS.TEST = ()  # not in the options: beside --data, they may name no data set
        cfg.freeze()
        seed_all_rng(max(cfg.SEED, 0))
        watches = {
            "training": watch_training(cfg, every),
            "prediction": watch_prediction(cfg, given, every),
        }
    rows = [
        (what, given, f"{w.slope / 1e3:.2f}", f"{w.settled[0].resident / 1e6:.1f}",
         f"{w.settled[-1].resident / 1e6:.1f}", "{} … {}".format(*w.tensors))
        for what, w in watches.items()
    ]  # fmt: skip
    headers = ["", "iterations", "slope, KB each", "MB after a quarter", "MB at the end", "tensors"]
    print(tabulate(rows, headers, tablefmt="pipe"))
    if args.output:
        samples = {what: [asdict(s) for s in w.samples] for what, w in watches.items()}
        found = {"command": command_line(SCRIPT, argv), "samples": samples}
        write_or_print(json.dumps(found, indent=1), args.output)
