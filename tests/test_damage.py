"""Graph damage: each damage computes what the plain network without that node or edge computes, the
shared work is what the tool says, and an interrupted evaluation ends as one that was not."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import (
    NODE_OPS,
    ROOT,
    SEEDS,
    assert_same,
    ba,
    draw_image_folders,
    draw_spec,
    er,
    images,
    raises_one_line,
    randomise,
    run,
    ws,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from randwire_d2 import NetworkGenerator, NetworkSpec, RandWireClassifier, complexity
from randwire_d2.checkpoint import RandWireCheckpointer
from randwire_d2.experiments import damage
from randwire_d2.experiments import damage_report as report
from randwire_d2.experiments import damage_runs as experiment
from randwire_d2.experiments.damage import (
    Damage,
    all_damages,
    count_correct,
    count_work,
    damaged_logits,
    downstream,
)
from randwire_d2.modeling import Node
from randwire_d2.wiring import Dag, random_graph

TOOL = ROOT / "tools/damage_graph.py"
CONFIG = ROOT / "configs/imagenet/randwire_c78_250ep.yaml"


# -------------------------------------------------------------------------------------------------
# The computation
# -------------------------------------------------------------------------------------------------


def plain(spec: NetworkSpec, state: oracle.State, x: Tensor, damage: Damage) -> Tensor:
    """The logits with a damage, from the sentences of damage.py: nothing shared, nothing fast."""
    result = oracle.Result()
    for conv in spec.convs:
        name = f"backbone.{conv.name}"
        x = torch.relu(x) if conv.name != "stem" else x
        x = oracle.dense(x, state[f"{name}.conv.weight"], stride=2)
        x = oracle.batch_norm(x, state, f"{name}.norm", False, result)
    for stage in spec.stages:
        removed = damage.removed if damage.stage == stage.name else None
        sent: dict[int, Tensor] = {}
        height, width = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
        nothing = x.new_zeros(len(x), stage.channels, height, width)
        for v in range(stage.dag.num_nodes):
            if v == removed:
                continue
            name = f"backbone.{stage.name}.nodes.{v}"
            sources = [source for source, target in stage.dag.edges if target == v]
            data, stride = x, 2
            if sources:
                data, stride = nothing, 1
                for i, u in enumerate(sources):
                    if removed not in (u, (u, v)):
                        one = len(sources) == 1
                        weight = 1 if one else torch.sigmoid(state[f"{name}.weight"][i])
                        data = data + sent[u] * weight
            data = torch.relu(data)
            data = oracle.convolution(data, spec.node_op, state, f"{name}.conv", stride)
            sent[v] = oracle.batch_norm(data, state, f"{name}.norm", False, result)
        readers = {source for source, _ in stage.dag.edges}
        outputs = [sent[v] for v in sent if v not in readers]
        x = torch.stack(outputs).mean(dim=0) if outputs else nothing
    x = oracle.dense(torch.relu(x), state["conv.weight"], stride=1)
    x = oracle.batch_norm(x, state, "norm", False, result)
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def network(spec: NetworkSpec, **options: Any) -> RandWireClassifier:
    torch.manual_seed(0)
    model = RandWireClassifier(spec, 5, **options).double().eval()
    nn.init.normal_(model.fc.weight)  # else all logits are much the same
    randomise(model)
    return model


def check_all(spec: NetworkSpec, size: tuple[int, int] = (7, 9), **options: Any) -> None:
    """Every damage of a spec against the plain network, and the intact one against itself."""
    model, x = network(spec, **options), images(*size)
    damages = all_damages(spec)
    found = dict(damaged_logits(model, x, damages))
    assert len(found) == len(damages) + 1
    with torch.no_grad():
        assert_same(found[None], model(x), "intact")
        for damage in damages:
            assert_same(found[damage], plain(spec, model.state_dict(), x, damage), str(damage))


@pytest.mark.parametrize("node_op", NODE_OPS)
@pytest.mark.parametrize("regime, graph", [("small", "ER"), ("small", "WS"), ("regular", "BA")])
def test_every_damage_is_the_plain_network(regime: str, graph: str, node_op: str) -> None:
    """Else a loss belongs to another damage than it says, for some operation or regime."""
    check_all(draw_spec(regime, graph, node_op, seed=len(node_op)))


@settings(max_examples=15)
@given(
    st.one_of(er(6), ba(6), ws(6)),
    SEEDS,
    st.sampled_from(NODE_OPS),
    st.sampled_from(["auto", "off"]),
)
def test_every_damage_of_any_graph_is_the_plain_network(
    drawn: tuple, seed: int, node_op: str, fused: str
) -> None:
    """Else some wiring is damaged wrongly: isolated nodes, single nodes, complete graphs."""
    model_name, n, params = drawn
    dag = Dag.from_graph(random_graph(model_name, n, seed, **params))
    check_all(NetworkSpec("small", 3, node_op, (Dag(1, ()), dag, Dag(1, ()))), (5, 6), fused=fused)


def test_a_chain_without_a_link() -> None:
    """Else a node that lost its only input becomes an input node, or passes on what it had."""
    dag = Dag(3, ((0, 1), (1, 2)))
    spec = NetworkSpec("small", 4, "sep_conv3x3", (dag,) * 3)
    check_all(spec)
    found = dict(damaged_logits(network(spec), images(9, 9), all_damages(spec)))
    constant = found[Damage("res3", (1, 2), 1)]
    # Node 2 sends a constant, whatever the image.
    assert_same(constant[0], constant[1], "two images")
    # So does the node whose only source is removed, and the stage whose only output node is.
    assert_same(found[Damage("res3", 1, 1)], constant, "without node 1")
    cut = found[Damage("res3", 2, 0)]
    assert_same(cut[0], cut[1], "two images")
    assert (cut - constant).abs().max() > 1e-3


def test_isolated_and_output_nodes_leave_the_mean() -> None:
    """Else a removed output node still counts in the number of those that are averaged."""
    check_all(NetworkSpec("small", 4, "conv3x3", (Dag(4, ((1, 3),)),) * 3))
    check_all(NetworkSpec("small", 4, "conv3x3", (Dag(1, ()), Dag(2, ()), Dag(1, ()))))


def test_stacking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the logits depend on how many damaged results the later stages run on at once."""
    monkeypatch.setattr(damage, "STACKED_IMAGES", 7)
    check_all(draw_spec("regular", "WS"))


