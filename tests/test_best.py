"""The best checkpoint, across SIGKILL and --resume: real trainings of a tiny classifier, in which
the accuracies alone are invented, so that it is known which is the best."""

import math
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import Tool, raises_one_line, refusal, run_tool
from launching import C78, TOOL, small

from randwire_d2.config import classifier_config, detector_config
from randwire_d2.engine import check_best_metric
from randwire_d2.engine.hooks.saving import set_earlier_aside
from randwire_d2.runs import Evaluation, RunFolder

TOP1 = "classification/top1"
# Evaluations after iterations 1, 3, 5, …, and the last one; checkpoints after 3, 7, 11.
OPTIONS = ["SOLVER.MAX_ITER", 12, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 4]
# In place of what evaluations find, one value after the other.
INVENT = """
from randwire_d2.classification import ClassificationTrainer
values = iter({values})
ClassificationTrainer.test = classmethod(
    lambda *_: {{"classification": {{"top1": next(values), "top5": 100.0}}}}
)
"""


def arguments(folders: Path, output: Path, *options: object) -> list[object]:
    return [
        "--config-file", C78, "--resume", *small(folders),
        *OPTIONS, "OUTPUT_DIR", output, *options,
    ]  # fmt: skip


def train(folders: Path, output: Path, values: Sequence[object], *options: object) -> str:
    """Train on, to the end; returns the log."""
    before = INVENT.format(values=f"[{', '.join(map(str, values))}]")
    log = output.with_suffix(".log")
    return run_tool(TOOL, *arguments(folders, output, *options), log=log, before=before)


def train_until(moment: str, folders: Path, output: Path, values: Sequence[object]) -> None:
    """Train until the process is killed at a moment (killer/sitecustomize.py)."""
    tool = Tool(
        TOOL, *arguments(folders, output), log=output.with_suffix(".log"),
        before=INVENT.format(values=values), kill_at=f"{moment} group",
    )  # fmt: skip
    assert tool.wait() == -signal.SIGKILL, tool.said[-3000:]


def assert_best_is(output: Path, iteration: int, value: float) -> None:
    """The argmax of metrics.json, and the file."""
    run = RunFolder(output)
    found = [(i, v) for i, v in run.evaluations(TOP1) if not math.isnan(v)]
    assert max(found, key=lambda item: item[1]) == (iteration, value), found
    best = torch.load(run.best_checkpoint, weights_only=True)
    assert best["iteration"] == iteration and "randwire" in best and "trainer" not in best
    periodic = output / f"model_{iteration:07}.pth"
    if periodic.is_file():
        weights = torch.load(periodic, weights_only=True)["model"]
        assert all(torch.equal(best["model"][k], weights[k]) for k in weights)
    assert run.last_checkpoint == run.final_checkpoint
    assert not list(output.glob("*.before"))


def test_a_new_training_is_not_taken_for_an_earlier_one(folders: Path, tmp_path: Path) -> None:
    """Wrong: a training that was stopped before its first checkpoint leaves an earlier one's as its
    own, or goes on from it with --resume, as a job that Slurm puts back into the queue does; or the
    earlier one is lost."""
    output = tmp_path / "run"
    train(folders, output, [10, 20, 30, 20, 10, 50])
    (output / "backbone.pth").write_text("")
    given = [given for given in arguments(folders, output) if given != "--resume"]
    log, kill = output.with_suffix(".log"), "os.rename model_best.pth 2 group"  # 1 moves it
    weights = ("MODEL.WEIGHTS", output / "model_final.pth")
    assert "belongs to an earlier training in OUTPUT_DIR" in refusal(
        TOOL, *given, *weights, log=log
    )
    tool = Tool(TOOL, *given, log=log, before=INVENT.format(values=[5]), kill_at=kill)
    assert tool.wait() == -signal.SIGKILL
    assert f"of an earlier training are in {output / 'earlier_1'} now" in tool.said
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        RunFolder(output).checkpoint()
    assert_best_is(output / "earlier_1", 12, 50)
    assert (output / "earlier_1" / "backbone.pth").is_file()
    began = "Command line arguments"
    assert (output / "earlier_1" / "log.txt").read_text().count(began) == 1
    log = (output / "log.txt").read_text()
    assert log.count(began) == 1 and "of an earlier training are in" in log
    assert (output / "config.yaml").is_file()
    said = train(folders, output, [1, 2, 3, 4, 5, 6])
    assert "Starting training from iteration 0" in said
    assert_best_is(output, 12, 6)
    assert not (output / "earlier_2").exists()


def test_metrics_that_were_left_without_a_checkpoint_do_not_count(
    folders: Path, tmp_path: Path
) -> None:
    """Wrong: an evaluation of a training that was killed ahead of its first checkpoint is the best
    of the next one, whose model_best.pth then seems damaged."""
    output = tmp_path / "run"
    output.mkdir()
    RunFolder(output).metrics_file.write_text(f'{{"iteration": 0, "{TOP1}": 99.0}}\n')
    train(folders, output, [1, 2, 3, 4, 5, 6])
    assert_best_is(output, 12, 6)


