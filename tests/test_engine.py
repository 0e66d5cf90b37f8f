"""A run that can't succeed is refused before any work; evaluators fit their data sets."""

import argparse
import copy
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import configurable, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathHandler, PathManager
from helpers import ROOT, assert_equal, in_two_processes, leave_checkpoint, raises_one_line
from PIL import Image
from test_lazy import DATA, FASTER, SMALL
from test_lazy import parse as parse_lazy
from torch import Tensor, nn

from randwire_d2 import add_randwire_config, engine, load_detector
from randwire_d2.checkpoint import Classes, Preprocessing, RandWireCheckpointer
from randwire_d2.config import (
    classifier_config,
    detector_config,
    merge_config,
    spec_from_config,
)
from randwire_d2.data.shapes import CLASSES
from randwire_d2.engine import Trainer, argument_parser, load_config, scale_schedule, trainer
from randwire_d2.engine.config import weights as weights_checks
from randwire_d2.engine.config.schedule import scale_to_processes
from randwire_d2.engine.lazy import config as lazy_checks
from randwire_d2.engine.lazy.config import load_lazy_config
from randwire_d2.engine.processes.threads import available_cores, busy_cores, fair_threads
from randwire_d2.engine.trainer import in_parallel, parallel_options
from randwire_d2.runs import RunFolder
from randwire_d2.upstream import hush_upstream

C109 = "configs/faster_rcnn_randwire_c109_fpn_1x.yaml"
SHAPES = "configs/faster_rcnn_randwire_shapes.yaml"
ON_CPU = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('randwire_shapes_train',)",
          "DATASETS.TEST", "('randwire_shapes_val',)"]  # fmt: skip
