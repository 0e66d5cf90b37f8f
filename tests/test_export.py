"""Exported models: each format and part computes what the model does, says so, and predicts."""

import ctypes
import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from helpers import ROOT, RunsCode, draw_image_folders, raises_one_line, run_tool
from PIL import Image
from pycocotools import mask as mask_util
from torch import Tensor, nn

from randwire_d2 import NetworkGenerator, RandWire, RandWireClassifier, load_detector
from randwire_d2.checkpoint import Classes, RandWireCheckpointer
from randwire_d2.cli.export import main as export
from randwire_d2.cli.predict import main as predict
from randwire_d2.config import classifier_config, detector_config
from randwire_d2.data.shapes import CLASSES
from randwire_d2.export import (
    DETECTOR,
    FORMATS,
    TOLERANCE,
    DetectorGraph,
    Signature,
    difference,
    fold_batch_norms,
    format_of,
)
from randwire_d2.export.runtimes import RUNTIMES
from randwire_d2.inference import Classifier, Detector, load_model
from randwire_d2.inference.deployment import export as export_module
from randwire_d2.inference.deployment import quantised, runtime
from randwire_d2.inference.deployment.export import export_model
from randwire_d2.inference.deployment.quantised import export_int8
from randwire_d2.inference.deployment.runtime import LEAST_IMAGES, in_runtime
from randwire_d2.inference.models.exported import ExportedClassifier

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "torch": ".pt2"}
SMALL = [
    "MODEL.RANDWIRE.CHANNELS", 6, "MODEL.RANDWIRE.NUM_NODES", 4, "MODEL.RANDWIRE.WS.K", 2,
    "MODEL.DEVICE", "cpu",
]  # fmt: skip
# A Mask R-CNN that takes milliseconds, and finds much though nobody trained it.
DETECTOR_OPTIONS = [
    *SMALL, "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "INPUT.MIN_SIZE_TEST", 96,
    "MODEL.ROI_HEADS.NUM_CLASSES", 6, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.02,
     "TEST.DETECTIONS_PER_IMAGE", 10,
]  # fmt: skip
NAMES = ["disc", "größe \"2\"", "ring", "star", "crescent", "box"]  # fmt: skip
IDS = [3, 1, 4, 15, 9, 2]


def trained(model: nn.Module) -> nn.Module:
    """The model with what a training would leave in its norms and its sums' weights."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, least in ((module.running_mean, -0.5), (module.running_var, 0.5)):
                tensor.uniform_(least, least + 1, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
        own = module._parameters.get("weight")
        if own is not None and own.dim() == 1 and not isinstance(module, nn.BatchNorm2d):
            own.data.normal_(generator=generator)
    return model


def save(cfg: CfgNode, folder: Path, names: list[str], ids: list[int], stuff: Any = None) -> Path:
    torch.manual_seed(0)
    model = trained(build_model(cfg))
    classes = Classes(names, ids, stuff)
    RandWireCheckpointer(model, str(folder), cfg=cfg, classes=classes).save("model_final")
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = detector_config()
    cfg.merge_from_file(str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml"))
    cfg.merge_from_list(DETECTOR_OPTIONS)
    return save(cfg, tmp_path_factory.mktemp("detector"), list(CLASSES), IDS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = classifier_config()
    cfg.merge_from_file(str(ROOT / "configs/shapes/randwire_pretrain.yaml"))
    cfg.merge_from_list([*SMALL, "MODEL.CLASSIFIER.NUM_CLASSES", 6, "INPUT.TEST_CROP_SIZE", 40])
    return save(cfg, tmp_path_factory.mktemp("classifier"), NAMES, list(range(6)))


@pytest.fixture(scope="module")
def files(detector: Path, classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The exported file of a model ("detector" or "classifier"), a part and a format."""
    folder = tmp_path_factory.mktemp("exported")
    sources = {"detector": detector, "classifier": classifier}

    def exported(kind: str, part: str, name: str) -> Path:
        file = folder / "made" / f"{kind}_{part}{SUFFIXES[name]}"
        if not file.exists():
            proof = export_model(sources[kind], file, name, part=part)
            assert proof.difference <= TOLERANCE and len(set(proof.shapes)) == 3
            assert (proof.detections > 5) == (kind == "detector" and part == "whole")
        return file

    return exported


def found_in(model: Detector | Classifier, size: tuple[int, int]) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    (found,) = model.predict([model.prepare(pixels)])
    return model.records(found, 7)


