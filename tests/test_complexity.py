"""Parameters, multiply-adds and activations: the paper's, the built modules', fvcore's."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from helpers import GRAPHS, NODE_OPS, draw_spec, raises_one_line

from randwire_d2 import NetworkGenerator, NetworkSpec, RandWire, RandWireClassifier, complexity
from randwire_d2.wiring import Complexity, find_channels


def weighted_sums(spec: NetworkSpec, height: int, width: int) -> int:
    """Multiply-adds of the weighted sums: one per element and input edge, where there are several.

    Written anew from DESIGN.md, for fvcore does not count them.
    """
    total = 0
    for stage, log_stride in zip(reversed(spec.stages), (5, 4, 3, 2)):
        pixels = -(-height // 2**log_stride) * -(-width // 2**log_stride)
        targets = [v for _, v in stage.dag.edges]
        edges = sum(targets.count(v) for v in set(targets) if targets.count(v) > 1)
        total += edges * stage.channels * pixels
    return total


@pytest.mark.parametrize(
    "regime, channels, size, params, flops",
    [
        ("small", 78, 224, "5.60±0.08", "583.8±6.3"),
        ("regular", 109, 224, "31.93±0.66", "4.005±0.089"),
        ("regular", 154, 224, "61.51±1.32", "7.865±0.175"),
        ("regular", 154, 320, "61.51±1.32", "16.05±0.36"),
    ],
)
def test_the_papers_networks_have_the_papers_complexity(
    regime: str, channels: int, size: int, params: str, flops: str
) -> None:
    """Else the networks, or the way they are counted, are not those of Tables 2 to 4."""
    counts = [
        complexity(NetworkGenerator(regime, channels)(seed), size, size) for seed in range(1, 6)
    ]

    def formatted(values: list[float], like: str) -> str:
        digits = [len(number.partition(".")[2]) for number in like.split("±")]
        return f"{mean(values):.{digits[0]}f}±{stdev(values):.{digits[1]}f}"

    unit = 1e6 if regime == "small" else 1e9
    assert formatted([c.params / 1e6 for c in counts], params) == params
    assert formatted([c.flops / unit for c in counts], flops) == flops


@pytest.mark.parametrize("node_op", NODE_OPS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_built_modules_have_the_counted_parameters(regime: str, graph: str, node_op: str) -> None:
    """Else a module has a parameter too many or too few, or the count is wrong; per stage too."""
    spec = draw_spec(regime, graph, node_op)
    model = RandWireClassifier(spec, num_classes=11)
    counted = complexity(spec, 64, 64, num_classes=11)
    assert sum(p.numel() for p in model.parameters()) == counted.params
    for name, stage in counted.stages.items():
        if name == "head":
            modules = [model.conv, model.norm, model.fc]
        else:
            modules = [model.backbone.get_submodule(name)]
        built = sum(p.numel() for module in modules for p in module.parameters())
        assert built == stage.params, name


def test_the_default_classifier_has_1000_classes() -> None:
    """Else complexity(spec) and RandWireClassifier(spec) speak of different networks."""
    spec = draw_spec("small", "WS")
    built = sum(p.numel() for p in RandWireClassifier(spec).parameters())
    assert built == complexity(spec).params


@pytest.mark.parametrize(
    "size", [(97, 131), *(pytest.param(s, marks=pytest.mark.slow) for s in ((64, 64), (33, 32)))]
)
@pytest.mark.parametrize("node_op", NODE_OPS)
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_fvcore_counts_the_same(regime: str, node_op: str, size: tuple[int, int]) -> None:
    """Else multiply-adds or activations of convolutions and fc are wrong, odd sizes included."""
    spec = draw_spec(regime, "BA", node_op)
    model = RandWireClassifier(spec, num_classes=11).eval()
    images = torch.zeros(1, 3, *size)
    counted = complexity(spec, *size, num_classes=11)

    flops = FlopCountAnalysis(model, images).unsupported_ops_warnings(False)
    by_operator = flops.by_operator()
    assert by_operator["conv"] + by_operator["linear"] == counted.flops - weighted_sums(spec, *size)

    activations = ActivationCountAnalysis(model, images).unsupported_ops_warnings(False)
    assert activations.total() == counted.activations


@pytest.mark.parametrize("regime", ["small", "regular"])
def test_stages_add_up_to_the_total(regime: str) -> None:
    """Else a stage is missing from the parts or from the total."""
    counted = complexity(draw_spec(regime, "WS"), 65, 100)
    assert list(counted.stages) == ["stem", "res2", "res3", "res4", "res5", "head"]
    total = sum(counted.stages.values(), Complexity())
    assert total == Complexity(counted.params, counted.flops, counted.activations)


def test_a_backbone_has_the_parameters_of_its_stages() -> None:
    """Else the per-stage parts can't be used for a backbone that ends early."""
    spec = draw_spec("regular", "ER")
    backbone = RandWire(spec, out_features=["res3"])
    stages = complexity(spec).stages
    built = sum(p.numel() for p in backbone.parameters())
    assert built == sum(stages[name].params for name in ("stem", "res2", "res3"))


