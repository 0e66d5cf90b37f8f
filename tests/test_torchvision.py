"""torchvision's classifiers as baselines, and training through torch.compile."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, last_metrics, raises_one_line, run_tool
from torch import Tensor, nn
from torchvision.models import ViT_B_32_Weights

from randwire_d2 import NetworkGenerator, RandWireClassifier
from randwire_d2.classification import ImageClassifier, load_config
from randwire_d2.classification.compiling import compile_network
from randwire_d2.config import classifier_config, merge_config
from randwire_d2.engine import argument_parser
from randwire_d2.experiments.networks import network_name
from randwire_d2.experiments.paper import TABLE_2
from randwire_d2.experiments.parts import network_parts, total_cost
from randwire_d2.inference import load_classifier
from randwire_d2.modeling import RandWireStage

TOOL = "pretrain_imagenet.py"
MOBILENET = ROOT / "configs/imagenet/mobilenet_v2_w1.4_250ep.yaml"
SHUFFLENET = ROOT / "configs/imagenet/shufflenet_v2_x2_250ep.yaml"
NAME = "MODEL.CLASSIFIER.TORCHVISION.NAME"
OPTIONS = "MODEL.CLASSIFIER.TORCHVISION.OPTIONS"


def arguments(file: Path, folders: Path, output: Path, *options: object) -> list[str]:
    given = (
        "--config-file", file, "MODEL.DEVICE", "cpu", "MODEL.CLASSIFIER.NUM_CLASSES", 3,
        "DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders / 'val'}',)",
        "DATALOADER.NUM_WORKERS", 0, "INPUT.TRAIN_CROP_SIZE", 32, "INPUT.TEST_CROP_SIZE", 32,
        "SOLVER.EPOCHS", 0, "SOLVER.IMS_PER_BATCH", 6, "SOLVER.BASE_LR", 0.01,
        "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0,
        "OUTPUT_DIR", output, *options,
    )  # fmt: skip
    return [*map(str, given)]


def line(folders: Path, *options: object) -> str:
    """The one line that refuses a config."""
    given = arguments(SHUFFLENET, folders, Path("output"), *options)
    with raises_one_line(ValueError) as e:
        load_config(argument_parser().parse_args(given))
    return str(e.value)


# -------------------------------------------------------------------------------------------------
# torchvision's classifiers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, network, params, flops",
    [
        # The paper prints what MobileNetV2's authors printed, 6.9 M; the model that they released
        # has 6.06 M, of 582 M multiply-adds.
        (MOBILENET, "MobileNet v2", 6_108_776, 585e6),
        (SHUFFLENET, "ShuffleNet v2", 7_393_996, 591e6),
    ],
)
def test_a_baseline_is_table_2s(file: Path, network: str, params: int, flops: float) -> None:
    """Wrong: another width than that of the network that Table 2 compares with."""
    cfg = classifier_config()
    merge_config(cfg, file, [])
    cost = total_cost(network_parts(cfg, 224, 224))
    (printed,) = (row for row in TABLE_2 if row.network == network)
    assert float(printed.flops) * 1e6 == flops
    assert cost.flops == pytest.approx(flops, rel=0.02) and cost.params == params
    if network == "ShuffleNet v2":
        assert round(params / 1e6, 1) == float(printed.params)


def test_attention_is_counted() -> None:
    """Wrong: a third of a transformer's multiply-adds is missing, without a word."""
    cfg = classifier_config()
    merge_config(cfg, MOBILENET, ["MODEL.CLASSIFIER.TORCHVISION.NAME", "vit_b_32",
                                  "MODEL.CLASSIFIER.TORCHVISION.OPTIONS", []])  # fmt: skip
    cost, meta = total_cost(network_parts(cfg, 224, 224)), ViT_B_32_Weights.IMAGENET1K_V1.meta
    assert (round(cost.flops / 1e9, 3), cost.params) == (meta["_ops"], meta["num_params"])


