"""What a LazyConfig's training leaves: whole detectors, the best checkpoint, averaged weights, an
early end; by the code of YAML's."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.engine import default_argument_parser
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import StandardROIHeads
from helpers import assert_equal, leave_checkpoint, raises_one_line, run_tool
from label_formats import write_sound
from omegaconf import DictConfig
from test_lazy import CONFIGS, DATA, FASTER, LAZY, SMALL, TOOL, both, parse
from test_survival import batches
from torch import nn

from randwire_d2 import NetworkGenerator, RandWire, load_detector
from randwire_d2.checkpoint import Classes, RandWireCheckpointer, check_wiring, load_checkpoint
from randwire_d2.config import detector_config, set_spec
from randwire_d2.data.detection.classes import class_entries
from randwire_d2.data.shapes import CLASSES
from randwire_d2.engine import check_continuation, register_data
from randwire_d2.engine.config.keys import LAZY_KEYS
from randwire_d2.engine.config.schedule import KeepSchedule
from randwire_d2.engine.lazy import training
from randwire_d2.engine.lazy.config import load_lazy_config
from randwire_d2.engine.lazy.in_yaml import add_detector, yaml_config
from randwire_d2.engine.processes.slurm import Task
from randwire_d2.experiments.results import read_runs
from randwire_d2.inference.record import sections_of
from randwire_d2.modeling import LAZY_PART_REGISTRY, LazyDetector, describe_lazily
from randwire_d2.runs import RunFolder

# -------------------------------------------------------------------------------------------------
# The checkpoint
# -------------------------------------------------------------------------------------------------


def small(name: str) -> DictConfig:
    lazy = both(name)[1]
    lazy.model.backbone.bottom_up.fused = "on"
    lazy.dataloader.test.mapper.augmentations[0].short_edge_length = 64
    heads = lazy.model.get("roi_heads")
    for predictor in heads.get("box_predictors", [heads.get("box_predictor")]) if heads else ():
        predictor.test_score_thresh = 0.0
    if not heads:
        lazy.model.test_score_thresh = 0.0
    return lazy


def saved(lazy: DictConfig, folder: Path) -> nn.Module:
    """The detector of a LazyConfig, whose checkpoint is model.pth, as its training writes it."""
    model: nn.Module = instantiate(lazy.model).eval()
    own = add_detector(yaml_config(lazy), lazy, model)
    classes = Classes(**class_entries("randwire_shapes_train"))
    RandWireCheckpointer(model, str(folder), cfg=own, classes=classes).save("model")
    return model


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("retinanet") else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_a_checkpoint_is_the_whole_detector(name: str, tmp_path: Path) -> None:
    """Wrong: it is another detector than its LazyConfig's, or gets other images."""
    lazy = small(name)
    model, detector = saved(lazy, tmp_path), load_detector(tmp_path / "model.pth", "cpu")
    assert repr(detector.model) == repr(model) and detector.class_names == list(CLASSES)
    record = DatasetCatalog.get("randwire_shapes_val")[0]
    given, read = instantiate(lazy.dataloader.test.mapper)(record), detector.read(record)
    assert torch.equal(read["image"], given["image"])
    with torch.no_grad():
        (expected,), (found,) = model([given]), detector.predict([read])
    expected, found = expected["instances"].get_fields(), found.get_fields()
    assert len(found["scores"]) == 100 and ("pred_masks" in found) == ("mask" in name)
    boxes = [fields.pop("pred_boxes").tensor for fields in (found, expected)]
    assert_equal({**found, "boxes": boxes[0]}, {**expected, "boxes": boxes[1]})


def test_weights_keep_the_relu_that_they_were_trained_with(tmp_path: Path) -> None:
    """Wrong: a LazyConfig that leaves it out, whose run began when the default was another, goes on
    as another network; or a pretrained classifier, whose head has the ReLU, is refused."""
    lazy = small("retinanet_randwire_c109_fpn_1x")
    lazy.model.backbone.bottom_up.relu_features = False
    model, file = saved(lazy, tmp_path), tmp_path / "model.pth"
    RandWireCheckpointer(model).load(str(file))
    model.backbone.bottom_up.relu_features = True  # the default
    with raises_one_line(ValueError, match=r"bottom_up.relu_features=False$"):
        RandWireCheckpointer(model).load(str(file))
    checkpoint = load_checkpoint(str(file))
    own = CfgNode.load_cfg(checkpoint["config"])
    own.MODEL.META_ARCHITECTURE = "ImageClassifier"
    check_wiring(model, {**checkpoint, "config": own.dump()})


