"""Tables 2 to 5 from the folders of runs: whose numbers stand where, and that no run is lost."""

import json
import runpy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from helpers import ROOT

from randwire_d2 import NetworkGenerator
from randwire_d2.config import classifier_config, detector_config, is_classifier
from randwire_d2.engine import scale_schedule
from randwire_d2.experiments.paper_recipe import (
    IMAGENET_IMAGES,
    find_reference,
    join_recipes,
    read_recipe,
)
from randwire_d2.experiments.results import (
    Reference,
    find_runs,
    read_result,
    read_runs,
    to_json,
    to_markdown,
)
from randwire_d2.runs import Evaluation, RunFolder, evaluation_config, training_of

TOOL = ROOT / "tools" / "collect_results.py"
D109 = "faster_rcnn_randwire_c109_fpn_1x.yaml"
C109 = "imagenet/randwire_c109_100ep.yaml"
C154 = "imagenet/randwire_c154_100ep.yaml"
AP = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), (40.1, 62.0, 43.0, 24.0, 44.0, 52.0)))


def read_config(config: str, options: tuple = ()) -> CfgNode:
    """A config as a trainer has it: a detector begins with weights, a classifier's is scaled."""
    classifies = "imagenet" in config
    cfg = classifier_config() if classifies else detector_config()
    cfg.merge_from_file(str(ROOT / "configs" / config))
    if not classifies:
        cfg.MODEL.WEIGHTS = "pretrained.pth"
    cfg.merge_from_list([*options])
    return scale_schedule(cfg, IMAGENET_IMAGES) if classifies else cfg


def write_run(
    folder: Path,
    config: str | CfgNode,
    options: tuple = (),
    metrics: Mapping[str, float] | None = None,
    iteration: int | None = None,
) -> Path:
    """A folder as a training leaves it: config.yaml, and metrics.json with a last evaluation."""
    cfg = read_config(config, options) if isinstance(config, str) else config
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    if metrics is None:
        ap = {f"bbox/{name}": value for name, value in AP.items()}
        metrics = accuracy(78.9) if is_classifier(cfg) else ap
    lines: list[dict[str, Any]] = [{"iteration": 19, "total_loss": 1.0}]
    lines.append({"iteration": cfg.SOLVER.MAX_ITER - 1 if iteration is None else iteration})
    lines[-1].update(metrics)
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def accuracy(top1: float) -> dict[str, float]:
    return {"classification/top1": top1, "classification/top5": 94.3}


def write_evaluation(
    training: Path,
    config: str,
    options: tuple = (),
    results: Mapping[str, dict[str, float]] | None = None,
    weights: str = "model_final.pth",
) -> Path:
    """A folder as ``--eval-only`` leaves it, of a checkpoint that lies in ``training``."""
    cfg = classifier_config() if "imagenet" in config else detector_config()
    cfg.merge_from_file(str(ROOT / "configs" / config))
    places = ("OUTPUT_DIR", str(training), "MODEL.WEIGHTS", str(training / weights))
    cfg.merge_from_list([*places, *options])
    cfg = evaluation_config(cfg, resume=False)
    run = RunFolder(cfg.OUTPUT_DIR)
    found = {task: dict(values) for task, values in (results or {}).items()}
    run.write_evaluation(Evaluation(cfg.MODEL.WEIGHTS, training_of(cfg.MODEL.WEIGHTS), found))
    run.config_file.write_text(cfg.dump())
    return run.path


def top1(value: float) -> dict[str, dict[str, float]]:
    return {"classification": {"top1": value, "top5": 95.5}}


def rows(text: str) -> list[list[str]]:
    cells = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in row] for row in cells]
    return [row for row in table if not row[0].startswith(("network", ":-"))]


def reference(folder: Path) -> Reference:
    found = read_result(folder).group.reference
    assert found is not None
    return found


