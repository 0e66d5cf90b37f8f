"""What a detector gets wrong: numbers against COCOEvaluator's and planted errors, and the page."""

import errno
import json
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from helpers import PATIENCE, raises_one_line, run_tool
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as rles

from randwire_d2.config import classifier_config, detector_config
from randwire_d2.data.formats.rle import rle_fault
from randwire_d2.drawing.errors import MOST, plot_class_ap, plot_confusion, plot_precision_recall
from randwire_d2.drawing.style import BLUE, RED, save_figure
from randwire_d2.engine import register_data
from randwire_d2.error_analysis import (
    Analysis,
    Source,
    analyze,
    ground_truth,
    source_of_run,
    summary,
    write_analysis,
)
from randwire_d2.error_analysis.measures import METRICS
from randwire_d2.runs import EVALUATIONS, Evaluation, RunFolder

TOOL = "analyze_results.py"
CLASSES = ["cat", "dog", "<b>owl & co</b>", "never there"]
IDS = (3, 7, 12, 90)  # in the data set's files, as COCO's, not contiguous
WIDTH, HEIGHT = 960, 480
CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), "")


def annotation(category: int, box: tuple[float, ...], crowd: int = 0) -> dict[str, Any]:
    x, y, w, h = box
    outline = [[x, y, x + w / 2, y, x + w / 2, y + h, x, y + h]]
    return {"category_id": category, "bbox": list(box), "bbox_mode": 1, "iscrowd": crowd,
            "segmentation": outline}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """12 images with 6 objects each, of three classes and all sizes, on a grid, whose masks are
    the left halves of their boxes; a crowd in the first; the last is empty."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(path)
        objects = []
        for cell in range(6 * (i < 11)):
            w, h = rng.integers(12, 200, 2)
            corner = 320 * (cell % 3), 240 * (cell // 3)
            crowd = int(i == 0 and cell == 0)
            objects.append(annotation(int(rng.integers(3)), (*map(float, (*corner, w, h)),), crowd))
        records.append({"file_name": str(path), "height": HEIGHT, "width": WIDTH,
                        "image_id": 100 + i, "annotations": objects})  # fmt: skip
    name = f"errors_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        thing_classes=CLASSES, thing_dataset_id_to_contiguous_id={c: k for k, c in enumerate(IDS)}
    )
    return name


def evaluate(name: str, output: Path, seed: int = 0) -> dict[str, Any]:
    """Let COCOEvaluator see and write what a poor detector would find: boxes and masks that are
    moved, twice, of another class, or on nothing, with scores of which many are equal."""
    rng = np.random.default_rng(seed)
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(output))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        boxes, classes = [], []
        for found in record["annotations"]:
            x, y, w, h = found["bbox"]
            for _ in range(rng.integers(0, 3)):
                dx, dy = rng.normal(0, 0.1, 2) * (w, h)
                boxes.append([x + dx, y + dy, x + dx + w, y + dy + h])
                wrong = rng.random() < 0.2
                classes.append(int(rng.integers(4)) if wrong else found["category_id"])
        boxes.append([200.0, 10.0, 230.0, 90.0])
        classes.append(int(rng.integers(4)))
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.tensor(boxes).clamp(0, WIDTH))
        instances.pred_classes = torch.tensor(classes)
        instances.scores = torch.tensor(rng.integers(1, 20, len(boxes)) / 20)
        masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, instances.pred_boxes.tensor.int().tolist()):
            mask[y0:y1, x0 : (x0 + x1) // 2] = True
        instances.pred_masks = masks
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def detection(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": IDS[category], "bbox": box, "score": score}


def perfect(name: str) -> list[dict[str, Any]]:
    """Every object as a detection, with a score of 0.9."""
    return [
        detection(record["image_id"], a["category_id"], a["bbox"], 0.9)
        for record in DatasetCatalog.get(name)
        for a in record["annotations"]
        if not a["iscrowd"]
    ]


def written(name: str, folder: Path, results: list[dict[str, Any]]) -> Source:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return Source(name, path, folder / "analysis")


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that nobody looks at take no second to draw."""

    def save(figure: Figure, path: Path, palette: bool) -> Path:
        Image.new("RGB", (1, 1)).save(path)
        return path

    monkeypatch.setattr("randwire_d2.error_analysis.report.save_figure", save)


