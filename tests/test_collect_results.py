"""Table 5 from the folders of runs: whose figures stand where, and that no run is lost."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path

import pytest

from randwire_d2 import NetworkGenerator
from randwire_d2.config import classifier_config, detector_config
from randwire_d2.experiments.results import find_runs, read_result, to_json, to_markdown

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "collect_results.py"
C109 = "faster_rcnn_randwire_c109_fpn_1x.yaml"
AP = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), (40.1, 62.0, 43.0, 24.0, 44.0, 52.0)))


def write_run(
    folder: Path,
    config: str,
    options: tuple = (),
    metrics: Mapping[str, float] | None = None,
    iteration: int | None = None,
) -> Path:
    """A folder as a training leaves it: config.yaml, and metrics.json with a last evaluation."""
    cfg = classifier_config() if "imagenet" in config else detector_config()
    cfg.merge_from_file(str(ROOT / "configs" / config))
    cfg.merge_from_list([*options])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    if metrics is None:
        metrics = {f"bbox/{name}": value for name, value in AP.items()}
    lines = [{"iteration": 19, "total_loss": 1.0}]
    lines.append({"iteration": cfg.SOLVER.MAX_ITER - 1 if iteration is None else iteration})
    lines[-1].update(metrics)
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def rows(text: str) -> list[list[str]]:
    cells = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells[2:]]


@pytest.mark.parametrize(
    "config, network, ap",
    [
        ("faster_rcnn_randwire_c109_fpn_1x.yaml", "RandWire-WS, C=109", "39.9"),
        ("faster_rcnn_randwire_c154_fpn_1x.yaml", "RandWire-WS, C=154", "41.1"),
        ("faster_rcnn_R_50_fpn_1x.yaml", "ResNet-50", "37.1"),
        ("faster_rcnn_R_101_fpn_1x.yaml", "ResNet-101", "39.8"),
        ("faster_rcnn_X_50_32x4d_fpn_1x.yaml", "ResNeXt-50", "38.2"),
        ("faster_rcnn_X_101_32x4d_fpn_1x.yaml", "ResNeXt-101", "40.7"),
    ],
)
def test_every_config_of_table_5_finds_the_papers_row(
    tmp_path: Path, config: str, network: str, ap: str
) -> None:
    """Wrong: another network's row of the paper, or none."""
    result = read_result(write_run(tmp_path / "run", config))
    here, paper = rows(to_markdown([result]))
    assert here == [network, "here", "coco_2017_val; 1,440k images", *map(str, AP.values())]
    assert paper[1] == "paper" and paper[3] == ap and len(paper) == 9


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.RANDWIRE.WS.P", 0.5),
        ("MODEL.RANDWIRE.CHANNELS", 110),
        ("MODEL.RANDWIRE.NODE_OP", "conv3x3"),
    ],
)
def test_another_network_is_not_compared(tmp_path: Path, options: tuple) -> None:
    """Wrong: the paper's figures below a network that it has not."""
    result = read_result(write_run(tmp_path / "run", C109, options))
    text = to_markdown([result])
    assert [row[1] for row in rows(text)] == ["here"]
    assert "The paper trained" not in text