# -------------------------------------------------------------------------------------------------
# Whether a run is the paper's
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, network, table, best",
    [
        ("faster_rcnn_randwire_c109_fpn_1x.yaml", "RandWire-WS, C=109", 5, "39.9"),
        ("faster_rcnn_randwire_c154_fpn_1x.yaml", "RandWire-WS, C=154", 5, "41.1"),
        ("faster_rcnn_R_50_fpn_1x.yaml", "ResNet-50", 5, "37.1"),
        ("faster_rcnn_R_101_fpn_1x.yaml", "ResNet-101", 5, "39.8"),
        ("faster_rcnn_X_50_32x4d_fpn_1x.yaml", "ResNeXt-50", 5, "38.2"),
        ("faster_rcnn_X_101_32x4d_fpn_1x.yaml", "ResNeXt-101", 5, "40.7"),
        ("imagenet/randwire_c78_250ep.yaml", "RandWire-WS, C=78", 2, "74.7±0.25"),
        ("imagenet/randwire_c109_100ep.yaml", "RandWire-WS, C=109", 3, "79.0±0.17"),
        ("imagenet/randwire_c154_100ep.yaml", "RandWire-WS, C=154", 3, "80.1±0.19"),
        ("imagenet/R_50_100ep.yaml", "ResNet-50", 3, "77.1"),
        ("imagenet/R_101_100ep.yaml", "ResNet-101", 3, "78.8"),
        ("imagenet/X_50_32x4d_100ep.yaml", "ResNeXt-50", 3, "78.4"),
        ("imagenet/X_101_32x4d_100ep.yaml", "ResNeXt-101", 3, "79.5"),
    ],
)
def test_every_config_of_the_paper_finds_its_row(
    tmp_path: Path, config: str, network: str, table: int, best: str
) -> None:
    """Wrong: another network's row of the paper, or none."""
    result = read_result(write_run(tmp_path / "run", config))
    here, paper = rows(to_markdown([result]))
    data = "coco_2017_val; trained on 1,440k images" if table == 5 else "imagenet_val, 224×224; "
    assert here[:2] == [network, "here"] and here[2].startswith(data)
    assert paper[1] == f"paper, Table {table}" and paper[3] == best
    assert len(here) == len(paper) and all(paper[3:])


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.RANDWIRE.WS.P", 0.5),
        ("MODEL.RANDWIRE.CHANNELS", 110),
        ("MODEL.RANDWIRE.REGIME", "small"),
        ("MODEL.RANDWIRE.NUM_NODES", 16),
        ("MODEL.BACKBONE.NAME", "build_mine"),
        ("MODEL.RANDWIRE.NODE_OP", "conv3x3"),
    ],
)
def test_another_network_is_not_compared(tmp_path: Path, options: tuple) -> None:
    """Wrong: the paper's numbers below a network that it has not."""
    result = read_result(write_run(tmp_path / "run", D109, options))
    text = to_markdown([result])
    assert [row[1] for row in rows(text)] == ["here"]
    assert "as in the paper" not in text


@pytest.mark.parametrize(
    "config, options, said",
    [
        (D109, ("SOLVER.MAX_ITER", 180_000), "SOLVER.MAX_ITER: 180000; the paper: 90000"),
        (D109, ("SOLVER.STEPS", (60_000,)), "SOLVER.STEPS: (60000,); the paper: (60000, 80000)"),
        (D109, ("SOLVER.BASE_LR", 0.01), "SOLVER.BASE_LR: 0.01; the paper: 0.02"),
        (D109, ("DATASETS.TRAIN", ("coco_2017_val",)), "DATASETS.TRAIN: ('coco_2017_val',); the"),
        (D109, ("DATASETS.TEST", ("mine",)), "DATASETS.TEST: ('mine',); the"),
        (D109, ("INPUT.MIN_SIZE_TRAIN", (640, 800)), "INPUT.MIN_SIZE_TRAIN: (640, 800); the"),
        (D109, ("MODEL.META_ARCHITECTURE", "RetinaNet"), "MODEL.META_ARCHITECTURE: RetinaNet; "),
        (D109, ("MODEL.RANDWIRE.NORM", "GN"), "MODEL.RANDWIRE.NORM: GN; the paper: FrozenBN"),
        (D109, ("MODEL.RPN.SMOOTH_L1_BETA", 0.0), "MODEL.RPN.SMOOTH_L1_BETA: 0.0; the paper: 0.11"),
        (D109, ("MODEL.WEIGHTS", ""), "MODEL.WEIGHTS: none; the paper: given"),
        (C109, ("SOLVER.WEIGHT_DECAY", 5e-5), "SOLVER.WEIGHT_DECAY: 5e-05; the paper: 1e-05"),
        (C109, ("SOLVER.NESTEROV", False), "SOLVER.NESTEROV: False; the paper: True"),
        (C109, ("SOLVER.BASE_LR", 0.2), "SOLVER.BASE_LR: 0.2; the paper: 0.1"),
        (C109, ("MODEL.CLASSIFIER.LABEL_SMOOTHING", 0.0), "LABEL_SMOOTHING: 0.0; the paper: 0.1"),
        (C109, ("MODEL.CLASSIFIER.DROPOUT", 0.0), "DROPOUT: 0.0; the paper: 0.2"),
        (C109, ("MODEL.RANDWIRE.EDGE_DROP_PROB", 0.0), "EDGE_DROP_PROB: 0.0; the paper: 0.1"),
        (C109, ("SOLVER.EPOCHS", 250), "SOLVER.MAX_ITER: 1251140; the paper: 500456"),
        (C109, ("MODEL.WEIGHTS", "first.pth"), "MODEL.WEIGHTS: given; the paper: none"),
        ("imagenet/randwire_c78_100ep.yaml", (), "SOLVER.MAX_ITER: 500456; the paper: 1251140"),
    ],
)
def test_another_training_is_not_compared_and_it_says_why(
    tmp_path: Path, config: str, options: tuple, said: str
) -> None:
    """Wrong: numbers side by side that are not of the same experiment, or nobody learns why not."""
    folder = write_run(tmp_path / "run", config, options)
    text = to_markdown([read_result(folder)])
    assert [row[1] for row in rows(text)] == ["here"]
    _, _, reasons = text.partition("Not trained or tested as in the paper:\n")
    first, reason = reasons.splitlines()
    assert first.startswith(f"- {folder} (RandWire-WS, C=") and said in reason


