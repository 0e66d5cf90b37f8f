"""Converted checkpoints compute what the originals computed, and nothing else is ever written."""

import json
import os
import pickle
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torchvision
import yaml
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet, build_model, build_resnet_backbone
from helpers import ROOT
from public_layouts import Graph, JiaminRen, Seungwonpark, randomise
from torch import Tensor, nn

from randwire_d2 import NetworkGenerator, NetworkSpec, RandWire, RandWireClassifier, conversion
from randwire_d2.checkpoint import Classes, RandWireCheckpointer
from randwire_d2.cli import convert as tool
from randwire_d2.config import classifier_config
from randwire_d2.conversion import head, public, read_checkpoint
from randwire_d2.conversion.graphs import draw
from randwire_d2.conversion.source import some
from randwire_d2.engine import argument_parser, read_config

IMAGENET = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}
AS_IMAGENET = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", IMAGENET["pixel_mean"],
               "MODEL.PIXEL_STD", IMAGENET["pixel_std"]]  # fmt: skip
SPECS = {regime: NetworkGenerator(regime, 8, num_nodes=10)(1) for regime in ("regular", "small")}
Features = dict[str, Tensor]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """Run the tool; what it printed, and the line with which it failed, or ''."""

    def run(*args: object) -> tuple[str, str]:
        error = ""
        try:
            tool.main([str(arg) for arg in args])
        except SystemExit as e:
            error = str(e.code)
            assert error.startswith("convert_checkpoint.py: error: ")
            assert "\n" not in error
        left = [p.name for p in tmp_path.rglob("*") if p.name.startswith(".convert")]
        assert not left, "a temporary folder stays behind"
        return capsys.readouterr().out, error

    return run


def images() -> Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(5)) * 4 - 2


def assert_agree(found: Features, expected: Features) -> None:
    assert found.keys() == expected.keys() == {"res2", "res3", "res4", "res5"}
    for stage, feature in expected.items():
        assert (found[stage] - feature).abs().max() <= 1e-4 * feature.abs().max(), stage
        assert feature.std() > 1e-3, "a feature that is constant proves nothing"


def run_randwire(
    output: Path, prefix: str = "backbone.bottom_up.", norm: str = "FrozenBN"
) -> Features:
    """The converted file in our backbone, on prepared images."""
    checkpoint = read_checkpoint(output)
    spec = NetworkSpec.from_json(checkpoint.rest["randwire"]["spec"])
    assert spec.fingerprint == checkpoint.rest["randwire"]["fingerprint"]
    backbone = RandWire(spec, norm=norm, relu_features=False).eval()
    assert all(key.startswith(prefix) for key in checkpoint.state)
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in checkpoint.state.items()})
    with torch.no_grad():
        return backbone(images())


def own_classifier(regime: str = "regular") -> RandWireClassifier:
    return randomise(RandWireClassifier(SPECS[regime], num_classes=10))


def own_checkpoint(regime: str = "regular", **changes: Any) -> dict[str, Any]:
    """What the pretraining tool saves."""
    spec = SPECS[regime]
    state = {f"network.{k}": v for k, v in own_classifier(regime).state_dict().items()}
    return {
        "model": state,
        "randwire": {"spec": spec.to_json(), "fingerprint": spec.fingerprint},
        "preprocessing": IMAGENET,
        "config": "MODEL: {META_ARCHITECTURE: ImageClassifier}",
        "class_names": [str(i) for i in range(10)],
        "iteration": 7,
        **changes,
    }


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.pth"
    torch.save(own_checkpoint(), path)
    return path


# -- this project's classifier ---------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["regular", "small"])
@pytest.mark.parametrize(
    ("to", "suffix"), [("fpn", "pth"), ("fpn", "pkl"), ("bare", "pth"), ("bare", "safetensors")]
)
def test_own_classifier(
    tmp_path: Path, convert: Callable, regime: str, to: str, suffix: str
) -> None:
    source, output = tmp_path / "own.pth", tmp_path / f"out.{suffix}"
    torch.save(own_checkpoint(regime), source)
    out, error = convert(source, output, "--to", to)
    assert not error
    assert "classifier head (7 keys)" in out
    assert "verified  largest" in out
    prefix = "backbone.bottom_up." if to == "fpn" else "backbone."
    found = run_randwire(output, prefix)
    with torch.no_grad():
        backbone = RandWire(SPECS[regime], relu_features=False).eval()
        backbone.load_state_dict(own_classifier(regime).backbone.state_dict())
        assert_agree(found, backbone(images()))
    rest = read_checkpoint(output).rest
    assert rest["preprocessing"] == IMAGENET
    # A backbone is no classifier any more: neither its config nor its classes go along.
    assert rest.keys() <= {"preprocessing", "randwire", "__author__"}


@pytest.mark.parametrize("named_as_ours", [True, False])
def test_what_was_evaluated_is_converted(
    tmp_path: Path, own: Path, convert: Callable, named_as_ours: bool
) -> None:
    """Wrong: with SOLVER.EMA the weights of one iteration, which nobody tested, or in silence; or
    what somebody else calls "ema" is taken for weights."""
    file = own_checkpoint()
    average = {key: value * 0.5 for key, value in file["model"].items()}
    torch.save({**file, "ema": average if named_as_ours else {"decay": 0.999}}, own)
    out, error = convert(own, tmp_path / "out.pth", "--to", "classifier")
    assert not error
    expected = average if named_as_ours else file["model"]
    for key, value in read_checkpoint(tmp_path / "out.pth").state.items():
        assert torch.equal(value, expected[key]), key
    assert ("are the average of SOLVER.EMA" in out) == named_as_ours


def test_output_loads_with_detectron2s_own_checkpointer(
    tmp_path: Path, own: Path, convert: Callable
) -> None:
    """A user's project has Detectron2's checkpointer, not ours: the names must be exact."""
    for suffix in ("pth", "pkl"):
        output = tmp_path / f"out.{suffix}"
        assert not convert(own, output, "--to", "bare", "--no-verify")[1]
        backbone = RandWire(SPECS["regular"], norm="FrozenBN", relu_features=False)
        model = nn.ModuleDict({"backbone": backbone}).eval()
        DetectionCheckpointer(model).load(str(output))
        with torch.no_grad():
            found = model["backbone"](images())
        assert_agree(found, run_randwire(output, "backbone."))


