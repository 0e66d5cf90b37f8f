"""tools/analyze_model.py: the paper's tables, the parts of networks, the C for a target."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis
from helpers import ROOT, run

from randwire_d2 import add_randwire_config, complexity
from randwire_d2.cli import analyze_model as tool
from randwire_d2.config import classifier_config, spec_from_config
from randwire_d2.experiments.analysis import paper_table, seeds_of, table_1
from randwire_d2.experiments.parts import default_size, network_parts, total_cost
from randwire_d2.experiments.tables import Quantity, Table
from randwire_d2.modeling.image_classifier import build_network
from randwire_d2.wiring import Complexity, NetworkGenerator

TOOL = ROOT / "tools" / "analyze_model.py"
CLASSIFIER = str(ROOT / "configs/imagenet/randwire_c78_250ep.yaml")
RESNET = str(ROOT / "configs/imagenet/R_50_100ep.yaml")
DETECTOR = str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml")
SMALL = ["MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "10"]


def config(path: str, *options: Any) -> CfgNode:
    cfg = classifier_config()
    cfg.merge_from_file(path)
    cfg.merge_from_list(list(options))
    return cfg


def column(table: Table, name: str) -> dict[str, Any]:
    first = next(iter(table.rows[0]))
    return {row[first]: row[name] for row in table.rows if row[name] is not None}


def test_table_1() -> None:
    """Wrong: the layers, or their sizes, are not those of Table 1."""
    rows = table_1().rows
    sizes = {row["stage"]: row["output"] for row in rows}
    assert [sizes[f"conv{i}"] for i in range(1, 6)] == [(n, n) for n in (112, 56, 28, 14, 7)]
    small, regular = ([row[f"{name} regime"] for row in rows] for name in ("small", "regular"))
    assert small[:5] == [
        "3×3 conv, C/2",
        "3×3 conv, C",
        "random wiring N, C",
        "random wiring N, 2C",
        "random wiring N, 4C",
    ]
    assert regular[:5] == [
        "3×3 conv, C/2",
        "random wiring N/2, C",
        "random wiring N, 2C",
        "random wiring N, 4C",
        "random wiring N, 8C",
    ]
    assert small[5:] == regular[5:]
    assert small[5] == "1×1 conv, 1280-d"


@pytest.mark.parametrize(
    "number, network, flops, params",
    [
        # 583.85 ± 6.295: the paper has 583 ± 6.2.
        (2, "RandWire-WS, C=78", "cut off", "rounded"),
        (4, "RandWire-WS, C=154", "rounded", "rounded"),
    ],
)
def test_counted_networks_have_the_papers_quantities(
    number: int, network: str, flops: str, params: str
) -> None:
    """Wrong: our networks are not the paper's, or a number passes for the paper's that is not."""
    table = paper_table(number)
    assert column(table, "multiply-adds: which is") == {network: flops}
    assert column(table, "parameters: which is") == {network: params}


@pytest.mark.slow
def test_table_3() -> None:
    """Wrong: a network of Table 3, the ResNets built by Detectron2 too, is not the paper's.

    ResNet-101 has 44.549 M parameters, the paper 44.6.
    """
    table = paper_table(3)
    networks = [row["network"] for row in table.rows]
    assert len(networks) == 6
    rounded = dict.fromkeys(networks, "rounded")
    assert column(table, "multiply-adds: which is") == rounded
    assert column(table, "parameters: which is") == {**rounded, "ResNet-101": "not 44.5"}


def test_other_networks_are_not_the_papers() -> None:
    """Wrong: the comparison with the paper can't fail."""
    table = paper_table(2, seeds=[6, 7, 8])
    assert column(table, "multiply-adds: which is")["RandWire-WS, C=78"].startswith("not 5")


@pytest.mark.parametrize(
    "values, paper, expected",
    [
        ([4.049e9], "4.0", "rounded"),
        ([4.051e9], "4.1", "rounded"),
        ([4.051e9], "4.0", "cut off"),
        ([4.051e9], "4.2", "not 4.1"),
        ([1e9, 2e9], "1.5±0.71", "rounded"),
        ([1e9, 2e9], "1.5±0.70", "cut off"),
        ([1e9, 2e9], "1.5±0.72", "not 1.5±0.71"),
    ],
)
def test_comparison_with_a_printed_number(values: list[float], paper: str, expected: str) -> None:
    """Wrong: the column "which is" says another thing than the digits do."""
    assert Quantity(tuple(values), "B").against(paper) == expected