@pytest.mark.parametrize("config", [D109, C109])
def test_every_key_is_compared_that_is_no_exception(tmp_path: Path, config: str) -> None:
    """Wrong: a key that was added, or forgotten, changes a training that passes for the paper's."""
    cfg = RunFolder(write_run(tmp_path / "run", config)).config()
    recipe = read_recipe(cfg)
    for key in recipe.keys() - {"SOLVER.IMS_PER_BATCH", "MODEL.META_ARCHITECTURE"}:
        found = find_reference("RandWire-WS, C=109", {**recipe, key: "another"})
        assert found is not None and [d.key for d in found.differences] == [key]
    found = find_reference("RandWire-WS, C=109", {**recipe, "MODEL.RANDWIRE.ADDED": True})
    assert found is not None and found.differences == (
        ("MODEL.RANDWIRE.ADDED", "True", "not read"),
    )
    cfg.MODEL.RANDWIRE.ADDED = True
    assert read_recipe(cfg)["MODEL.RANDWIRE.ADDED"] is True


def test_seeds_places_and_speed_are_no_difference(tmp_path: Path) -> None:
    """Wrong: only who has the authors' machine, or their seed, sees the paper's numbers."""
    places = ("OUTPUT_DIR", "elsewhere", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 1)
    speed = ("MODEL.RANDWIRE.FUSED", "off", "MODEL.RANDWIRE.RECOMPUTE", True)
    places += ("SOLVER.HANG_TIMEOUT", 60)
    seeds = ("SEED", 9, "MODEL.RANDWIRE.SEED", 2, "TEST.EVAL_PERIOD", 7)
    # A RandWire's training reads no key of a ResNet, and a cosine has no steps.
    unread = ("MODEL.RESNETS.DEPTH", 18, "SOLVER.STEPS", (1,), "SOLVER.AMP.PRECISION", "bfloat16")
    for i, options in enumerate((places, speed, seeds, unread)):
        assert reference(write_run(tmp_path / str(i), C109, options)).comparable, options


def test_the_papers_schedule_for_another_batch_is_the_papers(tmp_path: Path) -> None:
    """Wrong: only those with the paper's number of GPUs see its numbers."""
    halved = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER", 180_000)
    halved += ("SOLVER.STEPS", (120_000, 160_000), "SOLVER.WARMUP_ITERS", 1000)
    assert reference(write_run(tmp_path / "by hand", D109, halved)).comparable
    scaled = read_config(D109, ("SOLVER.REFERENCE_WORLD_SIZE", 8))
    scaled = DefaultTrainer.auto_scale_workers(scaled, 24)
    assert scaled.SOLVER.IMS_PER_BATCH == 48
    assert reference(write_run(tmp_path / "by Detectron2", scaled)).comparable
    for batch in (96, 1024):
        options = ("SOLVER.IMS_PER_BATCH", batch)
        assert reference(write_run(tmp_path / f"{batch}", C109, options)).comparable
    # A larger batch with the smaller one's rate is another recipe.
    options = ("SOLVER.IMS_PER_BATCH", 1024, "SOLVER.BASE_LR", 0.025)
    differences = reference(write_run(tmp_path / "small rate", C109, options)).differences
    assert differences == (("SOLVER.BASE_LR", "0.1", "0.4"),)
    with pytest.raises(ValueError, match="IMS_PER_BATCH must be at least 1; got 0"):
        read_result(write_run(tmp_path / "none", D109, ("SOLVER.IMS_PER_BATCH", 0)))


