#!/usr/bin/env python
"""Train or evaluate a detector, with Detectron2's command line.

    python tools/train_net.py --config-file configs/faster_rcnn_randwire_c109_fpn_1x.yaml \
        --num-gpus 8 MODEL.WEIGHTS randwire_c109.pth
"""

import argparse
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from randwire_d2.checkpoint import RandWireCheckpointer
from randwire_d2.engine import Trainer, load_config, run_distributed


def main(cfg: CfgNode, args: argparse.Namespace) -> Any:
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        RandWireCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    setup_logger(name="randwire_d2")
    try:
        cfg = load_config(args)
    except ValueError as e:
        sys.exit(f"train_net.py: error: {e}")
    run_distributed(main, cfg, args)
