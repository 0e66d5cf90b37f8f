"""The report of a training run, and tools/demo.py, which trains it."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.visualizer import Visualizer
from helpers import ROOT, Tool, run, wait_until
from matplotlib.figure import Figure
from PIL import Image

from randwire_d2 import NetworkSpec
from randwire_d2.config import detector_config
from randwire_d2.drawing.curves import plot_training
from randwire_d2.drawing.detections import draw_detections
from randwire_d2.engine.report import write_comparison, write_report
from randwire_d2.experiments.results import find_runs, read_result
from randwire_d2.runs import RunFolder

CLASSES = ["cat", "dog", "owl"]
DATASET_IDS = {7: 0, 3: 1, 90: 2}  # neither contiguous nor in order, as in COCO
BOX_AP = {"AP50": "bbox/AP50", "AP": "bbox/AP"}


def line(iteration: int, **values: float) -> str:
    return json.dumps({"iteration": iteration, **values})


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Three images of different shapes, one without objects."""
    records = []
    for i, (height, width) in enumerate([(40, 60), (64, 32), (50, 50)]):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((height, width, 3), 90 + 40 * i, np.uint8)).save(path)
        box = {"bbox": [4.0, 6.0, 20.0, 16.0], "bbox_mode": 1, "category_id": i, "iscrowd": 0}
        box["segmentation"] = [[4.0, 6.0, 24.0, 6.0, 24.0, 22.0]]
        records.append(
            {
                "file_name": str(path), "height": height, "width": width, "image_id": 100 + i,
                "annotations": [box] if i < 2 else [],
            }
        )  # fmt: skip
    name = f"report_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        thing_classes=CLASSES, thing_dataset_id_to_contiguous_id=DATASET_IDS
    )
    return name


def detection(image: int, category: int, score: float, **more: object) -> dict[str, object]:
    box = [5.0, 7.0, 19.0, 15.0]
    return {"image_id": image, "category_id": category, "bbox": box, "score": score, **more}