def assert_same_records(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected):
        for key in ("image_id", "category_id"):
            assert ours[key] == theirs[key]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours.get("bbox") == pytest.approx(theirs.get("bbox"), abs=1e-2)
        if "segmentation" in ours:
            masks = [ours["segmentation"], theirs["segmentation"]]
            assert mask_util.iou(masks[:1], masks[1:], [False]).item() > 0.99


# -------------------------------------------------------------------------------------------------
# What is computed
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_exported_detector_finds_what_its_checkpoint_finds(
    name: str, files: Any, detector: Path
) -> None:
    """Wrong: boxes, scores, classes or masks are others, in sizes that were neither traced nor
    compared, or names and ids of the classes are lost."""
    own, exported = load_detector(detector, "cpu"), load_detector(files("detector", "whole", name))
    assert (exported.class_names, exported.category_ids) == (list(CLASSES), IDS)
    for size in ((60, 81), (300, 100)):
        assert_same_records(found_in(exported, size), found_in(own, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_exported_panoptic_detector_finds_stuff_as_well(name: str, tmp_path: Path) -> None:
    """Wrong: stuff is another's, of the padded image, or instances and stuff are not combined."""
    cfg = detector_config()
    cfg.merge_from_file(str(ROOT / "configs/coco/panoptic_fpn_randwire_c109_1x.yaml"))
    cfg.merge_from_list([
        *DETECTOR_OPTIONS, "MODEL.RANDWIRE.REGIME", "small", "MODEL.RANDWIRE.NORM", "BN",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.1,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 20, "MODEL.WEIGHTS", "",
        "DATASETS.TRAIN", ("nobody_has_it",),
    ])  # fmt: skip
    stuff = {"names": [*map(str, range(54))], "ids": [*range(54, 108)]}
    own = load_detector(save(cfg, tmp_path, list(CLASSES), IDS, stuff), "cpu")
    export_model(own.file, tmp_path / f"x{SUFFIXES[name]}")
    exported = load_detector(tmp_path / f"x{SUFFIXES[name]}")
    pixels = np.random.default_rng(5).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    assert exported.stuff == own.stuff and own.stuff_entry == stuff
    ours, theirs = own(pixels), exported(pixels)
    assert len(ours["instances"]) == len(theirs["instances"]) > 0
    assert theirs["sem_seg"].shape == (54, 75, 101)
    assert (ours["sem_seg"] - theirs["sem_seg"]).abs().max() < 1e-3
    segments = [
        [(s["category_id"], s["isthing"]) for s in o["panoptic_seg"][1]] for o in (ours, theirs)
    ]
    assert segments[0] == segments[1] and {thing for _, thing in segments[0]} == {True, False}
    assert (ours["panoptic_seg"][0] == theirs["panoptic_seg"][0]).float().mean() > 0.99


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_classifier_is_as_sure_as_its_checkpoint(
    name: str, files: Any, classifier: Path
) -> None:
    """Wrong: the probabilities are others, or the format takes no batch of another number."""
    own, exported = load_model(classifier, "cpu"), load_model(files("classifier", "whole", name))
    assert isinstance(exported, Classifier) and exported.class_names == NAMES
    assert_same_records(found_in(exported, (60, 81)), found_in(own, (60, 81)))
    # A .pt2 of PyTorch 2.9 refuses what leaves the last stage one row.
    height = 33 if name == "torch" and torch.__version__ < "2.10" else 32
    images = torch.randint(0, 256, (5, 3, height, 77), dtype=torch.uint8)
    with torch.no_grad():
        logits = [model.model({"image": images}) for model in (own, exported)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].abs().max()


# torch.export takes seconds for each.
@pytest.mark.parametrize(
    "kind, name",
    [
        *((kind, name) for kind in ("detector", "classifier") for name in ("onnx", "torchscript")),
        pytest.param("detector", "torch", marks=pytest.mark.slow),
        pytest.param("classifier", "torch", marks=pytest.mark.slow),
    ],
)
def test_an_exported_backbone_gives_the_features(
    kind: str, name: str, files: Any, detector: Path, classifier: Path
) -> None:
    """Wrong: a feature has another value, order or size; of a size so small that some have one
    pixel, or of another number of images."""
    file = files(kind, "backbone", name)
    run, metadata = FORMATS[name].read(str(file))
    model: Any = load_model(detector if kind == "detector" else classifier, "cpu").model
    backbone = model.backbone if kind == "detector" else model.network.backbone
    multiple = json.loads(metadata["input"])["multiple_of"]
    assert multiple == (32 if kind == "detector" else 1)
    for number, height, width in ((1, multiple, 2 * multiple), (3, 64, 160)):
        images = torch.randn(number, 3, height, width)
        with torch.no_grad():
            expected = backbone(images)
        assert json.loads(metadata["outputs"]) == list(expected)
        for ours, theirs in zip(run(images), expected.values(), strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    with pytest.raises(ValueError, match="a backbone alone, which finds nothing"):
        load_model(file)


def test_predict_writes_the_same_results(files: Any, detector: Path, tmp_path: Path) -> None:
    """Wrong: tools/predict.py doesn't take an exported file, or an evaluation of its results.json
    would be another one."""
    onnx_file = files("detector", "whole", "onnx")
    given = {"own": [detector], "file": [onnx_file], "runtime": [detector, "--runtime", "onnx"]}
    for name, options in given.items():
        predict([
            *map(str, options), "--dataset", "test", "--output", str(tmp_path / name),
            "--no-pictures", "--device", "cpu",
        ])  # fmt: skip
    own, *others = (json.loads((tmp_path / n / "results.json").read_text()) for n in given)
    assert len({record["image_id"] for record in own}) == 12
    for other in others:
        assert_same_records(other, own)
        assert other != own


def pictures(folder: Path) -> Path:
    draw_image_folders(folder / "pictures", classes=["a"], train=2, val=1)
    return folder / "pictures"


def samples(model: Detector | Classifier, number: int = 8) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(4).integers(0, 256, (number, 50, 70, 3), dtype=np.uint8)
    return [model.prepare(image) for image in pixels]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("detector", "onnx"),
        ("classifier", "openvino"),
        pytest.param("classifier", "onnx", marks=pytest.mark.slow),
        pytest.param("detector", "openvino", marks=pytest.mark.slow),
    ],
)
def test_a_model_finds_the_same_in_another_runtime(
    kind: str, name: str, files: Any, detector: Path, classifier: Path
) -> None:
    """Wrong: a runtime finds something else, or forgets the ids of the data set that is
    predicted."""
    if name == "openvino":
        pytest.importorskip("openvino")
    model = load_model(detector if kind == "detector" else classifier, "cpu")
    model.category_ids = [7 * i for i in range(6)]
    said: list[str] = []
    for source in (model, load_model(files(kind, "whole", "onnx"))):
        source.category_ids = model.category_ids
        other = in_runtime(source, name, 2, samples(model), said.append)
        for size in ((60, 81), (300, 100)):
            assert_same_records(found_in(other, size), found_in(model, size))
    assert not said


class Bright(nn.Module):
    """A detector of the bright pixels in an image's first row."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        row = inputs[0]["image"][0, 0]
        (x,) = (row > 128).nonzero().T
        boxes = torch.stack([x, 0 * x, x + 1, 0 * x + 1], dim=1).float()
        kept = batched_nms(boxes, row[x], 0 * x, 0.5)
        fields = {"pred_boxes": boxes[kept], "scores": row[x][kept]}
        return [{"instances": SimpleNamespace(get_fields=lambda: fields)}]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    """Wrong: in OpenVINO, an image without objects has the best box of the one before it, of a
    class by chance."""
    pytest.importorskip("openvino")
    bright, dark = torch.zeros(2, 3, 4, 5)
    bright[0, 0, 2:4] = torch.tensor([200.0, 250.0])
    with open(tmp_path / "model.onnx", "wb") as file:
        FORMATS["onnx"].write(DetectorGraph(Bright(), 100), bright, {"version": ""}, file)
    run = RUNTIMES["openvino"](file.name)
    for image, scores in ((bright, [250, 200]), (dark, []), (bright, [250, 200])):
        boxes, found = run(image)
        assert (len(boxes), found.tolist()) == (len(scores), scores)


class Masks(nn.Module):
    """Takes each row of an image that isn't dark for a region, and returns its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.roi_heads = nn.Module()
        self.roi_heads.mask_head = self.head = MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=32), num_classes=2, conv_dims=[32, 32], conv_norm="GN"
        )

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        image = batch[0]["image"]
        rows = image[0, (image[0, :, 0] > 0).nonzero()[:, 0], :4]
        masks = self.head.layers(rows[:, None, :, None].expand(-1, 32, -1, 4))
        return [{"instances": SimpleNamespace(get_fields=lambda: {"pred_masks": masks})}]


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_norm_of_masks_may_have_no_region(name: str, tmp_path: Path) -> None:
    """Wrong: ONNX Runtime fails at an image without objects, if the mask head has group norms."""
    pytest.importorskip("onnxruntime" if name == "onnx" else name)
    torch.manual_seed(0)
    graph, image = DetectorGraph(Masks(), 100), torch.rand(3, 5, 4)
    with open(tmp_path / "model.onnx", "wb") as file:
        FORMATS["onnx"].write(graph, image, {"version": ""}, file)
    run = RUNTIMES[name](file.name)
    for seen, regions in ((image, 5), (0 * image, 0), (image[:, :2], 2)):
        (masks,), (wanted,) = run(seen), graph.model([{"image": seen}])[0].values()
        assert masks.shape == (regions, 2, 8, 8)
        torch.testing.assert_close(masks, wanted.get_fields()["pred_masks"].detach())


