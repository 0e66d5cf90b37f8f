"""SOLVER.EMA: the average of the weights is what is evaluated, and is saved.

That a resumed one is the same to the bit is in test_resume.py and test_resume_processes.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal, randomise, run_tool
from launching import C78, TOOL, small
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from randwire_d2 import NetworkGenerator, RandWire
from randwire_d2.engine.hooks.ema import AveragedWeights, AverageWeights
from randwire_d2.modeling import RandWireStage
from randwire_d2.runs import RunFolder

DECAY = 0.75


def arguments(
    folders: Path, output: Path, *options: object, flags: tuple[object, ...] = ()
) -> list[object]:
    return [
        "--config-file", C78, *flags, *small(folders),
        "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5, "MODEL.RANDWIRE.EDGE_DROP_SCOPE", "batch",
        "MODEL.CLASSIFIER.DROPOUT", 0.5, "SOLVER.BASE_LR", 0.05, "SOLVER.MAX_ITER", 6,
        "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 2, "SOLVER.EMA.DECAY", DECAY,
        "OUTPUT_DIR", output, *options,
    ]  # fmt: skip


def train(
    folders: Path, output: Path, *options: object, flags: tuple[object, ...] = (), **how: Any
) -> dict[str, Any]:
    """All checkpoints of a training, by their names."""
    log = output.with_suffix(".log")
    run_tool(TOOL, *arguments(folders, output, *options, flags=flags), log=log, **how)
    return {p.stem: torch.load(p, weights_only=True) for p in output.glob("model_*.pth")}


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def averaged(
    folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("averaged") / "run"
    # Ends with a backbone, and as elsewhere without pictures.
    no_report = "from randwire_d2.engine import conclusion as c; c._draw = lambda _: None"
    return output, train(folders, output, pictures=True, before=no_report)


def test_it_is_the_average_beside_the_weights(
    averaged: tuple[Path, dict[str, Any]], folders: Path, tmp_path: Path
) -> None:
    """Wrong: another average than that of every iteration's weights and batch statistics, or the
    training is another one than without."""
    _, files = averaged
    average = dict(files["model_0000000"]["model"])
    for i in range(6):
        file = files[f"model_{i:07}"]
        assert list(file["ema"]) == list(file["model"])
        for key, value in file["model"].items():
            if value.is_floating_point():
                average[key] = DECAY * average[key] + (1 - DECAY) * value
                torch.testing.assert_close(file["ema"][key], average[key])
            else:
                assert torch.equal(file["ema"][key], value)
    assert not equal(files["model_final"]["ema"], files["model_final"]["model"])
    assert equal(files["model_final"]["ema"], files["model_0000005"]["ema"])
    without = train(folders, tmp_path / "without", "SOLVER.EMA.DECAY", 0.0)
    assert "ema" not in without["model_final"]
    assert equal(files["model_final"]["model"], without["model_final"]["model"])


def test_it_is_what_is_evaluated(
    averaged: tuple[Path, dict[str, Any]], folders: Path, tmp_path: Path
) -> None:
    """Wrong: the best checkpoint, an evaluation of the last one, or the backbone has the weights of
    one iteration, which nobody tested; or an evaluation of those does not say so."""
    output, files = averaged
    best = files["model_best"]
    source = f"model_{best['iteration']:07}" if best["iteration"] < 6 else "model_final"
    assert "ema" not in best and equal(best["model"], files[source]["ema"])
    backbone = torch.load(RunFolder(output).backbone, weights_only=True)["model"]
    name = "stem.conv.weight"
    expected = files["model_final"]["ema"][f"network.backbone.{name}"]
    assert torch.equal(backbone[f"backbone.bottom_up.{name}"], expected)

    # A network whose average tells all images apart from one class, and whose weights do not.
    file = dict(files["model_final"])
    for entry, label in (("model", 0), ("ema", 1)):
        state = file[entry] = {key: value.clone() for key, value in file[entry].items()}
        state["network.fc.weight"].zero_()
        state["network.fc.bias"].copy_(torch.eye(3)[label])
    path = tmp_path / "planted.pth"
    torch.save(file, path)
    found = []
    for decay in (DECAY, 0.0):
        options = ("MODEL.WEIGHTS", path, "SOLVER.EMA.DECAY", decay, "DATASETS.TEST",
                   f"('{folders / 'train'}',)")  # fmt: skip
        given = arguments(folders, tmp_path / "run", *options, flags=("--eval-only",))
        said = run_tool(TOOL, *given, log=tmp_path / "log")
        found.append("the average of the weights is evaluated" in said)
        assert ("to evaluate that, set SOLVER.EMA.DECAY" in said) != found[-1]
    assert found == [True, False]
    assert len(list((tmp_path / "run" / "evaluations").iterdir())) == 2


@pytest.mark.slow
def test_two_processes_have_one_average(folders: Path, tmp_path: Path) -> None:
    """Wrong: what DistributedDataParallel wraps is averaged under other names, or not at all."""
    flags = ("--num-gpus", 2, "--dist-url", "auto")
    file = train(folders, tmp_path / "run", flags=flags)["model_final"]
    assert list(file["ema"]) == list(file["model"])
    assert not equal(file["ema"], file["model"])


def test_what_a_resumed_training_evaluates_first_runs_as_before() -> None:
    """Wrong: until an iteration is done, the average's stages do not run the way that was the
    faster one in the training, and round otherwise."""
    spec = NetworkGenerator("small", 8, 12, "WS", {"k": 4, "p": 0.75})(1)
    model = RandWire(spec, norm="BN", fused="auto")
    hook = AverageWeights(average := AveragedWeights(model, 0.5), model)
    stages = [[m for m in n.modules() if isinstance(m, RandWireStage)] for n in (model, average)]
    stages[0][0].slower = {False: "that takes 0.5 of the time in inference"}  # as ShadowSteps does
    hook.before_train()
    assert [s.slower for s in stages[1]] == [s.slower for s in stages[0]]


@pytest.mark.parametrize("ours", [True, False], ids=["SOLVER.EMA", "torch's with use_buffers"])
def test_an_average_keeps_the_wiring(ours: bool) -> None:
    """Wrong: what is averaged along with the weights says which edges there are, so that the
    average is of another network than the one that its checkpoint is loaded into."""
    spec = NetworkGenerator("small", 8, 12, "WS", {"k": 4, "p": 0.75})(1)
    model, x = RandWire(spec, norm="BN", fused="on"), torch.randn(2, 3, 64, 64)
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9999), "use_buffers": True}
    average = AveragedWeights(model, 0.9999) if ours else AveragedModel(model, **options)
    for seed in range(3):
        randomise(model, seed)
        average.update_parameters(model)
    rebuilt = RandWire(spec, norm="BN", fused="on").eval()
    rebuilt.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert_equal(average.module.eval()(x), rebuilt(x))
