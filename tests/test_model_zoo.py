"""MODEL_ZOO.md says what the configs are."""

import re
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from helpers import ROOT

from randwire_d2.config import classifier_config
from randwire_d2.experiments.parts import network_parts, total_cost
from randwire_d2.wiring import Complexity

ZOO = (ROOT / "MODEL_ZOO.md").read_text()
ROWS = dict(re.findall(r"^\| `([\w.]+_\d+ep)` \| (.*) \|$", ZOO, re.MULTILINE))
CONFIGS = {
    path.stem: path
    for folder in ("imagenet", "cifar10")
    for path in (ROOT / "configs" / folder).glob("[!B]*.yaml")
}


def config(path: Path, *options: object) -> CfgNode:
    cfg = classifier_config()
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(list(options))
    return cfg


def count(cfg: CfgNode, size: int = 0) -> Complexity:
    size = size or cfg.INPUT.TEST_CROP_SIZE
    return total_cost(network_parts(cfg, size, size))


def test_every_config_has_its_row() -> None:
    assert set(ROWS) == set(CONFIGS)
    detectors = {p.stem for p in (ROOT / "configs").glob("*_1x.yaml")} - {"Base-RCNN-FPN-1x"}
    assert set(re.findall(r"^\| `(\w+_1x)`", ZOO, re.MULTILINE)) == detectors


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_and_multiply_adds(name: str) -> None:
    """Wrong: a figure in MODEL_ZOO.md that tools/analyze_model.py does not print."""
    cfg = config(CONFIGS[name])
    counted = count(cfg)
    assert f"{counted.params / 1e6:.2f} M |" in ROWS[name]
    assert f"{counted.flops / 1e6:,.1f} M |" in ROWS[name]


def test_larger_images_of_table_4() -> None:
    flops = count(config(CONFIGS["randwire_c154_100ep"]), 320).flops
    assert f"{flops / 1e6:,.1f} M multiply-adds" in ZOO


COMMANDS = re.findall(r"--config-file configs/cifar10/(\w+)\.yaml \\\n +(.*)$", ZOO, re.MULTILINE)


@pytest.mark.parametrize("name, options", COMMANDS)
def test_the_networks_on_cifar10_have_the_same_multiply_adds(name: str, options: str) -> None:
    """Wrong: the comparison is of networks of different sizes or recipes."""
    assert {ours for ours, _ in COMMANDS} == {n for n in CONFIGS if n.endswith("_10ep")}
    ours, theirs = config(CONFIGS[name], *options.split()), config(CONFIGS["R_50_w10_10ep"])
    flops, baseline = (count(cfg).flops for cfg in (ours, theirs))
    assert abs(flops / baseline - 1) < 0.03
    assert max(flops, baseline) <= 15e6
    for key in ("SOLVER", "INPUT", "DATASETS", "TEST"):
        assert ours[key] == theirs[key], "the recipes differ"
    assert not ours.SOLVER.NESTEROV, "another recipe than the accuracies were measured with"
