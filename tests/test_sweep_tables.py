"""Sweeps of the paper's own networks: Tables 2 to 5 over five seeds."""

import json
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from helpers import ROOT, raises_one_line

from randwire_d2.config import classifier_config, detector_config, spec_from_config
from randwire_d2.engine import scale_schedule
from randwire_d2.experiments.sweep import load_sweep
from randwire_d2.experiments.sweep_results import report
from randwire_d2.experiments.sweep_run import Run
from randwire_d2.experiments.trainings import Training
from randwire_d2.runs import Evaluation, RunFolder, evaluation_config, training_of

SWEEPS = ROOT / "configs" / "sweeps"
TOOL = ROOT / "tools" / "compare_generators.py"
DETECTOR = str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml")

# Stands for every tool: writes down how it was called, and fails if it is told to.
RECORDER = """
import json, os, sys
log, name, *arguments = sys.argv[1:]
with open(log, "a") as f:
    f.write(json.dumps([name, *arguments]) + "\\n")
if os.environ.get("FAILS") == name:
    sys.exit(f"{name} is broken")
if name == "convert":
    open(arguments[1], "w").close()
"""


def load(name: str, output: Path) -> list[Run]:
    return load_sweep(SWEEPS / f"{name}.yaml", output / name)


def config_of(run: Run) -> CfgNode:
    """The config that the run's tool reads."""
    cfg = classifier_config() if run.classifies else detector_config()
    cfg.merge_from_file(run.arguments[1])
    cfg.merge_from_list(list(run.arguments[2:]))
    return cfg


def write_sweep(folder: Path, name: str, **keys: object) -> Path:
    path = folder / f"{name}.yaml"
    config = str(ROOT / "configs/shapes/randwire_pretrain.yaml")
    path.write_text(yaml.safe_dump({"config": config, "seeds": [1, 2], **keys}))
    return path


@pytest.fixture
def main() -> Iterator[Callable[..., None]]:
    """The tool, which sets a signal's handler for its own process."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: runpy.run_path(str(TOOL))["main"]([*map(str, arguments)])
    signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------------------
# The paper's tables
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, flops, config",
    [
        # MODEL_ZOO.md has these multiply-adds in M, beside the paper's.
        ("table2", {78: 583.846}, {"SOLVER.EPOCHS": 250, "INPUT.TEST_CROP_SIZE": 224}),
        (
            "table3",
            {109: 4005.207, 154: 7864.918},
            {"SOLVER.EPOCHS": 100, "INPUT.TEST_CROP_SIZE": 224},
        ),
        ("table4", {154: 16049.521}, {"INPUT.TEST_CROP_SIZE": 320}),
        ("table5", {109: 4005.207, 154: 7864.918}, {"SOLVER.MAX_ITER": 90_000}),
    ],
)
def test_tables_are_the_papers_networks_and_trainings(
    tmp_path: Path, name: str, flops: dict[int, float], config: dict[str, object]
) -> None:
    """Wrong: a mean that is not over the paper's five networks, or of another recipe."""
    runs = load(name, tmp_path)
    assert {(r.setting.channels, r.seed) for r in runs} == {
        (c, seed) for c in flops for seed in (1, 2, 3, 4, 5)
    }
    assert len(runs) == 5 * len(flops)
    for run in runs:
        assert run.setting.generator == "WS(4, 0.75)"
        assert run.setting.flops / 1e6 == pytest.approx(flops[run.setting.channels], abs=1e-3)
        cfg = config_of(run)
        node = cfg.MODEL.RANDWIRE
        assert (run.setting.channels, run.seed, run.seed) == (node.CHANNELS, node.SEED, cfg.SEED)
        assert Path(cfg.OUTPUT_DIR) == run.folder
        for key, value in config.items():
            section, name = key.split(".")
            assert cfg[section][name] == value