# -------------------------------------------------------------------------------------------------
# Rows
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, shown",
    [
        (("SOLVER.WEIGHT_DECAY", 0.5), ["SOLVER.WEIGHT_DECAY 0.0001", "SOLVER.WEIGHT_DECAY 0.5"]),
        (("MODEL.WEIGHTS", ""), ["MODEL.WEIGHTS given", "MODEL.WEIGHTS none"]),
        (("DATASETS.TRAIN", ("a",)), ["DATASETS.TRAIN ('coco_2017_train',)", "TRAIN ('a',)"]),
    ],
)
def test_only_seeds_are_averaged(tmp_path: Path, options: tuple, shown: list[str]) -> None:
    """Wrong: the mean of two different trainings, called a mean over seeds."""
    write_run(tmp_path / "a", D109)
    write_run(tmp_path / "b", D109, options)
    places = ("OUTPUT_DIR", "elsewhere", "DATALOADER.NUM_WORKERS", 1, "SEED", 9)
    write_run(tmp_path / "c", D109, (*places, "MODEL.RANDWIRE.SEED", 2))
    here = [row for row in rows(to_markdown(read_runs([tmp_path])[0])) if row[0]]
    assert [row[1] for row in here] == ["here, 2 runs", "here"]
    for row, difference in zip(here, shown):
        assert row[2].startswith("coco_2017_val; trained on 1,440k images; ") and row[2].endswith(
            difference
        )


def test_a_folder_named_twice_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a run that agrees with itself, with a standard deviation of 0."""
    write_run(tmp_path / "run", D109)
    monkeypatch.chdir(tmp_path)
    assert len(find_runs([tmp_path, "run", "."])) == 1


def test_a_drawn_wiring_is_recognised(tmp_path: Path) -> None:
    """Wrong: a detector whose wiring came with its weights is not the paper's network any more."""
    file = tmp_path / "spec.json"
    file.write_text(NetworkGenerator()(3).to_json())
    other = NetworkGenerator(num_nodes=16)(3)
    networks = {
        ("MODEL.RANDWIRE.SPEC", f"\n {file.read_text()}"): "RandWire-WS, C=109",
        ("MODEL.RANDWIRE.SPEC_FILE", str(file)): "RandWire-WS, C=109",
        ("MODEL.RANDWIRE.SPEC_FILE", "gone.json"): "RandWire of gone.json",
        ("MODEL.RANDWIRE.SPEC", f"\n {other.to_json()}"): f"RandWire {other.fingerprint[:12]}",
    }
    for i, (options, network) in enumerate(networks.items()):
        group = read_result(write_run(tmp_path / str(i), D109, options)).group
        assert group.network == network
        assert (group.reference is not None) == (network == "RandWire-WS, C=109")


def test_drawn_wirings_are_seeds_of_the_configs_generator(tmp_path: Path) -> None:
    """Wrong: a row per seed, where wirings came with their weights, and no mean."""
    for seed in (1, 2):
        spec = NetworkGenerator(graph="NAS", graph_params={"cell_nodes": 5})(seed)
        keys = ("MODEL.RANDWIRE.GRAPH", "NAS", "MODEL.RANDWIRE.SPEC", f"\n {spec.to_json()}")
        write_run(tmp_path / str(seed), D109, keys)
    (here,) = rows(to_markdown(read_runs([tmp_path])[0]))
    assert here[:2] == ["RandWire-NAS(5), regular, N=32, C=109, sep_conv3x3", "here, 2 runs"]


