"""tools/train_net.py as users run it: real processes, real kills, real COCO evaluation."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from processes import last_metrics, run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
# A few seconds of training: what is tested is the machinery.
SMALL = [
    "MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "10",
    "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "2", "SEED", "1",
    "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def command(output: Path, flags: Sequence[str] = (), options: Sequence[object] = ()) -> list[str]:
    config = ROOT / "configs/faster_rcnn_randwire_shapes.yaml"
    return [
        sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config),
        *flags, "OUTPUT_DIR", str(output), *SMALL, *map(str, options),
    ]  # fmt: skip


def test_train_evaluate_and_evaluate_again(tmp_path: Path) -> None:
    """--eval-only of the final checkpoint finds the AP that training ended with."""
    log = run(command(tmp_path, options=["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 4]))
    assert "eta:" in log, "no progress in the log"
    trained = last_metrics(tmp_path)
    assert 0 < trained["total_loss"] < float("inf")
    results = tmp_path / "inference" / "coco_instances_results.json"
    results.unlink()
    expected = f"[['bbox', 'AP', {trained['bbox/AP']}, 1e-6]]"
    run(command(
        tmp_path, ["--eval-only"],
        ["MODEL.WEIGHTS", tmp_path / "model_final.pth", "TEST.EXPECTED_RESULTS", expected,
         "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(128,)"],
    ))  # fmt: skip
    assert results.is_file()
    assert (tmp_path / "inference_TTA" / results.name).is_file()


def test_resume_after_kill_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    options = ["SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0]
    running = subprocess.Popen(
        command(tmp_path, options=[*options, "SOLVER.MAX_ITER", 100000]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last_checkpoint").exists():
            assert running.poll() is None, "training ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    last = torch.load(
        tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True
    )  # whole, whenever the kill came
    start = last["iteration"] + 1
    log = run(command(tmp_path, ["--resume"], [*options, "SOLVER.MAX_ITER", start + 2]))
    assert f"Starting training from iteration {start}" in log
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == start + 1


def test_two_cpu_processes_train_one_model(tmp_path: Path) -> None:
    """Two gloo ranks share the batch and evaluate; edge dropping stalls neither, whatever is
    recomputed."""
    log = run(command(
        tmp_path, ["--num-gpus", "2", "--dist-url", "auto"],
        [
            *("SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 6),
            *("MODEL.RANDWIRE.EDGE_DROP_PROB", 1.0, "MODEL.RANDWIRE.RECOMPUTE", True),
        ],
    ))  # fmt: skip
    assert "World size: 2" in log
    assert "bbox/AP" in last_metrics(tmp_path)
    assert (tmp_path / "model_final.pth").is_file()


def test_two_machines_train_one_model(tmp_path: Path) -> None:
    """--num-machines, --machine-rank and --dist-url reach the process group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    machines = [
        subprocess.Popen(
            command(
                tmp_path / rank,
                ["--num-machines", "2", "--machine-rank", rank, "--dist-url", url],
                ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0],
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    logs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(logs)[-3000:]
    assert "World size: 2" in logs[0]
    assert (tmp_path / "0" / "model_final.pth").is_file()
    assert not (tmp_path / "1" / "model_final.pth").exists()


def test_an_error_of_the_user_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = subprocess.run(
        command(output, options=["MODEL.RANDWIRE.WS.K", 3]), capture_output=True, text=True
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert [line for line in lines if "K=3" in line] == lines[-1:]
    assert "Traceback" not in done.stderr
    assert not os.path.exists(output)