def test_table_4_evaluates_the_networks_of_table_3(tmp_path: Path) -> None:
    """Wrong: another seed's network is tested, or one is trained again."""
    trained = {run.seed: run for run in load("table3", tmp_path) if run.setting.channels == 154}
    for run in load("table4", tmp_path):
        source = trained[run.seed]
        assert run.evaluates and run.tool == "pretrain_imagenet.py" and not source.evaluates
        cfg = config_of(run)
        assert str(source.folder / "model_final.pth") == cfg.MODEL.WEIGHTS
        assert spec_from_config(cfg) == spec_from_config(config_of(source))
        assert run.weights is not None and not run.weights.conversion


def test_table_5_fine_tunes_each_network_of_table_3(tmp_path: Path) -> None:
    """Wrong: a detector starts from another seed's network, or from none."""
    trained = {(r.setting.channels, r.seed): r for r in load("table3", tmp_path)}
    for run in load("table5", tmp_path):
        source = trained[run.setting.channels, run.seed]
        assert run.tool == "train_net.py" and run.metric == "bbox/AP"
        cfg = config_of(run)
        assert spec_from_config(cfg) == spec_from_config(config_of(source))
        assert str(run.folder / "backbone.pth") == cfg.MODEL.WEIGHTS
        assert run.weights is not None
        checkpoint, backbone, *options = run.weights.conversion
        assert checkpoint == str(source.folder / "model_final.pth")
        assert backbone == cfg.MODEL.WEIGHTS
        assert options[:3] == ["--to", "fpn", "--config-file"]
        assert Path(options[3]).name == f"{run.setting.config}.yaml"


def test_results_of_networks_that_are_trained_otherwise_now_are_refused(tmp_path: Path) -> None:
    """Wrong: who changes and repeats a pretraining gets the table of detectors of the old one."""
    write_sweep(tmp_path, "first")
    second = write_sweep(tmp_path, "second", config=DETECTOR, pretrained="first.yaml")
    load_sweep(second, tmp_path / "out" / "second")[0].claim()
    load_sweep(second, tmp_path / "out" / "second")[0].check()
    write_sweep(tmp_path, "first", options={"SOLVER.EPOCHS": 5})
    with pytest.raises(ValueError, match=r"now a pretrained network of config \w+; without a pre"):
        load_sweep(second, tmp_path / "out" / "second")[0].check()


def test_missing_weights_are_one_line_before_anything_is_done(
    tmp_path: Path, main: Callable[..., None]
) -> None:
    """Wrong: ten detectors fail one after the other, each in the middle of its start."""
    expected = (
        r"error: the weights that 10 of 10 runs start from are missing, such as \S+/table3/"
        r"randwire_c109_100ep/seed1/model_final.pth: train them first, python "
        r"tools/compare_generators.py \S+/table3.yaml --output \S+/table3; or say where"
    )
    with raises_one_line(SystemExit, match=expected):
        main(SWEEPS / "table5.yaml", "--output", tmp_path / "table5")
    assert not any(tmp_path.iterdir())

    # One is there, one has been converted and removed since.
    runs = load("table5", tmp_path)
    assert runs[0].weights is not None
    Path(runs[0].weights.file).parent.mkdir(parents=True)
    Path(runs[0].weights.file).touch()
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "backbone.pth").touch()
    with pytest.raises(SystemExit, match="that 8 of 10 runs start from"):
        main(SWEEPS / "table5.yaml", "--output", tmp_path / "table5")
    main(SWEEPS / "table5.yaml", "--output", tmp_path / "table5", "--report")