def written(path: Path, results: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    return path


def finished_run(folder: Path, dataset: str) -> Path:
    """What tools/train_net.py leaves in its OUTPUT_DIR, as far as the report reads it."""
    cfg = detector_config()
    cfg.MODEL.BACKBONE.NAME = "build_randwire_fpn_backbone"
    cfg.MODEL.RANDWIRE.NUM_NODES = 12
    cfg.DATASETS.TEST = (dataset,)
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    evaluations = [line(20, **{"bbox/AP": 11.0, "bbox/AP50": 22.0}), line(40, total_loss=1.0)]
    evaluations += [line(41, **{"bbox/AP": 12.5, "bbox/AP50": 33.25})]
    (folder / "metrics.json").write_text("\n".join(evaluations) + "\n")
    written(folder / "inference" / "coco_instances_results.json", [detection(100, 7, 0.9)])
    return folder


# -------------------------------------------------------------------------------------------------
# Curves
# -------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_last_of_each_iteration(tmp_path: Path) -> None:
    """Wrong: a curve that goes back in time, or shows what a killed run did after the checkpoint
    from which the training went on."""
    path = tmp_path / "metrics.json"
    before = [line(i, total_loss=9.0) for i in (19, 39, 59, 79)]
    before.insert(2, line(40, **{"bbox/AP": 1.0}))
    after = [line(49, total_loss=3.0), line(49, **{"bbox/AP": 5.0}), line(69, total_loss=2.0)]
    path.write_text("\n".join(before + after) + "\n")
    metrics = RunFolder(tmp_path).metrics()
    assert [(i, m.get("total_loss"), m.get("bbox/AP")) for i, m in metrics.items()] == [
        (19, 9.0, None), (39, 9.0, None), (40, None, 1.0), (49, 3.0, 5.0), (69, 2.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", ['{"iterat', '{"iteration": 4', "4", "null", "\udcff{", ""])
def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path, cut: str) -> None:
    """Wrong: a run that was killed can't be drawn any more. The next run of JSONWriter goes on in
    the same line, which is lost with it."""
    path = tmp_path / "metrics.json"
    whole = "\n".join([line(19, total_loss=2.0), line(39, total_loss=1.0)])
    path.write_text(f"{whole}\n{cut}", errors="surrogateescape")
    assert list(RunFolder(tmp_path).metrics()) == [19, 39]
    path.write_text(
        f"{whole}\n{cut}{line(39, total_loss=0.5)}\n{line(59, total_loss=0.25)}\n",
        errors="surrogateescape",
    )
    assert list(RunFolder(tmp_path).metrics()) == [19, 39, 59]


def curves(figure: Figure) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in curve.get_xydata()]
        for ax in figure.axes
        for curve in ax.lines
    ]


def test_the_curves_show_the_numbers(tmp_path: Path) -> None:
    """Wrong: a panel that shows something else than the loss, its running mean, AP50 and AP; or
    one NaN (no detection at all) that spoils it."""
    path = tmp_path / "metrics.json"
    lines = [line(i, total_loss=loss) for i, loss in enumerate([5.0, 3.0, 4.0, 2.0])]
    lines.append(line(3, **{"bbox/AP": float("nan"), "bbox/AP50": float("nan")}))
    lines.append(line(4, **{"bbox/AP": 20.0, "bbox/AP50": 50.0}))
    path.write_text("\n".join(lines))
    raw, smoothed, ap50, ap = curves(plot_training(RunFolder(tmp_path).metrics(), "AP", BOX_AP))
    assert raw == [(0, 5), (1, 3), (2, 4), (3, 2)]
    assert smoothed == [(0, 5), (1, 4), (2, 3), (3, 2)]
    assert (ap50, ap) == ([(4, 50)], [(4, 20)])


def test_a_run_without_evaluation_can_be_drawn(tmp_path: Path) -> None:
    """Wrong: curves only after the first evaluation."""
    path = tmp_path / "metrics.json"
    path.write_text(line(19, total_loss=2.0))
    plot_training(RunFolder(tmp_path).metrics(), "AP", BOX_AP).canvas.draw()


# -------------------------------------------------------------------------------------------------
# Detections
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the Visualizer is asked to draw: the ground truth and the detections of each image."""
    calls: list[dict] = []
    original = Visualizer.overlay_instances

    def overlay(self: Visualizer, **kwargs: object) -> object:
        calls.append(kwargs)
        return original(self, **kwargs)

    monkeypatch.setattr(Visualizer, "overlay_instances", overlay)
    return calls


def test_detections_have_the_data_sets_names(
    dataset: str, tmp_path: Path, drawn: list[dict]
) -> None:
    """Wrong: COCO's category ids taken for class numbers, boxes taken for corners, detections on
    another image, or below the threshold."""
    results = [detection(100, 7, 0.9), detection(101, 90, 0.6), detection(101, 3, 0.49)]
    figure = draw_detections(dataset, written(tmp_path / "r.json", results))
    figure.canvas.draw()
    assert [call["labels"] for call in drawn] == [
        ["cat"], ["cat 90%"], ["dog"], ["owl 60%"], [], [],
    ]  # fmt: skip
    assert drawn[0]["boxes"].tolist() == [[4, 6, 24, 22]]
    assert drawn[1]["boxes"].tolist() == [[5, 7, 24, 22]]
    assert all(call["masks"] is None for call in drawn)
    assert drawn[0]["assigned_colors"] == drawn[1]["assigned_colors"] != drawn[3]["assigned_colors"]


def test_masks_are_drawn_where_the_results_have_them(
    dataset: str, tmp_path: Path, drawn: list[dict]
) -> None:
    """Wrong: a Mask R-CNN's report without masks, or none at all where an object, as in a set of
    boxes, or a detection has none."""
    rle = {"size": [40, 60], "counts": "b6?i000000000000000000ng1"}
    masked, boxed = detection(100, 7, 0.9, segmentation=rle), detection(101, 3, 0.9)
    results = written(tmp_path / "r.json", [masked, boxed])
    draw_detections(dataset, results)
    outline = [[4.0, 6.0, 24.0, 6.0, 24.0, 22.0]]
    assert [call["masks"] for call in drawn] == [[outline], [rle], [outline], None, None, None]
    drawn.clear()
    del DatasetCatalog.get(dataset)[0]["annotations"][0]["segmentation"]
    draw_detections(dataset, results)
    assert [call["masks"] for call in drawn[:3]] == [None, [rle], [outline]]


def test_the_sheet_is_deterministic(dataset: str, tmp_path: Path) -> None:
    """Wrong: random colors."""
    results = written(tmp_path / "r.json", [detection(100, 7, 0.9)])
    sheets = []
    for _ in range(2):
        figure = draw_detections(dataset, results)
        figure.canvas.draw()
        sheets.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    assert np.array_equal(*sheets)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([detection(555, 7, 0.9)], "image_id 555"),
        ([detection(100, 0, 0.9)], "category_id 0"),
        ([{"image_id": 100}], "COCOEvaluator"),
        ({"AP": 1}, "COCOEvaluator"),
        (
            [detection(100, 7, 0.9), detection(100, 7, 93.0)],
            r"result 1 is 93\.0, .*by 100",
        ),
        ([detection(100, 7, float("nan"))], "score of result 0 is nan"),
        ([detection(100, 7, True)], "is True"),
        ([detection(100, 7, -0.1)], "0 … 1"),
        ([{**detection(100, 7, 1), "bbox": [1, 2, 3]}], r"bbox of result 0 is \[1, 2, 3\], .*four"),
        ([{**detection(100, 7, 0), "bbox": [1, 2, -3, 4]}], "at least 0"),
        ([{**detection(100, 7, 0), "bbox": [1, float("inf"), 3, 4]}], "finite"),
        ([{**detection(100, 7, 0), "bbox": [1, 10**400, 3, 4]}], "finite"),
        ([{**detection(100, 7, 0), "bbox": ["1", 2, 3, 4]}], "finite"),
    ],
)
def test_results_that_are_none_of_this_data_set_are_refused(
    dataset: str, tmp_path: Path, results: list, message: str
) -> None:
    """Wrong: boxes under wrong names, numbers of scores that are none, or an error that tells a
    user nothing."""
    with pytest.raises(ValueError, match=message):
        draw_detections(dataset, written(tmp_path / "r.json", results))


def test_half_written_results_and_unknown_data_sets_are_named(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: errors without the file, the value or the way out."""
    path = tmp_path / "r.json"
    path.write_text('[{"image_id": 1')
    with pytest.raises(ValueError, match=r"r\.json.*evaluate"):
        draw_detections(dataset, path)
    with pytest.raises(ValueError, match="no_such_set"):
        draw_detections("no_such_set", path)
    monkeypatch.setitem(DatasetCatalog.data, "nothing", list)
    with pytest.raises(ValueError, match="'nothing' has no images to draw"):
        draw_detections("nothing", written(path, []))


# -------------------------------------------------------------------------------------------------
# The report
# -------------------------------------------------------------------------------------------------


def test_report(dataset: str, tmp_path: Path) -> None:
    """Wrong: a picture is missing."""
    pictures = write_report(finished_run(tmp_path / "run", dataset), tmp_path / "pictures")
    assert {p.name for p in pictures} == {"detections.png", "training.png", "wiring.png"}
    for path in pictures:
        assert min(Image.open(path).size) > 300


@pytest.mark.parametrize(
    "missing", ["config.yaml", "metrics.json", "inference/coco_instances_results.json"]
)
def test_a_missing_file_is_named_with_the_way_out(
    dataset: str, tmp_path: Path, missing: str
) -> None:
    """Wrong: a report of half a run, or an error that does not say what to do."""
    run = finished_run(tmp_path / "run", dataset)
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing}.*train_net\.py"):
        write_report(run, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_a_run_of_another_kind_of_data_has_no_detections(dataset: str, tmp_path: Path) -> None:
    """Wrong: a detector of another data set's boxes fails at its end, or shows none of the rest."""
    run = finished_run(tmp_path / "run", dataset)
    (run / "inference" / "coco_instances_results.json").unlink()
    MetadataCatalog.get(dataset).set(evaluator_type="sem_seg")
    assert {p.name for p in write_report(run, run)} == {"training.png", "wiring.png"}


def test_a_run_that_has_not_begun_is_refused(dataset: str, tmp_path: Path) -> None:
    """Wrong: curves of nothing."""
    run = finished_run(tmp_path / "run", dataset)
    (run / "metrics.json").write_text("")
    with pytest.raises(ValueError, match="train first"):
        write_report(run, tmp_path)


def test_a_comparison_has_each_groups_mean_and_deviation(tmp_path: Path) -> None:
    """Wrong: the table of transfer says something else than the runs."""
    for name, values in (("a", (10.0, 30.0)), ("b", (50.0, 54.0))):
        for i, value in enumerate(values):
            (tmp_path / f"{name}{i}").mkdir()
            (tmp_path / f"{name}{i}" / "metrics.json").write_text(
                "\n".join([line(9, **{"bbox/AP": 1.0}), line(19, **{"bbox/AP": value})])
            )
    groups = {name: [tmp_path / f"{name}{i}" for i in (0, 1)] for name in "ab"}
    comparison = write_comparison(groups, ["bbox/AP"], tmp_path / "picture.png")
    assert "| a  |      2 | 20.0 ± 14.1 (10.0, 30.0) |" in comparison.table
    assert "| b  |      2 | 52.0 ± 2.8 (50.0, 54.0)  |" in comparison.table
    assert comparison.picture.is_file()
    with pytest.raises(ValueError, match=r"no evaluation \(bbox/AP50\)"):
        write_comparison(groups, ["bbox/AP50"], tmp_path / "picture.png")
    with pytest.raises(ValueError, match="needs at least two runs; 'a' has 1"):
        write_comparison({"a": groups["a"][:1]}, ["bbox/AP"], tmp_path / "picture.png")


# -------------------------------------------------------------------------------------------------
# tools/demo.py
# -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_trains_anew_and_draws(tmp_path: Path) -> None:
    """Wrong: `make demo` fails, mixes two runs' metrics, or removes a file that is not its own."""
    output = tmp_path / "demo"
    (output / "run").mkdir(parents=True)
    (output / "run" / "made_by_demo.txt").touch()
    (output / "run" / "metrics.json").write_text(line(99, total_loss=1.0) + "\n")
    (output / "mine.txt").write_text("kept")
    # The detector takes the wiring from the classifier.
    pretrain = (
        "MODEL.RANDWIRE.CHANNELS 8 MODEL.RANDWIRE.NUM_NODES 10 SOLVER.EPOCHS 0 SOLVER.MAX_ITER 2 "
        "SOLVER.IMS_PER_BATCH 4 INPUT.TEST_CROP_SIZE 32"
    )
    said = run([
        sys.executable, str(ROOT / "tools/demo.py"), "--output", str(output), "--seed", "5",
        "--pretrain-opts", pretrain, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "1",
        "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0",
    ])  # fmt: skip
    ap, pictures = said.splitlines()[-2:]
    assert ap.startswith("AP ") and "AP50 " in ap
    for name in ("detections.png", "training.png", "wiring.png"):
        assert str(output / name) in pictures and (output / name).is_file()
    detector, classifier = output / "run" / "detector", output / "run" / "pretrain"
    metrics = RunFolder(detector).metrics()
    assert max(metrics) == 2
    # What Detectron2 leaves is what tools/collect_results.py reads.
    found = {folder: read_result(folder) for folder in find_runs([output])}
    assert set(found) == {detector, classifier} and all(r.values for r in found.values())
    assert found[detector].values[0] == metrics[2]["bbox/AP"]
    for folder in (detector, classifier):
        assert "SEED: 5" in (folder / "config.yaml").read_text()
    # The detector began with the classifier's network and weights.
    weights = torch.load(classifier / "model_final.pth", weights_only=True)
    taken = RunFolder(detector).config().MODEL.RANDWIRE.SPEC
    assert NetworkSpec.from_json(taken) == NetworkSpec.from_json(weights["randwire"]["spec"])
    assert "verified, largest relative differences: " in said
    assert not (output / "run" / "metrics.json").exists()
    assert (output / "mine.txt").read_text() == "kept"


# Stands for a tool that demo.py runs: notes how it was called, and trains in no time.
STAND_IN = """
import json, os, sys, time
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps([name, *arguments]) + "\\n")
if name == os.environ.get("FAILS"):
    sys.exit(3)
if name == os.environ.get("HANGS"):
    print("it hangs", os.getpid(), flush=True)
    time.sleep(3600)
if "OUTPUT_DIR" in arguments:
    folder = arguments[arguments.index("OUTPUT_DIR") + 1]
    os.makedirs(folder)
    with open(os.path.join(folder, "metrics.json"), "w") as f:
        f.write(json.dumps({"iteration": 9, "bbox/AP": 1.0, "bbox/AP50": 2.0}))
"""


class Demo:
    """A copy of tools/demo.py among stand-ins of the tools that it runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.output, self._calls = root, root / "output", root / "calls"
        (root / "tools").mkdir()
        (root / "log").touch()
        shutil.copy(ROOT / "tools" / "demo.py", root / "tools")
        for name in ("pretrain_imagenet.py", "train_net.py"):
            (root / "tools" / name).write_text(STAND_IN)

    def __call__(self, *arguments: str, **environment: str) -> Tool:
        environment["CALLS"] = str(self._calls)
        return Tool(
            self.root / "tools" / "demo.py", "--output", self.output, *arguments,
            log=self.root / "log", before=f"import os\nos.environ.update({environment!r})\n",
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


@pytest.mark.slow
def test_transfer_compares_detectors_that_differ_in_their_first_weights(demo: Demo) -> None:
    """Wrong: detectors that differ in more than their first weights, or a table of other runs."""
    process = demo("--transfer", "SOLVER.IMS_PER_BATCH", "4")
    assert process.wait() == 0, process.said
    *_, scratch, pretrained, _ = process.said.splitlines()
    assert scratch.startswith("| from scratch |") and pretrained.startswith("| pretrained   |")
    assert (demo.output / "transfer.png").is_file()
    trained: dict[str, set[tuple[str, ...]]] = {"from_scratch": set(), "pretrained": set()}
    for name, *arguments in demo.calls:
        if name != "train_net.py":
            continue
        folder = Path(arguments.pop(arguments.index("OUTPUT_DIR") + 1))
        kind = folder.name
        assert f"seed{arguments[arguments.index('SEED') + 1]}" == folder.parent.name
        assert arguments[arguments.index("SOLVER.IMS_PER_BATCH") + 1] == "4"
        assert ("MODEL.WEIGHTS" in arguments) == (kind == "pretrained")
        if kind == "pretrained":
            at = arguments.index("MODEL.WEIGHTS")
            assert arguments[at + 1] == str(folder.parent / "pretrain" / "backbone.pth")
            del arguments[at : at + 2]
            arguments.remove("--config-from-weights")
        trained[kind].add(tuple(arguments))
    assert len(trained["from_scratch"]) == 3
    assert trained["from_scratch"] == trained["pretrained"]


def test_demo_hands_on_the_status_of_a_training_that_fails(demo: Demo) -> None:
    """Wrong: `make demo` succeeds, goes on, or draws pictures, though the training failed."""
    process = demo(FAILS="pretrain_imagenet.py")
    assert process.wait() == 3
    assert [name for name, *_ in demo.calls] == ["pretrain_imagenet.py"]
    assert not list(demo.output.glob("*.png"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_its_training(demo: Demo, number: signal.Signals) -> None:
    """Wrong: a training that goes on, unseen, on both cores."""
    process = demo(HANGS="pretrain_imagenet.py")
    wait_until(lambda: re.search(r"it hangs \d+\n", process.said) is not None)
    child = int(process.said.split()[-1])
    try:
        process.send(number, alone=True)
        assert process.wait() == 128 + number
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