def test_what_the_tool_writes_it_reads_again(tmp_path: Path, own: Path, convert: Callable) -> None:
    """Any format to any other, and the weights stay the same to the bit."""
    path = own
    for i, (suffix, to) in enumerate(
        [("safetensors", "fpn"), ("pkl", "bare"), ("pth", "fpn"), ("safetensors", "bare")]
    ):
        following = tmp_path / f"{i}.{suffix}"
        assert not convert(path, following, "--to", to)[1]
        path = following
    last = read_checkpoint(path).state
    for name, value in own_classifier().backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(last[f"backbone.{name}"], value), name


def test_printed_options_build_the_network(tmp_path: Path, own: Path, convert: Callable) -> None:
    """The line that the tool prints for train_net.py describes the network of the file."""
    from randwire_d2.config import add_randwire_config, spec_from_config

    def options(out: str) -> list[str]:
        words = shlex.split(re.search(r"^train +(.*)$", out, re.M)[1])
        return words[words.index("MODEL.BACKBONE.NAME") :]

    for other in (False, True):
        spec = SPECS["regular"]
        if other:  # a wiring that no keys draw
            dags = tuple(
                NetworkGenerator("regular", 8, num_nodes=10)(s).dags[0] for s in (1, 2, 3, 4)
            )
            spec = NetworkSpec("regular", 8, "sep_conv3x3", dags)
            classifier = randomise(RandWireClassifier(spec, 10))
            torch.save(
                {
                    "model": classifier.state_dict(),
                    "randwire": {"spec": spec.to_json(), "fingerprint": spec.fingerprint},
                    "preprocessing": IMAGENET,
                },
                own,
            )
        spec_file = tmp_path / "new" / "spec.json"  # both folders are made
        out, error = convert(own, tmp_path / "made/out.pth", "--spec-output", spec_file)
        assert not error
        cfg = get_cfg()
        add_randwire_config(cfg)
        cfg.merge_from_list(options(out))
        assert spec_from_config(cfg) == spec
        assert cfg.INPUT.FORMAT == "RGB"
        assert IMAGENET["pixel_std"] == cfg.MODEL.PIXEL_STD
        assert NetworkSpec.from_json(spec_file.read_text()) == spec
    assert "--config-from-weights" in convert(own, tmp_path / "out.pth")[0]