@pytest.mark.parametrize("name", ["fcos", "keypoint_rcnn_fpn"])
def test_detectron2s_other_models_can_be_described(name: str) -> None:
    """Wrong: a stock detector is refused, or becomes another one."""
    lazy = model_zoo.get_config(f"common/models/{name}.py").model
    generator = L(NetworkGenerator)(channels=8, num_nodes=10)
    out_features = lazy.backbone.bottom_up.out_features
    lazy.backbone.bottom_up = L(RandWire)(spec=L(generator)(seed=1), out_features=out_features)
    cfg = detector_config()
    cfg.MODEL.LAZY = describe_lazily(lazy)
    set_spec(cfg, NetworkGenerator(channels=8, num_nodes=10)(seed=1))
    with torch.device("meta"):
        again = LazyDetector(cfg)
        assert repr(again) == repr(instantiate(lazy))
    whole = model_zoo.get_config("common/data/coco.py")
    whole.model = lazy
    described = add_detector(detector_config(), whole, instantiate(lazy))
    assert described.MODEL.LAZY == cfg.MODEL.LAZY and described.INPUT.FORMAT == "BGR"


@pytest.fixture(scope="module")
def faster() -> tuple[DictConfig, nn.Module]:
    lazy = small(FASTER)
    return lazy, instantiate(lazy.model)


class OwnHeads(StandardROIHeads):
    pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model.roi_heads._target_": OwnHeads},
            "model.roi_heads calls 'OwnHeads', which is not i",
        ),
        ({"model.backbone.norm": nn.BatchNorm2d}, "model.backbone.norm is a "),
        ({"dataloader.test.mapper": print}, "test.mapper is not Detectron2's DatasetMapper"),
        ({"dataloader.test.mapper.augmentations": []}, "augmentations is not one ResizeShortestE"),
        ({"dataloader.test.mapper.augmentations.0._target_": T.RandomFlip}, "is not one Resize"),
        ({"dataloader.test.mapper.augmentations.0.interp": 0}, "augmentations.0 is not of one "),
        ({"dataloader.test.mapper.augmentations.0.short_edge_length": [1, 2]}, "0 is not of one"),
    ],
)
def test_what_cannot_be_said_without_code_is_named(
    faster: tuple[DictConfig, nn.Module], change: dict[str, Any], says: str
) -> None:
    """Wrong: the checkpoint describes another detector, or other images, without a word."""
    lazy, model = copy.deepcopy(faster[0]), faster[1]
    for key, value in change.items():
        node, _, last = key.rpartition(".")
        parent: Any = lazy
        for part in node.split("."):
            parent = parent[int(part) if part.isdigit() else part]
        parent[last] = value
    with raises_one_line(ValueError, match=says):
        add_detector(yaml_config(lazy), lazy, model)


def test_a_projects_own_part_joins_with_a_decorator(faster: tuple[DictConfig, nn.Module]) -> None:
    """Wrong: the way out that the message names is none."""
    lazy = copy.deepcopy(faster[0])
    lazy.model.roi_heads._target_ = OwnHeads
    registered = LAZY_PART_REGISTRY._obj_map
    LAZY_PART_REGISTRY.register(OwnHeads)
    try:
        cfg = detector_config()
        cfg.MODEL.LAZY = describe_lazily(lazy.model)
        set_spec(cfg, instantiate(lazy.model.backbone.bottom_up.spec))
        with torch.device("meta"):
            assert isinstance(LazyDetector(cfg).roi_heads, OwnHeads)
    finally:
        del registered["OwnHeads"]


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ('{"_target_": "os.mkdir", "path": "RAN"}', "os.mkdir"),
        ('{"_target_": "FPN", "bottom_up": [{"_target_": "mkdir", "path": "RAN"}]}', "mkdir"),
        ('{"_target_": {"_target_": "os.mkdir", "path": "RAN"}}', "os.mkdir"),
        ('{"_target_": ["os.mkdir"], "path": "RAN"}', "os.mkdir"),
        ('{"_target_": null}', "None"),
        ('{"_target_": "RandWire"}', "describes a RandWire, which is no detector"),
        ('{"_target_": "RandWire", "norm": "os.mkdir"}', ""),
        ('{"_target_": "GeneralizedRCNN"}', "missing"),
        ("[1]", "describes a list, which is no detector"),
        ("[" * 9999, "recursion"),
        ("{", "MODEL.LAZY is no JSON"),
    ],
)
def test_a_strangers_description_runs_nothing(tmp_path: Path, described: str, says: str) -> None:
    """Wrong: a checkpoint calls what it names, or its refusal is not one line."""
    cfg = detector_config()
    cfg.MODEL.META_ARCHITECTURE = "LazyDetector"
    cfg.MODEL.LAZY = f"\n {described.replace('RAN', str(tmp_path / 'ran'))}"
    torch.save({"model": {"x": torch.ones(1)}, "config": cfg.dump()}, tmp_path / "x.pth")
    with raises_one_line(ValueError, match=r"x\.pth") as e:
        load_detector(tmp_path / "x.pth", "cpu")
    assert says in str(e.value)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------
