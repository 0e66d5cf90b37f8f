"""tools/train_net.py in processes of its own: real groups, real COCO evaluation."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import networkx
import pytest
from detectron2.data import MetadataCatalog
from helpers import ROOT, last_metrics, run_tool
from torch import nn

from randwire_d2 import load_detector
from randwire_d2.checkpoint import Wiring, load_checkpoint
from randwire_d2.inference.record import sections_of
from randwire_d2.modeling import NODE_OP_REGISTRY
from randwire_d2.runs import EVALUATIONS, RunFolder
from randwire_d2.wiring import Dag

TOOL = "train_net.py"
# What is tested is the machinery.
SMALL = [
    "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10, "MODEL.RANDWIRE.FUSED", "on",
    "SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 2, "SEED", 1,
    "DATALOADER.NUM_WORKERS", 0,
]  # fmt: skip


def arguments(
    output: Path, flags: Sequence[object] = (), options: Sequence[object] = ()
) -> list[object]:
    config = ROOT / "configs/faster_rcnn_randwire_shapes.yaml"
    return ["--config-file", config, *flags, "OUTPUT_DIR", output, *SMALL, *options]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_guides_script_trains_what_it_registers(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the guide's script is none; the tools can't train a generator or a node operation of
    one's own, or its key has no default. Or who reads the detector needs the generator, or is not
    told that the operation is needed. Or the last line and the card name one of the tools in place
    of such a script."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "GUIDE.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "train.main()" in block]
    (tmp_path / "my_train.py").write_text(script)
    options = ["MODEL.RANDWIRE.GRAPH", "RING", "MODEL.RANDWIRE.NODE_OP", "conv5x5",
               "MODEL.RANDWIRE.FUSED", "auto", "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2,
               "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0]  # fmt: skip
    run = tmp_path / "run"
    given = arguments(run, ["--num-gpus", processes], options)
    if processes == 1:
        said = run_tool(tmp_path / "my_train.py", *given, log=tmp_path / "log")
    else:  # which import the script that was started
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(tmp_path / "my_train.py"), *map(str, given)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
    given = f"['{run}', 'path/to/images', '--output', '{run}/predictions']"
    call = f"randwire_d2.cli.predict.main({given})"
    assert f"Next: {call}, in a script that registers conv5x5\n" in said
    wiring = Wiring.of(load_checkpoint(str(run / "model_final.pth")))
    assert wiring is not None and wiring.spec.node_op == "conv5x5"
    assert set(wiring.spec.dags) == {Dag.from_graph(networkx.circulant_graph(10, [1, 2]))}
    with pytest.raises(ValueError, match="unknown node_op 'conv5x5'.* the script that registers"):
        load_detector(run)
    monkeypatch.setitem(
        NODE_OP_REGISTRY._obj_map,
        "conv5x5",
        lambda inputs, outputs, stride: nn.Conv2d(inputs, outputs, 5, stride, 2, bias=False),
    )
    for cfg in (load_detector(run).cfg, RunFolder(run).config()):
        assert cfg.MODEL.RANDWIRE.RING.HOPS == 2
        card = sections_of(str(run / "model_final.pth"), cfg, None, 1)
        assert f"python {tmp_path / 'my_train.py'} --config-file" in str(card["Command"])


@pytest.mark.slow
def test_train_evaluate_and_evaluate_again(tmp_path: Path) -> None:
    """Wrong: --eval-only of the final checkpoint does not find the AP that training ended with,
    nothing is evaluated with test-time augmentation, or a file of the training is another."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 4]
    assert "eta:" in run_tool(TOOL, *arguments(run, options=options), log=log), "no progress"
    trained = last_metrics(run)
    assert 0 < trained["total_loss"] < float("inf")
    assert (
        load_detector(run).class_names == MetadataCatalog.get("randwire_shapes_val").thing_classes
    )
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    expected = f"[['bbox', 'AP', {trained['bbox/AP']}, 1e-6]]"
    options = ["MODEL.WEIGHTS", run / "model_final.pth", "TEST.EXPECTED_RESULTS", expected,
               "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(128,)"]  # fmt: skip
    said = run_tool(TOOL, *arguments(run, ["--eval-only"], options), log=log)
    (evaluation,) = map(RunFolder, (run / EVALUATIONS).iterdir())
    assert evaluation.detections_file.is_file() and evaluation.results_file.is_file()
    assert (evaluation.path / "inference_TTA" / evaluation.detections_file.name).is_file()
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    found = evaluation.evaluation()
    assert (found.weights, found.training) == (str(run / "model_final.pth"), str(run))
    assert found.results["bbox"]["AP"] == pytest.approx(trained["bbox/AP"], abs=1e-6)
    assert found.results.keys() == {"bbox", "bbox_TTA"}
    assert said.count(f"results are in {evaluation.path}") == 1


@pytest.mark.slow
def test_two_cpu_processes_train_one_model(tmp_path: Path) -> None:
    """Wrong: two gloo ranks do not share the batch or the evaluation, or edge dropping stalls one
    of them, whatever is recomputed; or they do not choose together how their stages run."""
    run = tmp_path / "run"
    options = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 4, "MODEL.RANDWIRE.FUSED", "auto",
               "MODEL.RANDWIRE.EDGE_DROP_PROB", 1.0, "MODEL.RANDWIRE.RECOMPUTE", True]  # fmt: skip
    flags = ["--num-gpus", 2, "--dist-url", "auto"]
    said = run_tool(TOOL, *arguments(run, flags, options), log=tmp_path / "log")
    assert "World size: 2" in said
    assert said.count("Shadow step: ") == 1
    assert len(RunFolder(run).slower_stages() or {}) == 3
    assert "bbox/AP" in last_metrics(run)
    assert (run / "model_final.pth").is_file()