def test_weights_can_lie_elsewhere(tmp_path: Path, main: Callable[..., None]) -> None:
    """Wrong: whoever has the networks already must train them again."""
    pattern = str(tmp_path / "c{channels}_{seed}.pth")
    runs = load_sweep(SWEEPS / "table5.yaml", tmp_path / "out", ["MODEL.WEIGHTS", pattern])
    for run in runs:
        file = str(tmp_path / f"c{run.setting.channels}_{run.seed}.pth")
        assert file == config_of(run).MODEL.WEIGHTS
        assert run.weights is not None and not run.weights.conversion and not run.can_start
    with pytest.raises(SystemExit, match="c109_1.pth: say where they are"):
        main(SWEEPS / "table5.yaml", "--output", tmp_path / "out", "MODEL.WEIGHTS", pattern)
    # They may move, for instance to another machine's disk: not so other weights.
    (from_elsewhere, *_), (from_table_3, *_) = runs, load("table5", tmp_path)
    assert from_elsewhere.identity != from_table_3.identity


# -------------------------------------------------------------------------------------------------
# Mistakes
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"node_ops": ["conv3x3"]}, "node_ops go with generators, which are missing"),
        ({"channels": 8, "multiply_adds": 1e6}, "channels, multiply_adds go with generators"),
        ({"generators": ["BA(1)"], "config": ["a.yaml", "b.yaml"]}, "with one config, not several"),
        ({"config": ["a.yaml", "a.yaml"]}, "config must be a list without repetitions"),
        ({"evaluate": True}, "evaluate needs pretrained, or MODEL.WEIGHTS"),
        ({"pretrained": "nowhere.yaml"}, "nowhere.yaml"),
        ({"pretrained": "other.yaml", "seeds": [1, 7]}, r"none of its runs is of .*, seed 7"),
        (
            {"pretrained": "other.yaml", "options": {"MODEL.RANDWIRE.CHANNELS": 9}},
            r"other.yaml: none of its runs is of WS\(4, 0.75\), sep_conv3x3, C=9, seed 1",
        ),
        ({"options": {"MODEL.RANDWIRE.SPEC_FILE": "x.json"}}, "SPEC_FILE 'x.json' is one network"),
        # No key of a detector's.
        ({"config": DETECTOR, "options": {"SOLVER.WARMUP_EPOCHS": 3}}, "SOLVER.WARMUP_EPOCHS"),
        ({"options": {"DATASETS.TEST": "('a', 'b')"}}, "DATASETS.TEST must be one data set"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    tmp_path: Path, keys: dict[str, object], says: str
) -> None:
    """Wrong: a sweep of months is not what it seems, or ends with its first run."""
    write_sweep(tmp_path, "other")
    with pytest.raises(ValueError, match=says):
        load_sweep(write_sweep(tmp_path, "sweep", **keys), tmp_path / "out")


def test_configs_of_one_name_have_no_folder_in_common(tmp_path: Path) -> None:
    """Wrong: two trainings write into one folder."""
    config = ROOT / "configs/shapes/randwire_pretrain.yaml"
    (tmp_path / config.name).write_text(f"_BASE_: {config}\n")
    path = write_sweep(tmp_path, "sweep", config=[str(config), config.name])
    with pytest.raises(ValueError, match="must differ in their names"):
        load_sweep(path, tmp_path / "out")


# -------------------------------------------------------------------------------------------------
# Running and reporting
# -------------------------------------------------------------------------------------------------


Recorded = tuple[Callable[[Run], Training], Callable[[], list[list[str]]]]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """Makes trainings of runs whose tools are the recorder, and tells how they were called."""
    script, log = tmp_path / "recorder.py", tmp_path / "calls"
    script.write_text(RECORDER)

    def training(run: Run) -> Training:
        run.claim()
        python = (sys.executable, str(script), str(log))
        conversion = run.weights.conversion if run.weights else ()
        convert = (*python, "convert", *conversion)
        return Training(run, (*python, "train"), convert if conversion else ())

    def calls() -> list[list[str]]:
        return [json.loads(line) for line in log.read_text().splitlines()]

    return training, calls