def test_an_earlier_training_becomes_a_run_of_its_own(tmp_path: Path) -> None:
    """Wrong: its evaluations are read as the new one's, or with the new one's recipe; or nobody
    learns how much of the disk it takes."""
    run, earlier = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run" / "earlier_1")
    (run.path / "inference_TTA").mkdir(parents=True)
    for file in (run.final_checkpoint, run.config_file, run.detector_file, run.log_file):
        file.write_bytes(b"\n" * 100_000)
    run.write_slower_stages({})
    (run.path / "events.out.tfevents.1.host.1.0").touch()  # else TensorBoard draws two trainings
    own = Evaluation(str(run.final_checkpoint), str(run.path), {"bbox": {"AP": 41.0}})
    others = Evaluation("/other/model_final.pth", "/other", {"bbox": {"AP": 40.0}})
    for name, evaluation in (("own", own), ("others", others)):
        RunFolder(run.path / "evaluations" / name).write_evaluation(evaluation)
    said = set_earlier_aside(str(run.path), resume=False, weights="")
    told = f"training are in {earlier.path} now: 0.4 MB; delete that folder if nobody needs it"
    assert said.endswith(told)
    # What --config-file may name, and the log of this very process stay, too.
    assert {path.name for path in run.path.iterdir()} == {
        "earlier_1", "config.yaml", "detector.yaml", "log.txt"
    }  # fmt: skip
    assert run.log_file.stat().st_size == 0 and run.last_evaluation() is None
    assert earlier.log_file.stat().st_size == earlier.config_file.stat().st_size == 100_000
    assert earlier.detector_file.is_file() and earlier.slower_stages() == {}
    assert (earlier.path / "inference_TTA").is_dir()
    assert (earlier.path / "events.out.tfevents.1.host.1.0").is_file()
    evaluations = earlier.path / "evaluations"
    assert RunFolder(evaluations / "others").evaluation() == others
    assert RunFolder(evaluations / "own").evaluation() == Evaluation(
        str(earlier.final_checkpoint), str(earlier.path), own.results
    )


def test_the_backbone_that_a_training_starts_from_stays(tmp_path: Path) -> None:
    """Wrong: a sweep's weights, which lie in the run's folder, are moved away with what it left."""
    run = RunFolder(tmp_path)
    assert run.left() == [] and not run.backbone.touch() and run.left() == []
    run.best_checkpoint.touch()
    assert run.left() == [run.best_checkpoint, run.backbone]
    for options in ("", "?matching_heuristics=True"):
        weights = str(tmp_path / "x" / ".." / f"backbone.pth{options}")
        assert run.left(weights) == [run.best_checkpoint]


@pytest.mark.parametrize(
    ("moment", "before", "after", "best"),
    [
        # 50 at iteration 5 is redone and becomes 20: the best is that of iteration 3 again.
        ("os.rename model_0000007.pth 1", [10, 30, 50], [20, 25, 10, 10], (3, 30)),
        # It is redone and is still the best.
        ("os.rename model_0000007.pth 1", [10, 30, 50], [50, 25, 10, 10], (5, 50)),
        # Two of them are redone; what is kept is not the first of the two.
        ("os.rename model_0000011.pth 1", [10, 30, 20, 25, 50], [20, 10], (3, 30)),
        # Iteration 3 was evaluated and written down, but not saved; nor is its file half there.
        ("os.rename model_best.pth 2", [10, 30], [20, 25, 10, 10], (3, 30)),
        ("os.rename model_best.pth 3", [10, 30], [20, 25, 10, 10], (3, 30)),
        # The first one of all is redone.
        ("os.rename model_0000003.pth 1", [50], [10, 20, 15, 5, 5, 5], (3, 20)),
        # Killed in the last evaluation's writing.
        ("os.rename model_best.pth 3", [30, 20, 10, 15, 20, 40], [25], (1, 30)),
    ],
)
@pytest.mark.slow
def test_a_killed_run_keeps_the_best_of_what_counts(
    folders: Path,
    tmp_path: Path,
    moment: str,
    before: list[float],
    after: list[float],
    best: tuple[int, float],
) -> None:
    """Wrong: the file is of an evaluation that was redone and found less, or the best before the
    kill is forgotten, or was lost with its file."""
    output = tmp_path / "run"
    train_until(moment, folders, output, before)
    train(folders, output, after)
    assert_best_is(output, *best)


@pytest.mark.parametrize(("later", "best"), [(40, (12, 50)), (60, (14, 60))])
def test_a_longer_training_keeps_the_best_of_the_shorter_one(
    folders: Path, tmp_path: Path, later: float, best: tuple[int, float]
) -> None:
    """Wrong: a training that had ended is made longer, and its last evaluation, which was the best,
    is forgotten: a worse one takes its place in model_best.pth."""
    output = tmp_path / "run"
    train(folders, output, [10, 20, 10, 10, 10, 50])
    train(folders, output, [later], "SOLVER.MAX_ITER", 14)
    assert_best_is(output, *best)