DETECTION = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/quick_schedules/*.yaml")]
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in DETECTION)


def parse(config: str, *args: str) -> argparse.Namespace:
    path = str(ROOT / config) if config else ""
    return argument_parser().parse_args(["--config-file", path, *args])


@pytest.mark.parametrize(
    ("config", "args", "says"),
    [
        (C109, ["MODEL.RANDWIRE.CHANNELS", "wide"], ["CHANNELS", "wide"]),
        (SHAPES, ["DATASETS.TEST", "('randwire_shape_val',)"], ["'randwire_shapes_val'"]),
        (SHAPES, ["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN", "empty"]),
        (SHAPES, ["DATASETS.TEST", "('nowhere_set',)"], ["/nowhere", "DETECTRON2_DATASETS"]),
        (SHAPES, ["--eval-only"], ["--eval-only", "MODEL.WEIGHTS"]),
        (SHAPES, ["SOLVER.AMP.ENABLED", "True"], ["AMP", "GPU"]),
        (SHAPES, ["SOLVER.AMP.PRECISION", "float64"], ["PRECISION", "bfloat16", "float64"]),
        (SHAPES, ["MODEL.RANDWIRE.GRAPH", "XX"], ["MODEL.RANDWIRE", "XX", "WS"]),
        (SHAPES, ["MODEL.RANDWIRE.GRAPH", "SEED"], ["MODEL.RANDWIRE", "SEED", "WS"]),
        (SHAPES, ["MODEL.RANDWIRE.NORM", "BM"], ["BM", "get_norm"]),
        (SHAPES, ["MODEL.RANDWIRE.OUT_FEATURES", "['res5']"], ["IN_FEATURES", "res3"]),
        (SHAPES, ["MODEL.RANDWIRE.NORM", "SyncBN"], ["SyncBN", "BN or GN"]),
        (SHAPES, ["MODEL.RANDWIRE.SPEC_FILE", "no.json"], ["SPEC_FILE", "no.json"]),
        (SHAPES, ["MODEL.RANDWIRE.NORM", "FrozenBN"], ["FrozenBN", "MODEL.WEIGHTS", "NORM BN"]),
        (SHAPES, ["MODEL.BACKBONE.FREEZE_AT", "2"], ["FREEZE_AT", "MODEL.WEIGHTS"]),
        (C109, [*ON_CPU, "MODEL.WEIGHTS", ""], ["FrozenBN", "NORM BN"]),
        # The three ways to a backbone.
        (C109, ON_CPU, ["output/imagenet/randwire_c109_100ep/backbone.pth", "does not exist",
                        "--config-file configs/imagenet/randwire_c109_100ep.yaml",
                        "convert_checkpoint.py CHECKPOINT output/imagenet/randwire_c109_100ep/b",
                        "MODEL.WEIGHTS '' MODEL.RANDWIRE.NORM BN MODEL.BACKBONE.FREEZE_AT 0"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(
    config: str, args: list[str], says: list[str], nowhere_set: None
) -> None:
    with raises_one_line(ValueError) as e:
        load_config(parse(config, *args))
    for words in says:
        assert words in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("_BASE_: gone.yaml", "gone.yaml"),
        ("SOLVER: {BASE_LR: }", "SOLVER.BASE_LR has no value"),
    ],
)
def test_a_broken_config_file_is_named_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with raises_one_line(ValueError, match=says):
        load_config(parse(str(tmp_path / "config.yaml")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="MODEL.DEVICE cpu"):
        load_config(parse(C109))


def test_several_processes_have_no_gpu_in_common() -> None:
    """Wrong: NCCL says so, with a traceback in each of them."""
    way_out = "MODEL.DEVICE is 'cuda:0', which 8 processes can't share; .* with MODEL.DEVICE cuda$"
    with pytest.raises(ValueError, match=way_out):
        load_config(parse(C109, "--num-gpus", "8", "MODEL.DEVICE", "cuda:0"))


@pytest.mark.parametrize(("name", "expected"), [("cuda:1", ["cuda:1"]), ("cuda", [])])
def test_a_training_on_another_gpu_seeds_that_one(
    name: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the random numbers of GPU 0 are a function of the seed, those of the training's GPU
    are not; or it takes memory of both."""
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    args = parse(SHAPES, "OUTPUT_DIR", str(tmp_path))
    cfg = load_config(args)
    cfg.defrost()
    cfg.MODEL.DEVICE = name
    engine.setup(cfg, args)
    assert chosen == expected


class Computing(GeneralizedRCNN):
    """It has to know a tensor's values when it is built, as Detectron2's ViT and Swin have."""

    greedy = False

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
        if self.greedy:
            nn.Linear(1 << 14, 1 << 13)
            raise AssertionError("that was half a gigabyte")


def test_a_part_that_computes_while_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: the checks, which build a network without values, take it for a fault of their own;
    or nobody can load what was trained."""
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Computing", Computing)
    caplog.set_level("INFO")
    cfg = load_config(parse(SHAPES, "MODEL.META_ARCHITECTURE", "Computing"))
    assert "A part of the network computes while it is built" in caplog.text
    model: Any = Trainer.build_model(cfg)
    assert model.rates == [0, 0.25, 0.5]
    names = [f"name {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    RandWireCheckpointer(model, str(tmp_path), cfg=cfg, classes=Classes(names)).save("model")
    assert isinstance(load_detector(tmp_path / "model.pth", "cpu").model, Computing)
    # A stranger's config can describe any number of weights.
    monkeypatch.setattr(Computing, "greedy", True)
    with pytest.raises(ValueError, match="model.pth: the network takes more than .* bytes"):
        load_detector(tmp_path / "model.pth", "cpu")


@pytest.fixture
def nowhere_set():
    """A registered data set whose files do not exist."""
    MetadataCatalog.get("nowhere_set").set(json_file="/nowhere/a.json", image_root="/nowhere")
    DatasetCatalog.register("nowhere_set", list)


def test_a_norm_that_a_randwire_does_not_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: who takes a ResNet's config with SyncBN trains another norm, and does not know it; or
    is warned of Detectron2's default."""
    for norm in ("GN", "FrozenBN"):
        load_config(parse(SHAPES, "MODEL.RANDWIRE.NORM", "GN", "MODEL.RESNETS.NORM", norm))
    assert "MODEL.RESNETS.NORM" not in caplog.text
    load_config(parse(SHAPES, "MODEL.RANDWIRE.NORM", "GN", "MODEL.RESNETS.NORM", "SyncBN"))
    assert "norm is MODEL.RANDWIRE.NORM GN: MODEL.RESNETS.NORM SyncBN is for" in caplog.text


def test_resuming_a_run_needs_no_weights(tmp_path: Path) -> None:
    """A run that was started from weights resumes without them being there any more."""
    options = ["MODEL.RANDWIRE.NORM", "FrozenBN", "OUTPUT_DIR", str(tmp_path)]
    leave_checkpoint(tmp_path)
    load_config(parse(SHAPES, "--resume", *options))
    load_config(parse(SHAPES, "--resume", *options, "MODEL.WEIGHTS", "gone.pth"))
    with pytest.raises(ValueError, match="FrozenBN"):
        load_config(parse(SHAPES, *options))


KNOWN = [["--resume"], ["--resume", "--eval-only"], ["--eval-only"]]


def refused_by_both(flags: list[str], folder: Path, says: str, norm: str = "BN") -> None:
    """Either tool refuses a folder's checkpoint; a new training may start from it."""
    weights = str(folder / "model_0000001.pth")
    given = ["OUTPUT_DIR", str(folder), "MODEL.WEIGHTS", weights, "MODEL.RANDWIRE.NORM", norm]
    lazy = [f"train.output_dir={folder}", f"train.init_checkpoint={weights}"]
    lazy.append(f"model.backbone.bottom_up.norm={norm}")
    for load in (
        lambda: load_config(parse(SHAPES, *flags, *given)),
        lambda: load_lazy_config(parse_lazy(FASTER, *flags, *DATA, *SMALL, *lazy)),
    ):
        with raises_one_line(ValueError, match=says):
            load()
    given[1], lazy[0] = str(folder / "new"), f"train.output_dir={folder}/new"
    load_config(parse(SHAPES, *given))
    load_lazy_config(parse_lazy(FASTER, *DATA, *SMALL, *lazy))


@pytest.mark.parametrize("flags", KNOWN)
def test_a_network_of_other_shapes_goes_on_with_nothing(flags: list[str], tmp_path: Path) -> None:
    """Wrong: who leaves out --data, or has other classes, gets new weights for some of the old, and
    an optimizer that ends in a traceback once config.yaml was overwritten; or the AP of a head
    with random weights."""
    name = "roi_heads.box_predictor.cls_score.weight"
    leave_checkpoint(tmp_path, **{name: torch.zeros(3, 64)})
    refused_by_both(flags, tmp_path, rf"{name} has the .*\(7, .*\(3, 64\): .*--data")


@pytest.mark.parametrize("flags", KNOWN)
@pytest.mark.parametrize("theirs", ["BN", "GN"])
def test_weights_stay_under_their_norm(flags: list[str], theirs: str, tmp_path: Path) -> None:
    """Wrong: a training goes on with a batch norm's weights under another norm, or the other way
    round, where they mean nothing; or such a network gets an AP."""
    norm = "backbone.bottom_up.stem.norm"
    weights = {f"{norm}.weight": torch.ones(4)}
    if theirs == "BN":
        weights[f"{norm}.running_mean"] = torch.zeros(4)
    leave_checkpoint(tmp_path, **weights)
    own = {"BN": "GN", "GN": "BN"}[theirs]
    says = rf"{norm} is a (batch )?norm.*, and in the checkpoint a (batch )?norm.*: .*NORM"
    refused_by_both(flags, tmp_path, says, norm=own)
    layer = "backbone.fpn_lateral3"
    leave_checkpoint(tmp_path, **{f"{layer}.weight": torch.ones(4)})
    given = ["OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", tmp_path / "model_0000001.pth"]
    with raises_one_line(ValueError, match=f"{layer} is a layer with a norm, .* a layer without"):
        load_config(parse(SHAPES, *flags, *map(str, given), "MODEL.FPN.NORM", "GN"))


class _Downloads(PathHandler):
    """URLs in place of files: download:///tmp/x.pth."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["download://"]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return path.removeprefix("download://")


def test_what_is_downloaded_to_be_tested_is_compared_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: Detectron2's detector of COCO's 80 classes gets an AP of new heads."""
    downloads = copy.copy(PathManager)
    monkeypatch.setattr(weights_checks, "PathManager", downloads)
    downloads._path_handlers = {**downloads._path_handlers, "download://": _Downloads()}
    leave_checkpoint(tmp_path, **{"roi_heads.box_predictor.cls_score.weight": torch.zeros(81, 64)})
    given = ["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.WEIGHTS"]
    given.append(f"download://{tmp_path}/model_0000001.pth")
    load_config(parse(SHAPES, *given))  # a training has new heads for them
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS 'download:.* the checkpoint \(81, 64\)"):
        load_config(parse(SHAPES, "--eval-only", *given))


@pytest.mark.parametrize("flags", KNOWN)
def test_outputs_keep_their_classes(flags: list[str], tmp_path: Path) -> None:
    """Wrong: as many classes with other names, or in another order, are trained or tested as if
    they were the checkpoint's."""
    leave_checkpoint(tmp_path)
    file, first = tmp_path / "model_0000001.pth", [CLASSES[1], CLASSES[0]]
    content = torch.load(file, weights_only=True)
    torch.save(content | {"class_names": [*first, *CLASSES[2:]]}, file)
    says = f"class 0 is '{first[0]}' in the checkpoint, and '{first[1]}' in the data.*'s classes$"
    refused_by_both(flags, tmp_path, says)
    given = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(file)]
    swap = ["--renamed-class", *first, "--renamed-class", *reversed(first)]
    with pytest.raises(ValueError, match=says):  # whatever the user says
        load_config(parse(SHAPES, *swap, *flags, *given))
    proposals = "MODEL.META_ARCHITECTURE", "ProposalNetwork"  # of no class
    load_config(parse(SHAPES, *flags, *given, *proposals))
    torch.save(content | {"class_names": list(CLASSES)}, file)
    load_config(parse(SHAPES, *flags, *given))


@pytest.mark.parametrize("flags", KNOWN)
def test_a_class_may_be_renamed_by_a_word_of_the_user(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who corrects a typo in the labels trains anew; what the line says to add is refused;
    or one class's new name stands for another's."""
    leave_checkpoint(tmp_path)
    file = tmp_path / "model_0000001.pth"
    names = [f"a {CLASSES[0]}", f"{CLASSES[1]}s"]
    content = torch.load(file, weights_only=True)
    torch.save(content | {"class_names": [*names, *CLASSES[2:]]}, file)
    given = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(file)]
    with pytest.raises(ValueError, match=f"if only names were corrected, add .*{names[1]}") as e:
        load_config(parse(SHAPES, *flags, *given))
    added = shlex.split(str(e.value).split(" add ")[1])
    load_config(parse(SHAPES, *added, *flags, *given))
    lazy = [f"train.output_dir={tmp_path}", f"train.init_checkpoint={file}"]
    monkeypatch.setattr(lazy_checks, "_check_solver_parts", lambda *_: None)  # the file has none
    load_lazy_config(parse_lazy(FASTER, *added, *flags, *DATA, *SMALL, *lazy))
    says = f"class 1 is '{names[1]}' .* add --renamed-class {names[1]} {CLASSES[1]}$"
    with pytest.raises(ValueError, match=says):
        load_config(parse(SHAPES, *added[:3], *flags, *given))


@pytest.mark.parametrize("flags", KNOWN)
def test_a_lazy_proposal_network_has_no_classes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: its training does not go on, or isn't tested, with data of other classes."""
    leave_checkpoint(tmp_path)
    file = tmp_path / "model_0000001.pth"
    torch.save(torch.load(file) | {"class_names": ["another"]}, file)
    config = tmp_path / "rpn.py"
    config.write_text(
        "from detectron2.config import LazyConfig\n"
        "from detectron2.modeling import ProposalNetwork\n"
        f"cfg = LazyConfig.load({str(ROOT / 'configs/lazy' / FASTER)!r} + '.py')\n"
        "dataloader, lr_multiplier, optimizer, train, model = (\n"
        "    cfg[k] for k in ('dataloader', 'lr_multiplier', 'optimizer', 'train', 'model'))\n"
        "model._target_ = ProposalNetwork\n"
        "del model.roi_heads, model.input_format\n"
    )
    monkeypatch.setattr(lazy_checks, "_check_solver_parts", lambda *_: None)  # the file has none
    given = [f"train.output_dir={tmp_path}", f"train.init_checkpoint={file}"]
    load_lazy_config(parse_lazy(config, *flags, *DATA[1:3], *SMALL, *given))


def test_a_training_goes_on_with_its_own_optimizer_or_not_at_all(tmp_path: Path) -> None:
    """Wrong: it fails after its config.yaml was overwritten, or goes on as it was while config.yaml
    says otherwise; or what the line says to add is refused."""
    own = [*ON_CPU, "OUTPUT_DIR", str(tmp_path), "MODEL.RANDWIRE.NORM", "BN"]
    own += ["MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.WEIGHTS", ""]
    leave_checkpoint(tmp_path)
    load_config(parse(C109, "--resume", *own))  # there is no config.yaml to compare
    # The rest is Detectron2's defaults.
    text = "SOLVER: {WEIGHT_DECAY_BIAS: null}\nMODEL: {RANDWIRE: {NORM: BN}}\nVERSION: 2\n"
    (tmp_path / "config.yaml").write_text(text)
    with raises_one_line(ValueError) as e:
        load_config(parse(C109, "--resume", *own, "SOLVER.NESTEROV", "True"))
    assert "SOLVER.WEIGHT_DECAY_BIAS None (now 0.0), SOLVER.BIAS_LR_FACTOR 1.0 (now 2.0)" in str(
        e.value
    )
    added = str(e.value).split("add to the command ")[1].split(";")[0].split()
    assert added[:2] == ["SOLVER.NESTEROV", "False"] and len(added) == 8
    cfg = load_config(parse(C109, "--resume", *own, "SOLVER.NESTEROV", "True", *added))
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None and not cfg.SOLVER.NESTEROV
    load_config(parse(C109, *own, "SOLVER.NESTEROV", "True"))  # a new one


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("MODEL.BACKBONE.FREEZE_AT 2", "has MODEL.BACKBONE.FREEZE_AT 0 .now 2., which .* go on"),
        ("MODEL.RANDWIRE.NORM FrozenBN", "has MODEL.RANDWIRE.NORM BN .now FrozenBN., which .* go"),
        ("SOLVER.MOMENTUM 0.5", "has SOLVER.MOMENTUM 0.9 .now 0.5., which the state .* go on"),
        ("SOLVER.MAX_ITER 1", "has done 2 iterations, and is to have 1 in all: give it at least 2"),
        ("train.max_iter=1", "has done 2 iterations, and is to have 1 in all: give it at least 2"),
    ],
)
def test_what_a_training_cannot_change_is_refused_ahead_of_the_data(
    changed: str, says: str, tmp_path: Path
) -> None:
    """Wrong: who resumes so waits for the labels of all images first, and for all processes."""
    leave_checkpoint(tmp_path)
    given = ["--resume", "--data", str(tmp_path / "gone")]
    with raises_one_line(ValueError, match=f"^--resume: the training.*{says}"):
        if changed.startswith("train."):
            lazy = [*DATA, *SMALL, f"train.output_dir={tmp_path}", changed]
            load_lazy_config(parse_lazy(FASTER, *given, *lazy))
        own = ["OUTPUT_DIR", str(tmp_path)]
        (tmp_path / "config.yaml").write_text(load_config(parse(SHAPES, *own)).dump())
        load_config(parse(SHAPES, *given, *own, *changed.split()))


# The base has no FPN of its own.
@pytest.mark.parametrize("config", [c for c in CONFIGS if "Base-" not in c])
def test_every_config_of_a_detector_loads(config: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(weights),
               "DATASETS.TRAIN", "('randwire_shapes_train',)",
               "DATASETS.TEST", "('randwire_shapes_val',)"]  # fmt: skip
    assert load_config(parse(config, *options)).is_frozen()


def test_the_config_is_taken_from_the_weights(tmp_path: Path) -> None:
    """One flag is the way out that the refusal of another wiring names."""
    other = ["MODEL.RANDWIRE.SEED", "7", "INPUT.FORMAT", "BGR"]
    model = Trainer.build_model(load_config(parse(SHAPES, *other)))
    RandWireCheckpointer(model, str(tmp_path)).save("model")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "OUTPUT_DIR", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=model.backbone.bottom_up.spec.fingerprint):
        RandWireCheckpointer(Trainer.build_model(load_config(parse(SHAPES, *options)))).load(
            options[1]
        )
    cfg = load_config(parse(SHAPES, "--config-from-weights", *options))
    assert spec_from_config(cfg) == model.backbone.bottom_up.spec
    assert cfg.INPUT.FORMAT == "BGR"
    RandWireCheckpointer(Trainer.build_model(cfg)).load(options[1])
    # What the run leaves can be read again.
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert RunFolder(tmp_path).config().MODEL.RANDWIRE.SPEC == cfg.MODEL.RANDWIRE.SPEC


@pytest.mark.parametrize(
    ("content", "says"), [(None, "empty"), (b"no", "no checkpoint"), ({"model": {}}, "neither")]
)
def test_no_config_can_be_taken_from_such_weights(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    options = ["MODEL.WEIGHTS", str(path)] if content else []
    with raises_one_line(ValueError, match=says):
        load_config(parse(SHAPES, "--config-from-weights", *options))


def test_the_1x_recipe_is_the_original_detectrons() -> None:
    """Every row of Table 5 has the same recipe, whose numbers are those of Detectron's 1x."""
    rows = [c for c in CONFIGS if c.endswith("_1x.yaml") and "/Base" not in c]
    assert len(rows) == 6
    for config in rows:
        cfg = get_cfg()
        add_randwire_config(cfg)
        cfg.merge_from_file(str(ROOT / config))
        assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
        assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.FORMAT) == (1333, "RGB")
        assert abs(cfg.MODEL.RPN.SMOOTH_L1_BETA - 1 / 9) < 1e-3
        assert cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0
        assert cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlign"
        assert cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO == 2
        assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
        assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((60000, 80000), 90000)
        assert (cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.9, 0.0001)
        # TRAIN.RPN_STRADDLE_THRESH, SOLVER.BIAS_DOUBLE_LR and BIAS_WEIGHT_DECAY.
        assert cfg.MODEL.RPN.BOUNDARY_THRESH == 0
        assert (cfg.SOLVER.BIAS_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_BIAS) == (2.0, 0.0)
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
        assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.RANDWIRE.NORM == "FrozenBN"
        assert cfg.OUTPUT_DIR.endswith(Path(config).stem)
    for config in (SHAPES, "configs/faster_rcnn_randwire_own_images.yaml"):
        cfg, default = get_cfg(), get_cfg()
        cfg.merge_from_file(str(ROOT / config))
        for key in ("BIAS_LR_FACTOR", "WEIGHT_DECAY_BIAS"):
            assert cfg.SOLVER[key] == default.SOLVER[key]
        assert cfg.MODEL.RPN.BOUNDARY_THRESH == default.MODEL.RPN.BOUNDARY_THRESH


def test_a_detector_starts_from_what_its_pretraining_leaves() -> None:
    """Wrong: the two commands, literally, are not the whole path."""
    for name in ("randwire_c109", "randwire_c154", "R_50", "R_101", "X_50_32x4d", "X_101_32x4d"):
        detector, classifier = detector_config(), classifier_config()
        detector.merge_from_file(str(ROOT / f"configs/faster_rcnn_{name}_fpn_1x.yaml"))
        path = ROOT / f"configs/imagenet/{name}_100ep.yaml"
        classifier.merge_from_file(str(path))
        assert os.path.normpath(detector.MODEL.WEIGHTS) == str(
            RunFolder(os.path.normpath(classifier.OUTPUT_DIR)).backbone
        )
        assert path.stem == Path(classifier.OUTPUT_DIR).name
        assert spec_from_config(detector) == spec_from_config(classifier)
        for key in ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "STRIDE_IN_1X1"):
            assert detector.MODEL.RESNETS[key] == classifier.MODEL.RESNETS[key]
        assert Preprocessing.from_config(detector) == Preprocessing.from_config(classifier)


def test_epochs_are_of_the_images_with_objects(tmp_path: Path) -> None:
    """Wrong: a detector's epochs are not of the images that are read, its rate drops at iterations
    of another schedule, another batch has the rate of 16, or a config without EPOCHS is changed."""
    records = DatasetCatalog.get("randwire_shapes_train")
    some = [*records[:20], *({**record, "annotations": []} for record in records[20:])]
    name = f"half_empty_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: some)
    classes = MetadataCatalog.get("randwire_shapes_train").thing_classes
    MetadataCatalog.get(name).set(thing_classes=classes, evaluator_type="coco")

    def load(*options: object) -> Any:
        given = ["MODEL.WEIGHTS", "", "MODEL.RANDWIRE.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
        return load_config(parse(C109, *map(str, [*ON_CPU, *given, "DATASETS.TRAIN", f"('{name}',)",
                                                 "TEST.EVAL_PERIOD", 100, *options])))  # fmt: skip

    literal = load("SOLVER.IMS_PER_BATCH", 4).SOLVER
    assert (literal.MAX_ITER, literal.BASE_LR, literal.STEPS) == (90000, 0.02, (60000, 80000))
    cfg = load("SOLVER.EPOCHS", 450, "SOLVER.IMS_PER_BATCH", 4)
    solver = cfg.SOLVER
    assert cfg.is_frozen() and (solver.EPOCHS, solver.IMS_PER_BATCH) == (0, 4)
    assert (solver.MAX_ITER, solver.STEPS) == (2250, (1500, 2000))  # 450 · 20 / 4
    assert pytest.approx(0.005) == solver.BASE_LR
    assert (solver.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD) == (562, 400)  # a quarter
    assert load("SOLVER.EPOCHS", 4500, "SOLVER.IMS_PER_BATCH", 4).SOLVER.WARMUP_ITERS == 2000
    cfg = load("SOLVER.EPOCHS", 9000, "SOLVER.IMS_PER_BATCH", 16000)
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD) == (12, 1)
    # Of a schedule of few iterations, no step is the end, of which Detectron2 makes no rate.
    solver = load("SOLVER.EPOCHS", 1, "SOLVER.IMS_PER_BATCH", 8).SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (3, (2,))
    every = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.EPOCHS", 900)
    assert -(-900 * len(records) // 16) == load(*every).SOLVER.MAX_ITER
    with pytest.raises(ValueError, match="SOLVER.EPOCHS must be at least 0; got -1"):
        load("SOLVER.EPOCHS", -1)


def test_a_config_for_fewer_processes_is_scaled_before_it_is_written() -> None:
    """Wrong: config.yaml, and the tools that read it, tell another length and batch than the
    training has; periods and steps that rounding made 0 or equal end it with a traceback; or the
    rate of config.yaml is scaled once more if other EPOCHS are given."""
    given = ["--num-gpus", "4", "SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.IMS_PER_BATCH", "2"]
    cfg = load_config(parse(SHAPES, *given, "SOLVER.EPOCHS", "1")).clone()
    cfg.defrost()
    cfg.SOLVER.EPOCHS = 2
    again = scale_schedule(cfg, 24).SOLVER
    assert (again.BASE_LR, again.MAX_ITER) == (cfg.SOLVER.BASE_LR, 6)
    short = [
        "SOLVER.MAX_ITER", "9", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS",
        "(1, 5, 6, 7, 8)", "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1",
    ]  # fmt: skip
    cfg = load_config(parse(SHAPES, *given, *short))
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE) == (2, 8, 4)
    assert (solver.STEPS, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == ((1,), 1, 1)
    assert scale_to_processes(cfg, 4) is cfg, "the trainer would scale it again"


def test_a_last_rate_is_compared_with_the_scaled_one() -> None:
    """Wrong: it is refused although the training's rate is higher; or, with a rate that the batch
    made lower, the processes that were started end with a traceback of Detectron2's schedule."""
    end = ["SOLVER.BASE_LR", "0.02", "SOLVER.BASE_LR_END", "0.03"]
    for scaled in (
        ["SOLVER.EPOCHS", "1", "SOLVER.REFERENCE_BATCH_SIZE", "8", "SOLVER.IMS_PER_BATCH", "16"],
        ["--num-gpus", "2", "SOLVER.REFERENCE_WORLD_SIZE", "1"],
    ):
        assert load_config(parse(SHAPES, *scaled, *end)).SOLVER.BASE_LR == 0.04
    lower = ["SOLVER.EPOCHS", "1", "SOLVER.REFERENCE_BATCH_SIZE", "16", "SOLVER.IMS_PER_BATCH", "8"]
    says = "at most SOLVER.BASE_LR 0.02, the rate for SOLVER.IMS_PER_BATCH 8; got 0.03"
    with pytest.raises(ValueError, match=says):
        load_config(parse(SHAPES, *lower, *end, "SOLVER.BASE_LR", "0.04"))


@pytest.mark.parametrize(("iterations", "warns"), [(1000, True), (1001, False)])
def test_a_warm_up_that_never_ends_is_named(
    iterations: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: a short training with a long one's config has a fraction of the rate that was set."""
    cfg = detector_config()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = iterations, 0.02, 1000
    scale_schedule(cfg, 0)
    said = "".join(r.message for r in caplog.records)
    assert ("MAX_ITER 1000: the rate" in said and "BASE_LR 0.02;" in said) if warns else not said


@pytest.mark.parametrize(
    ("images", "batch", "warm_up"),
    [(15, 8, 9), (1, 8, 0), (78, 8, 48), (80, 8, 50), (1000, 8, 50), (15, 16, 4)],
)
def test_a_few_images_are_warmed_up_for_a_quarter(
    images: int, batch: int, warm_up: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: the first try of a small data set is refused, or never reaches its rate."""
    cfg = detector_config()
    merge_config(cfg, "faster_rcnn_randwire_own_images.yaml", ["SOLVER.IMS_PER_BATCH", str(batch)])
    with caplog.at_level("INFO", "randwire_d2"):
        solver = scale_schedule(cfg, images).SOLVER
    assert warm_up == solver.WARMUP_ITERS
    said = [r.message for r in caplog.records if "WARMUP_ITERS 50 of 8 images" in r.message]
    assert len(said) == (images < 80)
    assert all(f"({solver.MAX_ITER} iterations of {batch}); it warms up for {warm_up}" in line
               for line in said)  # fmt: skip


@pytest.mark.parametrize(
    ("available", "cores", "busy", "processes", "threads"),
    [
        (2, 2, 0, 1, 2),
        (2, 2, 1, 1, 1),
        (2, 2, 9, 1, 1),
        (2, 2, 0, 2, 1),
        (2, 2, 2, 2, 1),
        (16, 16, 4, 1, 12),
        (16, 16, 4, 3, 4),
        # A container with two cores of a machine that has others free, and of one that has not.
        (2, 64, 40, 1, 2),
        (2, 64, 63, 1, 1),
    ],
)
def test_threads_share_the_cores_that_are_free(
    available: int, cores: int, busy: int, processes: int, threads: int
) -> None:
    """Wrong: threads wait in busy loops for others that have no core, or cores stay idle."""
    assert fair_threads(available, cores, busy, processes) == threads


def test_the_environments_number_of_threads_is_respected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: OMP_NUM_THREADS has no effect, or the processes to be started do not inherit one."""
    before = torch.get_num_threads()
    monkeypatch.setattr(engine.processes.threads, "available_cores", lambda: 8)
    monkeypatch.setattr(engine.processes.threads, "busy_cores", lambda: 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    torch.set_num_threads(4)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        engine.share_cores()
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (4, "5")
        assert not caplog.records
        monkeypatch.delenv("OMP_NUM_THREADS")
        engine.share_cores()
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "3")
        assert "PyTorch gets 3 threads, not 8" in caplog.text and "OMP_NUM_THREADS" in caplog.text
    finally:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # then undone
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="Linux alone tells what runs")
def test_what_runs_is_counted() -> None:
    """Wrong: a file that the kernel writes is not understood, which looks like an idle machine."""
    assert (
        0
        <= busy_cores(samples=1, seconds=0)
        < int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
    )
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_precise_norms_leave_the_training_as_it_is(tmp_path: Path) -> None:
    """TEST.PRECISE_BN. Wrong: the statistics stay as they are, or the weights do not, because the
    images of the training or its random numbers were used up."""

    class Untested(Trainer):
        @classmethod
        def test(cls, *args: Any) -> dict[str, Any]:
            return {}

    def train(*options: str) -> dict[str, torch.Tensor]:
        cfg = load_config(parse(
            SHAPES, "MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "10", "SEED", "1",
            "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "1",
            "DATALOADER.NUM_WORKERS", "0", "MODEL.RANDWIRE.FUSED", "on",
            "OUTPUT_DIR", str(tmp_path), *options,
        ))  # fmt: skip
        seed_all_rng(1)
        trainer = Untested(cfg)
        trainer.train()
        return trainer.model.state_dict()

    without = train()
    precise = train("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2")
    equal = {key for key in precise if torch.equal(precise[key], without[key])}
    statistics = {key for key in precise if "running_" in key}
    weights = {key for key in precise if key.endswith((".weight", ".bias"))}
    assert statistics and not statistics & equal
    assert weights and weights <= equal


def test_evaluators_follow_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a data set is evaluated as one of another kind, or keypoints with COCO's sigmas."""
    given = ("TEST.KEYPOINT_OKS_SIGMAS", "[0.25, 0.5]")
    cfg = load_config(parse(SHAPES, "OUTPUT_DIR", str(tmp_path), *given))
    evaluator = Trainer.build_evaluator(cfg, "randwire_shapes_val")
    assert isinstance(evaluator, COCOEvaluator) and evaluator._kpt_oks_sigmas == [0.25, 0.5]
    monkeypatch.setitem(trainer._EVALUATORS, "coco", trainer._EVALUATORS["coco"] * 2)
    assert isinstance(Trainer.build_evaluator(cfg, "randwire_shapes_val"), DatasetEvaluators)
    MetadataCatalog.get("of_no_kind").set(evaluator_type="smell")
    with pytest.raises(ValueError, match="of_no_kind.*smell"):
        Trainer.build_evaluator(cfg, "of_no_kind")
    MetadataCatalog.remove("of_no_kind")


def steps_of_one_of_two(rank: int, options: dict[str, bool]) -> tuple[list[Tensor], int]:
    """The weights after some steps, and in how many pieces of memory the gradients lie."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    model[0].bias.requires_grad_(False)
    wrapped = in_parallel(model, on_cpu=True, **options)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9)
    for i in range(4):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * i + rank))
        optimizer.zero_grad()
        wrapped(x).square().sum().backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    pieces = {p.grad.untyped_storage().data_ptr() for p in learned if p.grad is not None}
    return [p.detach() for p in model.parameters()], len(pieces)


def said_in_one_of_two(rank: int) -> list[str]:
    """What PyTorch warns of; the gradient of such a convolution in channels_last is laid out so."""
    model = nn.Conv2d(16, 16, 3, groups=16)
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hush_upstream()
        wrapped = in_parallel(model, on_cpu=True)
        wrapped(x).sum().backward()
        torch.meshgrid(x[0, 0, 0], x[0, 0, 0])
    return [str(warning.message) for warning in said]


def test_true_labels_of_stuff_have_a_miou_of_100(tmp_path: Path) -> None:
    """Wrong: the evaluation can't read its labels, as that of Detectron2's wheel with numpy 2; or
    labels to be ignored count."""
    name, labels = "stuff_of_three", np.arange(48, dtype=np.uint8).reshape(6, 8) % 3
    labels[0] = 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register(name, lambda: [record])
    of_set = {"stuff_classes": ["things", "sky", "sea"], "ignore_label": 255}
    MetadataCatalog.get(name).set(evaluator_type="sem_seg", **of_set)
    try:
        evaluator = Trainer.build_evaluator(detector_config(), name, str(tmp_path))
        evaluator.reset()
        scores = nn.functional.one_hot(torch.from_numpy(labels % 255).long(), 3).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": scores}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def test_a_training_of_many_processes_says_nothing_that_nobody_can_mend() -> None:
    """Wrong: what a user of eight GPUs reads first are warnings of each process: of how Detectron2
    uses PyTorch, and of strides that mean nothing."""
    assert in_two_processes(said_in_one_of_two) == [[], []]


def test_gradients_lie_in_the_messages() -> None:
    """Wrong: processes copy each of hundreds of gradients into a message and back in every step, or
    what saves them that changes the weights."""
    plain = dict.fromkeys(parallel_options(), False)
    expected = in_two_processes(steps_of_one_of_two, plain)
    found = in_two_processes(steps_of_one_of_two, {})
    for (weights, pieces), (expected_weights, copies) in zip(found, expected):
        assert (pieces, copies) == (1, 5)
        assert_equal(weights, expected_weights)