@pytest.mark.parametrize(
    "config", ["faster_rcnn_randwire_c109_fpn_1x.yaml", "faster_rcnn_R_50_fpn_1x.yaml"]
)
def test_verification_in_a_config_of_the_project(own: Path, convert: Callable, config: str) -> None:
    """Any FPN config will do; what it does not say, or says of another family, is filled in."""
    options = ["MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10]
    out, error = convert(
        own, own.with_name("out.pth"), "--config-file", ROOT / "configs" / config, *options
    )
    assert not error
    assert "MODEL.BACKBONE.NAME build_randwire_fpn_backbone" in out


def test_retinanet(own: Path, convert: Callable) -> None:
    """Its FPN has another builder, and its config a tag that only Detectron2's own loader reads."""
    config = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    out, error = convert(own, own.with_name("out.pth"), "--config-file", config, *AS_IMAGENET)
    assert not error
    assert "build_randwire_retinanet_fpn_backbone" in out
    assert "head (" in out


def test_a_bare_state_dict_needs_to_be_told_what_it_is(own: Path, convert: Callable) -> None:
    """Neither wiring nor preprocessing may be guessed."""
    output = own.with_name("out.pth")
    torch.save(own_classifier().backbone.state_dict(), own)
    _, error = convert(own, output)
    assert "MODEL.RANDWIRE" in error
    wiring = ["MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10]
    _, error = convert(own, output, *wiring)
    assert "--input-format" in error
    told = ["--input-format", "BGR", "--pixel-mean", 100, 110, 120, "--pixel-std", 1, 1, 1]
    out, error = convert(own, output, *told, *wiring)
    assert not error
    assert "INPUT.FORMAT BGR MODEL.PIXEL_MEAN '[100.0, 110.0, 120.0]'" in out
    own_file = own_checkpoint()
    torch.save(own_file, own)
    assert "it says that it was trained with INPUT.FORMAT RGB" in convert(own, output, *told)[1]


# -- to a classifier -------------------------------------------------------------------------------


def printed_config(out: str) -> CfgNode:
    """The config of the command that the tool printed for pretrain_imagenet.py."""
    words = shlex.split(re.search(r"^evaluate +(.*)$", out, re.M)[1])
    assert words[:3] == ["python", "tools/pretrain_imagenet.py", "--eval-only"]
    words[words.index("--config-file") + 1] = str(ROOT / words[words.index("--config-file") + 1])
    args = argument_parser().parse_args(words[2:])
    return read_config(args, classifier_config())


def run_classifier(out: str) -> Tensor:
    """The logits of the converted file in ImageClassifier, as the printed command builds it."""
    cfg = printed_config(out)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    checkpointer = RandWireCheckpointer(model)
    state = set(read_checkpoint(cfg.MODEL.WEIGHTS).state)
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    assert state == set(model.state_dict()) - counters
    checkpointer.load(cfg.MODEL.WEIGHTS)
    mean, std = (torch.tensor(IMAGENET[k])[:, None, None] for k in ("pixel_mean", "pixel_std"))
    with torch.no_grad():
        return model({"image": images() * std + mean})


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape == (1, 10)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 1e-3, "logits that are all the same prove nothing"


@pytest.mark.parametrize(("suffix", "relu"), [("pth", False), ("pkl", True)])
def test_own_classifier_stays_one(
    tmp_path: Path, convert: Callable, suffix: str, relu: bool
) -> None:
    """Wrong: the logits are not those of the network that was trained, or HEAD_RELU is lost, or the
    names of the classes, with which --eval-only compares those of the data; or what was written
    can't be converted again."""
    classifier = randomise(RandWireClassifier(SPECS["small"], 10, head_relu=relu))
    folder, output = tmp_path / "run", tmp_path / f"out.{suffix}"
    folder.mkdir()
    network, names = nn.ModuleDict({"network": classifier}), list("badcfehgji")
    RandWireCheckpointer(network, str(folder), classes=Classes(names), save_to_disk=True).save(
        "model_final", preprocessing=IMAGENET
    )
    out, error = convert(folder / "model_final.pth", output, "--to", "classifier")
    assert not error
    assert re.search(r"verified .*res5 [\d.e+-]+, logits [\d.e+-]+$", out, re.M)
    assert ("MODEL.CLASSIFIER.HEAD_RELU True" in out) == relu
    assert "MODEL.CLASSIFIER.NUM_CLASSES 10" in out and "note" not in out
    with torch.no_grad():
        expected = classifier(images())
    assert_same_logits(run_classifier(out), expected)
    text = tmp_path / "again.safetensors"
    assert not convert(output, text, "--to", "classifier")[1]
    out, error = convert(text, tmp_path / "last.pth", "--to", "classifier")
    assert not error
    assert_same_logits(run_classifier(out), expected)
    assert read_checkpoint(tmp_path / "last.pth").rest["class_names"] == names
    assert not convert(tmp_path / "last.pth", tmp_path / "backbone.pth", "--to", "fpn")[1]
    assert "class_names" not in read_checkpoint(tmp_path / "backbone.pth").rest


def test_a_classifier_that_does_not_tell_its_relu(own: Path, convert: Callable) -> None:
    """Wrong: a file from before the key is read as if it had the ReLU, or in silence; or the user,
    who knows, is not heard."""
    output = own.with_name("out.pth")
    for options, relu in ([], False), (["MODEL.CLASSIFIER.HEAD_RELU", True], True):
        out, error = convert(own, output, "--to", "classifier", *options)
        assert not error
        assert f"MODEL.CLASSIFIER.HEAD_RELU: {relu} is assumed" in out
        classifier = own_classifier()
        classifier.head_relu = relu
        with torch.no_grad():
            assert_same_logits(run_classifier(out), classifier(images()))


def test_public_classifiers(tmp_path: Path, convert: Callable) -> None:
    """Wrong: a public implementation's head loses its convolution's bias, or gets a ReLU that it
    has not, or loses the one that it has."""
    graphs = ws_graphs(3)
    files = write_graphs(tmp_path, graphs)
    without_relu = randomise(Seungwonpark(9, graphs))
    _, with_relu = jiaminren("regular", "WS", K=4, P=0.75)
    source, output = tmp_path / "s.pth", tmp_path / "out.pth"
    for network, wiring, relu in (without_relu, files, False), (with_relu, [], True):
        torch.save({"state_dict": network.state_dict()}, source)
        out, error = convert(source, output, "--to", "classifier", *wiring)
        assert not error
        assert ("MODEL.CLASSIFIER.HEAD_RELU True" in out) == relu
        assert "classifier head" not in out, "a part of the head was left"
        with torch.no_grad():
            assert_same_logits(run_classifier(out), network.logits(images()))
        output.unlink()
        _, error = convert(
            source, output, "--to", "classifier", *wiring, "MODEL.CLASSIFIER.HEAD_RELU", not relu
        )
        assert f"MODEL.CLASSIFIER.HEAD_RELU is {not relu}, the checkpoint's {relu}" in error
        assert not output.exists()


def test_wrong_logits_fail(own: Path, convert: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a head that was converted wrongly is written, for only the stages were compared."""
    output = own.with_name("out.pth")
    right = head.finish
    with monkeypatch.context() as patch:
        patch.setattr(head, "finish", lambda *a: {k: v * 1.01 for k, v in right(*a).items()})
        _, error = convert(own, output, "--to", "classifier")
    assert "verification failed" in error
    assert re.search(r"res5 by [\d.e+-]+, logits by 0\.0[\d.]+ of", error)
    assert not output.exists()


def test_what_can_not_become_a_classifier(own: Path, convert: Callable) -> None:
    """Wrong: what has no classifier, or is a ResNet, ends in a traceback or in half a file; or a
    config of another kind is taken."""
    output = own.with_name("out.pth")

    def fails(*options: object) -> str:
        _, error = convert(own, output, *options)
        assert error and not output.exists()
        return error

    detector = ROOT / "configs/faster_rcnn_randwire_c109_fpn_1x.yaml"
    classifier = ROOT / "configs/imagenet/randwire_c109_100ep.yaml"
    error = fails("--to", "classifier", "--config-file", detector)
    assert "--to classifier" in error and "GeneralizedRCNN" in error
    error = fails("--to", "fpn", "--config-file", classifier)
    assert "--to fpn" in error and "ImageClassifier" in error
    error = fails("--to", "classifier", "MODEL.CLASSIFIER.NUM_CLASSES", 12)
    assert "MODEL.CLASSIFIER.NUM_CLASSES is 12, the checkpoint's 10" in error
    file = own_checkpoint()
    backbone = {k: v for k, v in file["model"].items() if ".backbone." in k}
    torch.save({**file, "model": backbone}, own)
    assert "it holds no classifier, whose fc layer would be 'network.fc'" in fails(
        "--to", "classifier"
    )
    torch.save({**file, "model": {**file["model"], "network.fc.bias": torch.zeros(())}}, own)
    assert "shapes of no such network" in fails("--to", "classifier")
    _, network = small_resnet(DEPTH=18, RES2_OUT_CHANNELS=64)
    torch.save({"model": network.state_dict(), "preprocessing": IMAGENET}, own)
    assert "--to classifier is for RandWires" in fails("--to", "classifier")


# -- ResNe(X)t -------------------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": ("18", "1", "64"),
    "resnet50": ("50", "1", "64"),
    "resnext50_32x4d": ("50", "32", "4"),
}


def run_resnet(output: Path) -> Features:
    checkpoint = read_checkpoint(output)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(checkpoint.rest["resnets"])
    return run_detectron2_resnet(cfg, checkpoint.state, "backbone.bottom_up.", "FrozenBN")


def run_detectron2_resnet(cfg: Any, state: dict[str, Tensor], prefix: str, norm: str) -> Features:
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    network = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()})
    with torch.no_grad():
        return network(images())


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in [*TORCHVISION][1:])],
)
def test_torchvision(tmp_path: Path, convert: Callable, name: str) -> None:
    network = randomise(getattr(torchvision.models, name)(num_classes=10))
    source, output = tmp_path / "tv.pth", tmp_path / "out.pth"
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, source)
    out, error = convert(source, output)
    assert not error
    keys = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP")
    for key, value in zip(keys, TORCHVISION[name], strict=True):
        assert f"MODEL.RESNETS.{key} {value} " in out
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False " in out
    assert "INPUT.FORMAT RGB MODEL.PIXEL_MEAN '[123.675, 116.28, 103.53]'" in out
    assert out.count("is assumed, as of torchvision's own") == (1 if name == "resnet18" else 2)
    assert "classifier head (2 keys)" in out
    assert_agree(run_resnet(output), torchvision_features(network))


def torchvision_features(network: Any) -> Features:
    """What a ResNet of torchvision's computes, as Detectron2 names it."""
    features = {}
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(images()))))
        for i in range(1, 5):
            features[f"res{i + 1}"] = x = getattr(network, f"layer{i}")(x)
    return features


