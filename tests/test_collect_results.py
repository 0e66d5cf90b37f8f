"""Table 5 from the folders of runs: whose figures stand where, and that no run is lost."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from randwire_d2 import NetworkGenerator, add_randwire_config
from randwire_d2.classification import add_classification_config
from randwire_d2.experiments.results import find_runs, read_result, to_json, to_markdown

ROOT = Path(__file__).parents[1]
AP = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), (40.1, 62.0, 43.0, 24.0, 44.0, 52.0)))


def write_run(
    folder: Path,
    config: str,
    options: tuple = (),
    metrics: Mapping[str, float] | None = None,
    iteration: int | None = None,
) -> Path:
    """A folder as a training leaves it: config.yaml, and metrics.json with a last evaluation."""
    cfg = get_cfg()
    add_randwire_config(cfg)
    if "imagenet" in config:
        add_classification_config(cfg)
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
        ("SOLVER.MAX_ITER", 180_000),
        ("DATASETS.TEST", ("randwire_shapes_val",)),
    ],
)
def test_another_network_data_or_schedule_is_not_compared(tmp_path: Path, options: tuple) -> None:
    """Wrong: figures side by side that are not of the same experiment."""
    config = "faster_rcnn_randwire_c109_fpn_1x.yaml"
    result = read_result(write_run(tmp_path / "run", config, options))
    assert [row[1] for row in rows(to_markdown([result]))] == ["here"]


def test_the_wiring_of_a_file_is_recognised(tmp_path: Path) -> None:
    """Wrong: a detector whose wiring came with its weights is not the paper's network any more."""
    config = "faster_rcnn_randwire_c109_fpn_1x.yaml"
    for seed, generator in ((3, NetworkGenerator()), (3, NetworkGenerator(num_nodes=16))):
        folder = tmp_path / f"run{generator.num_nodes}"
        spec_file = tmp_path / "gone" / "spec.json"
        write_run(folder, config, ("MODEL.RANDWIRE.SPEC_FILE", str(spec_file)))
        (folder / "spec.json").write_text(generator(seed).to_json())
    known, other = (read_result(folder).group for folder in sorted(tmp_path.glob("run*"))[::-1])
    assert known.network == "RandWire-WS, C=109" and known.paper is not None
    fingerprint = NetworkGenerator(num_nodes=16)(3).fingerprint
    assert other.network == f"RandWire {fingerprint[:12]}" and other.paper is None


def test_seeds_are_one_row_and_unfinished_runs_are_listed(tmp_path: Path) -> None:
    """Wrong: an unfinished run's AP in the mean, or a run that is not heard of any more."""
    config = "faster_rcnn_randwire_c109_fpn_1x.yaml"
    for seed, ap in ((1, 39.0), (2, 41.0)):
        options = ("MODEL.RANDWIRE.SEED", seed, "SEED", seed)
        metrics = {f"bbox/{name}": ap for name in AP}
        write_run(tmp_path / "a" / f"seed{seed}", config, options, metrics)
    killed = write_run(tmp_path / "a" / "killed", config, iteration=44_999)
    bare = write_run(tmp_path / "b", config, metrics={})
    empty = write_run(tmp_path / "c", config)
    (empty / "metrics.json").unlink()
    results = [read_result(folder) for folder in find_runs([tmp_path, killed])]
    assert len(results) == 5
    text = to_markdown(results)
    here = rows(text)[0]
    assert here[:4] == [here[0], "here, 2 runs", here[2], "40.0 ± 1.41"]
    assert "3 runs are not finished:" in text
    for folder, done in ((killed, "50%"), (bare, "100%"), (empty, "0%")):
        assert f"- {folder} (RandWire-WS, C=109): {done} done" in text
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
    main = runpy.run_path(str(ROOT / "tools" / "collect_results.py"))["main"]
    write_run(tmp_path / "run", "faster_rcnn_R_50_fpn_1x.yaml")
    output = tmp_path / "made" / "table.md"
    main([str(tmp_path), "--output", str(output)])
    assert "ResNet-50" in output.read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="is no OUTPUT_DIR of a training, and holds none"):
        main([str(tmp_path / "empty")])
    (tmp_path / "run" / "config.yaml").write_text("NO_SUCH_KEY: 1\n")
    with pytest.raises(SystemExit, match=r"collect_results.py: error: .*NO_SUCH_KEY"):
        main([str(tmp_path / "run")])