@pytest.mark.parametrize("seeds", [(1, 2), (-1, -1)])
def test_a_copied_or_repeated_training_is_no_further_seed(
    tmp_path: Path, seeds: tuple[int, int]
) -> None:
    """Wrong: a backup of one run, or a second training of its seed, is in the mean and makes the
    deviation smaller, or is passed over in silence; or trainings that drew their seeds are one."""
    for name, seed, ap in (("a", seeds[0], 39.0), ("b", seeds[1], 41.0)):
        metrics = {f"bbox/{key}": ap for key in AP}
        write_run(tmp_path / name, "faster_rcnn_R_50_fpn_1x.yaml", ("SEED", seed), metrics)
    repeats = [tmp_path / "backup" / "b"]
    shutil.copytree(tmp_path / "b", repeats[0])
    if seeds == (1, 2):
        repeats.append(tmp_path / "c")
        write_run(repeats[1], "faster_rcnn_R_50_fpn_1x.yaml", ("SEED", 1))
    results, _ = read_runs([tmp_path / "a", tmp_path / "b", *repeats])
    text = to_markdown(results)
    assert rows(text)[0][1::2] == ["here, 2 runs", *["40.0 ± 1.41"] * 3]
    assert f"no further seeds ({len(repeats)}):\n- {repeats[0]}: as {tmp_path / 'b'}" in text
    listed = [run["folder"] for run in json.loads(to_json(results))["runs"] if run["repeats"]]
    assert listed == [str(folder) for folder in repeats]


def test_a_small_training_has_seen_images(tmp_path: Path) -> None:
    """Wrong: a training of 120 images is one of 0k."""
    options = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 30)
    text = to_markdown([read_result(write_run(tmp_path / "run", D109, options))])
    assert "coco_2017_val; trained on 120 images" in text


def test_seeds_are_one_row_and_unfinished_runs_are_listed(tmp_path: Path) -> None:
    """Wrong: an unfinished run's AP in the mean, or a run that is not heard of any more."""
    for seed, ap in ((1, 39.0), (2, 41.0)):
        options = ("MODEL.RANDWIRE.SEED", seed, "SEED", seed)
        metrics = {f"bbox/{name}": ap for name in AP}
        write_run(tmp_path / "a" / f"seed{seed}", D109, options, metrics)
    killed = write_run(tmp_path / "a" / "killed", D109, iteration=44_999)
    bare = write_run(tmp_path / "b", D109, metrics={})
    empty = write_run(tmp_path / "c", D109)
    (empty / "metrics.json").unlink()
    results, _ = read_runs([tmp_path, killed])
    assert len(results) == 5
    text = to_markdown(results)
    here = rows(text)[0]
    assert here[:4] == [here[0], "here, 2 runs", here[2], "40.0 ± 1.41"]
    assert "Not finished (3):" in text
    for folder, done in ((killed, "50%"), (bare, "100%"), (empty, "0%")):
        assert f"- {folder} (RandWire-WS, C=109): {done} done" in text
    assert f"- {bare} (RandWire-WS, C=109): 100% done, but bbox/AP is missing" in text
    data = json.loads(to_json(results))["runs"]
    assert sum(run["values"] is None for run in data) == 3
    assert all(run["paper"]["values"]["AP"] == "39.9" for run in data)
    assert all(run["paper"]["comparable"] and run["kind"] == "training" for run in data)