def test_what_can_not_be_damaged_is_refused() -> None:
    """Else batch statistics mix images, or a misspelt kind removes nothing."""
    spec = draw_spec("small", "WS")
    with pytest.raises(ValueError, match="eval"):
        list(damaged_logits(network(spec).train(), images(9, 9), all_damages(spec)))
    with pytest.raises(ValueError, match="nodes"):
        all_damages(spec, ["nodes"])


def test_degrees_are_those_of_the_figure() -> None:
    """Else the x axis of Figure 5 is another: extra nodes' edges, or the source's degree."""
    dag = Dag(5, ((0, 1), (0, 2), (1, 2), (2, 3)))
    spec = NetworkSpec("small", 4, "sep_conv3x3", (dag, Dag(1, ()), Dag(1, ())))
    res3 = [d for d in all_damages(spec) if d.stage == "res3"]
    assert [d.degree for d in res3 if d.kind == "node"] == [2, 1, 1, 0, 0]
    edges = {d.removed: d.degree for d in res3 if d.kind == "edge"}
    assert edges == {(0, 1): 1, (0, 2): 2, (1, 2): 2, (2, 3): 1}
    assert all_damages(spec, ["node"]) == [d for d in all_damages(spec) if d.kind == "node"]
    assert downstream(dag, 0) == [1, 2, 3]
    assert downstream(dag, (1, 2)) == [2, 3]
    assert downstream(dag, 4) == downstream(dag, 3) == []


