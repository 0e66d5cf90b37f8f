"""Bad input for every tool: one line that names it and the way out, and nothing is left behind."""

import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from helpers import ROOT, Ended, end_each
from PIL import Image

from randwire_d2.checkpoint import Classes, RandWireCheckpointer
from randwire_d2.command import TOOLS
from randwire_d2.config import classifier_config, merge_config

# In command lines: IN is the folder of ``inputs``; the others are what begins many of them.
BEGINNINGS = {
    "DETECTOR": "--config-file faster_rcnn_randwire_shapes.yaml MODEL.DEVICE cpu",
    "CLASSIFIER": "--config-file shapes/randwire_pretrain.yaml MODEL.DEVICE cpu",
    "LAZY": "--config-file lazy/mask_rcnn_randwire_c109_fpn_1x.py train.device=cpu "
    "dataloader.train.dataset.names=randwire_shapes_train "
    "dataloader.test.dataset.names=randwire_shapes_val model.roi_heads.num_classes=6",
}
# By tool, each with what its line says.
REFUSALS = {
    "train_net.py": [
        # Weights
        ("DETECTOR MODEL.WEIGHTS IN/empty.pth", "empty.pth' is empty … copy or download it again"),
        ("DETECTOR MODEL.WEIGHTS IN/empty.pkl", "empty.pkl' is empty … copy or download it again"),
        (
            "DETECTOR MODEL.WEIGHTS IN/empty.pyth",
            "empty.pyth' is empty … copy or download it again",
        ),
        (
            "DETECTOR MODEL.WEIGHTS IN/cut.pth",
            "MODEL.WEIGHTS: '…/cut.pth' is cut off … copy or download it again",
        ),
        ("DETECTOR MODEL.WEIGHTS IN/cut.pkl", "cut.pkl' is damaged, cut off"),
        ("DETECTOR MODEL.WEIGHTS IN/cut.pyth", "cut.pyth' is cut off … copy or download"),
        ("DETECTOR MODEL.WEIGHTS IN/text.pth", "text.pth' is no checkpoint … name another"),
        ("DETECTOR MODEL.WEIGHTS IN/code.pth", "system, and to unpickle that could run code"),
        ("DETECTOR MODEL.WEIGHTS IN/code.pkl", "system, and to unpickle that could run code"),
        ("DETECTOR MODEL.WEIGHTS IN/code.pyth", "system, and to unpickle that could run code"),
        (
            "--eval-only DETECTOR MODEL.WEIGHTS IN/cut.pth",
            "cut.pth' is cut off … copy or download it again",
        ),
        ("--config-from-weights DETECTOR MODEL.WEIGHTS IN/code.pth", "could run code"),
        ("DETECTOR MODEL.WEIGHTS IN/number.pth", "number.pth' holds no weights"),
        ("DETECTOR MODEL.WEIGHTS IN", "MODEL.WEIGHTS '…/in' is a folder; name the file in it"),
        ("DETECTOR MODEL.WEIGHTS IN/gone.pth", "MODEL.WEIGHTS '…/gone.pth' does not exist"),
        ("DETECTOR DATASETS.TRAIN coco", "Type mismatch … DATASETS.TRAIN; a tuple of one name is"),
        ("DETECTOR MODEL.WEIGHTS IN/classifier.pth", "the fingerprint … --config-from-weights"),
        ("DETECTOR MODEL.WEIGHTS hf://x", "'hf://x' names no repository: it is hf://owner/name"),
        # Numbers
        ("DETECTOR SOLVER.IMS_PER_BATCH 0", "SOLVER.IMS_PER_BATCH must be at least 1; got 0"),
        ("--num-gpus 3 DETECTOR", "SOLVER.IMS_PER_BATCH 8 … must be a multiple"),
        ("DETECTOR SOLVER.BASE_LR 0.0", "SOLVER.BASE_LR must be greater than 0, and finite"),
        ("DETECTOR SOLVER.BASE_LR -1.0", "SOLVER.BASE_LR must be greater than 0 … got -1.0"),
        ("DETECTOR SOLVER.BASE_LR 1e400", "SOLVER.BASE_LR must be … finite; got inf"),
        ("DETECTOR SOLVER.BASE_LR nan", "float … nan) for config key: SOLVER.BASE_LR"),
        ("DETECTOR SOLVER.MAX_ITER -5", "SOLVER.MAX_ITER must be at least 1; got -5"),
        (
            "--config-file faster_rcnn_randwire_own_images.yaml SOLVER.MAX_ITER 5",
            "MAX_ITER 5 has no effect … SOLVER.EPOCHS 20; leave it out, or set SOLVER.EPOCHS 0",
        ),
        ("DETECTOR SOLVER.EPOCHS 2 SOLVER.MAX_ITER 5", "MAX_ITER 5 has no effect … EPOCHS 2;"),
        (
            "DETECTOR SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR SOLVER.STEPS (500,1000)",
            "SOLVER.STEPS (500, 1000) must be less than SOLVER.MAX_ITER 1000 … leave 1000 out",
        ),
        ("DETECTOR SOLVER.BASE_LR_END 1.0", "SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR 0"),
        (
            "DETECTOR SOLVER.REFERENCE_WORLD_SIZE 3",
            "the batch of all SOLVER.REFERENCE_WORLD_SIZE 3 processes … such as 9",
        ),
        ("DETECTOR SOLVER.STEPS (30,20)", "SOLVER.STEPS must be … increasing order; got (30, 20)"),
        ("DETECTOR SOLVER.MOMENTUM 1.0", "SOLVER.MOMENTUM must be … less than 1; got 1.0"),
        ("DETECTOR SOLVER.WARMUP_ITERS -1", "SOLVER.WARMUP_ITERS must be at least 0; got -1"),
        ("DETECTOR SOLVER.CHECKPOINT_PERIOD 0", "SOLVER.CHECKPOINT_PERIOD must be at least 1"),
        ("DETECTOR TEST.EVAL_PERIOD -1", "TEST.EVAL_PERIOD must be at least 0; got -1"),
        ("DETECTOR DATALOADER.NUM_WORKERS -1", "DATALOADER.NUM_WORKERS must be at least 0"),
        ("DETECTOR INPUT.MIN_SIZE_TRAIN (0,)", "INPUT.MIN_SIZE_TRAIN must be a list … got (0,)"),
        ("DETECTOR INPUT.CROP.SIZE [1.5,1.5]", "INPUT.CROP.SIZE must be two sizes … at most 1"),
        (
            "DETECTOR MODEL.PIXEL_STD [0.0,1.0,1.0]",
            "MODEL.PIXEL_STD must be … greater than 0",
        ),
        ("DETECTOR MODEL.PIXEL_STD \"['a']\"", "MODEL.PIXEL_STD must be a list … got ['a']"),
        (
            "DETECTOR MODEL.PIXEL_MEAN [90.0]",
            "MODEL.PIXEL_STD must have a value each for every channel; got [90.0] and [58.395,",
        ),
        (
            "DETECTOR MODEL.PIXEL_MEAN [90.0] MODEL.PIXEL_STD [60.0]",
            "INPUT.FORMAT RGB reads 3 channels, and MODEL.PIXEL_MEAN has 1: set INPUT.FORMAT L",
        ),
        (
            "DETECTOR MODEL.PIXEL_MEAN [1.0,2.0,3.0,4.0] MODEL.PIXEL_STD [1.0,1.0,1.0,1.0]",
            "MODEL.PIXEL_MEAN has 4: … a mapper of your own, as GUIDE.md says under Channels",
        ),
        ("DETECTOR MODEL.ROI_HEADS.NUM_CLASSES 7", "is 7, but 'randwire_shapes_train' has 6"),
        ("DETECTOR SEED 99999999999", "SEED must be less than 2**32"),
        (
            "DETECTOR TEST.EXPECTED_RESULTS \"[['a']]\"",
            "a list of [task, metric, value",
        ),
        # Names
        ("DETECTOR INPUT.FORMAT XYZ", "INPUT.FORMAT must be one of RGB, BGR, … got 'XYZ'"),
        ("DETECTOR SOLVER.LR_SCHEDULER_NAME Cosine", "must be one of WarmupMultiStepLR … 'Cosine'"),
        ("DETECTOR MODEL.META_ARCHITECTURE GeneralRCNN", "did you mean 'GeneralizedRCNN'"),
        ("DETECTOR MODEL.BACKBONE.NAME build_randwire", "no 'build_randwire' is … did you mean"),
        ("DETECTOR MODEL.ROI_HEADS.NAME X", "can't be built: No object named 'X' … 'ROI_HEADS'"),
        ("DETECTOR MODEL.ROI_BOX_HEAD.POOLER_TYPE X", "can't be built: Unknown pooler type: X"),
        (
            "DETECTOR MODEL.FPN.OUT_CHANNELS 10000000000",
            "the config's network can't be built: Storage size … sizes=[10000000000,",
        ),
        ("DETECTOR MODEL.RPN.IN_FEATURES \"['res9']\"", "can't be built: there is no 'res9'"),
        (
            "DETECTOR MODEL.META_ARCHITECTURE RetinaNet",
            "no 'p7' (MODEL.BACKBONE.NAME build_randwire_fpn_backbone; MODEL.RETINANET.IN_FEATURES",
        ),
        (
            "DETECTOR MODEL.RANDWIRE.NORM GN MODEL.RANDWIRE.FUSED on",
            "FUSED is on, but the norm is GroupNorm, … with auto, nodes run one by one",
        ),
        ("DETECTOR MODEL.RANDWIRE.WS.K 3", "MODEL.RANDWIRE … WS needs an even K … got K=3"),
        ("DETECTOR MODEL.RANDWIRE.SPEC_FILE IN/broken.json", "SPEC_FILE '…/broken.json': not the"),
        ("DETECTOR MODEL.KEYPOINT_ON True", "has no keypoint_names; … MODEL.KEYPOINT_ON False"),
        ("DETECTOR SOLVER.NOTHING 1", "Non-existent key: SOLVER.NOTHING"),
        ("CLASSIFIER", "key: MODEL.CLASSIFIER; this is a classifier's, which tools/pretrain_im"),
        ("DETECTOR MODEL.WEIGHTS", "options come as pairs KEY VALUE"),
        ("DETECTOR SOLVER.MAX_ITR 9", "key: SOLVER.MAX_ITR; did you mean 'SOLVER.MAX_ITER'"),
        ("DETECTOR MODEL.RANDWIRE.CHANELS 9", "; did you mean 'MODEL.RANDWIRE.CHANNELS'?"),
        ("DETECTOR SEED 1 --resume", "--resume belongs ahead of 'MODEL.DEVICE'"),
        (
            "--renamed-class a b DETECTOR",
            "--renamed-class goes with --resume or --eval-only: … or leave out --renamed-class",
        ),
        ("--config-file IN/broken.py", "is Python: a LazyConfig is for tools/lazyconfig_train"),
        # The machine
        ("DETECTOR MODEL.DEVICE gpu", "MODEL.DEVICE must be such as cpu, cuda … got 'gpu'"),
        ("DETECTOR MODEL.DEVICE cuda:99", "MODEL.DEVICE is 'cuda:99', but"),
        ("--num-gpus -1 DETECTOR", "--num-gpus must be at least 0; got -1"),
        ("--num-gpus two DETECTOR", "--num-gpus: invalid int value: 'two'; see --help"),
        ("--num-machines 2 --machine-rank 2 DETECTOR", "--machine-rank must be 0 … 1 … got 2"),
        ("--num-machines 2 DETECTOR", "--num-machines 2 needs --dist-url … for one machine"),
        ("--num-gpus 2 --dist-url nowhere DETECTOR", "must be tcp://HOST:PORT … got 'nowhere'"),
        ("--unknown DETECTOR", "unrecognized arguments: --unknown; see --help"),
        # Files and data
        ("DETECTOR OUTPUT_DIR IN/a_file/below", "OUTPUT_DIR '…/below': '…/a_file' is a file; name"),
        ("DETECTOR OUTPUT_DIR ''", "OUTPUT_DIR is empty; name a folder"),
        ("--config-file IN/none.yaml", "none.yaml' does not exist"),
        ("--config-file IN/broken.yaml", "broken.yaml is no YAML of a config: while parsing"),
        ("--config-file IN/unknown.yaml", "unknown.yaml: Non-existent config key: MODEL.RANDWYRE"),
        ("--config-file IN/on.yaml", "key: MODEL.RANDWIRE.FUSED; YAML reads … quote the word"),
        ("--config-file IN/list.yaml", "list.yaml: it is no mapping of keys to values"),
        (
            "--config-file IN/image.png",
            "image.png is no YAML of a config: 'utf-8' codec can't decode",
        ),
        ("DETECTOR DATASETS.TRAIN \"('randwire_shape_train',)\"", "mean 'randwire_shapes_train'"),
        ("DETECTOR DATASETS.TRAIN (1,)", "DATASETS.TRAIN: no data set 1 is registered"),
        ("DETECTOR DATASETS.TEST \"('coco_2017_val',)\"", "set … variable DETECTRON2_DATASETS"),
        ("--data IN/empty_folder DETECTOR", "empty_folder' holds no data set; expected is"),
        ("--data-val IN DETECTOR", "DATASETS.PATH_VAL (--data-val) needs DATASETS.PATH"),
    ],
    "pretrain_imagenet.py": [
        (
            "CLASSIFIER MODEL.WEIGHTS IN/empty.pth",
            "empty.pth' is empty … copy or download it again",
        ),
        ("CLASSIFIER MODEL.WEIGHTS IN/cut.pyth", "cut.pyth' is cut off … copy or download"),
        ("CLASSIFIER MODEL.WEIGHTS IN/code.pkl", "system, and to unpickle that could run code"),
        ("CLASSIFIER SOLVER.IMS_PER_BATCH 0", "SOLVER.IMS_PER_BATCH must be at least 1; got 0"),
        (
            "CLASSIFIER SOLVER.MOMENTUM 0.0",
            "SOLVER.NESTEROV True needs a SOLVER.MOMENTUM above 0; got 0.0: set … to False",
        ),
        ("CLASSIFIER OUTPUT_DIR IN/a_file/x", "a_file' is a file; name a folder"),
        ("CLASSIFIER MODEL.CLASSIFIER.NUM_CLASSES 0", "NUM_CLASSES is 0, but … has 6 classes"),
        ("CLASSIFIER MODEL.CLASSIFIER.DROPOUT 1.5", "DROPOUT must be within 0 … 1 … got 1.5"),
        ("CLASSIFIER INPUT.TRAIN_CROP_SIZE 0", "INPUT.TRAIN_CROP_SIZE must be at least 1; got 0"),
        ("CLASSIFIER DATASETS.TRAIN \"('IN/empty_folder',)\"", "has no class folders; an image"),
        ("DETECTOR", "MODEL.META_ARCHITECTURE must be 'ImageClassifier'"),
        ("--measure-input --num-gpus -2 CLASSIFIER", "--num-gpus must be at least 0; got -2"),
        ("--data IN CLASSIFIER", "--data (DATASETS.PATH) is a detector's; a classifier's data"),
        ("CLASSIFIER DATASETS.PATH IN", "--data (DATASETS.PATH) is a detector's; a classifier's"),
        ("CLASSIFIER DATASETS.HOLD_BACK 0.1", "HOLD_BACK must be 0: it is for detectors; name"),
    ],
    "lazyconfig_train_net.py": [
        ("--config-file IN/broken.yaml", "is no LazyConfig, whose name ends in .py"),
        ("--config-file IN/broken.py", "broken.py: SyntaxError: invalid syntax … line 1"),
        ("--config-file IN/raises.py", "raises.py, line 2: ZeroDivisionError: division by zero"),
        ("--config-file IN/nothing.py", "nothing.py lacks dataloader, lr_multiplier, model"),
        ("--renamed-class a b LAZY", "--renamed-class goes with --resume or --eval-only"),
        ("LAZY train.max_itre=3", "train.max_itre is unknown; did you mean 'max_iter'?"),
        ("LAZY train.max_iter=0", "train.max_iter must be at least 1; got 0"),
        ("LAZY dataloader.train.total_batch_size=0", "total_batch_size must be at least 1 … got 0"),
        ("LAZY train.device=gpu", "train.device must be such as cpu, cuda … got 'gpu'"),
        ("LAZY train.init_checkpoint=IN/none.pth", "none.pth' does not exist"),
        (
            "LAZY train.init_checkpoint=IN/cut.pth",
            "cut.pth' is cut off … copy or download it again",
        ),
        ("LAZY train.output_dir=IN/a_file/x", "train.output_dir '…' is a file; name a folder"),
    ],
    "convert_checkpoint.py": [
        ("IN/none.pth out.pth", "none.pth' is no file"),
        ("IN/code.pth out.pth", "system, and to unpickle that could run code"),
        ("IN/cut.pth out.pth", "cut.pth' is cut off … copy or download it again"),
        ("IN/whole.pth out.pth", "is of no known layout … its keys are weight"),
        ("IN/classifier.pth out.txt", "OUTPUT must end in .pth, .pkl, .safetensors; got 'out.txt'"),
        ("IN/classifier.pth IN/a_file/out.pth", "OUTPUT … a_file' is a file; name a folder"),
        ("IN/classifier.pth out.pth --spec-output IN", "--spec-output … is a folder; name a file"),
        ("IN/classifier.pth out.pth --image IN/broken.png", "--image: …/broken.png can't be read"),
        ("IN/classifier.pth out.pth --graphs IN/none", "layout randwire does not have its wiring"),
        ("IN/classifier.pth out.pth MODEL.NOTHING 1", "Non-existent key: MODEL.NOTHING"),
        ("IN/classifier.pth out.pth --pixel-mean 1 2 3", "come together; see --help"),
    ],
    "predict.py": [
        ("IN/classifier.pth IN/none.png --output out", "none.png' matches no image and no video"),
        ("IN/classifier.pth IN/image.png --output IN/a_file/x", "is a file; name a folder"),
        ("IN/classifier.pth IN/image.png --output IN", "is not empty; name another folder"),
        ("IN/classifier.pth IN/image.png --output out --device gpu", "--device must be … 'gpu'"),
        ("IN/none.pth IN/image.png --output out --device cuda:99", "--device is 'cuda:99', but"),
        ("IN/classifier.pth IN/image.png --output out --batch 0", "--batch: must be at least 1"),
        ("IN/classifier.pth --dataset nothing --output out", "no data set 'nothing' is registered"),
        (
            "IN/classifier.pth IN/image.png --output out --renamed-class a b",
            "--renamed-class goes with --dataset NAME; see --help",
        ),
        ("IN/cut.pth IN/image.png --output out", "cut.pth' is cut off … copy or download it again"),
        ("IN/whole.pth IN/image.png --output out", "whole.pth: it holds no config"),
        ("IN/run IN/image.png --output out", "run holds no checkpoint (model_best.pth"),
        ("IN/empty.ts IN/image.png --output out", "empty.ts can't be read as torchscript"),
    ],
    "export_model.py": [
        ("IN/none.pth x.ts", "none.pth does not exist; name a .pth file"),
        ("IN/code.pth x.ts", "system, and to unpickle that could run code"),
        ("IN/classifier.pth x.txt", "OUTPUT 'x.txt': the name … ends in .onnx"),
        ("IN/classifier.pth IN/a_file/x.ts", "OUTPUT … a_file' is a file; name a folder"),
        ("IN/classifier.pth x.ts --images IN/none.png", "--images '…/none.png' matches no image"),
        ("IN/classifier.pth x.ts --images IN/empty.ts", "--images '…/empty.ts' has videos alone"),
        ("IN/empty.ts x.ts", "empty.ts is an exported file already; name a checkpoint"),
        (
            "IN/empty.ts x.onnx --int8 --calibration IN/image.png",
            "empty.ts is an exported file already; name a checkpoint",
        ),
    ],
    "publish_model.py": [
        ("IN/cut.pth out", "cut.pth' is cut off … copy or download it again"),
        ("IN/empty.ts out", "empty.ts is an exported file already; name a checkpoint"),
        ("IN/empty_folder out", "empty_folder holds no checkpoint"),
        ("IN/classifier.pth IN/a_file", "a_file is a file; name a folder"),
        ("IN/classifier.pth IN", "is not empty: name another folder, or overwrite it (--overwrite"),
    ],
    "draw_wiring.py": [
        ("--grid --output a.jpg", "--output must end in one of .png, .svg, .pdf; got a.jpg"),
        ("--grid --output IN/a_file/a.png", "--output '…' is a file; name a folder"),
        ("--grid 'ER(2)' --output a.png", "ER needs a probability 0 <= P <= 1; got P=2"),
        ("--grid 'BA(5)' --nodes 3 --output a.png", "BA needs 1 <= M < N; got M=5, N=3"),
        ("--spec IN/empty.json --output a.png", "empty.json': not the JSON of a NetworkSpec"),
        ("--checkpoint IN/code.pth --output a.png", "system, and to unpickle that could run code"),
        ("--config-file Base-RCNN-FPN-1x.yaml --output a.png", "is no RandWire"),
        ("--output a.png", "--grid is required; see --help"),
    ],
    "analyze_model.py": [
        ("--tables 7", "invalid choice: 7 (choose from 1, 2, 3, 4)"),
        ("--target x", "a number such as 580M, 4B or 4.0e9; got 'x'"),
        ("--target 0", "no C has 0 multiply-adds; the least, C=2"),
        ("--target 4B --graph XX", "unknown graph model 'XX'; registered are"),
        ("--config-file IN/broken.yaml", "broken.yaml is no YAML of a config: while parsing"),
        ("--tables 1 --output IN", "is a folder; name a file"),
    ],
    "analyze_results.py": [
        ("", "name a RUN, or --results and --dataset; see --help"),
        ("IN/empty_folder", "empty_folder/config.yaml does not exist; expected"),
        ("IN/run", "run/config.yaml is no YAML of a config: while parsing"),
        ("--results IN/broken.json --dataset randwire_shapes_val --output out", "broken.json: Exp"),
        ("--results IN/numbers.json --dataset nothing --output out", "no data set 'nothing'"),
        ("--results IN/numbers.json --dataset x --output IN/a_file", "is a file; name a folder"),
        (
            "--results IN/numbers.json --dataset randwire_shapes_val --output out",
            "is not what",
        ),
    ],
    "benchmark.py": [
        ("--batch 0", "the batch must be at least 1; got 0"),
        ("--size -3 --no-time", "the height must be at least 1; got -3"),
        ("--channels 0 --no-time", "channels (C) must be at least 2"),
        ("--threads 0", "--threads: must be at least 1; got 0"),
        ("--no-time --json IN/a_file/x", "--json '…' is a file; name a folder"),
        ("--no-time --json ''", "--json is empty; name a file"),
    ],
    "browse_data.py": [
        ("", "DATASETS.TRAIN is empty; name registered data sets, or --data PATH"),
        ("--data IN/none", "none' does not exist; expected is a folder"),
        ("--data IN/list.yaml", "list.yaml' is no data.yaml of YOLO's"),
        ("--images 0 DETECTOR", "--images: must be at least 1; got 0"),
        ("DETECTOR INPUT.MIN_SIZE_TRAIN (0,)", "INPUT.MIN_SIZE_TRAIN must be a list"),
    ],
    "collect_results.py": [
        ("", "the following arguments are required: FOLDER; see --help"),
        ("IN/none", "none' is no OUTPUT_DIR of a training, and holds none"),
        ("IN/run", "no run can be read: …/run: config.yaml is no YAML of a config: while"),
    ],
    "make_shards.py": [
        ("IN/none out", "no data set '…/none' is registered"),
        ("IN/empty_folder out", "empty_folder' has no class folders"),
        ("IN out --images 0", "a shard has at least 1 image; got 0"),
    ],
    "measure_memory.py": [
        ("--iterations 2 DETECTOR", "--iterations: must be at least 8; got 2"),
        ("DETECTOR SOLVER.NOTHING 1", "Non-existent key: SOLVER.NOTHING"),
        ("--output IN DETECTOR SOLVER.NOTHING 1", "--output '…' is a folder; name a file"),
    ],
    "compare_generators.py": [
        ("IN/none.yaml", "none.yaml' does not exist"),
        ("IN/broken.yaml", "broken.yaml … while parsing"),
        ("IN/empty.json", "empty.json: the key 'config' is missing or empty"),
        ("sweeps/miniature.yaml --jobs 0", "--jobs: must be at least 1"),
        ("sweeps/miniature.yaml --slurm x", "--slurm: … is NAME=VALUE; got 'x'"),
        ("sweeps/miniature.yaml --output IN/a_file", "a_file' is a file; name a folder"),
        ("sweeps/miniature.yaml MODEL.NOTHING 1", "Non-existent key: MODEL.NOTHING"),
    ],
    "damage_graph.py": [
        ("IN/none", "none/config.yaml does not exist; give the OUTPUT_DIR of a training"),
        ("IN/run", "run/model_final.pth does not exist; give the OUTPUT_DIR"),
        ("IN/run --output x.jpg", "--output must end in one of .png, .svg, .pdf; got x.jpg"),
        ("IN/good --images 0", "the number of images must be at least 1; got 0"),
        ("IN/good --weights IN/code.pth", "system, and to unpickle that could run"),
        ("IN/good IN/run --weights IN/code.pth", "--weights belongs to one RUN; got 2"),
    ],
    "check_gpu.py": [
        ("--device gpu", "--device must be such as cpu, cuda or cuda:1; got 'gpu'"),
        ("--batch 0", "--batch: must be at least 1; got 0"),
    ],
    "measure_gpu.py": [
        ("--device gpu", "--device: invalid choice: 'gpu'"),
        ("--device cpu --quick --output IN/a_file", "a_file' is a file; name a folder"),
        ("--minutes 0", "--minutes: must be at least 1; got 0"),
    ],
    "measure_host.py": [("--rounds 0", "--rounds: must be at least 1; got 0")],
    "inspect_kernels.py": [
        ("--channels 0", "--channels: must be at least 1; got 0"),
        ("--capability -1", "--capability: must be at least 70"),
    ],
    "demo.py": [
        ("--output IN", "in/run is not empty and not from a demo; move it away"),
        ("--output IN/a_file", "a_file' is a file; name a folder"),
        ("--seed x", "--seed: invalid int value: 'x'"),
    ],
    "check_matrix.py": [
        ("nothing", "no such environment: nothing; there are … 'python3.13'"),
        ("--detectron2", "expected one argument"),
    ],
    "install.py": [("--nothing", "unrecognized arguments: --nothing; see --help")],
}
CASES = [(tool, line, words) for tool, lines in REFUSALS.items() for line, words in lines]