def run_of(
    name: str, folder: Path, results: list[dict[str, Any]] | None, cfg: Any = None
) -> RunFolder:
    """What a training leaves, as far as an analysis reads it."""
    run, cfg = RunFolder(folder), cfg or detector_config()
    cfg.DATASETS.TEST = (name,)
    folder.mkdir(parents=True)
    run.config_file.write_text(cfg.dump())
    if results is not None:
        run.detections_file.parent.mkdir()
        run.detections_file.write_text(json.dumps(results))
    return run


# -------------------------------------------------------------------------------------------------
# Numbers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_every_ap_is_cocoevaluators(dataset: str, tmp_path: Path, task: str) -> None:
    """Wrong: an AP that differs in any digit: other settings, crowds that count, a class without
    objects in a mean, or sizes of boxes where masks are meant."""
    truth = ground_truth(dataset)
    expected = evaluate(dataset, tmp_path)[task]
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    found = analyze(truth, results, task, 0.5)
    # But the last: Detectron2's own code, in C++, adds them up in another order.
    assert {name: found.metrics[name] for name in METRICS[:6]} == pytest.approx(
        {name: expected[name] for name in METRICS[:6]}, rel=1e-14
    )
    assert 5 < found.metrics["AP"] < 95 and len(set(found.metrics.values())) > 6
    of_classes = [result.metrics["AP"] for result in found.classes]
    np.testing.assert_array_equal(of_classes, [expected[f"AP-{name}"] for name in CLASSES])
    assert np.isnan(of_classes[3])
    for name in METRICS[:6]:  # the evaluator has no other than AP of each class
        mean = np.nanmean([result.metrics[name] for result in found.classes])
        np.testing.assert_allclose(mean, expected[name], rtol=1e-12)
    mean = 100 * np.nanmean(found.precision, axis=(1, 2))
    np.testing.assert_allclose(mean, [expected["AP50"], expected["AP75"]], rtol=1e-12)


def test_planted_swaps_are_recovered(dataset: str) -> None:
    """Wrong: a confusion lost, turned round, or counted where a crowd is."""
    results, kinds = perfect(dataset), [0, 0, 0]
    truth = ground_truth(dataset)
    for result in results:
        k = IDS.index(result["category_id"])
        kinds[k] += 1
        if k == 0 and kinds[0] % 5 == 0:  # a fifth of the cats are dogs
            result["category_id"] = IDS[1]
    expected = np.zeros((5, 5), int)
    np.fill_diagonal(expected[:3, :3], kinds)
    swaps = kinds[0] // 5
    expected[0, :2] = kinds[0] - swaps, swaps
    assert swaps >= 3
    lost = results.pop()  # an object without a detection
    k = IDS.index(lost["category_id"])
    expected[k, [k, 4]] = expected[k, k] - 1, 1
    results.append(detection(111, 2, [9.0, 9.0, 50.0, 50.0], 0.8))  # in an image without objects
    expected[4, 2] = 1
    results.append(detection(100, 0, [150.0, 100.0, 9.0, 9.0], 0.2))  # below the threshold
    crowd = DatasetCatalog.get(dataset)[0]["annotations"][0]
    results.append(detection(100, crowd["category_id"], crowd["bbox"], 0.9))

    found = analyze(truth, results, "bbox", 0.5)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.confused_pairs() == [("cat", "dog", swaps)]
    assert found.errors == {"class": swaps, "place": 0, "class and place": 0, "duplicate": 0,
                            "background": 1, "missed": 1}  # fmt: skip
    assert found.objects == expected[:-1].sum() == 65
    assert sum(image.not_found for image in found.worst) == swaps + 1
    assert sum(image.false for image in found.worst) == swaps + 1