MSRA = ["MODEL.RESNETS.STRIDE_IN_1X1", True, "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN",
        [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]  # fmt: skip


@pytest.mark.parametrize("options", [MSRA, MSRA[:2], []])
def test_caffes_resnet_under_torchvisions_names(
    tmp_path: Path, convert: Callable, options: list[Any]
) -> None:
    """Wrong: mmdetection's resnet50_msra is taken for torchvision's though the user says what it is
    (its bottlenecks have their stride in the first 1×1 convolution, its images are BGR, and its
    stem has a bias); or what the file does not say is assumed without a word."""
    network = randomise(torchvision.models.resnet50(width_per_group=4))
    network.conv1.bias = nn.Parameter(torch.linspace(-1, 1, 64))
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    source, output = tmp_path / "resnet50_msra.pth", tmp_path / "out.pth"
    torch.save(state, source)
    out, error = convert(source, output, *options)
    assert not error
    whose = "the config's" if options else "assumed, as of torchvision's own"
    stride = bool(options)
    assert f"does not tell its MODEL.RESNETS.STRIDE_IN_1X1: {stride} is {whose}" in out
    whose = "the config's" if "INPUT.FORMAT" in options else "assumed, as of torchvision's own"
    order = "BGR" if "INPUT.FORMAT" in options else "RGB"
    assert re.search(rf"how its images were prepared: INPUT.FORMAT {order} .* is {whose}\n", out)
    assert f"MODEL.RESNETS.STRIDE_IN_1X1 {stride} INPUT.FORMAT {order} " in out
    for block in network.modules():
        if stride and isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    assert_agree(run_resnet(output), torchvision_features(network))


def small_resnet(**keys: Any) -> tuple[Any, nn.Module]:
    """A Detectron2 ResNet with its classifier, of few channels."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(
        {
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 16,
            "WIDTH_PER_GROUP": 4,
            "NORM": "BN",
            **keys,
        }
    )
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return cfg, randomise(ResNet(backbone.stem, backbone.stages, num_classes=10))


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_detectron2_resnet(tmp_path: Path, convert: Callable, stride_in_1x1: bool) -> None:
    """The weights of both strides have the same shapes: the wrong one would go unnoticed."""
    cfg, network = small_resnet(DEPTH=50, STRIDE_IN_1X1=stride_in_1x1, NUM_GROUPS=2)
    source, output = tmp_path / "d2.pth", tmp_path / "out.pth"
    state = {f"backbone.{k}": v for k, v in network.state_dict().items()}
    torch.save({"model": state, "preprocessing": IMAGENET}, source)
    _, error = convert(source, output)
    assert "MODEL.RESNETS.STRIDE_IN_1X1" in error
    out, error = convert(source, output, "MODEL.RESNETS.STRIDE_IN_1X1", stride_in_1x1)
    assert not error
    kept = {k: v for k, v in network.state_dict().items() if not k.startswith("linear")}
    assert_agree(run_resnet(output), run_detectron2_resnet(cfg, kept, "", "BN"))
    again = tmp_path / "again.pkl"  # now the file says it itself
    out, error = convert(output, again)
    assert not error
    assert f"MODEL.RESNETS.STRIDE_IN_1X1 {stride_in_1x1} " in out


def test_a_detector_as_the_source(tmp_path: Path, convert: Callable) -> None:
    """A fine-tuned detector's backbone, for another detector: the rest is left, and said to be."""
    spec = SPECS["regular"]
    state = {
        f"backbone.bottom_up.{k}": v for k, v in own_classifier().backbone.state_dict().items()
    }
    for name in "backbone.fpn_output2", "proposal_generator.x", "roi_heads.box_head.fc1":
        state[f"{name}.weight"] = torch.zeros(1)
    source, output = tmp_path / "detector.pth", tmp_path / "out.pth"
    torch.save(own_checkpoint(model=state), source)
    out, error = convert(source, output, "--to", "bare")
    assert not error
    assert "FPN (1 keys); detector's heads (2 keys)" in out
    assert NetworkSpec.from_json(read_checkpoint(output).rest["randwire"]["spec"]) == spec


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["MODEL.RESNETS.DEPTH", 50], "MODEL.RESNETS.DEPTH is 50, the checkpoint's 18"),
        (["--spec-output", "spec.json"], "a ResNet has no spec"),
    ],
)
def test_resnet_options_that_do_not_fit(
    tmp_path: Path, convert: Callable, options: list[Any], named: str
) -> None:
    _, network = small_resnet(DEPTH=18, RES2_OUT_CHANNELS=64)
    source, output = tmp_path / "s.pth", tmp_path / "out.pth"
    torch.save({"model": network.state_dict(), "preprocessing": IMAGENET}, source)
    assert named in convert(source, output, *options)[1]
    assert not output.exists()


def test_a_depth_that_detectron2_does_not_have(tmp_path: Path, convert: Callable) -> None:
    network = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    torch.save(network.state_dict(), tmp_path / "s.pth")
    _, error = convert(tmp_path / "s.pth", tmp_path / "out.pth")
    assert "depths [18, 34, 50, 101, 152]; this one has 1 + 1 + 1 + 1 basic blocks" in error


def test_pretrained_resnet_of_this_project(tmp_path: Path, convert: Callable) -> None:
    _, network = small_resnet(DEPTH=18, RES2_OUT_CHANNELS=64)
    state = {f"network.{k}": v for k, v in network.state_dict().items()}
    source, output = tmp_path / "own.pth", tmp_path / "out.safetensors"
    torch.save({"model": state, "preprocessing": {**IMAGENET, "input_format": "BGR"}}, source)
    out, error = convert(source, output)
    assert not error
    assert "INPUT.FORMAT BGR" in out
    assert "classifier head (2 keys)" in out


@pytest.mark.parametrize("part", ["network", "backbone.bottom_up"])
def test_the_stride_that_a_checkpoints_config_tells(
    tmp_path: Path, convert: Callable, part: str
) -> None:
    """Wrong: a ResNet that was trained with the other stride gets that of configs/imagenet: the
    weights are the same, so nothing fails, and the features are others."""
    cfg, network = small_resnet(DEPTH=50, STRIDE_IN_1X1=True)
    state = {f"{part}.{k}": v for k, v in network.state_dict().items()}
    own = classifier_config()
    own.MODEL.RESNETS = cfg.MODEL.RESNETS
    own.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    source, output = tmp_path / "own.pth", tmp_path / "out.pth"
    torch.save({"model": state, "preprocessing": IMAGENET, "config": own.dump()}, source)
    out, error = convert(source, output)
    assert not error
    assert "MODEL.RESNETS.STRIDE_IN_1X1 True" in out
    _, error = convert(source, output, "MODEL.RESNETS.STRIDE_IN_1X1", False)
    assert "MODEL.RESNETS.STRIDE_IN_1X1 is False, the checkpoint's True" in error