@pytest.mark.parametrize(
    "quantity, text",
    [
        (Quantity((31.518e6,)), "31.52 M"),
        (Quantity((1.0e9, 1.2e9), digits=(1, 1)), "1,100.0 ± 141.4 M"),
        (Quantity((5e6, 5e6, 5e6)), "5.00 M"),
        (Quantity((1566.0,)), "0.0016 M"),
        (Quantity((0.0,)), "0.00 M"),
        (Quantity((20.0, 24.0), "", (0, 0)), "22 ± 3"),
    ],
)
def test_quantities_as_text(quantity: Quantity, text: str) -> None:
    """Wrong: a number is printed in another unit, or as zero where it is only small."""
    assert str(quantity) == text


def test_parts_of_a_classifier() -> None:
    """Wrong: a row does not describe its stage, or the rows are not the whole network."""
    cfg = config(CLASSIFIER)
    parts = {part.name: part for part in network_parts(cfg, 100, 224)}
    assert list(parts) == ["stem", "res2", "res3", "res4", "res5", "head"]
    stage = parts["res4"]
    assert (stage.output, stage.channels, stage.nodes, stage.edges) == ((7, 14), 156, 32, 64)
    counted = complexity(spec_from_config(cfg), 100, 224)
    assert total_cost(parts.values()) == Complexity(
        counted.params, counted.flops, counted.activations
    )


def test_parts_of_a_resnet() -> None:
    """Wrong: a part is missing, or counted twice, or otherwise than by fvcore's own total."""
    parts = network_parts(config(RESNET), 64, 64)
    assert [part.name for part in parts] == ["stem", "res2", "res3", "res4", "res5", "linear"]
    assert (parts[3].output, parts[3].channels) == ((4, 4), 1024)
    counted, network = total_cost(parts), build_network(config(RESNET)).eval()
    assert counted.params == sum(p.numel() for p in network.parameters())
    by_operator = FlopCountAnalysis(network, torch.zeros(1, 3, 64, 64)).by_operator()
    assert counted.flops == by_operator["conv"] + by_operator["linear"]


@pytest.mark.parametrize("norm, freeze_at", [("BN", 0), ("FrozenBN", 2)])
def test_parts_of_a_detector(norm: str, freeze_at: int) -> None:
    """Wrong: a part costs other than its layers do, or than the spec says of a backbone's stage.

    The layers' costs are written anew from the config.
    """
    options = ["MODEL.RANDWIRE.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at, *SMALL]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", 6]
    cfg = config(DETECTOR, *options)
    height, width = 64, 96
    found = network_parts(cfg, height, width)
    parts = {part.name: part.cost for part in found}
    rois = {part.name: part.rois for part in found}

    counted = complexity(spec_from_config(cfg), height, width)
    for name in ("stem", "res2", "res3", "res4", "res5"):
        assert parts.pop(f"backbone.bottom_up.{name}") == counted.stages[name], name

    pixels = [height * width // stride**2 for stride in (8, 16, 32)]
    levels = [
        (8, 64, 1, pixels[0], 1),
        (16, 64, 1, pixels[1], 1),
        (32, 64, 1, pixels[2], 1),
        *((64, 64, 3, n, 1) for n in pixels),
    ]
    assert parts.pop("backbone.fpn") == layers(levels, norms=6)
    rpn = [(64, out, kernel, sum(pixels), 1) for out, kernel in ((64, 3), (3, 1), (12, 1))]
    assert parts.pop("proposal_generator") == layers(rpn, biases=64 + 3 + 12)
    head = [(64, 64, 3, 6 * 6, 50), (64 * 6 * 6, 256, 1, 1, 50)]
    assert parts.pop("roi_heads.box_head") == layers(head, norms=1, biases=256)
    predictor = [(256, 7 + 6 * 4, 1, 1, 50)]
    assert parts.pop("roi_heads.box_predictor") == layers(predictor, biases=7 + 6 * 4)
    assert not parts

    assert {name for name in rois if rois[name]} == {
        "roi_heads.box_head",
        "roi_heads.box_predictor",
    }
    assert rois["roi_heads.box_head"] == cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 50
    model = build_model(cfg)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    weights = {k: v for k, v in model.state_dict().items() if k.split(".")[-1] not in statistics}
    assert total_cost(found).params == sum(value.numel() for value in weights.values())


def layers(of: list[tuple[int, int, int, int, int]], norms: int = 0, biases: int = 0) -> Complexity:
    """The cost of layers (in, out, kernel, pixels, images), and of norms of 64 channels."""
    params = sum(i * o * k * k for i, o, k, _, _ in of) + norms * 2 * 64 + biases
    flops = sum(i * o * k * k * pixels * n for i, o, k, pixels, n in of)
    return Complexity(params, flops, sum(o * pixels * n for _, o, _, pixels, n in of))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, heads",
    [
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            {"roi_heads.box_head": 30, "roi_heads.box_predictor": 30, "roi_heads.mask_head": 3},
        ),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", {}),
        (
            "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
            {"roi_heads.res5": 30, "roi_heads.box_predictor": 30},
        ),
    ],
    ids=["mask", "retinanet", "c4"],
)
def test_parts_of_detectron2s_own_detectors(name: str, heads: dict[str, int]) -> None:
    """Wrong: other detectors than Faster R-CNN with FPN can't be counted, or with other numbers
    of proposals and detections than their config has."""
    cfg = model_zoo.get_config(name)
    add_randwire_config(cfg)
    cfg.merge_from_list(["MODEL.RPN.POST_NMS_TOPK_TEST", 30, "TEST.DETECTIONS_PER_IMAGE", 3])
    parts = network_parts(cfg, 64, 96)
    assert {part.name: part.rois for part in parts if part.rois} == heads
    assert sum(part.name.endswith(("stem", "res2", "res3", "res4", "res5")) for part in parts) == 5
    cfg.MODEL.DEVICE = "cpu"
    built = build_model(cfg)
    frozen = sum(
        buffer.numel()
        for key, buffer in built.named_buffers()
        if "norm." in key and key.endswith((".weight", ".bias"))
    )
    assert total_cost(parts).params == sum(p.numel() for p in built.parameters()) + frozen