def test_an_object_whose_id_is_0_counts(dataset: str) -> None:
    """Wrong: the first annotation of a file that counts from 0 is never found, as in COCOeval's
    own list of matches."""
    truth = ground_truth(dataset)
    for a in truth.dataset["annotations"]:
        a["id"] -= 2  # the crowd's is -1
    truth.createIndex()
    found = analyze(truth, perfect(dataset), "bbox", 0.5)
    assert np.trace(found.confusion) == found.confusion.sum() == 65


def test_kinds_of_errors(dataset: str) -> None:
    """Wrong: a kind taken for another at the limits that TIDE sets, or an object called missed
    that a detection was on."""
    truth = ground_truth(dataset)
    first, second, third, *_ = DatasetCatalog.get(dataset)[1]["annotations"]
    (x, y, w, h), k = first["bbox"], first["category_id"]
    moved = [x + 0.5 * w, y, w, h]  # an IoU of 1/3
    other = (k + 1) % 3
    results = [
        detection(101, k, first["bbox"], 0.9),
        detection(101, k, first["bbox"], 0.8),  # duplicate
        detection(101, other, first["bbox"], 0.7),  # class
        detection(101, k, moved, 0.7),  # place
        detection(101, other, moved, 0.7),  # class and place
        detection(101, (second["category_id"] + 1) % 3, second["bbox"], 0.7),  # class
        detection(101, third["category_id"], [300.0, 110.0, 9.0, 9.0], 0.7),  # background
        detection(111, 0, moved, 0.7),  # background
    ]
    found = analyze(truth, results, "bbox", 0.5)
    assert found.errors == {"class": 2, "place": 1, "class and place": 1, "duplicate": 1,
                            "background": 2, "missed": 65 - 2}  # fmt: skip
    assert found.confusion[k, k] == 1, "a better score of another class took the object"


def test_thresholds(dataset: str, tmp_path: Path) -> None:
    """Wrong: counts at a threshold that contradict each other, or a larger F1 at another one."""
    truth = ground_truth(dataset)
    evaluate(dataset, tmp_path)
    path = tmp_path / "coco_instances_results.json"

    def at(threshold: float) -> Analysis:
        return analyze(truth, json.loads(path.read_text()), "bbox", threshold)

    sweep = {i: at(i / 20) for i in range(1, 20)}
    for found in sweep.values():
        hits = np.trace(found.confusion)
        assert found.chosen.recall == hits / found.objects
        assert found.chosen.precision == hits / found.confusion[:, :-1].sum()
        for k, result in enumerate(found.classes[:3]):
            assert found.confusion[k].sum() == result.objects
            assert found.confusion[:, k].sum() == result.detections
            assert result.chosen.recall == found.confusion[k, k] / result.objects
    best = sweep[1].best
    assert best.f1 == max(found.chosen.f1 for found in sweep.values())
    assert sweep[round(20 * best.threshold)].chosen == best
    for k in range(3):
        own = sweep[1].classes[k].best
        assert own.f1 == max(found.classes[k].chosen.f1 for found in sweep.values())
    np.testing.assert_allclose(sweep[10].sweep[50], [sweep[10].chosen.precision,
                               sweep[10].chosen.recall, sweep[10].chosen.f1])  # fmt: skip
    assert sweep[1].scores.sum() == sweep[1].confusion[:, :-1].sum()


# -------------------------------------------------------------------------------------------------
# Pictures
# -------------------------------------------------------------------------------------------------


def test_the_matrix_shows_the_counts() -> None:
    """Wrong: rows and columns exchanged, or the right ones in the colour of the wrong ones."""
    counts = np.array([[8, 0, 0], [3, 1, 0], [0, 0, 0]])
    (ax,) = plot_confusion(counts, ["cat", "dog"]).axes
    colors = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(colors[0, 0], to_rgb(BLUE))
    expected = 1 - np.sqrt(0.75) * (1 - np.array(to_rgb(RED)))
    np.testing.assert_allclose(colors[1, 0], expected)
    np.testing.assert_allclose(colors[0, 1], 1)
    texts = {tuple(map(int, t.get_position())): t.get_text() for t in ax.texts}
    assert texts == {(0, 0): "8", (0, 1): "3", (1, 1): "1"}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["cat", "dog", "nothing found"]