def test_a_training_that_has_ended_is_resumed_in_silence(folders: Path, tmp_path: Path) -> None:
    """Wrong: if its last evaluation was the best, the log takes model_best.pth for damaged."""
    output = tmp_path / "run"
    train(folders, output, [10, 20, 10, 10, 10, 50])
    assert "is damaged" not in train(folders, output, [50])
    assert_best_is(output, 12, 50)


def test_the_end_names_no_other_evaluations_checkpoint(folders: Path, tmp_path: Path) -> None:
    """Wrong: SOLVER.BEST_METRIC is another one since --resume, and model_best.pth, which is of the
    best by the first one, is said to hold the best by the second."""
    output = tmp_path / "run"
    said = train(folders, output, [10, 20, 10, 10, 10, 10])
    assert f"the best, 20.0 at iteration 3, is {RunFolder(output).best_checkpoint}." in said
    metric = ("SOLVER.BEST_METRIC", "classification/top5", "SOLVER.MAX_ITER", 13)
    said = train(folders, output, [10], *metric)
    assert "the best, 100.0 at iteration 1, is in no checkpoint." in said


@pytest.mark.slow
def test_patience_is_remembered_and_shared(folders: Path, tmp_path: Path) -> None:
    """Wrong: a resumed run begins to count anew, or one of two processes waits for the other."""
    output = tmp_path / "run"
    several = ("SOLVER.PATIENCE", 3)
    given = [*arguments(folders, output, *several), "SOLVER.IMS_PER_BATCH", 8]
    given[2:2] = ["--num-gpus", 2, "--dist-url", "auto"]
    log = tmp_path / "log"
    # What is invented does not reach the processes that are started. Of three classes, all images
    # are always among the top five.
    said = run_tool(TOOL, *given, "SOLVER.BEST_METRIC", "classification/top5", log=log)
    assert said.count("has not improved for 3 evaluations") == 1
    train_until("os.rename model_0000007.pth 1", folders, tmp_path / "killed", [30, 20, 20])
    said = train(folders, tmp_path / "killed", [20, 20], *several)
    assert "has not improved for 3 evaluations" in said
    assert "The training has ended after 8 iterations" in said
    assert_best_is(tmp_path / "killed", 1, 30)
    assert RunFolder(tmp_path / "killed").progress().done == 1


def test_a_longer_training_is_not_at_its_end(tmp_path: Path) -> None:
    """Wrong: with SOLVER.PATIENCE, the model_final.pth of a shorter training passes for its own,
    and a sweep takes its figures amid the training for its result."""
    cfg, run = classifier_config(), RunFolder(tmp_path)
    cfg.SOLVER.PATIENCE, cfg.SOLVER.MAX_ITER = 3, 101
    run.config_file.write_text(cfg.dump())
    torch.save({"model": {}, "iteration": 7}, run.final_checkpoint)
    for last, done in ((7, 1.0), (8, 1.0), (50, 0.5)):
        run.metrics_file.write_text(f'{{"iteration": {last}, "total_loss": 1.0}}\n')
        assert run.progress().done == done


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    """Wrong: it comes out when the training ends, or a test set's own metric is refused."""
    cfg = detector_config()
    cfg.DATASETS.TEST = ("randwire_shapes_val",)
    check_best_metric(cfg)
    cfg.SOLVER.BEST_METRIC = "bbox/AP-circle"
    check_best_metric(cfg)
    for name in ("segm/AP", "AP"):
        cfg.SOLVER.BEST_METRIC = name
        with raises_one_line(ValueError, match=r"bbox/AP50") as e:
            check_best_metric(cfg)
        assert repr(name) in str(e.value)
    cfg.MODEL.MASK_ON, cfg.SOLVER.BEST_METRIC = True, "segm/AP"
    check_best_metric(cfg)
    cfg.DATASETS.TEST += ("coco_2017_val",)
    check_best_metric(cfg)
    cfg.SOLVER.BEST_METRIC = "coco_2017_val/segm/AP75"
    check_best_metric(cfg)
    classifier = classifier_config()
    classifier.MODEL.META_ARCHITECTURE = "ImageClassifier"
    classifier.DATASETS.TEST = ("imagenet_val",)
    check_best_metric(classifier)
    classifier.SOLVER.BEST_METRIC = "classification/top3"
    with pytest.raises(ValueError, match="top1, classification/top5"):
        check_best_metric(classifier)


def test_a_metric_that_no_evaluation_gave_is_said_once(folders: Path, tmp_path: Path) -> None:
    """Wrong: silence, or a line per evaluation. Which metrics an evaluator has can't always be told
    beforehand."""
    invent = (
        "from randwire_d2.classification import ClassificationTrainer\n"
        "ClassificationTrainer.test = classmethod(lambda *_: {'sem_seg': {'mIoU': 1.0}})\n"
    )
    log = tmp_path / "log"
    said = run_tool(TOOL, *arguments(folders, tmp_path / "run"), log=log, before=invent)
    assert said.count("no evaluation gives 'classification/top1'") == 1
    assert "they give sem_seg/mIoU" in said
    assert not RunFolder(tmp_path / "run").best_checkpoint.exists()