# The training
# -------------------------------------------------------------------------------------------------

TRAINING = """
from pathlib import Path
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler
from test_lazy_runs import Told, one_batch
from test_survival import Norm, batches

dataloader = dict(train=L(batches)(values=[1.0] * 12), test=L(one_batch)(), evaluator=L(Told)())
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0], milestones=[], num_updates=12)
model = L(Norm)()
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.1
train = dict(device="cpu", checkpointer=dict(period=1), log_period=1, eval_period=2, ddp={},
             amp=dict(enabled=False), init_checkpoint="", seed=1, max_iter=12)
"""
TOLD: list[float] = []  # what the next evaluations find
TESTED: list[dict[str, Any]] = []  # the weights that the last ones were of


def one_batch() -> list[Any]:
    return batches([1.0])


class Told(DatasetEvaluator):
    def evaluate(self) -> dict[str, Any]:
        return {"bbox": {"AP": TOLD.pop(0)}}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    """Trains a tiny network whose evaluations find what is told."""
    (tmp_path / "config.py").write_text(TRAINING)
    test = training._test
    TESTED.clear()

    def noting(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
        TESTED.append({key: value.clone() for key, value in model.state_dict().items()})
        return test(cfg, model)

    monkeypatch.setattr(training, "_test", noting)

    def run(found: list[float], *given: str) -> RunFolder:
        TOLD[:] = found
        options = ["--config-file", str(tmp_path / "config.py"), *given]
        args = default_argument_parser().parse_args([*options, f"train.output_dir={tmp_path}/run"])
        training.run_lazy(load_lazy_config(args), args, Task([], []))
        assert not TOLD
        return RunFolder(tmp_path / "run")

    return run


def test_the_best_is_kept_and_patience_ends_the_training(train: Callable[..., RunFolder]) -> None:
    """Wrong: a later or worse evaluation replaces it, the training ends too early or too late, goes
    on or evaluates again when it is resumed, as every run of a sweep is, or ends where its patience
    is lifted."""
    for found, flags in (([20.0, 30.0, math.nan, 29.0], ()), ([], ("--resume",))):
        run = train(found, *flags, "train.patience=2", "train.checkpointer.max_to_keep=2")
        assert [i for i, _ in run.evaluations("bbox/AP")] == [1, 3, 5, 7]
        assert load_checkpoint(str(run.final_checkpoint))["iteration"] == 7
        assert [*run.periodic_checkpoints()] == [6, 7]
        assert "has not improved for 2 evaluations (train.patience)" in run.log_file.read_text()
        best = torch.load(run.best_checkpoint, weights_only=True)
        assert best["iteration"] == 3 and "trainer" not in best
        assert_equal(best["model"], TESTED[1])
    train([10.0, 40.0], "--resume")
    assert torch.load(run.best_checkpoint, weights_only=True)["iteration"] == 12
    assert not run.detector_file.exists()  # nobody knows what a Norm is
    with pytest.raises(ValueError, match="there is no detector.yaml beside it"):
        load_detector(run.path)


def test_a_longer_training_ends_with_its_own_weights(train: Callable[..., RunFolder]) -> None:
    """Wrong: a longer training is killed ahead of its model_final.pth, and is resumed: that of the
    shorter one passes for it."""
    run = train([10.0], "train.eval_period=0")
    shorter = run.final_checkpoint.read_bytes()
    longer = ["--resume", "train.eval_period=0", "train.max_iter=14"]
    train([20.0], *longer)
    run.final_checkpoint.write_bytes(shorter)
    (run.path / "last_checkpoint").write_text("model_0000013.pth")
    train([20.0], *longer)
    final, last = (torch.load(run.path / f"model_{n}.pth") for n in ("final", "0000013"))
    assert final["iteration"] == 13
    assert_equal(final["model"], last["model"])


def test_the_end_of_a_shorter_training_counts_if_its_file_is_lost(
    train: Callable[..., RunFolder],
) -> None:
    """Wrong: the longer one goes on from the periodic checkpoint of the same iteration, and forgets
    the best evaluation."""
    run = train([10.0, 20.0, 10.0, 10.0, 10.0, 50.0])
    run.final_checkpoint.write_bytes(b"damaged")
    train([40.0], "--resume", "train.max_iter=14")
    assert torch.load(run.best_checkpoint)["iteration"] == 12


def test_patience_counts_the_evaluation_of_the_shorter_trainings_end(
    train: Callable[..., RunFolder],
) -> None:
    """Wrong: its last evaluation is the best, and yet the longer training ends at once."""
    train([30.0, 20.0, 20.0, 20.0, 20.0, 50.0])
    run = train([60.0, 10.0], "--resume", "train.max_iter=16", "train.patience=4")
    assert [i for i, _ in run.evaluations("bbox/AP")] == [1, 3, 5, 7, 9, 12, 13, 16]


def test_an_evaluation_that_failed_is_done_on_resumption(train: Callable[..., RunFolder]) -> None:
    """Wrong: it is missing for good, and with it perhaps the best weights; a kill was told from it,
    as that leaves no line of its iteration."""
    with pytest.raises(IndexError):
        train([10.0, 20.0])
    for _ in range(2):  # it fails again as the training is resumed
        with pytest.raises(IndexError):
            train([], "--resume")
    run = train([50.0, 20.0, 10.0, 10.0], "--resume")
    assert [i for i, _ in run.evaluations("bbox/AP")] == [1, 3, 5, 7, 9, 12]
    assert torch.load(run.best_checkpoint)["iteration"] == 5


def test_what_is_done_anew_does_not_count(train: Callable[..., RunFolder]) -> None:
    """Wrong: a training goes on from an earlier checkpoint with a longer EVAL_PERIOD; an evaluation
    that it does not repeat, of weights that are gone, is the best, and loses it its patience."""
    run = train([10.0, 20.0, 10.0, 10.0, 90.0, 10.0], "train.log_period=100")
    run.final_checkpoint.unlink()
    (run.path / "last_checkpoint").write_text("model_0000007.pth")
    given = ["--resume", "train.log_period=100", "train.eval_period=4"]
    train([30.0], *given)
    assert run.evaluations("bbox/AP") == [(1, 10), (3, 20), (5, 10), (7, 10), (12, 30)]
    assert torch.load(run.best_checkpoint)["iteration"] == 12
    train([30.0], *given)
    # The best of what counts had a later one's file; the new best has its own.
    assert run.log_file.read_text().count("is damaged, or not of iteration") == 1


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_another_rate_counts_and_another_optimizer_is_refused(
    train: Callable[..., RunFolder], kind: str, tmp_path: Path
) -> None:
    """Wrong: who resumes with a lower rate trains at the checkpoint's; or who resumes with another
    momentum or decay does, and config.yaml says otherwise."""
    own = {name: TRAINING.replace(".SGD", f".{name}") for name in ("SGD", "AdamW")}
    config = tmp_path / "config.py"
    config.write_text(own[kind])
    settings = ["train.eval_period=0"]
    train([1.0], *settings, "train.max_iter=2")
    settings = ["--resume", *settings, "train.max_iter=4"]
    train([1.0], *settings, "optimizer.lr=0.01")
    run = train([1.0], *settings, "optimizer.lr=0.01", "train.max_iter=5")
    rates = [line["lr"] for line in run.metrics().values() if "lr" in line]
    assert rates == [0.1, 0.1, 0.01, 0.01, 0.01]
    settings.append("train.max_iter=5")
    before, weights = run.config_file.read_bytes(), "train.init_checkpoint in another output folder"
    others = {
        "SGD": {
            "optimizer.momentum=0.5": r"momentum 0.9 \(now 0.5\)",
            "optimizer.params.weight_decay_norm=1.0": r"weight_decay 0.0 \(now 1.0\)",
            "optimizer.params.weight_decay_bias=1.0": r"in 1 groups, \[2\] \(now 2, \[1, 1\]\)",
        },
        "AdamW": {"optimizer.betas=[0.8,0.9]": r"betas .*0.999.* \(now .*0.8, 0.9.\)"},
    }
    for changed, says in others[kind].items():
        with raises_one_line(ValueError, match=f"{says}, which its state fixes. .*{weights}"):
            train([], *settings, changed)
        assert run.config_file.read_bytes() == before
    config.write_text(own["AdamW" if kind == "SGD" else "SGD"])
    with pytest.raises(ValueError, match=r"(betas|momentum) .* \(now None\)"):
        train([], *settings)


def test_a_schedule_is_as_long_as_its_training(train: Callable[..., RunFolder]) -> None:
    """Wrong: rates fall too late, or never."""
    steps = ["lr_multiplier.values=[1.0,0.1]", "lr_multiplier.milestones=[6]"]
    run = train([1.0], "train.eval_period=0", *steps, "lr_multiplier.num_updates=12")
    rates = [values["lr"] for values in run.metrics().values() if "lr" in values]
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 6)