def test_names_are_drawn_as_they_are() -> None:
    """Wrong: a name with two $ is taken for a formula, and ends the analysis, or one that begins
    with _ is left out of a legend."""
    names = ["$$", "_background_"]
    figures = [
        plot_confusion(np.eye(3, dtype=np.int64), names),
        plot_precision_recall(np.ones((1, 11, 2)), [0.5], names),
        plot_class_ap(names, [1.0, 2.0], [1.0, 2.0]),
    ]
    for figure in figures:
        figure.canvas.draw()
    texts = figures[1].axes[0].get_legend().get_texts()
    assert [t.get_text().split("  ")[1] for t in texts] == [r"\$\$", "_background_", "mean of 2"]


def test_many_classes_stay_on_a_page() -> None:
    """Wrong: a picture of a thousand classes, or one without those that are confused."""
    names = [f"class {k}" for k in range(1000)]
    counts = np.diag(np.full(1001, 5))
    counts[990, 995] = 2
    figure = plot_confusion(counts, names)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert len(labels) == MOST + 1 and {"class 990", "class 995"} < set(labels)
    assert max(figure.get_size_inches()) * figure.dpi < 2400
    ap = np.linspace(99, 1, 1000)
    figure = plot_class_ap(names, ap, ap)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "class 999"
    assert max(figure.get_size_inches()) * figure.dpi < 2400


# -------------------------------------------------------------------------------------------------
# The page
# -------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The images, the links of any kind, and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(dataset: str, tmp_path: Path) -> None:
    """Wrong: a link to elsewhere, a picture that is none, one without words, or a name of a class
    that becomes part of the page."""
    evaluate(dataset, tmp_path)
    source = Source(dataset, tmp_path / "coco_instances_results.json", tmp_path / "analysis")
    analysis, path = write_analysis(source)
    page = Page(path)
    assert all(link.startswith("data:") for link in page.links) and "script" not in page.tags
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert len(page.images) == 6 and all(image["alt"] for image in page.images)
    for image in page.images:
        Image.open(BytesIO(b64decode((image["src"] or "").partition(",")[2]))).load()
    assert CLASSES[2] in page.text
    assert f"{analysis.metrics['AP']:.1f}" in page.text
    numbers = json.loads((path.parent / "analysis.json").read_text())
    assert numbers["metrics"]["AP"] == analysis.metrics["AP"]
    assert numbers["confusion"] == analysis.confusion.tolist()
    assert numbers["classes"][3]["metrics"]["AP"] is None


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("false", [0, 1])
def test_no_detections_of_an_object(dataset: str, tmp_path: Path, false: int) -> None:
    """Wrong: a detector that finds nothing has no page, or a best score at which its F1 is 0."""
    results = [detection(111, 0, [9.0, 9.0, 50.0, 50.0], 0.9)] * false
    analysis, path = write_analysis(written(dataset, tmp_path, results))
    assert analysis.metrics["AP"] == 0 and analysis.errors["missed"] == 65
    assert analysis.confusion[:3, 4].sum() == analysis.confusion.sum() - false == 65
    page = Page(path)
    assert len(page.images) == 6
    assert "No score makes F1 larger than 0" in page.text and "F1 is largest from" not in page.text
    assert "largest F1" not in summary(analysis)
    assert all(np.isnan(c.best.threshold) for c in analysis.classes)