def test_counts_are_of_the_right_damage_and_label() -> None:
    """Else counts are shifted between damages, or an unreadable image counts."""
    spec = draw_spec("small", "WS")
    model, damages = network(spec), all_damages(spec)
    x = torch.randn(32, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(dim=0)  # else all images are of one class
        labels = model(x).argmax(1)
        kept = [int((plain(spec, model.state_dict(), x, d).argmax(1) == labels).sum())
                for d in damages]  # fmt: skip
    assert len(set(kept)) > 3
    seen: list[None] = []
    assert count_correct(model, x, labels, damages, progress=lambda: seen.append(None)) == (
        32,
        kept,
    )
    assert len(seen) == len(damages)
    assert count_correct(model, x, labels, damages[::-1])[1] == kept[::-1]
    intact, damaged = count_correct(model, x, torch.full_like(labels, -1), damages)
    assert intact == 0 and not any(damaged)


@pytest.mark.parametrize("node_op", NODE_OPS)
@pytest.mark.parametrize("regime", ["small", "regular"])
def test_the_work_is_what_the_tool_says(regime: str, node_op: str) -> None:
    """Else nodes are run that the damage does not reach, or the saving is not counted right."""
    spec = draw_spec(regime, "WS", node_op)
    model, damages, x = network(spec, fused="off"), all_damages(spec), images(33, 40)
    sums = 0

    def add(node: nn.Module, arguments: tuple) -> None:
        nonlocal sums
        if len(arguments[0]) > 1:
            sums += sum(term.numel() for term in arguments[0])

    for module in model.modules():
        if isinstance(module, Node):
            module.register_forward_pre_hook(add)

    def counted(run: Any) -> int:
        nonlocal sums
        sums = 0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops() // 2 + sums

    work = count_work(spec, damages, 33, 40, 5)
    assert counted(lambda: model(x)) == len(x) * work.full
    assert counted(lambda: list(damaged_logits(model, x, damages))) == len(x) * work.shared


@pytest.mark.parametrize("regime, times_less", [("small", 2.5), ("regular", 2)])
def test_sharing_saves_work_in_the_papers_networks(regime: str, times_less: float) -> None:
    """Else the evaluation costs about as much as evaluating every damaged network by itself."""
    spec = NetworkGenerator(regime)(1)
    damages = all_damages(spec)
    work = count_work(spec, damages, 224, 224, 1000)
    assert work.full == complexity(spec).flops
    assert times_less * work.shared < len(damages) * work.full


# -------------------------------------------------------------------------------------------------
# The experiment
# -------------------------------------------------------------------------------------------------

OPTIONS = [
    "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "6",
    "MODEL.CLASSIFIER.NUM_CLASSES", "3", "INPUT.TRAIN_CROP_SIZE", "32",
    "INPUT.TEST_CROP_SIZE", "32", "DATALOADER.NUM_WORKERS", "0", "TEST.IMS_PER_PROCESS", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw_image_folders(root, val=6)
    (root / "val/b/cut.jpg").write_bytes(b"\xff\xd8\xff")
    return root


def make_run(folder: Path, folders: Path, *options: str) -> Path:
    """The OUTPUT_DIR of a training, without the training: random weights."""
    data = ["DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders}/val',)"]
    flags = ["--config-file", str(CONFIG), *OPTIONS, *data, "OUTPUT_DIR", str(folder), *options]
    cfg = experiment.load_config(experiment.argument_parser().parse_args(flags))
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = experiment.build_model(cfg)
    head: Any = model.network.fc
    nn.init.normal_(head.weight)
    with torch.no_grad():  # else all images are of one class
        noise = torch.randint(0, 256, (32, 3, 32, 32))
        head.bias -= model.eval()({"image": noise}).mean(dim=0)
    RandWireCheckpointer(model, str(folder)).save("model_final")
    return folder


@pytest.fixture
def ws_run(folders: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "ws", folders)


def test_an_interrupted_evaluation_goes_on(ws_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else batches are lost or counted twice, or a finished evaluation is computed again."""
    whole = experiment.evaluate(experiment.load_run(ws_run))
    assert whole.counts.images == 18 and whole.counts.done == 19  # one can't be read
    assert len(set(whole.counts.damaged)) > 1
    state_file = experiment.load_run(ws_run).state_file
    state_file.unlink()

    seen: list[int] = []

    def watch(network: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return count_correct(network, images, *args, **kwargs)

    monkeypatch.setattr(experiment, "count_correct", watch)
    with pytest.raises(KeyboardInterrupt):
        experiment.evaluate(experiment.load_run(ws_run))
    del seen[0]  # one batch more may come
    with pytest.raises(KeyboardInterrupt):
        experiment.evaluate(experiment.load_run(ws_run))
    assert json.loads(state_file.read_text())["counts"]["done"] == 15
    seen.clear()
    resumed = experiment.evaluate(experiment.load_run(ws_run))
    assert seen == [4]
    assert (resumed.losses, resumed.top1) == (whole.losses, whole.top1)
    seen[:] = [0, 0]  # none may come
    assert experiment.evaluate(experiment.load_run(ws_run)).counts == resumed.counts


def test_the_intact_accuracy_is_the_evaluators(ws_run: Path) -> None:
    """Else images are read, normalised or counted in another way than in the run's own test."""
    loaded = experiment.load_run(ws_run)
    evaluator = experiment_trainer().test(loaded.cfg, loaded.model)["classification"]
    outcome = experiment.evaluate(loaded)
    assert outcome.top1 == pytest.approx(evaluator["top1"])
    assert outcome.losses[0] == pytest.approx(
        outcome.top1 - 100 * outcome.counts.damaged[0] / outcome.counts.images
    )


def test_with_an_average_it_is_the_average_that_is_damaged(ws_run: Path) -> None:
    """Else the intact network is not the one whose accuracy the training reported."""
    file = torch.load(ws_run / "model_final.pth", weights_only=True)
    file["ema"] = {key: value * 0.5 for key, value in file["model"].items()}
    torch.save(file, ws_run / "model_final.pth")
    loaded = experiment.load_run(ws_run).model.state_dict()
    floats = [key for key, value in loaded.items() if value.is_floating_point()]
    assert all(torch.equal(loaded[key], file["ema"][key]) for key in floats)


def experiment_trainer() -> Any:
    from randwire_d2.classification import ClassificationTrainer

    return ClassificationTrainer


def test_a_part_of_the_images_has_all_classes(ws_run: Path) -> None:
    """Else a quick look is at the first classes alone: folders list class after class."""
    loaded = experiment.load_run(ws_run, max_images=5)
    labels = [loaded.images[i]["label"] for i in range(len(loaded.images))]  # type: ignore
    assert labels == [0, 0, 1, 1, 2]


def test_counts_of_something_else_are_not_mixed_in(
    ws_run: Path, folders: Path, tmp_path: Path
) -> None:
    """Else the counts of other weights, images, preprocessing or damages are taken for these."""
    shutil.copytree(folders / "val", tmp_path / "val")
    copied = ["DATASETS.TEST", f"('{tmp_path}/val',)"]
    first = experiment.load_run(ws_run)
    others = [
        experiment.load_run(ws_run, kinds=["node"]),
        experiment.load_run(ws_run, max_images=6),
        experiment.load_run(ws_run, ["INPUT.TEST_CROP_RATIO", "0.9"]),
        experiment.load_run(ws_run, ["INPUT.FORMAT", "BGR"]),
        experiment.load_run(ws_run, ["MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"]),
        experiment.load_run(ws_run, ["MODEL.PIXEL_STD", "[1.0, 2.0, 3.0]"]),
    ]
    others.append(experiment.load_run(ws_run, copied))
    image = next((tmp_path / "val" / "a").iterdir())
    image.rename(image.with_stem("another"))  # the data set's name and size are the same
    others.append(experiment.load_run(ws_run, copied))
    make_run(ws_run, folders, "MODEL.RANDWIRE.SEED", "2")
    others.append(experiment.load_run(ws_run))
    assert len({r.state_file for r in (first, *others)}) == len(others) + 1
    # As if somebody had moved the file.
    experiment._write_counts(first, experiment.Counts([0] * len(first.damages)))
    first.state_file.rename(others[0].state_file)
    with pytest.raises(ValueError, match="remove this file"):
        experiment.evaluate(others[0])


def test_only_networks_of_one_kind_are_pooled(ws_run: Path, folders: Path, tmp_path: Path) -> None:
    """Wrong: a column of the figure mixes operations, or counts one network twice."""
    seed_2 = make_run(tmp_path / "seed2", folders, "MODEL.RANDWIRE.SEED", "2")
    dense = make_run(tmp_path / "dense", folders, "MODEL.RANDWIRE.NODE_OP", "conv3x3")
    runs = [experiment.load_run(folder) for folder in (ws_run, seed_2, dense)]
    labels = [run.label for run in experiment.tell_apart(runs)]
    assert labels == ["WS(4, 0.75), sep_conv3x3"] * 2 + ["WS(4, 0.75), conv3x3"]
    assert [run.label for run in experiment.tell_apart(runs[:2])] == ["WS(4, 0.75)"] * 2
    shutil.copytree(ws_run, tmp_path / "copy")
    with raises_one_line(ValueError, match=f"copy has the same weights and images as {ws_run}: "):
        experiment.tell_apart([*runs, experiment.load_run(tmp_path / "copy")])


def outcome(label: str, losses: dict[Damage, int]) -> experiment.Damaged:
    """Of a hundred images, half of which the intact network classifies correctly."""
    kept = [50 - loss for loss in losses.values()]
    counts = experiment.Counts(kept, 100, 100, 50, seconds=1, full_seconds=1, full_images=100)
    nothing: Any = None
    run = experiment.DamageRun(
        Path("output"), label, nothing, nothing, [*losses], nothing, experiment.Work(10, 20), {}
    )
    return experiment.Damaged(run, counts)


def test_the_figure_shows_every_damage_over_its_degree() -> None:
    """Else points, boxes or means are of another degree, runs of a generator are not pooled, or
    generators stand in another order than they were given in."""
    first = {Damage("res3", 0, 2): 1, Damage("res3", 1, 2): 5, Damage("res3", (0, 1), 1): 9}
    second = {Damage("res3", 0, 2): 3, Damage("res4", 1, 0): -2}
    outcomes = [outcome("ER(0.2)", second), outcome("BA(5)", first), outcome("BA(5)", second)]
    assert report.by_degree(outcomes, "node")["BA(5)"] == {0: [-2.0], 2: [1.0, 5.0, 3.0]}
    figure = report.plot_damage(outcomes)
    nodes = figure.axes[1]
    assert [ax.get_title("left").split(":")[0] for ax in figure.axes[:2]] == ["ER(0.2)", "BA(5)"]
    assert len(figure.axes) == 4
    (box,) = [bar for bar in nodes.patches if round(bar.get_x() + bar.get_width() / 2) == 2]
    assert (box.get_y(), box.get_height()) == (2.0, 2.0)
    dots, mean = [c.get_offsets() for c in nodes.collections if isinstance(c, PathCollection)][2:]
    assert np.array(dots)[:, 1].tolist() == [1.0, 5.0, 3.0]
    assert np.array(mean).tolist() == [[2.0, 3.0]]
    table = report.to_markdown(outcomes)
    assert "| BA(5)       |                                   2 |       3 |" in table
    assert "3 damages took 1.0 s" in table and "3.00 times less" in table


# -------------------------------------------------------------------------------------------------
# The tool
# -------------------------------------------------------------------------------------------------


def test_errors_name_the_value_and_the_way_out(ws_run: Path, folders: Path, tmp_path: Path) -> None:
    """Else what can't work fails after hours, or with a stack trace."""
    with pytest.raises(ValueError, match="NO_KEY"):
        experiment.load_run(ws_run, ["MODEL.NO_KEY", "1"])
    with pytest.raises(ValueError, match="one data set"):
        experiment.load_run(ws_run, ["DATASETS.TEST", f"('{folders}/val', '{folders}/train')"])
    with pytest.raises(ValueError, match="fingerprint"):
        experiment.load_run(ws_run, ["MODEL.RANDWIRE.SEED", "9"])
    with pytest.raises(ValueError, match="no random graph"):
        experiment.load_run(
            ws_run, ["MODEL.BACKBONE.NAME", "build_resnet_backbone",
                     "MODEL.RESNETS.OUT_FEATURES", "['res5']"]
        )  # fmt: skip
    with pytest.raises(ValueError, match="no edge to remove"):
        experiment.load_run(
            make_run(tmp_path / "one", folders, "MODEL.RANDWIRE.GRAPH", "ER",
                     "MODEL.RANDWIRE.ER.P", "0.0"), kinds=["edge"]
        )  # fmt: skip
    incomplete = tmp_path / "incomplete.pth"
    state = torch.load(ws_run / "model_final.pth", weights_only=True)
    del state["model"]["network.fc.weight"]
    torch.save(state, incomplete)
    with pytest.raises(ValueError, match="network.fc.weight"):
        experiment.load_run(ws_run, weights=incomplete)
    assert not list(ws_run.glob("damage_*"))


def test_ctrl_c_says_how_to_go_on(ws_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever stops it does not know that nothing is lost."""
    main = runpy.run_path(str(TOOL))["main"]

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "_write_counts", interrupt)
    with pytest.raises(SystemExit, match="the same command goes on from there: python tools/"):
        main([str(ws_run)])


@pytest.mark.slow
def test_the_tool_on_a_trained_network(folders: Path, tmp_path: Path) -> None:
    """Training, then the tool, as users run them; the second time nothing is computed."""
    output = tmp_path / "ba"
    data = ["DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders}/val',)"]
    run([
        sys.executable, str(ROOT / "tools/pretrain_imagenet.py"), "--config-file", str(CONFIG),
        *OPTIONS, *data, "MODEL.RANDWIRE.GRAPH", "BA", "MODEL.RANDWIRE.BA.M", "2",
        "SOLVER.EPOCHS", "0", "SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "8",
        "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(output),
    ])  # fmt: skip
    arguments = [output, "--output", tmp_path / "figure.svg", "--json", tmp_path / "all.json",
                 "TEST.IMS_PER_PROCESS", 4]  # fmt: skip
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "times less" in first.stdout and "| BA(2) " in first.stdout
    picture = (tmp_path / "figure.svg").read_bytes()
    (found,) = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert len(found["damages"]) == 3 * (6 + 8) and found["images"] == 18
    assert all(
        d["loss"] == pytest.approx(found["top1"] - d["correct"] / 0.18) for d in found["damages"]
    )
    assert len(list(output.glob("damage_*.json"))) == 1

    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert (tmp_path / "figure.svg").read_bytes() == picture