def test_names_of_networks() -> None:
    """Wrong: a table of results calls the network after a backbone that nobody built."""
    cfg = classifier_config()
    merge_config(cfg, MOBILENET, [])
    assert network_name(cfg) == "mobilenet_v2(width_mult=1.4, dropout=0.0)"
    merge_config(cfg, SHUFFLENET, [OPTIONS, "[]"])
    assert network_name(cfg) == "shufflenet_v2_x2_0"


@pytest.mark.parametrize(
    "options, said",
    [
        ((NAME, "mobilenetv2"), "has no classifier 'mobilenetv2'; did you mean 'mobilenet_v2'"),
        # Its builder would download a backbone.
        ((NAME, "fasterrcnn_resnet50_fpn"), "has no classifier 'fasterrcnn_resnet50_fpn'"),
        ((OPTIONS, "['width', 2]"), "shufflenet_v2_x2_0 can't be built with ['width', 2]"),
        ((OPTIONS, "['stages_repeats']"), "which are names, each before its value"),
        ((NAME, "vit_b_16"), "vit_b_16 can't take images of 32×32 pixels"),
        ((NAME, "googlenet"), "googlenet has more outputs than logits"),
        (("MODEL.CLASSIFIER.DROPOUT", 0.2), "MODEL.CLASSIFIER.DROPOUT must be 0: torchvision's"),
    ],
)
def test_what_is_no_baseline(folders: Path, options: tuple[object, ...], said: str) -> None:
    """Wrong: a traceback, or one after the workers have started."""
    assert said in line(folders, *options)


def test_a_baseline_is_not_tested_without_weights(folders: Path) -> None:
    """Wrong: the accuracy of random weights, for a MODEL.WEIGHTS that was forgotten."""
    given = ["--eval-only", *arguments(SHUFFLENET, folders, Path("output"))]
    with pytest.raises(ValueError, match="--eval-only needs weights"):
        load_config(argument_parser().parse_args(given))


@pytest.mark.slow
def test_a_baseline_trains_resumes_and_predicts(folders: Path, tmp_path: Path) -> None:
    """Wrong: a step that is common to classifiers, training, resuming, testing or loading as a
    model, takes the network for a RandWire or a ResNet."""
    output = tmp_path / "run"
    small = (OPTIONS, "['width_mult', 0.25, 'dropout', 0.0]")
    given = arguments(MOBILENET, folders, output, *small)
    log = run_tool(TOOL, *given, "SOLVER.MAX_ITER", 2, log=tmp_path / "log")
    assert "predict.py" in log and "was not written" not in log
    log = run_tool(TOOL, "--resume", *given, log=tmp_path / "log")
    assert "Starting training from iteration 2" in log
    trained = last_metrics(output)["classification/top1"]
    expected = [["classification", "top1", trained, 1e-6]]
    run_tool(
        TOOL, "--eval-only", *given, "MODEL.WEIGHTS", output / "model_final.pth",
        "TEST.EXPECTED_RESULTS", expected, log=tmp_path / "log",
    )  # fmt: skip
    model = load_classifier(output, "cpu")
    assert model.class_names == ["a", "b", "c"]
    image = np.zeros((40, 48, 3), np.uint8)
    assert float(model(image).sum()) == pytest.approx(1)
    assert model.cfg.MODEL.CLASSIFIER.TORCHVISION.OPTIONS[:2] == ["width_mult", 0.25]


# -------------------------------------------------------------------------------------------------
# torch.compile
# -------------------------------------------------------------------------------------------------


def randwire(prob: float) -> ImageClassifier:
    torch.manual_seed(0)
    spec = NetworkGenerator("small", 4, 3, "ER", {"p": 1.0})(1)
    network = RandWireClassifier(spec, 3, fused="off", edge_drop_prob=prob, dropout=0.5)
    return ImageClassifier(
        network, input_format="RGB", pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0)
    )