@pytest.mark.parametrize(
    "numbers, says",
    [
        ({"height": 0}, "height must be at least 1; got 0"),
        ({"width": -1}, "width must be at least 1; got -1"),
        ({"height": 224.5}, "height must be an integer; got 224.5"),
        ({"num_classes": 0}, "num_classes must be at least 1; got 0"),
        ({"in_channels": -1}, "in_channels must be at least 1; got -1"),
    ],
)
def test_impossible_numbers_are_refused(numbers: dict[str, Any], says: str) -> None:
    """Wrong: the complexity of no image is a number, or a network of -1 channels has fewer
    parameters than its convolutions."""
    with pytest.raises(ValueError, match=says):
        complexity(draw_spec("small", "WS"), **numbers)


@pytest.mark.parametrize("build", [complexity, RandWire, RandWireClassifier])
def test_a_generator_is_no_network(build: Callable[[Any], object]) -> None:
    """Wrong: who forgets the seed learns that a generator has no attribute 'convs'."""
    with raises_one_line(ValueError, match=r"NetworkGenerator.*generator\(seed=1\)"):
        build(NetworkGenerator())


def mean_flops(
    generator: NetworkGenerator, channels: int, seeds: Sequence[int] = (1, 2, 3, 4, 5)
) -> float:
    drawn = replace(generator, channels=channels)
    return mean(complexity(drawn(seed)).flops for seed in seeds)


@pytest.mark.parametrize(
    "regime, target, size, channels",
    [
        ("small", 583e6, 224, 78),
        ("small", 580e6, 224, 78),
        ("regular", 4.0e9, 224, 109),
        ("regular", 7.9e9, 224, 154),
        ("regular", 16.0e9, 320, 154),
    ],
)
def test_the_papers_complexity_has_the_papers_channels(
    regime: str, target: float, size: int, channels: int
) -> None:
    """Wrong: C is not "the nearest integer such that target model complexity is met" (§4)."""
    generator = NetworkGenerator(regime)
    assert find_channels(generator, target, height=size, width=size) == channels


@pytest.mark.parametrize("node_op", NODE_OPS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_no_other_channels_come_nearer(regime: str, graph: str, node_op: str) -> None:
    """Wrong: the search stops beside the nearest C, or takes the generator's own C for it."""
    generator = NetworkGenerator(regime, 50, 9, graph, GRAPHS[graph], node_op)
    costs = {channels: mean_flops(generator, channels) for channels in range(2, 34)}
    for target in (
        costs[2],
        1.1 * costs[2],
        costs[3],
        1.07 * costs[7],
        0.96 * costs[16],
        costs[32],
    ):
        nearest = min(costs, key=lambda channels: abs(costs[channels] - target))
        assert find_channels(generator, target) == nearest


def test_of_two_equally_near_channels_the_smaller() -> None:
    """Wrong: what is found for a target half way depends on the search."""
    generator = NetworkGenerator("small", num_nodes=9)
    for channels in (2, 3, 8, 21):
        below, above = (mean_flops(generator, c, [4]) for c in (channels, channels + 1))
        halfway = (below + above) / 2
        assert find_channels(generator, halfway, [4]) == channels
        assert find_channels(generator, halfway + 1, [4]) == channels + 1


def test_channels_depend_on_seeds_size_and_classes() -> None:
    """Wrong: an argument does not reach the networks that are compared."""
    generator = NetworkGenerator("small", num_nodes=9, graph="ER", graph_params={"p": 0.3})
    flops = complexity(replace(generator, channels=60)(8), 64, 96, 10).flops
    assert find_channels(generator, flops, [8], 64, 96, 10) == 60
    assert find_channels(generator, flops, [8]) < 60


@pytest.mark.parametrize("target", [1e6, -1.0, float("nan"), float("inf")])
def test_impossible_targets_are_refused(target: float) -> None:
    """Wrong: C=2 passes for a network that it is not."""
    generator = NetworkGenerator("regular")
    with pytest.raises(ValueError, match=f"the least, C=2, has {mean_flops(generator, 2):,.0f}"):
        find_channels(generator, target)
    with pytest.raises(ValueError, match="no seeds"):
        find_channels(generator, 4e9, seeds=())