@pytest.mark.usefixtures("blank")
def test_no_errors_and_missing_images(dataset: str, tmp_path: Path) -> None:
    """Wrong: a sheet of images that have no errors, or no page where the images lie elsewhere."""
    source = written(dataset, tmp_path, perfect(dataset))
    analysis, path = write_analysis(source)
    assert (analysis.worst, analysis.metrics["AP"]) == ((), pytest.approx(100))
    assert len(Page(path).images) == 5
    written(dataset, tmp_path, perfect(dataset)[1:])
    (tmp_path / "0.png").unlink()
    (path.parent / "images.png").touch()
    write_analysis(source)
    page = Page(path)
    assert len(page.images) == 5 and "0.png" in page.text
    assert not (path.parent / "images.png").exists(), "an earlier analysis's"


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
def test_a_browser_shows_the_page(dataset: str, tmp_path: Path) -> None:
    """Wrong: what a parser takes for a page shows nothing in a browser, or it complains."""
    evaluate(dataset, tmp_path)
    source = Source(dataset, tmp_path / "coco_instances_results.json", tmp_path / "analysis")
    _, path = write_analysis(source)
    look = "--screenshot=" + str(tmp_path / "shot.png")
    said = browse(path, tmp_path, "--window-size=1280,4000", "--hide-scrollbars", look)
    assert "CONSOLE" not in said, "the page breaks its own policy"
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    for color in (BLUE, RED):  # of the plots; the page itself has neither
        assert np.all(shot == np.round(255 * np.array(to_rgb(color))), axis=-1).sum() > 500
    # A page can't say which of its images were decoded without a script, which the policy forbids.
    probe = tmp_path / "probe.html"
    script = (
        "<script>onload = () => { document.body.dataset.sizes = "
        "[...document.images].map(i => i.complete ? i.naturalWidth : 0).join(); "
        "document.body.dataset.wide = document.documentElement.scrollWidth; }</script>"
    )
    text = path.read_text().replace("Content-Security-Policy", "none")
    probe.write_text(text.replace("</body>", f"{script}</body>"))
    dom = browse(probe, tmp_path, "--window-size=600,900", "--dump-dom")
    sizes = dom.partition('data-sizes="')[2].partition('"')[0].split(",")
    assert len(sizes) == 6 and min(map(int, sizes)) > 300
    wide = int(dom.partition('data-wide="')[2].partition('"')[0])
    assert wide <= 600, "a narrow window has to be scrolled sidewards"


def browse(path: Path, tmp_path: Path, *flags: str) -> str:
    """What Chromium prints and logs as it opens a page from disk."""
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]  # fmt: skip
    profile = tmp_path / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={profile}", *quiet, *flags]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------
# Runs
# -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank")
def test_what_of_a_run_is_analysed(dataset: str, tmp_path: Path) -> None:
    """Wrong: another data set than the run's, an evaluation where the training has detections of
    its own, or files among the training's."""
    run = run_of(dataset, tmp_path / "run", None)
    evaluation = run_of(dataset, tmp_path / "run" / EVALUATIONS / "abc", perfect(dataset))
    evaluation.write_evaluation(Evaluation("model_final.pth", None, {}))
    for path in (run.path, evaluation.path):
        source = source_of_run(path)
        assert source == Source(dataset, evaluation.detections_file, evaluation.path / "analysis")
    run.detections_file.parent.mkdir()
    run.detections_file.write_text("[]")
    assert source_of_run(run.path) == Source(dataset, run.detections_file, run.path / "analysis")