def test_detectron2s_conversion_of_torchvision(tmp_path: Path, convert: Callable) -> None:
    """Detectron2's ImageNetPretrained/torchvision/R-50.pkl: its names, its author, no prefix."""
    _, network = small_resnet(DEPTH=50, STRIDE_IN_1X1=False)
    arrays = {k.replace("linear", "stem.fc"): v.numpy() for k, v in network.state_dict().items()}
    source = tmp_path / "R-50.pkl"
    source.write_bytes(
        pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True})
    )
    out, error = convert(source, tmp_path / "out.pth")
    assert not error
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB" in out


def caffe2_name(name: str) -> str:
    name = name.replace("stem.conv1.norm", "res.conv1.norm").replace("stem.", "")
    for ours, theirs in (("shortcut", "branch1"), ("conv1", "branch2a"), ("conv2", "branch2b")):
        name = re.sub(rf"(res\d\.\d+)\.{ours}", rf"\1.{theirs}", name)
    name = re.sub(r"(res\d\.\d+)\.conv3", r"\1.branch2c", name)
    name = name.replace("norm.weight", "bn_s").replace("norm.bias", "bn_b")
    name = name.replace("linear", "fc1000")
    return re.sub(r"bias$", "b", re.sub(r"weight$", "w", name)).replace(".", "_")


class Python2Pickler(pickle._Pickler):
    """Bytes as Python 2 wrote them, as strings without encoding: so are Detectron2's files."""

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}


@pytest.mark.parametrize("groups", [1, 2])
def test_caffe2_blobs(tmp_path: Path, convert: Callable, groups: int) -> None:
    """MSRA's and Facebook's pickles: other names, BGR, scale and shift in place of batch norms."""
    cfg, network = small_resnet(DEPTH=50, STRIDE_IN_1X1=groups == 1, NUM_GROUPS=groups)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.zero_()
            part.running_var.fill_(1 - part.eps)
    state = {k: v for k, v in network.state_dict().items() if "running" not in k}
    blobs = {caffe2_name(k): v.numpy() for k, v in state.items() if "tracked" not in k}
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", "res2_0_branch1_bn_b"} <= set(blobs)
    bias = np.linspace(-1, 1, 8, dtype=np.float32)
    blobs["conv1_b"] = bias
    blobs["conv1_w_momentum"] = np.zeros(1)
    blobs["fpn_inner_res2_2_sum_lateral_w"] = blobs["bbox_pred_w"] = np.zeros((8, 2))
    source, output = tmp_path / "R-50.pkl", tmp_path / "out.pth"
    with open(source, "wb") as f:
        Python2Pickler(f, protocol=2).dump(blobs)
    out, error = convert(source, output)
    assert not error
    std = "1.0, 1.0, 1.0" if groups == 1 else "57.375, 57.12, 58.395"
    assert (
        f"INPUT.FORMAT BGR MODEL.PIXEL_MEAN '[103.53, 116.28, 123.675]' MODEL.PIXEL_STD '[{std}]'"
        in out
    )
    network.stem.conv1.norm.running_mean -= torch.from_numpy(bias)
    kept = {k: v for k, v in network.state_dict().items() if not k.startswith("linear")}
    assert_agree(run_resnet(output), run_detectron2_resnet(cfg, kept, "", "BN"))


def test_a_detector_that_ends_at_res4(tmp_path: Path, convert: Callable) -> None:
    """Detectron2's C4 detectors: what their backbone does not build is said, not hidden."""
    _, network = small_resnet(DEPTH=50, STRIDE_IN_1X1=True)
    source = tmp_path / "d2.pth"
    torch.save(
        {"model": network.state_dict(), "__author__": "me", "preprocessing": IMAGENET}, source
    )
    config = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    options = ["--config-file", config, *AS_IMAGENET, "MODEL.RESNETS.STRIDE_IN_1X1", True]
    out, error = convert(source, tmp_path / "out.pth", "--to", "bare", *options)
    assert not error
    assert re.search(r"left +res5 \(\d+ keys\)", out)
    assert "res4" in re.search(r"verified .*", out)[0]


# -- seungwonpark/RandWireNN -----------------------------------------------------------------------


def graph_text(graph: Graph) -> str:
    num_nodes, edges = graph
    return "\n".join([str(num_nodes), str(len(edges)), *(f"{u} {v}" for u, v in edges)]) + "\n"


def write_graphs(folder: Path, graphs: list[Graph]) -> list[object]:
    """Into text files, and the options that name these."""
    options: list[object] = []
    for i, graph in enumerate(graphs):
        (folder / f"ws-{i}.txt").write_text(graph_text(graph))
        options += ["--graphs", folder / f"ws-{i}.txt"]
    return options


def ws_graphs(count: int, num_nodes: int = 10) -> list[Graph]:
    return [draw("WS", num_nodes, seed, {"K": 4, "P": 0.75}) for seed in range(count)]


def shuffled(graph: Graph, seed: int) -> Graph:
    """The same DAG with other numbers, in another order: some edges point downwards."""
    rng = np.random.default_rng(seed)
    number = rng.permutation(graph[0])
    edges = [(int(number[u]), int(number[v])) for u, v in graph[1]]
    return graph[0], [edges[i] for i in rng.permutation(len(edges))]


@pytest.mark.parametrize("variant", ["plain", "shuffled", "single inputs weighted"])
def test_seungwonpark(tmp_path: Path, convert: Callable, variant: str) -> None:
    graphs = ws_graphs(3)
    graphs[1] = (4, [(0, 2), (2, 3)])  # a node without any edge
    if variant == "shuffled":
        graphs = [shuffled(graph, i) for i, graph in enumerate(graphs)]
        assert any(u > v for _, edges in graphs for u, v in edges)
    network = randomise(Seungwonpark(9, graphs, variant == "single inputs weighted"))
    folder, names = tmp_path / "generated", [f"ws-{i}.txt" for i in range(3)]
    folder.mkdir()
    files = write_graphs(folder, graphs)
    config = "\n---\n".join(
        [
            "data:\n  type: ImageNet",
            "model:\n" + "".join(f"  graph{i}: '{n}'\n" for i, n in enumerate(names)),
        ]
    )
    source, output = tmp_path / "chkpt_000.pt", tmp_path / "out.pth"
    optimizer = torch.optim.SGD(network.parameters(), 0.1).state_dict()
    data = {"model": network.state_dict(), "optimizer": optimizer, "step": 3, "hp_str": config}
    torch.save(data, source, _use_new_zipfile_serialization=False)  # as PyTorch 1.0 wrote
    out, error = convert(source, output, "--graphs", folder)
    assert not error
    assert "classifier head (8 keys)" in out
    with torch.no_grad():
        assert_agree(run_randwire(output), network.features(images()))
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, source)
    assert not convert(source, tmp_path / "again.pth", *files, "--no-verify")[1]
    first, second = read_checkpoint(output), read_checkpoint(tmp_path / "again.pth")
    assert first.rest == second.rest
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())