def test_classifiers_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Wrong: an AP below top-1, or "nan" for what does not exist."""
    write_run(tmp_path / "d", "faster_rcnn_R_50_fpn_1x.yaml")
    write_run(tmp_path / "c", C109)
    undefined = {**{f"bbox/{name}": 1.0 for name in AP}, "bbox/APl": float("nan")}
    write_run(tmp_path / "n", "faster_rcnn_randwire_shapes.yaml", metrics=undefined)
    results, _ = read_runs([tmp_path])
    text = to_markdown(results)
    assert "top-1" in text and "APl" in text
    assert "| 79.0±0.17 | 94.4±0.11" in text and "| 78.9 " in text
    assert "–" in text, "no large objects, no APl"
    data = json.loads(to_json(results), parse_constant=pytest.fail)["runs"]
    (values,) = (run["values"] for run in data if run["folder"] == str(tmp_path / "n"))
    assert (values["AP"], values["APl"]) == (1.0, None)


# -------------------------------------------------------------------------------------------------
# Evaluations
# -------------------------------------------------------------------------------------------------

AT_320 = ("INPUT.TEST_CROP_SIZE", 320)


def test_table_4(tmp_path: Path) -> None:
    """Wrong: Table 4 has no row, or an evaluation counts as a training, or in its mean."""
    for seed, value in ((1, 81.0), (2, 82.0)):
        options = ("MODEL.RANDWIRE.SEED", seed)
        run = write_run(tmp_path / f"seed{seed}", C154, options, accuracy(79.0 + seed))
        write_evaluation(run, C154, (*options, *AT_320), top1(value))
    results, _ = read_runs([tmp_path])
    text = to_markdown(results)
    assert "Not finished" not in text and "as in the paper" not in text
    (trained, table_3, tested, table_4) = rows(text)
    data = f"imagenet_val, 224×224; trained on {500_456 * 256 / 1000:,.0f}k images"
    assert trained == ["RandWire-WS, C=154", "here, 2 runs", data, "80.5 ± 0.71", "94.3 ± 0.00"]
    assert table_3 == ["", "paper, Table 3", "", "80.1±0.19", "94.8±0.18"]
    assert tested[1:] == [
        "here, 2 evaluations", data.replace("224×224", "320×320"), "81.5 ± 0.71", "95.5 ± 0.00"
    ]  # fmt: skip
    assert table_4 == ["", "paper, Table 4", "", "81.6±0.13", "95.6±0.07"]
    kinds = [run["kind"] for run in json.loads(to_json(results))["runs"]]
    assert sorted(kinds) == ["evaluation"] * 2 + ["training"] * 2


def test_an_evaluation_is_compared_as_its_training_was_trained(tmp_path: Path) -> None:
    """Wrong: Table 4's numbers beside a training that was not Table 3's, or a test that was not
    Table 4's; or an evaluation must repeat the training's options."""
    decay = ("SOLVER.WEIGHT_DECAY", 5e-5)
    run = write_run(tmp_path / "decay", C154, decay)
    assert reference(write_evaluation(run, C154, AT_320, top1(81.0))) == Reference(
        4, ("81.6±0.13", "95.6±0.07"), (("SOLVER.WEIGHT_DECAY", "5e-05", "1e-05"),)
    )
    run = write_run(tmp_path / "batch", C154, ("SOLVER.IMS_PER_BATCH", 1024))
    assert reference(write_evaluation(run, C154, AT_320, top1(81.0))).comparable
    # Keys of training in the command of an evaluation, which nothing reads.
    assert reference(write_evaluation(run, C154, (*AT_320, *decay), top1(81.0))).comparable
    at_256 = write_evaluation(run, C154, ("INPUT.TEST_CROP_SIZE", 256), top1(80.0))
    assert reference(at_256).differences == (("INPUT.TEST_CROP_SIZE", "256", "224"),)
    bgr = write_evaluation(run, C154, (*AT_320, "INPUT.FORMAT", "BGR"), top1(70.0))
    assert reference(bgr).differences == (("INPUT.FORMAT", "RGB, tested with BGR", "RGB"),)
    early = write_evaluation(run, C154, AT_320, top1(70.0), weights="model_0004999.pth")
    ((key, here, paper),) = reference(early).differences
    assert (key, here, paper) == ("MODEL.WEIGHTS", "none, tested with model_0004999.pth", "none")


def test_precise_norms_are_the_trainings() -> None:
    """Wrong: a training with precise batch norms passes for one without, once it is evaluated."""
    training, test = read_recipe(read_config(C154)), read_recipe(read_config(C154, AT_320))
    training["TEST.PRECISE_BN.ENABLED"] = True
    joined = join_recipes(training, test)
    assert joined["TEST.PRECISE_BN.ENABLED"] == "True, tested with False"
    assert joined["INPUT.TEST_CROP_SIZE"] == 320


def test_one_checkpoint_is_one_seed(tmp_path: Path) -> None:
    """Wrong: a checkpoint that was tested twice is the mean of two, with a deviation of 0."""
    run = write_run(tmp_path / "run", C154)
    first = write_evaluation(run, C154, AT_320, top1(81.0))
    again = first.with_name("once again")
    again.mkdir()
    for path in first.iterdir():
        (again / path.name).write_bytes(path.read_bytes())
    text = to_markdown(read_runs([run])[0])
    assert [row[1] for row in rows(text) if row[0]] == ["here", "here, evaluation"]
    assert f"no further seeds (1):\n- {again}: as {first}" in text


@pytest.mark.parametrize("config", [C154, "imagenet/randwire_c78_100ep.yaml", D109])
def test_weights_without_their_training_are_not_compared(tmp_path: Path, config: str) -> None:
    """Wrong: the paper's numbers beside weights of which nobody knows how they were trained, or a
    mean over them."""
    found = {"bbox": AP} if config == D109 else top1(81.5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_evaluation(tmp_path / name, config, (), found)
    text = to_markdown(read_runs([tmp_path])[0])
    assert [row[1] for row in rows(text)] == ["here, evaluation"] * 2
    for name in ("a", "b"):
        weights = tmp_path / name / "model_final.pth"
        assert (
            "how its weights were trained can't be told: no training's config.yaml lies beside "
            f"{weights}\n" in f"{text}\n"
        )


def test_a_detectors_evaluation_stands_beside_table_5(tmp_path: Path) -> None:
    """Wrong: what --eval-only finds is lost, or passes for the training's own."""
    run = write_run(tmp_path / "run", D109)
    write_evaluation(run, D109, (), {"bbox": AP})
    without = write_evaluation(run, D109, ("TEST.DETECTIONS_PER_IMAGE", 10), {"segm": AP})
    started = write_evaluation(run, D109, ("TEST.DETECTIONS_PER_IMAGE", 20))
    (started / "results.json").unlink()
    text = to_markdown(read_runs([tmp_path])[0])
    assert [row[1] for row in rows(text)] == [
        "here", "paper, Table 5", "here, evaluation", "paper, Table 5"
    ]  # fmt: skip
    assert f"- {without} (RandWire-WS, C=109): 100% done, but bbox/AP is missing" in text
    assert f"- {started} (RandWire-WS, C=109): an evaluation without results" in text