def test_a_run_of_an_older_version_goes_on(train: Callable[..., RunFolder]) -> None:
    """Wrong: the state of its trainer, which has one level less, is a KeyError."""
    run = train([1.0], "train.eval_period=0", "train.max_iter=4")
    expected = torch.load(run.final_checkpoint, weights_only=True)
    path = run.path / "model_0000001.pth"
    file = torch.load(path, weights_only=True)
    file["trainer"] |= file["trainer"].pop("_trainer")
    torch.save(file, path)
    (run.path / "last_checkpoint").write_text(path.name)
    train([1.0], "--resume", "train.eval_period=0", "train.max_iter=4")
    found = torch.load(run.final_checkpoint, weights_only=True)
    assert_equal([found[k] for k in ("model", "trainer")], [expected["model"], expected["trainer"]])


def test_who_is_refused_late_can_go_on_as_before(
    train: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wrong: what is seen once the checkpoint is loaded leaves the refused command's config, the
    pickle of what YAML can't hold of it, or its detector."""
    settings = ["--resume", "train.eval_period=0"]
    run = train([1.0], *settings, "train.max_iter=2")
    run.detector_file.write_text("of the first command")  # the second one's has none

    def configs() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.path.glob("*.yaml*")}

    def refuse(length: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(KeepSchedule, "load_state_dict", mock.Mock(side_effect=ValueError("no")))
            with pytest.raises(ValueError, match="no"):
                train([], *settings, f"train.max_iter={length}")

    before = configs()
    (tmp_path / "config.py").write_text(f"{TRAINING}functions = dict(one=lambda: 1)\n")
    refuse(4)
    assert configs() == before
    train([1.0], *settings, "train.max_iter=4")
    after = configs()
    assert b"max_iter: 4" in after["config.yaml"]
    assert after.keys() == {"config.yaml", "config.yaml.pkl"}
    refuse(6)
    assert configs() == after


def test_a_new_training_is_not_taken_for_an_earlier_one(train: Callable[..., RunFolder]) -> None:
    """Wrong: the best checkpoint of two trainings is the first one's, or that is lost."""
    best = torch.load(train([10.0] * 5 + [90.0]).best_checkpoint, weights_only=True)
    run = train([20.0], "train.max_iter=1", "train.seed=2", "train.init_checkpoint=null")
    assert [value for _, value in run.evaluations("bbox/AP")] == [20]
    assert torch.load(run.best_checkpoint, weights_only=True)["iteration"] == 1
    earlier = RunFolder(run.path / "earlier_1")
    assert_equal(torch.load(earlier.best_checkpoint, weights_only=True), best)
    assert len([*earlier.path.glob("model_0*.pth")]) == 12
    assert earlier.last_checkpoint.samefile(earlier.final_checkpoint)


def test_a_last_iteration_that_fails_is_not_evaluated(train: Callable[..., RunFolder]) -> None:
    """Wrong: its error waits for an evaluation, or is lost in one that fails for the same cause; or
    it names keys that a LazyConfig has not."""
    values = f"dataloader.train.values=[{'1.0,' * 11}nan]"
    says = "the loss of iteration 11 is not finite.* lower optimizer.lr; train.skip_nonfinite sets"
    with raises_one_line(FloatingPointError, match=says) as e:
        train([1.0] * 5, values)
    assert "SOLVER" not in str(e.value)


def test_a_lazy_config_skips_as_yaml_does(train: Callable[..., RunFolder]) -> None:
    """Wrong: ``train.skip_nonfinite`` counts otherwise, or weights that are no number are saved."""
    given = ["train.eval_period=0", "train.skip_nonfinite=2"]
    train([1.0], *given, "dataloader.train.values=[1.0,nan,nan,2.0,nan,3.0]", "train.max_iter=6")
    with pytest.raises(FloatingPointError, match="loss of iteration 3 is not finite"):
        train([], *given, "dataloader.train.values=[1.0,nan,nan,nan]", "train.max_iter=4")
    with pytest.raises(FloatingPointError, match="weights are not .* after iteration 0, .*izer.lr"):
        train(
            [], *given, "dataloader.train.values=[1e6,2]", "train.max_iter=2", "optimizer.lr=1e38"
        )


def test_averaged_weights_are_what_is_tested(train: Callable[..., RunFolder]) -> None:
    """Wrong: the average is another, or is not what evaluations and model_best.pth are of; with
    --eval-only, too, whose folder is not the training's."""
    decay = "train.ema.decay=0.75"
    run = train([1.0, 2.0, 3.0, 2.0, 2.0, 2.0], decay)
    files = [torch.load(run.path / f"model_{i:07}.pth", weights_only=True) for i in range(12)]
    for tested, i in zip(TESTED, (1, 3, 5, 7, 9, 11), strict=True):
        assert_equal(tested, files[i]["ema"])
    assert not torch.equal(files[5]["ema"]["norm.weight"], files[5]["model"]["norm.weight"])
    best = torch.load(run.best_checkpoint, weights_only=True)
    assert "ema" not in best
    assert_equal(best["model"], files[5]["ema"])

    before = (run.path / "config.yaml").read_bytes()
    train([50.0], "--eval-only", "--resume", decay)
    assert_equal(TESTED[-1], files[11]["ema"])
    evaluated = run.last_evaluation()
    assert evaluated is not None and evaluated.evaluation().results == {"bbox": {"AP": 50.0}}
    assert (run.path / "config.yaml").read_bytes() == before


def test_the_hooks_of_yaml_are_a_lazy_configs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: no loss of the test images is written after an evaluation, or is what the training is
    best in; norms are tested with other statistics than precise ones, or, without an evaluator,
    with others in each process; or no stage is looked at once more, when its time has come."""
    shared = mock.Mock(wraps=training.share_statistics)
    monkeypatch.setattr(training, "share_statistics", shared)
    run = RunFolder(tmp_path / "run")
    given = [
        *DATA, *SMALL, "train.seed=1", "train.max_iter=2", "train.eval_period=1",
        "model.roi_heads.box_head.fc_dims=[8]",
        "model.roi_heads.box_predictor.input_shape.channels=8",
        "model.proposal_generator.post_nms_topk=[20,20]", "train.checkpointer.period=9",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[48]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=48",
        "model.backbone.bottom_up.fused=on", "dataloader.evaluator=null", "train.eval_loss=True",
        "train.best_metric=val_total_loss", "train.patience=9", "train.precise_bn.enabled=True",
        "train.precise_bn.num_iter=2", "train.shadow_period=1", f"train.output_dir={run.path}",
    ]  # fmt: skip
    args = parse(FASTER, *given)
    training.run_lazy(load_lazy_config(args), args, Task([], []))
    losses = run.evaluations("val_total_loss")
    assert [i for i, _ in losses] == [0, 2]
    assert shared.call_count == 2
    best = torch.load(run.best_checkpoint, weights_only=True)["iteration"]
    assert best == min(losses, key=lambda item: item[1])[0]
    log = run.log_file.read_text()
    assert log.count("Running precise-BN for 2 iterations") == 2 and log.count("Shadow step") == 2


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_of_ones_own_images_knows_their_classes(processes: int, tmp_path: Path) -> None:
    """Wrong: a process of the training lacks the data set, nobody looks at it, or what reads the
    run later knows neither the classes' names nor where the images lie."""
    run = RunFolder(tmp_path / "run")
    given = [
        *write_sound(tmp_path / "data")["coco"], f"--num-gpus={processes}", *SMALL, "train.seed=1",
        "train.max_iter=1", "model.proposal_generator.post_nms_topk=[20,20]",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[48]", "train.eval_period=0",
        "dataloader.test.mapper.augmentations.0.short_edge_length=48",
        f"train.output_dir={run.path}",
    ]  # fmt: skip
    run_tool(TOOL, "--config-file", LAZY / f"{FASTER}.py", *given, log=tmp_path / "log")
    assert load_detector(run.final_checkpoint, "cpu").class_names == ["cat", "dog"]
    assert "The data:" in run.log_file.read_text()
    own = run.config()
    assert register_data(own) == (own.DATASETS.TRAIN, own.DATASETS.TEST)
    assert own.MODEL.ROI_HEADS.NUM_CLASSES == 2 and given[1] == own.DATASETS.PATH


@pytest.mark.parametrize("lazily", [False, True])
def test_a_training_of_the_other_tool_is_not_resumed(lazily: bool, tmp_path: Path) -> None:
    """Wrong: its state, which has another form, ends the new one as if this were a bug."""
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    cfg = detector_config()
    cfg.OUTPUT_DIR = str(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("optimizer: {}\n" if lazily else cfg.dump())
    args = parse(FASTER, "--resume", *DATA, *SMALL, f"train.output_dir={tmp_path}")
    tool = "lazyconfig_train_net.py" if lazily else "train_net.py"
    with raises_one_line(ValueError, match=f"holds a training of tools/{tool}.*anoth.*folder"):
        if lazily:
            check_continuation(cfg, args)
        else:
            load_lazy_config(args)


def test_a_frozen_part_is_not_compared_with_yamls_default(tmp_path: Path) -> None:
    """Wrong: the training of a LazyConfig whose freeze_at is not 2 does not go on."""
    leave_checkpoint(tmp_path)
    now = detector_config()
    now.OUTPUT_DIR = str(tmp_path)
    (tmp_path / "config.yaml").write_text("optimizer: {}\n")
    (tmp_path / "detector.yaml").write_text("VERSION: 2\nMODEL: {BACKBONE: {FREEZE_AT: 0}}\n")
    own = check_continuation(now, parse(FASTER, "--resume"), LAZY_KEYS)
    assert own is not None and own.MODEL.BACKBONE.FREEZE_AT == 0


@pytest.mark.slow
def test_its_run_is_used_as_any_other(tmp_path: Path) -> None:
    """Wrong: what the tools say of a run that a LazyConfig trained is not what it found, is lost,
    or is made up."""
    run, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    given = [
        "--config-file", LAZY / f"{FASTER}.py", *DATA, *SMALL, "train.seed=1", "train.max_iter=2",
        "model.backbone.bottom_up.fused=on", "model.proposal_generator.post_nms_topk=[50,20]",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=96", "train.eval_period=1",
    ]  # fmt: skip
    said = run_tool(TOOL, *given, f"train.output_dir={run.path}", log=log, pictures=True)
    assert re.search(r"has ended after 2 iterations.* bbox/AP .* Next: python tools/predict", said)
    assert {p.name for p in run.path.glob("*.png")} == {
        "detections.png", "training.png", "wiring.png",
    }  # fmt: skip
    for name, dataset in (("model_final.pth", "test"), ("model_final.pth", "randwire_shapes_val")):
        output = tmp_path / dataset
        predict = [run.path / name, "--dataset", dataset, "--output", output, "--no-pictures"]
        run_tool("predict.py", *predict, log=log)
        results = json.loads((output / "results.json").read_text())
        assert results == json.loads(run.detections_file.read_text()) and len(results) > 100
    run_tool("export_model.py", run.path, tmp_path / "x.ts", log=log)
    run_tool("analyze_results.py", run.path, log=log)
    assert (run.path / "analysis" / "index.html").is_file()

    evaluation = [f"train.init_checkpoint={run.final_checkpoint}", f"train.output_dir={run.path}"]
    run_tool(TOOL, "--eval-only", *given, *evaluation, log=log)
    results, unreadable = read_runs([run.path])
    assert not unreadable and [r.group.kind for r in results] == ["training", "evaluation"]
    assert results[0].values == pytest.approx(results[1].values, nan_ok=True)
    assert dict(results[0].group.recipe)["SOLVER.LAZY"] == str(run.path)
    card = sections_of(str(run.final_checkpoint), run.config(), list(CLASSES), 1)
    assert "SOLVER.BASE_LR" not in card["Recipe"] and "bbox/AP" in card["Figures"]
    assert "python tools/lazyconfig_train_net.py --config-file" in str(card["Command"])