# -- JiaminRen/RandWireNN --------------------------------------------------------------------------


def jiaminren(
    regime: str, model: str, seed: int = 1, **params: Any
) -> tuple[list[Graph], nn.Module]:
    sizes = [5, 10, 10, 10] if regime == "regular" else [10, 10, 10]
    graphs = [draw(model, size, seed, params) for size in sizes]
    return graphs, randomise(JiaminRen(regime, 9, graphs))


def training_config(regime: str, model: str, seed: int = 1, **params: Any) -> str:
    """The keys of configs/config_regular_c109_n32.yaml that say what the network is."""
    train = {
        "batch_size": 256, "net_type": regime, "channels": 9, "nodes": 10, "graph_model": model,
        "seed": seed, **params,
    }  # fmt: skip
    return yaml.safe_dump({"TRAIN": train, "TEST": {"checkpoint_path": "x.pth"}})


def jiaminren_checkpoint(network: nn.Module) -> dict[str, Any]:
    return {"epoch": 3, "model": "config_regular", "state_dict": network.state_dict()}


@pytest.mark.parametrize("regime", ["regular", "small"])
@pytest.mark.parametrize(("model", "params"), [("WS", {"K": 4, "P": 0.75}), ("BA", {"M": 2})])
def test_jiaminren_from_seeds(
    tmp_path: Path, convert: Callable, regime: str, model: str, params: dict[str, Any]
) -> None:
    _, network = jiaminren(regime, model, **params)
    source, output, config = tmp_path / "s.pth", tmp_path / "out.pth", tmp_path / "config.yaml"
    torch.save(jiaminren_checkpoint(network), source)
    config.write_text(training_config(regime, model, **params))
    out, error = convert(source, output, "--graphs", config)
    assert not error
    assert "classifier head" in out
    assert "drawn anew" in out
    with torch.no_grad():
        assert_agree(run_randwire(output), network.features(images()))
    graph = [f"MODEL.RANDWIRE.{model}.{key}={value}" for key, value in params.items()]
    pairs = [word for pair in graph for word in pair.split("=")]
    again = tmp_path / "again.pth"
    assert not convert(source, again, "MODEL.RANDWIRE.GRAPH", model, *pairs)[1]
    assert read_checkpoint(again).rest == read_checkpoint(output).rest


@pytest.mark.parametrize("regime", ["regular", "small"])
def test_jiaminren_from_saved_graphs(tmp_path: Path, convert: Callable, regime: str) -> None:
    """networkx's write_yaml saved Python objects: they are read as text, and never built."""
    graphs, network = jiaminren(regime, "WS", K=4, P=0.75)
    source, output, folder = tmp_path / "s.pth", tmp_path / "out.pth", tmp_path / "graphs"
    torch.save(jiaminren_checkpoint(network), source)
    folder.mkdir()
    first = 6 - len(graphs)
    for i, (num_nodes, edges) in enumerate(graphs):
        graph = nx.Graph()
        graph.add_nodes_from(range(num_nodes))
        graph.add_edges_from(edges[::-1])
        text = yaml.dump(graph)
        assert "!!python/object" in text
        if i == 0:  # as networkx 1 had it
            text = text.replace("_adj:", "adj:")
        (folder / f"conv{first + i}.yaml").write_text(text)
    _, error = convert(source, output, "--graphs", folder)
    assert not error
    with torch.no_grad():
        assert_agree(run_randwire(output), network.features(images()))
    proof = tmp_path / "code-has-run"
    evil = f"!!python/object/apply:os.mkdir ['{proof}']\n"
    output.unlink()
    for text in (f"_adj:\n  0: {evil}", "_adj: {0: ["):  # the second was cut off
        (folder / "conv5.yaml").write_text(text)
        _, error = convert(source, output, "--graphs", folder)
        assert "conv5.yaml' is no graph as networkx saves it" in error
        assert not proof.exists()
        assert not output.exists()


def test_old_networkx_barabasi_albert() -> None:
    """JiaminRen's graphs were drawn by networkx before 2.6; these edges were derived by hand:
    node 2 joins both first nodes, and the draws of random.Random(1) over [0, 1, 2, 2] follow."""
    import random

    num_nodes, edges = draw("BA", 4, 1, {"M": 2})
    rng, chosen = random.Random(1), set()
    while len(chosen) < 2:
        chosen.add(rng.choice([0, 1, 2, 2]))
    assert num_nodes == 4
    assert edges == sorted([(0, 2), (1, 2), *((u, 3) for u in chosen)])


# -- what must fail --------------------------------------------------------------------------------