@pytest.mark.usefixtures("blank")
def test_a_run_on_data_by_path(tmp_path: Path) -> None:
    """Wrong: a process that did not train does not know the run's data set; or it can't be
    analysed although it trains."""
    images, annotations = [], []
    for split in ("train", "valid"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 48), (9, 99, 9 * i)).save(tmp_path / "data" / split / f"{i}.jpg")
    for i in range(2):
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48})
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i, "iscrowd": 0,
                            "bbox": [4, 5, 30, 20], "area": 600})  # fmt: skip
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "speck"}]}  # fmt: skip
    for split in ("train", "valid"):
        path = tmp_path / "data" / split / "_annotations.coco.json"
        path.write_text(json.dumps(content))
    cfg = detector_config()
    cfg.DATASETS.PATH = str(tmp_path / "data")
    train, (name,) = register_data(cfg)
    ids = {record["image_id"] for record in DatasetCatalog.get(name)}
    results = [{"image_id": i, "category_id": 1, "bbox": [4, 5, 30, 20], "score": 0.9} for i in ids]
    run = run_of(name, tmp_path / "run", results, cfg)
    for registered in (*train, name):
        DatasetCatalog.remove(registered)
        MetadataCatalog.remove(registered)
    analysis, page = write_analysis(source_of_run(run.path))
    assert str(tmp_path / "data") in Page(page).text, "a name that tells a user nothing"
    assert analysis.confused_pairs() == [("speck", "cell", 1)]
    assert analysis.metrics["AP"] == pytest.approx(50, abs=1)


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize(
    "change, message",
    {
        "nothing": ("", ""),
        "an image is new": ("b.xml", "image 2, 'b.jpg', was 'c.jpg'"),
        "the last image is new": ("d.xml", "image 3, 'd.jpg', was not there"),
        "a class is new": ("ant", "class 1, 'cell', is 2 now"),
    }.values(),
)  # fmt: skip
def test_data_that_have_changed_since_are_refused(
    change: str, message: str, tmp_path: Path
) -> None:
    """Wrong: detections are compared with the objects of other images, or classes, whose ids are
    places among names."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)

    def label(*names: str, kind: str = "cell") -> None:
        for name in names:
            Image.new("RGB", (64, 48)).save(tmp_path / "voc" / "JPEGImages" / f"{name}.jpg")
            (tmp_path / "voc" / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><object><name>{kind}</name><bndbox><xmin>5</xmin><ymin>6</ymin>"
                "<xmax>34</xmax><ymax>25</ymax></bndbox></object></annotation>"
            )
        there = sorted(path.stem for path in (tmp_path / "voc" / "Annotations").iterdir())
        for split in ("train", "val"):
            listed = tmp_path / "voc" / "ImageSets" / "Main" / f"{split}.txt"
            listed.write_text("\n".join(there))

    label("a", "c")
    cfg = detector_config()
    cfg.DATASETS.PATH = str(tmp_path / "voc")
    train, (name,) = register_data(cfg)
    run = run_of(name, tmp_path / "run", None, cfg)
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(run.detections_file.parent))
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": Instances(
        (48, 64), pred_boxes=Boxes(torch.tensor([[4.0, 5, 34, 25]])), scores=torch.ones(1),
        pred_classes=torch.zeros(1, dtype=torch.int64))}])  # fmt: skip
    evaluator.evaluate()
    if change.endswith(".xml"):
        label(change.removesuffix(".xml"))
    elif change:
        label("c", kind=change)
    for registered in (*train, name):
        DatasetCatalog.remove(registered)
        MetadataCatalog.remove(registered)
    source = source_of_run(run.path)
    if message:
        with raises_one_line(ValueError, message):
            write_analysis(source)
    else:
        assert write_analysis(source)[0].errors["missed"] == 1


@pytest.mark.usefixtures("blank")
def test_predictions_of_other_images_are_refused(dataset: str, tmp_path: Path) -> None:
    """Wrong: the ids 1, 2, … of images in a folder are taken for a data set's; or one image that
    predict could not compute makes its results useless."""
    run = run_of(dataset, tmp_path / "run", perfect(dataset))
    listed = [{"id": r["image_id"], "file_name": f"photos/{Path(r['file_name']).name}"}
              for r in DatasetCatalog.get(dataset)]  # fmt: skip
    beside = run.detections_file.parent / "images.json"
    classes = [{"id": i, "name": name} for i, name in zip(IDS, ["kitten", *CLASSES[1:]])]
    beside.write_text(json.dumps({"categories": classes, "images": listed}))
    write_analysis(source_of_run(run.path))
    listed[0]["file_name"], listed[1]["file_name"] = "1.png", "0.png"
    beside.write_text(json.dumps({"categories": classes, "images": listed}))
    with raises_one_line(ValueError, "image 100, '0.png', was '1.png'"):
        write_analysis(source_of_run(run.path))
    # One that predict has skipped is no new one, as long as it is not there with another id.
    listed[0]["file_name"], listed[1]["file_name"] = "0.png", "1.png"
    first = listed.pop(0)
    note = beside.with_name("job.json")
    for given, others in ((["x/0.png"], []), ([], []), (["x/0.png"], [{**first, "id": 7}])):
        note.write_text(json.dumps({"stamps": dict.fromkeys(given)}))
        beside.write_text(json.dumps({"categories": classes, "images": [*listed, *others]}))
        if given and not others:
            write_analysis(source_of_run(run.path))
        else:
            with raises_one_line(ValueError, "image 100, '0.png', was not there"):
                write_analysis(source_of_run(run.path))
    beside.write_text('{"images": 7}')
    with raises_one_line(ValueError, "images.json is damaged"):
        write_analysis(source_of_run(run.path))


@pytest.mark.usefixtures("blank")
def test_only_an_analysis_of_the_same_run_is_replaced(dataset: str, tmp_path: Path) -> None:
    """Wrong: files overwritten that nobody gave up; or an analysis, once made, can't be repeated,
    as after the run was moved."""
    source = written(dataset, tmp_path / "run", perfect(dataset))
    write_analysis(source)
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    source = Source(dataset, moved / "results.json", moved / "analysis")
    write_analysis(source, threshold=0.3)
    assert json.loads((source.folder / "analysis.json").read_text())["threshold"] == 0.3
    other = written(dataset, tmp_path / "other", perfect(dataset))
    before = (source.folder / "index.html").read_bytes()
    with pytest.raises(ValueError, match="holds no analysis of"):
        write_analysis(other, source.folder)
    with pytest.raises(ValueError, match="holds no analysis of"):
        write_analysis(other, tmp_path)
    assert (source.folder / "index.html").read_bytes() == before


def test_an_interrupted_analysis_is_made_again(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the pictures that it left are refused as what is no analysis of these detections."""
    source = written(dataset, tmp_path, perfect(dataset))

    def interrupt(figure: Figure, path: Path, palette: bool) -> Path:
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("randwire_d2.error_analysis.report.save_figure", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_analysis(source)


@pytest.mark.usefixtures("blank")
def test_a_full_disk_ends_an_analysis(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: if it is full at the contact sheet, the page says so, and the tool ends with 0."""

    def save(figure: Figure, path: Path, palette: bool) -> Path:
        if path.name == "images.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_figure(figure, path, palette)

    monkeypatch.setattr("randwire_d2.error_analysis.report.save_figure", save)
    source = written(dataset, tmp_path, perfect(dataset)[1:])
    with pytest.raises(OSError, match="No space"):
        write_analysis(source)
    assert not (source.folder / "index.html").exists()


def test_what_can_not_be_analysed(dataset: str, tmp_path: Path) -> None:
    """Wrong: a traceback of somebody else's, or numbers that mean nothing."""
    classifier = classifier_config()
    classifier.MODEL.META_ARCHITECTURE = "ImageClassifier"
    run = run_of(dataset, tmp_path / "classifier", None, classifier)
    with pytest.raises(ValueError, match="classifier's run"):
        source_of_run(run.path)
    run = run_of(dataset, tmp_path / "unfinished", None)
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        write_analysis(source_of_run(run.path))
    source = written(dataset, tmp_path / "results", perfect(dataset))
    with pytest.raises(ValueError, match="no masks"):
        write_analysis(source, task="segm")
    with pytest.raises(ValueError, match="got 1.5"):
        write_analysis(source, threshold=1.5)
    assert not source.folder.exists()
    MetadataCatalog.get(dataset).evaluator_type = "lvis"
    with pytest.raises(ValueError, match="'lvis'"):
        ground_truth(dataset)


def mask_of(height: int, width: int, **changes: Any) -> dict[str, Any]:
    found = rles.encode(np.asfortranarray(np.eye(height, width, dtype=np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode(), **changes}


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[1, 2, 30, 40, 5, 6]], "it is no compressed RLE"),
        ("T3", "it is no compressed RLE"),
        (mask_of(HEIGHT, WIDTH, counts=[0, WIDTH * HEIGHT]), "it is no compressed RLE"),
        (mask_of(HEIGHT, WIDTH, size=None), "its size is no height and width"),
        (mask_of(HEIGHT, WIDTH, size=[-HEIGHT, -WIDTH]), "its size is no height and width"),
        (mask_of(HEIGHT, WIDTH, counts="garbage~"), "its counts are no RLE"),
        (mask_of(HEIGHT, WIDTH, counts="é"), "its counts are no RLE"),
        (mask_of(HEIGHT, WIDTH, counts="o" * 99 + "0"), "its counts are no RLE"),
        (mask_of(HEIGHT, WIDTH, counts="T3"), f"of 100 pixels, and its size is {HEIGHT} × {WIDTH}"),
        (mask_of(HEIGHT, WIDTH, size=[10**6, 10**6]), "and its size is 1000000 × 1000000"),
        (mask_of(WIDTH, HEIGHT), f"is of {WIDTH} × {HEIGHT} pixels .* its image of {HEIGHT} × "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mask_that_is_none_is_named(
    dataset: str, tmp_path: Path, task: str, segmentation: Any, says: str
) -> None:
    """Other tools write other things. Wrong: pycocotools ends in its own error, or ends the
    process; or a mask of another size matches nothing, in silence."""
    results = perfect(dataset)
    for result in results:
        result["segmentation"] = mask_of(HEIGHT, WIDTH)
    results[7]["segmentation"] = segmentation
    source = written(dataset, tmp_path / "results", results)
    with raises_one_line(ValueError, match=f"results.json: the segmentation of result 7 .*{says}"):
        write_analysis(source, task=task)
    assert not source.folder.exists()


@pytest.mark.usefixtures("blank")
def test_a_mask_that_is_missing_is_no_mask(dataset: str, tmp_path: Path) -> None:
    results = perfect(dataset)
    for result in results:
        result["segmentation"] = mask_of(HEIGHT, WIDTH)
    results[7]["segmentation"] = []
    with pytest.raises(ValueError, match="holds no masks"):
        write_analysis(written(dataset, tmp_path / "results", results), task="segm")
    results[7]["segmentation"] = mask_of(HEIGHT, WIDTH)
    source = written(dataset, tmp_path / "results", results)
    DatasetCatalog.get(dataset)[2]["annotations"][0].pop("segmentation")
    with raises_one_line(ValueError, match="1 of 66 objects of the data set .* have no mask"):
        write_analysis(source, task="segm")


def test_what_is_taken_for_a_mask_pycocotools_reads_alike() -> None:
    """Wrong: a sound mask is refused, or one is let through that pycocotools reads otherwise."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(1000):
        shape = rng.integers(1, 60, 2)
        pixels = np.asfortranarray(rng.random(shape) < rng.random(), np.uint8)
        rle = rles.encode(pixels)
        assert rle_fault(rle) == ""
        damaged = bytearray(rle["counts"])
        damaged[rng.integers(len(damaged))] = rng.integers(48, 112)
        rle["counts"] = bytes(damaged)
        if not rle_fault(rle):
            passed += 1
            assert rles.encode(rles.decode(rle))["size"] == shape.tolist()
            assert rles.area(rle) == rles.decode(rle).sum()
    assert passed > 0


@pytest.mark.slow
def test_the_tool(tmp_path: Path) -> None:
    """Wrong: the tool can't read what a run of the built-in data set leaves."""
    name, log = "randwire_shapes_val", tmp_path / "log"
    contiguous = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    ids = {k: category for category, k in contiguous.items()}
    results = [
        {"image_id": record["image_id"], "category_id": ids[a["category_id"]], "bbox": a["bbox"],
         "score": 0.75}
        for record in DatasetCatalog.get(name)
        for a in record["annotations"]
    ]  # fmt: skip
    run = run_of(name, tmp_path / "run", results)
    said = run_tool(TOOL, run.path, "--score-threshold", 0.7, log=log)
    assert "most confused: none" in said and "100.0" in said
    assert said.splitlines()[-1] == f"The page: {run.path / 'analysis' / 'index.html'}"