# -------------------------------------------------------------------------------------------------
# The tool
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("NO_SUCH_KEY: 1\n", "NO_SUCH_KEY"),
        ("- 1\n", "config.yaml"),
        ("", "config.yaml"),
        ("a: [\n", "config.yaml"),
        ("SOLVER: {MAX_ITER: many}\n", "SOLVER.MAX_ITER"),
        ("MODEL: {BACKBONE: {NAME: build_randwire_backbone}, RANDWIRE: {GRAPH: MINE}}\n", "MINE"),
        ("MODEL: {BACKBONE: {NAME: build_randwire_backbone}, RANDWIRE: {SPEC: '{}'}}\n", "SPEC"),
        ("SOLVER: {IMS_PER_BATCH: 0}\n", "SOLVER.IMS_PER_BATCH must be at least 1"),
    ],
)
def test_one_foreign_config_does_not_stop_the_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    """Wrong: one folder of somebody else's hides all other runs, or is passed over in silence."""
    main = runpy.run_path(str(TOOL))["main"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path)])
    message = str(error.value)
    assert message.startswith("collect_results.py: error: no run can be read: ")
    assert said in message and "\n" not in message
    write_run(tmp_path / "run", "faster_rcnn_R_50_fpn_1x.yaml")
    main([str(tmp_path)])
    table, _, others = capsys.readouterr().out.partition("\n\nNot readable (1):\n")
    assert "ResNet-50" in table
    (line,) = others.splitlines()
    assert line.startswith(f"- {foreign}: ") and said in line
    main([str(tmp_path), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 1 and found["unreadable"][0]["folder"] == str(foreign)


def test_a_damaged_evaluation_does_not_stop_the_tool(tmp_path: Path) -> None:
    """Wrong: results.json that a full disk cut off hides all other runs."""
    run = write_run(tmp_path / "run", C154)
    damaged = write_evaluation(run, C154, AT_320, top1(81.0))
    (damaged / "results.json").write_text("{")
    results, unreadable = read_runs([tmp_path])
    assert [result.folder for result in results] == [run]
    assert list(unreadable) == [damaged] and "is damaged" in unreadable[damaged]


def test_the_tool(tmp_path: Path) -> None:
    """Wrong: --output is not taken."""
    main = runpy.run_path(str(TOOL))["main"]
    write_run(tmp_path / "run", "faster_rcnn_R_50_fpn_1x.yaml")
    output = tmp_path / "made" / "table.md"
    main([str(tmp_path), "--output", str(output)])
    assert "ResNet-50" in output.read_text() and "paper, Table 5" in output.read_text()