C109 = ROOT / "configs/faster_rcnn_randwire_c109_fpn_1x.yaml"
DETECTRON2S = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
ZERO_TO_ONE = ["MODEL.PIXEL_MEAN", [0.485, 0.456, 0.406], "MODEL.PIXEL_STD", [0.229, 0.224, 0.225]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT is BGR, the source's RGB"),
        (["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]], "MODEL.PIXEL_MEAN is [103.53"),
        (["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], "MODEL.PIXEL_STD is [1.0"),
        (ZERO_TO_ONE, "MODEL.PIXEL_STD is [0.229"),
    ],
)
@pytest.mark.parametrize("to", ["fpn", "bare"])
def test_wrong_preprocessing_fails(
    own: Path, convert: Callable, options: list[Any], named: str, to: str
) -> None:
    output = own.with_name("out.pth")
    _, error = convert(own, output, "--to", to, *options)
    assert "verification failed" in error
    assert named in error
    assert re.search(r"res2 by [\d.e+-]+", error)
    assert not output.exists()


def test_a_wrong_conversion_fails(
    tmp_path: Path, convert: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step that a conversion could forget is seen by the verification."""
    _, network = jiaminren("small", "WS", K=4, P=0.75)
    source, output = tmp_path / "s.pth", tmp_path / "out.pth"
    torch.save(jiaminren_checkpoint(network), source)
    with monkeypatch.context() as patch:
        patch.setattr(public, "_separable_bias", lambda *_: None)
        _, error = convert(source, output)
        assert "belong to no such network" in error  # the biases were not even read
    right = public._separable_bias
    for wrong in (lambda *a: -right(*a), lambda *a: right(*a) * 0):
        with monkeypatch.context() as patch:
            patch.setattr(public, "_separable_bias", wrong)
            assert "verification failed" in convert(source, output)[1]
    assert not output.exists()
    assert not convert(source, output)[1]


def test_an_old_output_stays_when_a_conversion_fails(own: Path, convert: Callable) -> None:
    output = own.with_name("out.pth")
    output.write_text("old")
    assert convert(own, output, "INPUT.FORMAT", "BGR")[1]
    assert output.read_text() == "old"
    assert sorted(os.listdir(own.parent)) == ["out.pth", "own.pth"]
    assert not convert(own, output)[1]
    assert len(read_checkpoint(output).state) > 100


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["MODEL.RANDWIRE.REGIME", "small"], "MODEL.RANDWIRE.REGIME is small"),
        (["MODEL.RANDWIRE.CHANNELS", 109], "MODEL.RANDWIRE.CHANNELS is 109, the checkpoint's 8"),
        (["MODEL.BACKBONE.NAME", "build_randwire_backbone"], "MODEL.BACKBONE.NAME build_randwire"),
        (["MODEL.RANDWIRE.NORM", "GN"], "running_mean (unused)"),
        (["--layout", "torchvision"], "missing"),
        # C=109 in the config file, C=8 in the checkpoint: it would be trained on random weights.
        (["--config-file", C109], "MODEL.RANDWIRE.CHANNELS is 109, the checkpoint's 8"),
        # Detectron2's own defaults, BGR with a std of 1: a config that says nothing means them.
        (["--config-file", DETECTRON2S], "INPUT.FORMAT is BGR"),
    ],
)
def test_options_that_do_not_fit(
    own: Path, convert: Callable, options: list[Any], named: str
) -> None:
    output = own.with_name("out.pth")
    _, error = convert(own, output, *options)
    assert named in error
    assert not output.exists()


@pytest.mark.parametrize("key", ["SPEC_FILE", "SPEC"])
def test_a_drawn_network_in_the_config(own: Path, convert: Callable, key: str) -> None:
    """Wrong: another network than the checkpoint's is accepted if its JSON describes it, or the
    printed command does not build the checkpoint's."""
    file, output = own.with_name("spec.json"), own.with_name("out.pth")
    for spec in SPECS["small"], SPECS["regular"]:
        file.write_text(spec.to_json())
        value = file if key == "SPEC_FILE" else repr(spec.to_json())
        out, error = convert(own, output, "--no-verify", f"MODEL.RANDWIRE.{key}", value)
        if spec == SPECS["small"]:
            assert "MODEL.RANDWIRE.REGIME is small, the checkpoint's regular" in error
            assert f"fingerprint is {spec.fingerprint}" in error
    assert not error
    named = f"MODEL.RANDWIRE.SPEC_FILE {file}" if key == "SPEC_FILE" else "--config-from-weights"
    assert named in out and "MODEL.RANDWIRE.SEED" not in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda d: d["model"].pop("network.backbone.res3.nodes.0.norm.bias"),
            "res3.nodes.0.norm.bias",
        ),
        (lambda d: d["model"].update(extra=torch.zeros(1)), "extra"),
        (lambda d: d["model"]["network.backbone.stem.conv.weight"].fill_(torch.nan), "finite"),
        (
            lambda d: d["model"]["network.backbone.res5.nodes.0.norm.weight"].mul_(torch.inf),
            "finite",
        ),
        (lambda d: [v.zero_() for v in d["model"].values()], "proves nothing"),
        (lambda d: d["randwire"].update(fingerprint="0" * 64), "fingerprint"),
        (lambda d: d["randwire"].update(spec="{}"), "randwire"),
        (lambda d: d["preprocessing"].pop("pixel_std"), "preprocessing"),
        (lambda d: d.update(model={"weight": torch.zeros(1)}), "no known layout"),
        (lambda d: d.update(model={}), "empty"),
        (lambda d: d.update(model=[1, 2]), "no state dict"),
        (
            lambda d: d["randwire"].update(
                spec=SPECS["small"].to_json(), fingerprint=SPECS["small"].fingerprint
            ),
            "weights of the network are missing",
        ),
        (
            lambda d: d["randwire"].update(
                spec=(s := NetworkGenerator("regular", 9, num_nodes=10)(1)).to_json(),
                fingerprint=s.fingerprint,
            ),
            "wrong channels",
        ),
    ],
)
def test_files_that_are_not_what_they_say(
    own: Path, convert: Callable, change: Callable[[dict], Any], named: str
) -> None:
    data = own_checkpoint(preprocessing=dict(IMAGENET))
    change(data)
    torch.save(data, own)
    output = own.with_name("out.pth")
    _, error = convert(own, output)
    assert named in error
    assert not output.exists()


@pytest.mark.parametrize("suffix", ["pth", "pkl", "safetensors", "old.pth"])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99, "text"])
def test_damaged_files(
    tmp_path: Path, own: Path, convert: Callable, suffix: str, part: float | str
) -> None:
    path, output = tmp_path / f"damaged.{suffix}", tmp_path / "out.pth"
    if part == "text":
        path.write_text("<html><body>404 Not Found</body></html>\n")
    else:
        if suffix == "old.pth":
            torch.save(own_checkpoint(), path, _use_new_zipfile_serialization=False)
        elif suffix == "pth":
            torch.save(own_checkpoint(), path)
        else:
            convert(own, path, "--no-verify")
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * float(part))])
    _, error = convert(path, output)
    assert "damaged" in error
    assert path.name in error
    assert not output.exists()