def losses(model: ImageClassifier, steps: int) -> list[float]:
    """Of some steps with other images, dropped edges and dropout in each."""
    found, optimizer = [], torch.optim.SGD(model.parameters(), 0.01)
    for step in range(steps):
        torch.manual_seed(step)
        batch = {"image": torch.randn(4, 3, 64, 64), "label": torch.tensor([0, 1, 2, 0])}
        (loss,) = model(batch).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_a_compiled_network_is_the_same() -> None:
    """Wrong: what is compiled is another function, draws other edges, is compiled anew for each
    edge, or has other names for its weights."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return aot_eager(graph, example)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    plain, compiled = randwire(0.9), randwire(0.9)
    names = list(plain.state_dict())
    compile_network(compiled, backend)
    assert losses(compiled, 5) == pytest.approx(losses(plain, 5), rel=1e-5)
    assert len(graphs) == 3  # one for each random graph
    assert list(compiled.state_dict()) == names
    plain.load_state_dict(compiled.state_dict())
    x = {"image": torch.randn(3, 3, 48, 48)}
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        assert torch.equal(compiled.eval()(x), plain.eval()(x))
    assert len(graphs) == 3


@pytest.mark.slow
def test_no_compiler(folders: Path) -> None:
    """Wrong: the first step fails, with a traceback, in every process."""
    import torch._inductor.config as inductor

    with inductor.patch("cpp.cxx", (None, "no-such-compiler")):  # monkeypatch deletes it at the end
        said = line(folders, "SOLVER.COMPILE", True)
    assert "No working C++ compiler found" in said and said.endswith("SOLVER.COMPILE False")
    assert "FUSED is on" in line(folders, "SOLVER.COMPILE", True, "MODEL.RANDWIRE.FUSED", "on")


@pytest.mark.slow
def test_the_compilers_code_is_the_same() -> None:
    """Wrong: what inductor makes of a stage is another function, or has other gradients."""
    torch._dynamo.reset()  # all stages share one code object, of which it compiles only so many
    spec = NetworkGenerator("small", 4, 3, "ER", {"p": 1.0})(1)
    plain, compiled = (RandWireStage(spec.stages[0], "sep_conv3x3", "BN") for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    plain.fused = "off"
    compile_network(SimpleNamespace(network=nn.Sequential(compiled)))  # type: ignore[arg-type]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, plain.in_channels, 16, 16, generator=generator)
        kept = torch.tensor([seed == 0, True])
        for stage in (plain, compiled):
            stage(x, kept).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name
    for (name, one), other in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_a_training_is_compiled(folders: Path, tmp_path: Path) -> None:
    """Wrong: SOLVER.COMPILE trains another network, or its checkpoint is of use to it alone. All
    of it is real but the compiler's last step, which takes minutes on a busy CPU."""
    shorter = (
        "from functools import partial\n"
        "from randwire_d2.classification import compiling, trainer\n"
        "trainer.compile_network = partial(compiling.compile_network, backend='aot_eager')\n"
    )
    found = {}
    for compiles in (True, False):
        output = tmp_path / str(compiles)
        given = arguments(
            ROOT / "configs/imagenet/randwire_c78_250ep.yaml", folders, output,
            "MODEL.RANDWIRE.CHANNELS", 4, "MODEL.RANDWIRE.NUM_NODES", 3, "SOLVER.COMPILE", compiles,
            "MODEL.RANDWIRE.GRAPH", "ER", "MODEL.RANDWIRE.ER.P", 1.0, "SOLVER.MAX_ITER", 3,
            "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.9, "MODEL.RANDWIRE.FUSED", "auto",
        )  # fmt: skip
        log = run_tool(TOOL, *given, log=tmp_path / "log", before=shorter)
        assert ("because SOLVER.COMPILE is on" in log) == compiles
        found[compiles] = last_metrics(output)["total_loss"]
        names = torch.load(output / "model_final.pth", weights_only=True)["model"].keys()
        assert not any("_orig_mod" in name for name in names)
        assert load_classifier(output, "cpu").class_names == ["a", "b", "c"]
    assert found[True] == pytest.approx(found[False], rel=1e-4)