@pytest.mark.parametrize(
    "options, unlike",
    [
        (("SOLVER.MAX_ITER", 180_000), "SOLVER.IMS_PER_BATCH · MAX_ITER"),
        (("SOLVER.STEPS", (60_000,)), "SOLVER.IMS_PER_BATCH · STEPS"),
        (("SOLVER.BASE_LR", 0.01), "SOLVER.BASE_LR / IMS_PER_BATCH"),
        (("DATASETS.TRAIN", ("coco_2017_val",)), "DATASETS.TRAIN"),
        (("DATASETS.TEST", ("randwire_shapes_val",)), "DATASETS.TEST"),
        (("INPUT.MIN_SIZE_TRAIN", (640, 800)), "INPUT.MIN_SIZE_TRAIN"),
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), "MODEL.META_ARCHITECTURE"),
        (("MODEL.BACKBONE.NAME", "build_randwire_backbone"), "MODEL.BACKBONE.NAME"),
        (("MODEL.RANDWIRE.NORM", "GN"), "MODEL.RANDWIRE.NORM"),
        (("MODEL.MASK_ON", True), "MODEL.MASK_ON"),
    ],
)
def test_another_training_is_not_compared_and_it_says_why(
    tmp_path: Path, options: tuple, unlike: str
) -> None:
    """Wrong: figures side by side that are not of the same experiment."""
    folder = write_run(tmp_path / "run", C109, options)
    text = to_markdown([read_result(folder)])
    assert [row[1] for row in rows(text)] == ["here"]
    assert (
        f"The paper trained with other values of:\n- {folder} (RandWire-WS, C=109): {unlike}"
        in text
    )


def test_half_the_batch_for_twice_as_long_is_the_same_schedule(tmp_path: Path) -> None:
    """Wrong: only those with the paper's number of GPUs see its figures."""
    halved = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER", 180_000)
    result = read_result(
        write_run(tmp_path / "run", C109, (*halved, "SOLVER.STEPS", (120_000, 160_000)))
    )
    assert [row[1] for row in rows(to_markdown([result]))] == ["here", "paper"]


@pytest.mark.parametrize(
    "options, shown",
    [
        (("SOLVER.WEIGHT_DECAY", 0.5), ["SOLVER.WEIGHT_DECAY 0.0001", "SOLVER.WEIGHT_DECAY 0.5"]),
        (("MODEL.WEIGHTS", "c109.pth"), ["MODEL.WEIGHTS none", "MODEL.WEIGHTS given"]),
        (("DATASETS.TRAIN", ("a",)), ["DATASETS.TRAIN ('coco_2017_train',)", "TRAIN ('a',)"]),
    ],
)
def test_only_seeds_are_averaged(tmp_path: Path, options: tuple, shown: list[str]) -> None:
    """Wrong: the mean of two different trainings, called a mean over seeds."""
    write_run(tmp_path / "a", C109)
    write_run(tmp_path / "b", C109, options)
    places = ("OUTPUT_DIR", "elsewhere", "DATALOADER.NUM_WORKERS", 1, "SEED", 9)
    write_run(tmp_path / "c", C109, (*places, "MODEL.RANDWIRE.SEED", 2))
    here = [row for row in rows(to_markdown([*map(read_result, find_runs([tmp_path]))])) if row[0]]
    assert [row[1] for row in here] == ["here, 2 runs", "here"]
    for row, difference in zip(here, shown):
        assert row[2].startswith("coco_2017_val; 1,440k images; ") and row[2].endswith(difference)


def test_a_folder_named_twice_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a run that agrees with itself, with a standard deviation of 0."""
    write_run(tmp_path / "run", C109)
    monkeypatch.chdir(tmp_path)
    assert len(find_runs([tmp_path, "run", "."])) == 1


def test_the_wiring_of_a_file_is_recognised(tmp_path: Path) -> None:
    """Wrong: a detector whose wiring came with its weights is not the paper's network any more."""
    for seed, generator in ((3, NetworkGenerator()), (3, NetworkGenerator(num_nodes=16))):
        folder = tmp_path / f"run{generator.num_nodes}"
        spec_file = tmp_path / "gone" / "spec.json"
        write_run(folder, C109, ("MODEL.RANDWIRE.SPEC_FILE", str(spec_file)))
        (folder / "spec.json").write_text(generator(seed).to_json())
    known, other = (read_result(folder).group for folder in sorted(tmp_path.glob("run*"))[::-1])
    assert known.network == "RandWire-WS, C=109" and known.paper is not None
    fingerprint = NetworkGenerator(num_nodes=16)(3).fingerprint
    assert other.network == f"RandWire {fingerprint[:12]}" and other.paper is None


