"""Small trainings of a classifier that tests start, disturb, and compare to the bit."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from helpers import ROOT, Tool, draw_image_folders, run_tool

TOOL = "pretrain_imagenet.py"
C78 = ROOT / "configs/imagenet/randwire_c78_250ep.yaml"
TORCHRUN = Path(torch.distributed.run.__file__)
ITERATIONS = 18
LAUNCHERS = ("--num-gpus", "torchrun", "variables", "two machines")

# The commands of README.md and GUIDE.md, which tests run: with fewer processes, and other words.
_TOOL = "tools/pretrain_imagenet.py"
COMMANDS = {
    "one machine": f"python {_TOOL} --config-file CONFIG --num-gpus 8",
    "torchrun": f"torchrun --standalone --nproc-per-node 8 {_TOOL} --config-file CONFIG",
    "torchrun, restarts": "torchrun --standalone --nproc-per-node 8 --max-restarts 1 "
    f"{_TOOL} --resume --config-file CONFIG",
    "two machines": "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST "
    f"--master-port 29500 {_TOOL} --config-file CONFIG",
    "two machines, restarts": "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 1 "
    f"--rdzv-backend c10d --rdzv-endpoint HOST:29500 {_TOOL} --resume --config-file CONFIG",
    "Slurm": f"python {_TOOL} --config-file CONFIG --slurm 2x8 --partition gpu",
}


_held: list[socket.socket] = []


def free_port() -> int:
    """A port that the system gives nobody else: it stays bound, which does not hinder those who are
    told of it, PyTorch's stores, since they share addresses."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", 0))
    _held.append(found)
    return int(found.getsockname()[1])


def command(
    name: str, folders: Path, output: Path, *more: object, workers: int = 0, **words: object
) -> list[object]:
    """The arguments of "python" or "torchrun" that run one of COMMANDS as a small training.

    Args:
        more: arguments of the tool.
        words: what takes the place of words, or of the values of flags (``nproc_per_node=2``).
    """
    texts = COMMANDS[name].replace("HOST", "127.0.0.1").split()[1:]
    for word, value in words.items():
        flag = f"--{word.replace('_', '-')}"
        texts[texts.index(flag) + 1] = str(value)
    at = texts.index(_TOOL)
    flags = [text for text in texts[at + 1 :] if text not in ("--config-file", "CONFIG")]
    given = arguments(folders, output, *flags, *more, workers=workers)
    return [*texts[:at], ROOT / _TOOL, *given] if at else given


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound images in train/ and val/, three classes; to be read only."""
    root = tmp_path_factory.mktemp("images")
    draw_image_folders(root)
    return root


def run_in_two(
    name: str,
    given: Sequence[object],
    keys: Sequence[object],
    launcher: str,
    hook: str,
    folder: Path,
) -> None:
    """Run a tool in two processes, each of which, and of their children, executes a hook first.

    Args:
        name: of the script in tools/.
        given, keys: its arguments; what follows is a launcher's flags, and then the keys.
        launcher: of LAUNCHERS.
        hook: code; its environment names a file SEEN in the folder.
    """
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(hook)
    environment = {"SEEN": str(folder / "seen"), "PYTHONPATH": f"{folder / 'hook'}:{ROOT}"}
    before = f"import os\nos.environ.update({environment})\n{hook}"
    tool, port = ROOT / "tools" / name, free_port()
    commands: list[list[Any]] = [[tool, *given, "--num-gpus", 2, "--dist-url", "auto", *keys]]
    if launcher == "torchrun":
        commands = [[TORCHRUN, "--standalone", "--nproc-per-node", 2, tool, *given, *keys]]
    elif launcher == "variables":
        commands = [[tool, *given, *keys]] * 2
    elif launcher == "two machines":
        url = ["--dist-url", f"tcp://127.0.0.1:{port}", "--num-machines", 2]
        commands = [[tool, *given, *url, "--machine-rank", rank, *keys] for rank in range(2)]
    started = []
    for rank, command in enumerate(commands):
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        variables = {k: str(v) for k, v in there.items()} if launcher == "variables" else {}
        first = f"{before}\nos.environ.update({variables})"
        started.append(Tool(*command, log=folder / f"log{rank}", before=first))
    for one in started:
        assert one.wait() == 0, one.said[-3000:]


def small(folders: Path) -> list[object]:
    """The keys of a training of a classifier that takes milliseconds per iteration."""
    return [
        "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 6,
        # Runs in different folders are compared to the bit: none may time its stages.
        "MODEL.RANDWIRE.FUSED", "on", "MODEL.CLASSIFIER.NUM_CLASSES", 3,
        "DATASETS.TRAIN", f"('{folders / 'train'}',)", "DATASETS.TEST", f"('{folders / 'val'}',)",
        "DATALOADER.NUM_WORKERS", 0, "INPUT.TRAIN_CROP_SIZE", 32, "INPUT.TEST_CROP_SIZE", 32,
        "SOLVER.EPOCHS", 0, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.01,
    ]  # fmt: skip


def arguments(folders: Path, output: Path, *flags: object, workers: int = 0) -> list[object]:
    return [
        "--config-file", C78, *flags, *small(folders),
        "MODEL.RANDWIRE.EDGE_DROP_PROB", 0.5, "MODEL.RANDWIRE.EDGE_DROP_SCOPE", "batch",
        "MODEL.CLASSIFIER.DROPOUT", 0.5, "SOLVER.MAX_ITER", ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 0, "SEED", 1, "OUTPUT_DIR", output,
        "DATALOADER.NUM_WORKERS", workers,
    ]  # fmt: skip


def final(output: Path) -> dict[str, Any]:
    """All that a training ended with, but for its config, which may name other workers."""
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    del checkpoint["config"]
    return checkpoint


@pytest.fixture(scope="session")
def alone(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an undisturbed run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run_tool(TOOL, *arguments(folders, output), log=output.with_name("log"))
    return output


@pytest.fixture(scope="session")
def two(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an undisturbed run of two processes, by --num-gpus."""
    output = tmp_path_factory.mktemp("two") / "run"
    given = command("one machine", folders, output, "--dist-url", "auto", num_gpus=2)
    run_tool(TOOL, *given, log=output.with_name("log"))
    return output