def test_default_sizes() -> None:
    """Wrong: a network is counted at another size than it is tested at."""
    assert default_size(config(CLASSIFIER)) == (224, 224)
    assert default_size(config(CLASSIFIER, "INPUT.TEST_CROP_SIZE", 320)) == (320, 320)
    assert default_size(config(str(ROOT / "configs/faster_rcnn_R_50_fpn_1x.yaml"))) == (800, 1344)
    assert default_size(config(DETECTOR)) == (128, 224)
    assert default_size(config(DETECTOR, "INPUT.MIN_SIZE_TEST", 0)) == (800, 1344)


def test_a_drawn_network_has_no_other_seeds(tmp_path: Path) -> None:
    """Wrong: one network is reported as the mean of several."""
    spec = tmp_path / "spec.json"
    spec.write_text(NetworkGenerator("small", 8, 10)(3).to_json())
    cfg = config(CLASSIFIER, "MODEL.RANDWIRE.SPEC_FILE", str(spec))
    assert seeds_of(cfg, ()) == [1]
    with pytest.raises(ValueError, match=r"spec\.json' is one network"):
        seeds_of(cfg, [1, 2])
    assert (
        total_cost(network_parts(cfg, 32, 32)).params
        == complexity(NetworkGenerator("small", 8, 10)(3)).params
    )


def tables(capsys: pytest.CaptureFixture[str], *argv: str) -> list[Any]:
    tool.main([*argv, "--format", "json"])
    found: list[Any] = json.loads(capsys.readouterr().out)["tables"]
    return found


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    """Wrong: a format lacks the numbers, or --output is not what would be printed."""
    configs = [CLASSIFIER, CLASSIFIER.replace("250ep", "100ep")]
    argv = ["--config-file", *configs, *SMALL, "--size", "32", "64", "--format", form]
    tool.main(argv)
    printed = capsys.readouterr().out
    counted = complexity(NetworkGenerator("small", 8, 10)(1), 32, 64)
    if form == "json":
        row = json.loads(printed)["tables"][0]["rows"][0]
        assert (row["size"], row["parameters"]) == ([32, 64], counted.params)
        assert (row["multiply-adds"], row["activations"]) == (counted.flops, counted.activations)
    else:
        row = next(line for line in printed.splitlines() if CLASSIFIER in line)
        assert f"{counted.params / 1e6:.2f} M" in row and f"{counted.flops / 1e6:,.1f} M" in row
        assert row.startswith("| ") == (form == "markdown")
    output = tmp_path / "new" / "tables"
    tool.main([*argv, "--output", str(output)])
    assert capsys.readouterr().out == ""
    # The command is in the JSON.
    if form != "json":
        assert output.read_text() == printed
    assert [path.name for path in output.parent.iterdir()] == ["tables"]