def test_weights_are_converted_once_and_before_the_training(
    tmp_path: Path, recorded: Recorded
) -> None:
    """Wrong: a training starts without its weights, or they change when it resumes."""
    training, calls = recorded
    run = load("table5", tmp_path)[0]
    assert run.weights is not None
    for _ in range(2):
        training(run)()
    train = ["train", "--resume", *run.arguments]
    assert calls() == [["convert", *run.weights.conversion], train, train]


def test_a_failed_conversion_is_the_runs_failure(tmp_path: Path, recorded: Recorded) -> None:
    """Wrong: a detector is trained from scratch because its weights could not be converted."""
    training, calls = recorded
    run = load("table5", tmp_path)[0]
    training(run)({"FAILS": "convert"})
    assert [name for name, *_ in calls()] == ["convert"]
    assert run.status().state == "failed" and run.status().reason == "convert is broken"


def test_an_evaluation_trains_nothing_and_is_finished_by_its_results(
    tmp_path: Path, recorded: Recorded
) -> None:
    """Wrong: Table 4's networks are trained on, or tested again at each start."""
    training, calls = recorded
    run = load("table4", tmp_path)[0]
    training(run)()
    assert calls() == [["train", "--eval-only", *run.arguments]]
    assert run.status().state == "unfinished" and run.result is None
    found = Evaluation("w.pth", None, {"classification": {"top1": 81.5, "top5": 95.5}})
    folder = run.folder / "evaluations" / "0123456789ab"
    RunFolder(folder).write_evaluation(found)
    assert (run.status().state, run.status().score) == ("finished", 81.5)
    assert run.result is not None and run.result.path == folder


NAMES = {True: ("top1", "top5"), False: ("AP", "AP50", "AP75", "APs", "APm", "APl")}


def finish(run: Run, score: float) -> None:
    """Leave what the run's tool leaves in its folder."""
    run.claim()
    cfg = config_of(run)
    values = {name: score + i for i, name in enumerate(NAMES[run.classifies])}
    task = run.metric.split("/")[0]
    if run.evaluates:
        cfg = evaluation_config(cfg, resume=False)
        folder, weights = RunFolder(cfg.OUTPUT_DIR), cfg.MODEL.WEIGHTS
        folder.write_evaluation(Evaluation(weights, training_of(weights), {task: values}))
        folder.config_file.write_text(cfg.dump())
        return
    if run.classifies:
        cfg = scale_schedule(cfg, 1_281_167)
    (run.folder / "config.yaml").write_text(cfg.dump())
    line = {f"{task}/{name}": value for name, value in values.items()}
    line["iteration"] = cfg.SOLVER.MAX_ITER - 1
    (run.folder / "metrics.json").write_text(json.dumps(line))
    (run.folder / "model_final.pth").touch()


@pytest.mark.parametrize(
    "tables, papers",
    [
        (["table2"], ["| 74.7±0.25"]),
        # Table 4 says how the networks were trained that it tests.
        (["table3", "table4"], ["| 81.6±0.13"]),
        (["table3"], ["| 79.0±0.17", "| 80.1±0.19"]),
    ],
)
def test_classifiers_stand_beside_the_papers_rows(
    tmp_path: Path, tables: list[str], papers: list[str]
) -> None:
    """Wrong: a sweep's own keys make its runs other than the paper's, and nothing is compared."""
    for name in tables:
        runs = load(name, tmp_path)
        for run in runs:
            finish(run, 70 + run.seed)
    table = report(runs).table
    assert all(paper in table for paper in papers)
    assert table.count("73.0 ± 1.58") == len(papers) and "Not " not in table