def test_signals_keep_their_stack(files: Any) -> None:
    """Wrong: once an OpenVINO model has ended in another thread, a signal ends the process."""
    pytest.importorskip("openvino")
    # stack_t: an address, flags and a size; faulthandler has set one.
    before, after = (ctypes.c_int64 * 3)(), (ctypes.c_int64 * 3)()
    ctypes.CDLL(None).sigaltstack(None, before)
    run = RUNTIMES["openvino"](str(files("classifier", "whole", "onnx")))
    ctypes.CDLL(None).sigaltstack(None, after)
    assert list(after) == list(before)
    del run


def test_the_runtime_is_chosen_by_the_time_it_takes(
    files: Any, detector: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a slower runtime is taken, a few images wait for an export, what can't be exported
    isn't predicted, or the choice is hidden."""
    seconds: dict[type, list[float]] = {}
    monkeypatch.setattr(runtime, "installed_runtimes", lambda: ["onnx"])
    monkeypatch.setattr(runtime, "_seconds", lambda model, one: seconds[type(model.model)].pop())
    model = load_model(classifier, "cpu")
    said: list[str] = []

    def chosen(own: list[float], onnx: list[float], images: int = LEAST_IMAGES) -> Any:
        # The first image's, which is popped last, does not count.
        seconds.update({type(model.model): own, ExportedClassifier: onnx})
        return in_runtime(model, "auto", images, samples(model), said.append)

    assert isinstance(chosen([4, 4, 4, 9, 4, 4], [2, 2, 2, 2, 2, 90]).model, ExportedClassifier)
    assert said == ["Runtime: onnx. Of the time of eager, for the first 6 images: onnx 0.50"]
    assert chosen([4] * 6, [5] * 6) is model and said[-1].startswith("Runtime: eager. Of the time")
    assert chosen([], [], LEAST_IMAGES - 1) is model and len(said) == 2
    script = load_model(files("classifier", "whole", "torchscript"))
    assert in_runtime(script, "auto", LEAST_IMAGES, [], said.append) is script and len(said) == 2
    blind = load_detector(detector, "cpu")
    for predictor in blind.model.roi_heads.box_predictor.modules():
        if hasattr(predictor, "test_score_thresh"):
            predictor.test_score_thresh = 1.1
    assert in_runtime(blind, "auto", LEAST_IMAGES, samples(blind), said.append) is blind
    refusal = "Runtime: eager, because no other could be tried with this model: "
    assert said[-1].startswith(f"{refusal}the model found nothing")

    def huge(model: Any, one: Any) -> float:
        raise RuntimeError("can't allocate memory")

    # One of the first images is too large: the prediction skips it.
    monkeypatch.setattr(runtime, "_seconds", huge)
    assert chosen([], []) is model and said[-1] == f"{refusal}can't allocate memory"


def test_a_runtime_that_a_model_has_not_is_refused(files: Any, classifier: Path) -> None:
    """Wrong: predict runs in another one than it was asked for."""
    model = load_model(classifier, "cpu")
    for kind, name, message in (
        ("onnx", "eager", "is an exported file: name its checkpoint to run eager"),
        ("torchscript", "onnx", "is no ONNX file"),
    ):
        exported = load_model(files("classifier", "whole", kind))
        with pytest.raises(ValueError, match=message):
            in_runtime(exported, name, 1, samples(model), print)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("node_op", ["sep_conv3x3", "conv3x3", "max_pool3x3"])
def test_folded_norms_are_gone_and_change_nothing(norm: str, node_op: str) -> None:
    """Wrong: a norm stays, or is folded into the wrong convolution."""
    spec = NetworkGenerator("small", 6, 5, "WS", {"k": 2, "p": 0.5}, node_op)(1)
    model = trained(RandWireClassifier(spec, 4, norm="BN")).eval()
    model.load_state_dict(trained(RandWireClassifier(spec, 4)).state_dict())
    if norm == "FrozenBN":
        from detectron2.layers import FrozenBatchNorm2d

        model = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    images = torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        expected = model(images)
        number = fold_batch_norms(model)
        actual = model(images)
    assert number == 2 + 1 + 3 * 5  # conv1, conv2, the head, and the nodes of three stages
    assert not any("Norm" in type(module).__name__ for module in model.modules())
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


class Standardised(nn.Conv2d):
    """A node operation of a project's own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, None, self.stride, self.padding)


def test_what_is_no_batch_norm_stays() -> None:
    """Wrong: a group norm is folded, or one whose convolution nobody knows."""
    spec = NetworkGenerator("small", 6, 5, "WS", {"k": 2, "p": 0.5}, "conv3x3")(1)
    assert fold_batch_norms(RandWire(spec, norm="GN")) == 0
    unknown: Any = RandWire(spec)
    unknown.res5.nodes[0].conv = nn.Sequential(unknown.res5.nodes[0].conv, nn.MaxPool2d(1))
    own = unknown.res5.nodes[1].conv
    unknown.res5.nodes[1].conv = Standardised(own.in_channels, 24, 3, own.stride, 1, bias=False)
    unknown.res5.nodes[2].conv.activation = nn.functional.gelu
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained(unknown).eval()(x)["res5"]
        assert fold_batch_norms(unknown) == 2 + 3 * 5 - 3
        assert torch.allclose(unknown(x)["res5"], expected, atol=1e-4)


def test_nodes_are_in_the_order_that_needs_least_memory(files: Any, classifier: Path) -> None:
    """Wrong: a runtime that takes nodes as they come holds more results than it must."""
    graph = onnx.load(files("classifier", "whole", "onnx")).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    network: Any = load_model(classifier, "cpu").model
    for name in ("res3", "res4", "res5"):
        pattern = rf".*/{name}/nodes\.(\d+)/conv/pointwise/Conv"
        found = [re.fullmatch(pattern, node.name) for node in graph.node]
        order = getattr(network.network.backbone, name).plan.order
        assert tuple(int(match[1]) for match in found if match) == order


# -------------------------------------------------------------------------------------------------
# INT8
# -------------------------------------------------------------------------------------------------


def test_int8_costs_what_the_command_says(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wrong: nothing is computed in int8, the file doesn't say so, images that calibrated it are
    compared, or its accuracy can't be told by one command."""
    monkeypatch.setattr(quantised, "LEAST_COMPARED", 15)
    draw_image_folders(tmp_path / "images", classes=NAMES, train=5, val=3)
    file, images = tmp_path / "int8.onnx", tmp_path / "images" / "train"
    checkpoint = torch.load(classifier, weights_only=True)
    checkpoint["class_names"] = sorted(NAMES)  # the order of a folder's
    classifier = tmp_path / "sorted.pth"
    torch.save(checkpoint, classifier)
    export([str(classifier), str(file), "--int8", "--calibration", str(images)])
    said = capsys.readouterr().out
    assert (
        "calibrated on 15 images. It gives " in said
        and "% of 15 others the checkpoint's class" in said
    )
    metadata = own_metadata(file)
    assert (metadata["precision"], metadata["calibration_images"]) == ("int8", "15")
    assert metadata["kind"] == "classifier" and json.loads(metadata["class_names"]) == sorted(NAMES)
    weights = [t.data_type for t in onnx.load(file).graph.initializer if len(t.dims) == 4]
    assert weights and set(weights) == {onnx.TensorProto.INT8}
    own, exported = load_model(classifier, "cpu"), load_model(file)
    ours, theirs = (m.predict(samples(m)) for m in (own, exported))
    assert max((a - b).abs().max() for a, b in zip(ours, theirs)) > 1e-5
    for name, source in (("own", classifier), ("int8", file)):
        predict([
            str(source), "--dataset", str(tmp_path / "images" / "val"), "--output",
            str(tmp_path / name), "--no-pictures", "--device", "cpu",
        ])  # fmt: skip
        written = json.loads((tmp_path / name / "results.json").read_text())
        best = {r["image_id"]: r["category_id"] for r in reversed(written)}
        # Three images of each class, in the order of the sorted names of their folders.
        right = sum(best[i + 1] == i // 3 for i in range(18)) / 18
        assert f"Of 18 labelled images, top-1 is {right:.2%}, top-5 " in capsys.readouterr().out


def test_int8_that_says_something_else_is_not_written(
    classifier: Path, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a file that lost what was learnt, or was compared on a few images alone, gets its
    name, or a detector's boxes are compared as classes."""
    images = str(pictures(tmp_path))
    with pytest.raises(ValueError, match=r"--calibration: 3 images are too .* at least 200"):
        export_int8(classifier, tmp_path / "x.onnx", [images])
    with pytest.raises(ValueError, match="is a detector's file: int8 is for classifiers"):
        export_int8(detector, tmp_path / "x.onnx", [images])
    monkeypatch.setattr(quantised, "LEAST_COMPARED", 1)
    with pytest.raises(ValueError, match="--calibration: 1 images are too few"):
        export_int8(classifier, tmp_path / "x.onnx", [f"{images}/val"])
    classes = iter([[0], [1]] * 9)
    monkeypatch.setattr(quantised, "_classes", lambda model, images: next(classes))
    with pytest.raises(ValueError, match=r"only 0\.0% of 1 images get the same class"):
        export_int8(classifier, tmp_path / "x.onnx", [images])
    assert not [*tmp_path.glob("x.onnx*")]


# -------------------------------------------------------------------------------------------------
# What a file says about itself
# -------------------------------------------------------------------------------------------------


def own_metadata(file: Path) -> dict[str, str]:
    """As somebody without this project reads it."""
    if file.suffix == ".onnx":
        return {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    keys = ("kind", "opset", "class_names", "category_ids", "preprocessing", "fingerprint", "input")
    if file.suffix == ".ts":
        texts = {f"metadata/{key}": "" for key in keys}
        torch.jit.load(file, _extra_files=texts)
        return {key.removeprefix("metadata/"): texts[key].decode() for key in texts}
    texts = dict.fromkeys(keys, "")
    torch.export.load(file, extra_files=texts)
    return texts


@pytest.mark.parametrize(
    "kind, name", [("detector", "onnx"), ("classifier", "torchscript"), ("classifier", "torch")]
)
def test_the_metadata_says_what_it_takes_to_use_the_file(
    kind: str, name: str, files: Any, detector: Path, classifier: Path
) -> None:
    """Wrong: who has nothing but the file doesn't know what it takes, or what its outputs mean."""
    said = own_metadata(files(kind, "whole", name))
    model = load_model(detector if kind == "detector" else classifier, "cpu")
    assert said["kind"] == kind
    assert said["opset"].startswith({"onnx": "ai.onnx 17"}.get(name, ""))
    assert json.loads(said["class_names"]) == (NAMES if kind == "classifier" else list(CLASSES))
    assert json.loads(said["category_ids"]) == model.category_ids
    spec = next(m for m in model.model.modules() if isinstance(m, RandWire)).spec
    assert said["fingerprint"] == spec.fingerprint
    shape = [3, "height", "width"] if kind == "detector" else ["batch", 3, "height", "width"]
    assert json.loads(said["input"])["shape"] == shape
    preprocessing = json.loads(said["preprocessing"])
    assert preprocessing["input_format"] == model.cfg.INPUT.FORMAT
    assert preprocessing["pixel_std"] == list(model.cfg.MODEL.PIXEL_STD)
    assert preprocessing["normalisation"] == "in the graph"
    assert 96 in preprocessing.values() or preprocessing["center_crop"] == 40


# -------------------------------------------------------------------------------------------------
# Refusals
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_a_graph_that_computes_something_else_is_not_written(
    kind: str, detector: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a file with other results than the model's gets its name, or replaces a good one."""

    def fold_badly(model: nn.Module) -> int:
        fold_batch_norms(model)
        parts = [m for m in model.modules() if isinstance(m, nn.Linear)]
        parts[-1].weight.data *= 1.2
        return 0

    monkeypatch.setattr(export_module, "fold_batch_norms", fold_badly)
    source = detector if kind == "detector" else classifier
    (tmp_path / "x.ts").write_text("a good one")
    with pytest.raises(ValueError, match=r"differs from the model by [\d.einf]+ \(at most 0.001"):
        export_model(source, tmp_path / "x.ts")
    assert [p.name for p in tmp_path.iterdir()] == ["x.ts"]
    assert (tmp_path / "x.ts").read_text() == "a good one"


def test_detections_are_paired() -> None:
    """Wrong: another order counts as a difference, or another box, score, class or number does
    not."""
    fields = ("pred_boxes", "pred_classes", "scores")
    signature = Signature(DETECTOR, fields, batched=False, most=8)
    corner = torch.rand(8, 2) * 90
    boxes = torch.cat([corner, corner + 9], dim=1)
    classes, scores = torch.arange(8) % 3, torch.linspace(0.9, 0.1, 8)

    def apart(
        order: Tensor, *, b: Tensor = boxes, c: Tensor = classes, s: Tensor = scores
    ) -> float:
        image = torch.zeros(3, 50, 100)
        own = (boxes, classes, scores)
        return difference(signature, image, own, (b[order], c[order], s[order]))

    every = torch.arange(8)
    assert apart(every.flip(0)) == 0
    assert apart(every, b=boxes + 0.005) == pytest.approx(0.005 / 100, rel=1e-2)
    assert apart(every, b=boxes + 5) > TOLERANCE
    assert apart(every, s=scores + 5e-5) == pytest.approx(5e-5, rel=1e-2)
    assert apart(every, s=scores + 2 * TOLERANCE) > TOLERANCE
    assert apart(every, c=(classes + 1) % 3) > TOLERANCE
    last, first = boxes.clone(), boxes.clone()
    last[-1], first[0] = 0, 0
    assert apart(every, b=last) == 0  # there could have been more than eight
    assert apart(every, b=first) == pytest.approx(0.8)
    assert apart(every[:-1]) == pytest.approx(0.1) and apart(every[1:]) == pytest.approx(0.9)
    assert apart(every[:0]) > TOLERANCE
    assert apart(every, b=boxes * float("nan")) > TOLERANCE
    one, moved = ((b, classes[:1], scores[:1]) for b in (boxes[:1], boxes[:1] + 5))
    assert difference(signature, torch.zeros(3, 50, 100), one, moved) == pytest.approx(0.9)
    nothing = tuple(v[:0] for v in (boxes, classes, scores))
    assert difference(signature, torch.zeros(3, 9, 9), nothing, nothing) == 0
    logits = (torch.ones(1, 4),)
    signature = Signature("classifier", ("logits",), batched=True)
    for wrong in (torch.ones(1, 4) * float("nan"), torch.ones(2, 4), torch.ones(1, 4) * 1.1):
        assert difference(signature, torch.zeros(1, 3, 9, 9), logits, (wrong,)) > TOLERANCE


def test_what_can_not_be_exported_is_refused_in_one_line(
    files: Any, detector: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: work is done in vain, or what is wrong and what to do is not said."""
    onnx_file = files("classifier", "whole", "onnx")
    with pytest.raises(ValueError, match=r"format torch ends in \.pt2"):
        export_model(classifier, tmp_path / "x.onnx", "torch")
    with pytest.raises(ValueError, match=r"written as \.pt2: torch.export can't follow how Det"):
        export_model(detector, tmp_path / "x.pt2")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for missing in (
        lambda: export_model(classifier, tmp_path / "x.onnx"),
        lambda: load_model(onnx_file),
    ):
        with pytest.raises(ValueError, match="onnxruntime: pip install onnx onnxruntime"):
            missing()


def test_a_detector_that_finds_nothing_is_not_proved_by_it(detector: Path, tmp_path: Path) -> None:
    """Wrong: boxes of a detector are said to be equal though none were compared."""
    checkpoint = torch.load(detector, weights_only=True)
    checkpoint["config"] = checkpoint["config"].replace(
        "SCORE_THRESH_TEST: 0.02", "SCORE_THRESH_TEST: 0.9"
    )
    torch.save(checkpoint, tmp_path / "sure.pth")
    with pytest.raises(ValueError, match="found nothing in the images .* with --images"):
        export_model(tmp_path / "sure.pth", tmp_path / "x.ts")
    assert not (tmp_path / "x.ts").exists()


def test_an_image_to_compare_on_that_cant_be_read_is_named(detector: Path, tmp_path: Path) -> None:
    """Wrong: of a hundred --images one is refused, and nobody knows which."""
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(deep)
    with raises_one_line(ValueError, match=f"--images {deep}: .*more than 8 bits"):
        export_model(detector, tmp_path / "x.onnx", images=[str(deep)])


def test_files_of_others_are_refused_in_one_line(files: Any, tmp_path: Path) -> None:
    """Wrong: a file without this metadata, a damaged one or one with a pickle is run, or fails with
    a traceback; a checkpoint that is called .pt is taken for TorchScript."""
    good = files("classifier", "whole", "onnx")
    model = onnx.load(good)
    metadata = {entry.key: entry.value for entry in model.metadata_props if entry.key != "sha256"}
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"lacks what tools/export_model\.py writes"):
        load_model(tmp_path / "foreign.onnx")
    onnx.helper.set_model_props(model, {**metadata, "outputs": "[" * 10**5})
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"lacks what .* \(RecursionError: .*export it again"):
        load_model(tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(good.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.onnx can't be read as onnx"):
        load_model(tmp_path / "cut.onnx")
    with pytest.raises(ValueError, match="an exported file runs on the CPU here"):
        load_model(good, "cuda")
    torch.save({"model": {}}, tmp_path / "x.pt")
    assert format_of(str(tmp_path / "x.pt")) is None
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(files("classifier", "whole", "torch").read_bytes())
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("archive/data/constants/opaque_obj_0", b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="opaque_obj_0', which is no part of a graph"):
        load_model(bad)


@pytest.mark.parametrize(
    ("part", "old", "new", "says"),
    [
        ("data/sample_inputs/model.pt", None, None, "Weights only"),
        ("models/model.json", "Floor", "__import__('os').mkdir('RAN') or Floor", "it evaluates"),
        ("models/model.json", "Symbol(", "Max('open(chr(97))', 1) or Symbol(", "it evaluates"),
        ("models/model.json", '"guards_code": ', '"guards_code": ["eval()"], "": ', "it evaluates"),
        ("models/model.json", "torch.ops.aten.relu.default", "torch.os.mkdir", "it calls"),
        ("data/aotinductor/model/a.so", None, "\x7fELF", "a.so', which is no part of a graph"),
        ("MODELS/model.json", None, "{}", "two of its parts have one name"),
    ],
)  # fmt: skip
def test_a_program_of_torch_export_runs_no_code(
    part: str, old: str | None, new: str | None, says: str, files: Any, tmp_path: Path
) -> None:
    """Wrong: a .pt2 file of a stranger runs what it likes, as torch.export alone lets it."""
    ran, bad = tmp_path / "ran", tmp_path / "bad.pt2"
    objects = io.BytesIO()
    torch.save(((RunsCode(ran),), {}), objects)
    other = objects.getvalue() if new is None else new.replace("RAN", str(ran)).encode()
    with zipfile.ZipFile(files("classifier", "whole", "torch")) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    name = f"archive/{part}"
    parts[name] = other if old is None else parts[name].replace(old.encode(), other)
    assert old is None or other in parts[name]
    with zipfile.ZipFile(bad, "w") as archive:
        for key, content in parts.items():
            archive.writestr(key, content)
    with raises_one_line(ValueError, match=r"bad\.pt2 can't be read as torch: .*" + says):
        load_model(bad)
    assert not ran.exists()


def test_a_damaged_file_is_refused_in_one_line(
    files: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a weight that has changed on a disk computes something else without a word; or a file
    that is cut off, or of another kind, is a traceback, of ours or in torch.export's log."""
    whole = {name: files("classifier", "whole", name).read_bytes() for name in SUFFIXES}
    for name, content in whole.items():
        flips = range(len(content) // 3, len(content) // 2, len(content) // 30)
        others = [content[:position] for position in (0, 9, len(content) // 2, len(content) - 9)]
        others += [b"text\n", *(other for kind, other in whole.items() if kind != name)]
        for position in flips:
            flipped = bytes([content[position] ^ 4])
            others.append(content[:position] + flipped + content[position + 1 :])
        bad = tmp_path / f"bad{SUFFIXES[name]}"
        for other in others:
            bad.write_bytes(other)
            with raises_one_line(ValueError, match="can't be read as .*; export it again$") as e:
                load_model(bad)
            assert str(e.value).startswith(f"{bad} can't")
            assert f": {bad}" not in str(e.value)
    assert "Traceback" not in capfd.readouterr().err


def test_the_command_says_what_it_proved(
    detector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: the tool doesn't run, passes over --images, or says nothing of what was compared; or
    a program that is called as checkpoints are runs without a word, or its export tells of it."""
    images = pictures(tmp_path) / "val"  # a folder, with one image below it
    (image,) = images.rglob("*.*g")
    shutil.copy(image, images / f"another{image.suffix}")
    file = tmp_path / "x.pt"
    said = run_tool("export_model.py", detector, file, "--format", "torchscript",
                    "--images", images, log=tmp_path / "log")  # fmt: skip
    line = said.splitlines()[-1]
    sizes = re.findall(r"\d+×\d+×\d+", line)
    assert len(sizes) == len(set(sizes)), "with a hundred images, the line would fill the screen"
    assert re.search(r"x\.pt: [\d.]+ MB, \d+ batch norms folded\. The largest difference", line)
    assert "3×128×96, 3×96×96, 3×96×115, " in line and line.endswith(" detections")
    assert "TorchScript" not in said
    assert load_detector(file).class_names == list(CLASSES)
    assert f"{file} is TorchScript, a program" in caplog.text