def test_means_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: --seeds does not draw the networks, or what has no seed is counted for each."""
    argv = ["--config-file", CLASSIFIER, *SMALL, "MODEL.RANDWIRE.GRAPH", "ER", "--size", "32"]
    (table,) = tables(capsys, *argv, "--seeds", "4", "6")
    generator = NetworkGenerator("small", 8, 10, "ER", {"p": 0.2})
    first, second = (complexity(generator(seed), 32, 32) for seed in (4, 6))
    row = table["rows"][-1]
    assert row["part"] == "total"
    for name, attribute in (("parameters", "params"), ("multiply-adds", "flops")):
        a, b = getattr(first, attribute), getattr(second, attribute)
        assert row[name]["mean"] == (a + b) / 2
        assert row[name]["std"] == pytest.approx(abs(a - b) / 2**0.5)
    argv = ["--config-file", RESNET, CLASSIFIER, *SMALL, "--size", "32", "--seeds", "4", "6"]
    (table,) = tables(capsys, *argv)
    assert [row["networks"] for row in table["rows"]] == [None, 2]


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: the tool finds another C than find_channels, or forgets an option or a key."""
    (table,) = tables(capsys, "--target", "583M", "--regime", "small", "--nodes", "32")
    found = {row["node operation"]: row["C"] for row in table["rows"]}
    assert found == {"sep_conv3x3": 78, "conv3x3": 30, "max_pool3x3": 80, "avg_pool3x3": 80}
    argv = ["--target", "4B", "--graph", "BA(5)", "--node-op", "conv3x3", "--seeds", "3"]
    (table,) = tables(capsys, *argv)
    (row,) = table["rows"]
    generator = NetworkGenerator("regular", row["C"], 32, "BA", {"m": 5}, "conv3x3")
    assert row["multiply-adds"] == complexity(generator(3)).flops
    of_config = ["--target", "4.0e9", "--config-file", CLASSIFIER, "MODEL.RANDWIRE.REGIME"]
    (table,) = tables(capsys, *of_config, "regular", "MODEL.RANDWIRE.CHANNELS", "5")
    assert [row["C"] for row in table["rows"]] == [109]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config-file", CLASSIFIER, "MODEL.RANDWIRE.NODE_OP", "conv9"], "conv9"),
        (["--config-file", CLASSIFIER, "MODEL.BACKBONE.NAME", "build_x"], "build_x"),
        (["--config-file", DETECTOR, "MODEL.BACKBONE.NAME", "build_x"], "build_x"),
        (["--config-file", DETECTOR, "MODEL.META_ARCHITECTURE", "YOLO"], "YOLO"),
        (["--config-file", DETECTOR, "--target", "4B"], "RandWire classifiers"),
        (["--target", "4B", "--nodes", "0"], "num_nodes"),
        (["--target", "4B", "--node-op", "conv9"], "conv9"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str) -> None:
    """Wrong: a mistake ends in a traceback, or in a message that does not name it."""
    with pytest.raises(SystemExit) as error:
        tool.main(argv)
    text = str(error.value.code)
    assert text.startswith("analyze_model.py: error: ") and "\n" not in text and message in text


@pytest.mark.parametrize(
    "argv",
    [
        ["--tables", "1", "--target", "4B"],
        ["--tables", "3", "--seeds", "1", "1"],
        ["--size", "0", "--target", "4B"],
        ["--size", "1", "2", "3", "--target", "4B"],
        ["--size", "320"],
        ["--nodes", "16"],
        ["--node-op", "conv3x3"],
        ["--config-file", CLASSIFIER, "--target", "4B", "--graph", "BA(5)"],
        ["--config-file", "MODEL.RANDWIRE.SEED", "2"],
        ["--config-file"],
    ],
)
def test_wrong_usage(argv: list[str]) -> None:
    """Wrong: an option that has no effect is taken."""
    with pytest.raises(SystemExit) as error:
        tool.main(argv)
    assert error.value.code == 2


@pytest.mark.slow
def test_as_a_command() -> None:
    """Wrong: the tool does not run by itself, or a detector's parts do not add up."""
    command = [sys.executable, "-W", "ignore", str(TOOL), "--config-file", DETECTOR]
    printed = run([*command, "--format", "json"])  # after what libraries say
    (table,) = json.loads(printed[printed.index("{") :])["tables"]
    *parts, last = table["rows"]
    assert table["title"] == f"{DETECTOR}, 128×224"
    for name in ("parameters", "multiply-adds", "activations"):
        assert sum(part[name] for part in parts) == last[name]