def test_the_report_has_means_beside_the_papers_rows(tmp_path: Path) -> None:
    """Wrong: a mean of other runs, no row of the paper's, or a run that is dropped silently."""
    runs = load("table5", tmp_path)
    aps: dict[int, list[float]] = {109: [], 154: []}
    for run in runs[:-1]:
        aps[run.setting.channels].append(38 + run.seed * 7 % 4)
        finish(run, aps[run.setting.channels][-1])
    runs[-1].claim()
    runs[-1].failure.write_text("exit status 1\nValueError: diverged\n")
    found = report(runs)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in found.table.splitlines()
        if line.startswith("| ")
    ]
    for channels, paper, at in ((109, "39.9", 1), (154, "41.1", 3)):
        values = aps[channels]
        here, theirs = rows[at : at + 2]
        assert here[:2] == [f"RandWire-WS, C={channels}", f"here, {len(values)} runs"]
        assert here[3] == f"{mean(values):.1f} ± {stdev(values):.2f}" and theirs[3] == paper
    assert f"Not finished (1):\n- {runs[-1].folder}: failed at 0%: ValueError: diverged" in (
        found.table
    )
    assert found.figure is None and str(runs[0].folder) in found.data


def test_detectors_of_generators_are_compared_by_their_ap(tmp_path: Path) -> None:
    """Wrong: a sweep of detectors never ends, since it waits for a top-1 accuracy."""
    path = write_sweep(tmp_path, "sweep", config=DETECTOR, generators=["BA(1)", "WS(4, 0)"])
    runs = load_sweep(path, tmp_path / "out")
    for run in runs:
        finish(run, 30 + run.seed)
    found = report(runs)
    assert "AP: mean ± std" in found.table
    assert found.table.count("31.5 ± 0.7") == found.table.count("31.0, 32.0") == 2
    assert "Not finished" not in found.table
    assert found.figure is not None and found.figure.axes[0].get_ylabel() == "AP"


@pytest.mark.slow
def test_networks_are_trained_tested_and_fine_tuned(
    tmp_path: Path, main: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: Tables 3, 4 and 5 can't be had by one command each: real tools, small networks."""
    monkeypatch.setattr("randwire_d2.experiments.trainings.POLL", 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)  # where the built-in data sets lie
    small = {"MODEL.RANDWIRE.CHANNELS": 8, "MODEL.RANDWIRE.NUM_NODES": 10}
    short = {"SOLVER.EPOCHS": 0, "SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 0}
    table3 = write_sweep(tmp_path, "networks", options={**small, **short})
    table4 = write_sweep(
        tmp_path,
        "tested",
        seeds=[1],
        pretrained="networks.yaml",
        evaluate=True,
        options={**small, "INPUT.TEST_CROP_SIZE": 64},
    )
    frozen = {"MODEL.RANDWIRE.NORM": "FrozenBN", "MODEL.BACKBONE.FREEZE_AT": 2}
    frozen |= {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.BASE_LR": 0.001, "INPUT.MIN_SIZE_TEST": 64}
    frozen |= {"MODEL.RPN.PRE_NMS_TOPK_TEST": 10, "MODEL.RPN.POST_NMS_TOPK_TEST": 5}
    table5 = write_sweep(
        tmp_path,
        "detectors",
        config=DETECTOR,
        pretrained="networks.yaml",
        options={**small, **short, **frozen},
    )
    for path in (table3, table4, table5):
        main(path, "--output", tmp_path / "out" / path.stem, "--jobs", 2)
        runs = load_sweep(path, tmp_path / "out" / path.stem)
        assert {run.status().state for run in runs} == {"finished"}

    networks = load_sweep(table3, tmp_path / "out" / "networks")
    for network, detector in zip(networks, runs, strict=True):
        ours = torch.load(detector.folder / "model_final.pth", weights_only=True)["model"]
        theirs = torch.load(network.folder / "model_final.pth", weights_only=True)["model"]
        # It is frozen, so that it is still that of the same seed's classifier.
        ours = ours["backbone.bottom_up.stem.conv.weight"]
        assert torch.equal(ours, theirs["network.backbone.stem.conv.weight"])
    table = (tmp_path / "out" / "detectors" / "table.md").read_text()
    assert "here, 2 runs" in table and "AP50" in table