class Code:
    """Unpickled, it leaves a file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it_ran",)


def make_inputs(folder: Path) -> None:
    (folder / "empty_folder").mkdir(parents=True)
    for name in ("a_file", "empty.pth", "empty.pkl", "empty.pyth", "empty.ts"):
        (folder / name).touch()
    for name, text in {
        "text.pth": "no checkpoint",
        "broken.json": "{",
        "empty.json": "{}",
        "numbers.json": "[1, 2]",
        "broken.yaml": "MODEL: [",
        "list.yaml": "- 1",
        "on.yaml": "{VERSION: 2, MODEL: {RANDWIRE: {FUSED: on}}}",
        "unknown.yaml": "{VERSION: 2, MODEL: {RANDWYRE: 1}}",
        "broken.py": "def",
        "raises.py": "\n1 / 0",
        "nothing.py": "a = 1",
        "broken.png": "PNG",
        "run/config.yaml": "MODEL: [",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    Image.new("RGB", (40, 48)).save(folder / "image.png")
    torch.save({"model": {"weight": torch.zeros(5000)}}, folder / "whole.pth")
    torch.save({"model": 3}, folder / "number.pth")
    code = {"model": Code(), "model_state": Code()}
    for suffix in ("pth", "pyth"):
        torch.save(code, folder / f"code.{suffix}")
        (folder / f"cut.{suffix}").write_bytes((folder / "whole.pth").read_bytes()[:9000])
    (folder / "code.pkl").write_bytes(pickle.dumps(code))
    (folder / "cut.pkl").write_bytes(pickle.dumps({"model": {"weight": [0.5] * 100}})[:-50])
    cfg = classifier_config()
    small = ["MODEL.RANDWIRE.CHANNELS", "4", "MODEL.RANDWIRE.NUM_NODES", "6"]
    merge_config(cfg, "shapes/randwire_pretrain.yaml", ["MODEL.DEVICE", "cpu", *small])
    RandWireCheckpointer(
        build_model(cfg), str(folder), cfg=cfg, classes=Classes(list("abcdef"))
    ).save("classifier")
    (folder / "good").mkdir()
    (folder / "good" / "config.yaml").write_text(cfg.dump())


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Ended, list[str]]]:
    """How each of ``CASES`` ended, and the files that it left."""
    root = tmp_path_factory.mktemp("refusals")
    make_inputs(root / "in")
    before = sorted(root.rglob("*"))
    lines = []
    for i, (tool, line, _) in enumerate(CASES):
        line = " ".join(BEGINNINGS.get(word, word) for word in line.split(" "))
        arguments = [
            str(root / "in") if a == "IN" else a.replace("IN/", f"{root}/in/")
            for a in shlex.split(line)
        ]
        lines.append((tool, arguments, root / str(i)))
        lines[-1][2].mkdir()
    found = end_each(lines)
    left = [[str(path) for path in folder.rglob("*")] for _, _, folder in lines]
    after = sorted(path for path in root.rglob("*") if not path.parts[len(root.parts)].isdigit())
    assert after == before, "a tool has written into the folder of its input"
    return list(zip(found, left))


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"{tool} {line}"[:70] for tool, line, _ in CASES]
)
def test_bad_input_is_refused_in_one_line(index: int, ended: list[tuple[Ended, list[str]]]) -> None:
    """Wrong: a traceback, a line that does not name the value and the way out, a status of success,
    or files that look like a result."""
    tool, _, words = CASES[index]
    (status, out, err), left = ended[index]
    assert "Traceback" not in out + err, out + err
    assert err.count("\n") == 1 and err.startswith(f"{tool}: error: "), err
    assert status == (2 if err.endswith("; see --help\n") else 1)
    rest = err
    for part in words.split("…"):
        _, found, rest = rest.partition(part.strip())
        assert found, f"{part!r} is not in {err!r}"
    assert left == []


def test_every_tool_has_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: a tool is not in the table."""
    tools = {script for script, _ in TOOLS.values()} | {"check_matrix.py", "install.py"}
    assert REFUSALS.keys() == tools == {path.name for path in (ROOT / "tools").glob("*.py")}
    assert len(CASES) >= 80
    with capsys.disabled():
        print(f"\n{len(CASES)} bad inputs for {len(tools)} tools")