@pytest.mark.parametrize("layout", ["seungwonpark", "jiaminren"])
def test_graphs_that_do_not_fit(tmp_path: Path, convert: Callable, layout: str) -> None:
    source, output = tmp_path / "s.pth", tmp_path / "out.pth"

    def fails(*args: object) -> str:
        _, error = convert(source, output, *args)
        assert error
        assert not output.exists()
        return error

    files = [tmp_path / f"{i}.txt" for i in range(4)]
    if layout == "seungwonpark":
        graphs = ws_graphs(3)
        torch.save(randomise(Seungwonpark(8, graphs)).state_dict(), source)
        others = [draw("WS", 10, 7, {"K": 4, "P": 0.75}), (9, [(0, 1)]), (3, [(0, 1), (1, 0)])]
        for path, graph in zip(files, [graphs[0], *others], strict=True):
            path.write_text(graph_text(graph))

        def three(last: Path) -> list[object]:
            return ["--graphs", files[0], "--graphs", files[0], "--graphs", last]

        assert "three text files" in fails()
        assert "got 2" in fails("--graphs", files[0], "--graphs", files[0])
        assert "does not say which files" in fails("--graphs", tmp_path)
        assert "the wrong graph" in fails(*three(files[1]))
        assert "the wrong graph" in fails("--graphs", files[2], *three(files[2])[2:])
        assert "cycle" in fails("--graphs", files[3], *three(files[3])[2:])
        files[0].write_text("10\n3\n0 1\n")
        assert "announces 3 edges" in fails(*three(files[1]))
        files[0].write_text("10\n1\n0 10\n")
        assert "(0, 10)" in fails(*three(files[1]))
        files[0].write_text("10\n1\nfirst second\n")
        assert "is no graph" in fails(*three(files[1]))
        files[0].write_text(graph_text((10, [(0, 1), (0, 1)])))
        assert "twice" in fails(*three(files[1]))
        assert "can't be read" in fails(*three(files[1])[:-1], "none.txt")
    else:
        _, network = jiaminren("regular", "WS", K=4, P=0.75)
        torch.save(jiaminren_checkpoint(network), source)
        for change, named in (
            ({"seed": 2}, "the wrong graph"),
            ({"graph_model": "XX"}, "'XX'"),
            ({"net_type": "small"}, "net_type is small"),
            ({"channels": 78}, "channels is 78"),
            ({"nodes": 32}, "nodes is 32"),
            ({"K": 40}, "WS of"),
        ):
            config = yaml.safe_load(training_config("regular", "WS", K=4, P=0.75))
            config["TRAIN"].update(change)
            files[0].write_text(yaml.safe_dump(config))
            assert named in fails("--graphs", files[0])
        files[0].write_text("just: text")
        assert "no training config" in fails("--graphs", files[0])
        assert "conv2.yaml" in fails("--graphs", tmp_path)
        assert "has 4 graphs" in fails("--graphs", files[0], "--graphs", files[0])
        assert "the wrong graph" in fails("MODEL.RANDWIRE.SEED", 2)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("conv1.depthwise.weight", ()),
        ("conv1.pointwise.weight", (4, 3)),
        ("conv2.conv.depthwise.bias", (7,)),
        ("conv3.nodeop.2.conv.conv.pointwise.bias", (1,)),
        ("conv3.nodeop.2.conv.bn.running_var", ()),
        ("conv2.bn.weight", ()),
    ],
)
def test_shapes_of_no_network(
    tmp_path: Path, convert: Callable, key: str, shape: tuple[int, ...]
) -> None:
    """A stranger's file can have any shapes; none may end in a traceback, or broadcast."""
    _, network = jiaminren("small", "WS", K=4, P=0.75)
    state = {**network.state_dict(), key: torch.ones(shape)}
    torch.save({"state_dict": state}, tmp_path / "s.pth")
    assert convert(tmp_path / "s.pth", tmp_path / "out.pth")[1]
    assert not (tmp_path / "out.pth").exists()


def test_channels_that_ours_do_not_have(tmp_path: Path, convert: Callable) -> None:
    """seungwonpark's MNIST networks read one channel, and until June 2019 the inner nodes of a
    stage kept its input's channels: neither is a network of Table 1."""
    graphs = ws_graphs(3)
    network = randomise(Seungwonpark(8, graphs))
    network.conv1 = randomise(nn.Conv2d(1, 4, 3, 2, 1))
    files = write_graphs(tmp_path, graphs)
    torch.save(network.state_dict(), tmp_path / "s.pth")
    _, error = convert(tmp_path / "s.pth", tmp_path / "out.pth", *files)
    assert "stem.conv.weight has the shape (4, 1, 3, 3)" in error
    network = randomise(Seungwonpark(8, graphs))
    network.dagly4.nodes[3].conv.pointwise = nn.Conv2d(16, 8, 1, bias=False)
    torch.save(network.state_dict(), tmp_path / "s.pth")
    _, error = convert(tmp_path / "s.pth", tmp_path / "out.pth", *files)
    assert "res4.nodes.3.conv.pointwise.weight has the shape (8, 16, 1, 1)" in error
    assert not (tmp_path / "out.pth").exists()


def test_output_names_and_formats(
    own: Path, convert: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "OUTPUT is SOURCE" in convert(own, own)[1]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in convert(own, own.with_name("out.safetensors"))[1]


def test_safetensors_carries_everything_as_text(own: Path, convert: Callable) -> None:
    from safetensors import safe_open

    output = own.with_name("out.safetensors")
    assert not convert(own, output, "--no-verify")[1]
    with safe_open(output, framework="pt") as f:
        metadata = f.metadata()
    assert json.loads(metadata["preprocessing"]) == IMAGENET
    assert json.loads(metadata["randwire"])["fingerprint"] == SPECS["regular"].fingerprint


def test_users_image(own: Path, convert: Callable) -> None:
    """It is cut, not resized, and a format other than RGB in the file does not matter."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (70, 101, 3), np.uint8)
    Image.fromarray(noise).convert("CMYK").save(own.with_name("image.tif"))
    out, error = convert(own, own.with_name("out.pth"), "--image", own.with_name("image.tif"))
    assert not error
    assert "verified  largest" in out
    Image.fromarray(noise[:40]).save(own.with_name("image.png"))
    assert "64" in convert(own, own.with_name("o.pth"), "--image", own.with_name("image.png"))[1]


def test_a_strangers_keys_are_named_on_one_line() -> None:
    """Wrong: a file's keys, which may be any text, break a message, or fill the screen."""
    named = some(["\nfirst\x00", "x" * 10_000, "third"])
    assert named.startswith("first, xxx") and named.endswith(" …, third")
    assert named.isprintable() and len(named) < 300


@pytest.mark.parametrize("wrong", [{"to": "detector"}, {"layout": "timm"}])
def test_python_can_misname_them_too(wrong: dict[str, str], tmp_path: Path) -> None:
    """Wrong: whoever calls the function gets a KeyError."""
    torch.save({"stem.conv1.weight": torch.zeros(1)}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"(must be one of|known are) \['"):
        conversion.convert(tmp_path / "in.pth", tmp_path / "out.pth", **wrong)


def test_a_graph_without_nodes_is_refused() -> None:
    """Wrong: networkx 2.8 says so by an error of another kind, which ends in a traceback."""
    with pytest.raises(ValueError, match="WS of 0 nodes"):
        draw("WS", 0, 1, {"K": 0, "P": 0.5})