def test_wirings_of_files_are_seeds_of_the_configs_generator(tmp_path: Path) -> None:
    """Wrong: a row per seed, where wirings came with their weights, and no mean."""
    keys = ("MODEL.RANDWIRE.GRAPH", "NAS", "MODEL.RANDWIRE.SPEC_FILE", "gone.json")
    for seed in (1, 2):
        folder = write_run(tmp_path / str(seed), C109, keys)
        spec = NetworkGenerator(graph="NAS", graph_params={"cell_nodes": 5})(seed)
        (folder / "spec.json").write_text(spec.to_json())
    (here,) = rows(to_markdown([*map(read_result, find_runs([tmp_path]))]))
    assert here[:2] == ["RandWire-NAS(5), regular, N=32, C=109, sep_conv3x3", "here, 2 runs"]


def test_seeds_are_one_row_and_unfinished_runs_are_listed(tmp_path: Path) -> None:
    """Wrong: an unfinished run's AP in the mean, or a run that is not heard of any more."""
    for seed, ap in ((1, 39.0), (2, 41.0)):
        options = ("MODEL.RANDWIRE.SEED", seed, "SEED", seed)
        metrics = {f"bbox/{name}": ap for name in AP}
        write_run(tmp_path / "a" / f"seed{seed}", C109, options, metrics)
    killed = write_run(tmp_path / "a" / "killed", C109, iteration=44_999)
    bare = write_run(tmp_path / "b", C109, metrics={})
    empty = write_run(tmp_path / "c", C109)
    (empty / "metrics.json").unlink()
    results = [read_result(folder) for folder in find_runs([tmp_path, killed])]
    assert len(results) == 5
    text = to_markdown(results)
    here = rows(text)[0]
    assert here[:4] == [here[0], "here, 2 runs", here[2], "40.0 ± 1.41"]
    assert "Not finished (3):" in text
    for folder, done in ((killed, "50%"), (bare, "100%"), (empty, "0%")):
        assert f"- {folder} (RandWire-WS, C=109): {done} done" in text
    assert f"- {bare} (RandWire-WS, C=109): 100% done, but bbox/AP is missing" in text
    data = json.loads(to_json(results))
    assert sum(run["values"] is None for run in data) == 3
    assert all(run["paper"]["AP"] == "39.9" for run in data)


def test_classifiers_have_a_table_of_their_own(tmp_path: Path) -> None:
    accuracy = {"classification/top1": 78.9, "classification/top5": 94.3}
    schedule = ("SOLVER.MAX_ITER", -(-100 * 1_281_167 // 256), "SOLVER.EPOCHS", 0)
    write_run(tmp_path / "d", "faster_rcnn_R_50_fpn_1x.yaml")
    write_run(tmp_path / "c", "imagenet/randwire_c109_100ep.yaml", schedule, accuracy)
    undefined = {**{f"bbox/{name}": 1.0 for name in AP}, "bbox/APl": float("nan")}
    write_run(tmp_path / "n", "faster_rcnn_randwire_shapes.yaml", metrics=undefined)
    text = to_markdown([read_result(folder) for folder in find_runs([tmp_path])])
    assert "top-1" in text and "APl" in text
    assert "| 79.0±0.17 | 94.4±0.11" in text and "| 78.9 " in text
    assert "–" in text, "no large objects, no APl"


def test_the_tool(tmp_path: Path) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    write_run(tmp_path / "run", "faster_rcnn_R_50_fpn_1x.yaml")
    output = tmp_path / "made" / "table.md"
    main([str(tmp_path), "--output", str(output)])
    assert "ResNet-50" in output.read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="is no OUTPUT_DIR of a training, and holds none"):
        main([str(tmp_path / "empty")])
    for text, says in (("NO_SUCH_KEY: 1\n", "NO_SUCH_KEY"), ("- 1\n", "config.yaml"), ("", "yaml")):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(SystemExit, match=rf"collect_results.py: error: .*{says}"):
            main([str(tmp_path / "run")])
