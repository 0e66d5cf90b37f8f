"""The package: its configs, its command, what Detectron2's own tools need of it, and its wheel."""

import os
import pickle
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from helpers import ROOT, draw_image_folders, output_of, raises_one_line, run_tool

from randwire_d2 import command, get_config_file
from randwire_d2.command import TOOLS, in_users_words, process, program
from randwire_d2.config import detector_config, merge_config
from randwire_d2.config_files import CONFIGS, KINDS
from randwire_d2.engine import argument_parser, data_config

SHAPES = "faster_rcnn_randwire_shapes.yaml"
SMALL = ["MODEL.RANDWIRE.CHANNELS", "8", "MODEL.RANDWIRE.NUM_NODES", "8"]


# -------------------------------------------------------------------------------------------------
# Configs
# -------------------------------------------------------------------------------------------------


def test_configs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a name finds another file, or only where the checkout is the current folder."""
    monkeypatch.chdir(tmp_path)
    assert get_config_file(SHAPES) == str(ROOT / "configs" / SHAPES)
    nested = "imagenet/randwire_c109_100ep.yaml"
    assert get_config_file(f"configs/{nested}") == str(ROOT / "configs" / nested)
    args = argument_parser().parse_args(["--config-file", SHAPES, *SMALL])
    assert data_config(args).MODEL.RANDWIRE.REGIME == "small"
    assert args.config_file == str(ROOT / "configs" / SHAPES), "default_setup reads it"
    # A file of the user's own comes first.
    Path(SHAPES).write_text("MODEL: {RANDWIRE: {CHANNELS: 7}}\nVERSION: 2\n")
    cfg = detector_config()
    merge_config(cfg, SHAPES, [])
    assert cfg.MODEL.RANDWIRE.CHANNELS == 7


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("faster_rcnn_randwire_c109_fpn_3x.yaml", "faster_rcnn_randwire_c109_fpn_1x.yaml"),
        ("randwire_c78_100ep.yaml", "imagenet/randwire_c78_100ep.yaml"),
        ("../setup.py", str(CONFIGS)),
    ],
)
def test_unknown_configs_are_named_with_what_is_near(name: str, near: str) -> None:
    """Wrong: a stack trace, a guess, or a file from outside."""
    with raises_one_line(ValueError, match="has no config") as error:
        get_config_file(name)
    assert near in str(error.value)


# -------------------------------------------------------------------------------------------------
# The command
# -------------------------------------------------------------------------------------------------

AS_COMMAND = "/usr/local/bin/randwire-d2"


def test_the_command_waits_for_no_library() -> None:
    """Wrong: `randwire-d2 --help` takes the seconds that PyTorch needs."""
    code = (
        "import runpy, sys\n"
        f"main = runpy.run_path({str(command.__file__)!r})['main']\n"
        "try: main(['--help'])\n"
        "finally: print(*{'torch', 'detectron2', 'numpy', 'randwire_d2'}.intersection(sys.modules))"
    )
    *listing, loaded = output_of(code).splitlines()
    assert not loaded
    assert all(any(line.startswith(f"  {name} ") for line in listing) for name in TOOLS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["--nothing"], "the following arguments are required: COMMAND"),
        (["trian", "--config-file", "x"], "'trian': did you mean 'train'"),
        (["xyz"], "'xyz': there are train, train-lazy, "),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    given: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a traceback; or who mistypes one of 22 commands has to find it in a list."""
    with pytest.raises(SystemExit) as e:
        command.main(given)
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and says in line
    assert line.startswith("randwire-d2: error: ") and line.endswith("; see --help")


@pytest.mark.parametrize("name", TOOLS)
def test_subcommands(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a tool can't be called, its script does something else, or its help names the
    scripts of a checkout to those who have none."""
    script, _ = TOOLS[name]
    main = import_module(f"randwire_d2.cli.{name.replace('-', '_')}").main
    assert runpy.run_path(str(ROOT / "tools" / script))["main"].__code__ is main.__code__
    for started, usage in ((str(ROOT / "tools" / script), script), (AS_COMMAND, None)):
        monkeypatch.setattr(sys, "argv", [started])
        with pytest.raises(SystemExit) as stop:
            main(["--help"]) if usage else command.main([name, "--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0
        assert said.startswith(f"usage: {usage or f'randwire-d2 {name}'} ")
        assert usage or "tools/" not in said


@pytest.mark.parametrize(
    ("name", "shown", "unshown"),
    [
        ("train", "--data PATH --data-val --resume --num-gpus --slurm", ""),
        ("pretrain", "--resume --num-gpus --slurm", "--data"),
        ("browse-data", "--data PATH --data-val", "--resume --eval-only -gpus --dist-url lurm"),
        ("measure-memory", "--data PATH --data-val", "--resume --eval-only -gpus --dist-url lurm"),
    ],
)
def test_a_help_shows_the_options_of_its_tool(
    name: str, shown: str, unshown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a tool offers what it refuses or has no use for."""
    with pytest.raises(SystemExit):
        import_module(f"randwire_d2.cli.{name.replace('-', '_')}").main(["--help"])
    said = capsys.readouterr().out
    assert all(words in said for words in shown.split())
    assert not any(words in said for words in unshown.split())


@pytest.mark.parametrize("name", ["browse-data", "measure-memory"])
@pytest.mark.parametrize("given", ["--resume", "--eval-only", "--num-gpus=2", "--slurm=1x2"])
def test_a_tool_takes_no_option_that_it_would_not_heed(
    name: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: who asks for two GPUs, or a job, gets neither, and is not told."""
    with pytest.raises(SystemExit) as stop:
        import_module(f"randwire_d2.cli.{name.replace('-', '_')}").main([given, "SEED", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: unrecognized arguments: {given}" in said


@pytest.mark.slow
def test_importing_says_nothing_of_others_deprecations() -> None:
    """Wrong: each tool begins with four lines about Detectron2's use of PyTorch, or a second later
    than it must, because what PyTorch defines is searched for garbage again and again, or half a
    second later, because a training waits for what only draws its pictures."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import gc, sys\n"
        "searches = []\n"
        "gc.callbacks.append(lambda phase, info: searches.append((phase, info['generation'])))\n"
        "import randwire_d2\n"
        "print(searches.count(('start', 2)), gc.isenabled())\n"
        "import randwire_d2.cli.pretrain, randwire_d2.cli.train\n"
        "print('matplotlib' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "torch.jit.script" not in done.stderr
    searches, enabled, draws = done.stdout.split()
    assert int(searches) <= 1 and (enabled, draws) == ("True", "False")


def test_the_command_without_detectron2(tmp_path: Path) -> None:
    """Wrong: who has installed the package alone gets a stack trace."""
    code = (
        "import runpy, sys\n"
        "sys.modules['detectron2'] = None\n"
        f"runpy.run_path({str(command.__file__)!r})['main'](['train'])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("randwire-d2: error: randwire_d2 needs Detectron2")


def test_errors_and_commands_in_the_users_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: who has a checkout is told of a command, or who has none of scripts."""
    text = "pretrain it (python tools/pretrain_imagenet.py --data x), see tools/unknown.py"
    for started in (str(ROOT / "tools" / "train_net.py"), "/somewhere/pytest"):
        monkeypatch.setattr(sys, "argv", [started])
        assert in_users_words(text) == text and program("demo.py") == "demo.py"
    monkeypatch.setattr(sys, "argv", [AS_COMMAND, "train"])
    assert in_users_words(text) == (
        "pretrain it (randwire-d2 pretrain --data x), see tools/unknown.py"
    )
    assert program("demo.py") == "randwire-d2 demo"
    with pytest.raises(SystemExit, match=r"^randwire-d2 train: error: the file 'none'"):
        command.main(["train", "--config-file", "none"])


def test_tools_start_the_tools_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a sweep or the demo runs another project's train_net.py, of which there are many."""
    package = [sys.executable, "-m", "randwire_d2", "train"]
    (tmp_path / "train_net.py").touch()
    for started in (AS_COMMAND, str(tmp_path / "train_net.py"), str(tmp_path / "demo.py")):
        monkeypatch.setattr(sys, "argv", [started])
        assert process("train_net.py") == package
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / "demo.py")])
    assert process("train_net.py") == [sys.executable, str(ROOT / "tools" / "train_net.py")]


# -------------------------------------------------------------------------------------------------
# Detectron2's own tools
# -------------------------------------------------------------------------------------------------

# As demo/demo.py of Detectron2: a predictor, and a drawing of what it finds.
DEMO = """
import argparse, cv2
import randwire_d2
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
parser = argparse.ArgumentParser()
for name in ("config-file", "input", "output"):
    parser.add_argument(f"--{name}")
parser.add_argument("--opts", nargs=argparse.REMAINDER)
args = parser.parse_args()
cfg = get_cfg()
cfg.merge_from_file(args.config_file)
cfg.merge_from_list(args.opts)
cfg.freeze()
image = cv2.imread(args.input)
found = DefaultPredictor(cfg)(image)["instances"]
drawing = Visualizer(image[:, :, ::-1], MetadataCatalog.get(cfg.DATASETS.TEST[0]))
cv2.imwrite(args.output, drawing.draw_instance_predictions(found).get_image()[:, :, ::-1])
print("it found", len(found), "things")
"""

# As tools/analyze_model.py of Detectron2: the multiply-adds of a model on images of its test set.
ANALYZE = """
import sys
import randwire_d2
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.merge_from_list(sys.argv[2:])
model = build_model(cfg).eval()
flops = FlopCountAnalysis(model, [{"image": torch.zeros(3, 64, 96)}])
flops.unsupported_ops_warnings(False)
print("counted", flops.by_module()["model.backbone.bottom_up"], parameter_count(model)[""])
"""


@pytest.mark.slow
def test_a_script_like_detectron2s_demo(tmp_path: Path) -> None:
    """Wrong: `import randwire_d2` is not enough for a tool of somebody else's."""
    draw_image_folders(tmp_path / "data", classes="a", train=1, val=0)
    script, picture = tmp_path / "their_demo.py", tmp_path / "found.png"
    script.write_text(DEMO)
    said = run_tool(
        script, "--config-file", get_config_file(SHAPES), "--output", picture,
        "--input", tmp_path / "data" / "train" / "a" / "0.png", "--opts", *SMALL,
        "MODEL.ROI_HEADS.NUM_CLASSES", 6, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
        log=tmp_path / "log",
    )  # fmt: skip
    assert int(re.findall(r"it found (\d+) things", said)[0]) > 0 and picture.is_file()


def test_a_script_like_detectron2s_analysis(tmp_path: Path) -> None:
    """Wrong: the same, or the keys of the command line do not reach the backbone."""
    script, log = tmp_path / "their_analysis.py", tmp_path / "log"
    script.write_text(ANALYZE)
    counted = []
    for channels in ("8", "16"):
        options = [*SMALL, "MODEL.RANDWIRE.CHANNELS", channels]
        said = run_tool(script, get_config_file(SHAPES), *options, log=log)
        counted.append([*map(float, said.split("counted ")[-1].split()[:2])])
    assert all(0 < few < many for few, many in zip(*counted))


DETECTORS = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name not in ("imagenet", "cifar10", "shapes", "sweeps")
]


@pytest.mark.parametrize("path", DETECTORS, ids=lambda path: path.stem)
def test_get_cfg_reads_the_configs_of_detectors(path: Path) -> None:
    """Wrong: Detectron2's own tools refuse one of them."""
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.RANDWIRE.NUM_NODES > 0


def test_get_cfg_reads_the_configs_of_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: Detectron2's demo stops at the config.yaml of a run, because of what only trainers
    read; or another project's trainer passes over such a key in silence, or over its own key of
    that name, or this project's trainer over any."""
    ours = detector_config()
    pairs = ["SOLVER.EPOCHS", 3, "SOLVER.EMA.DECAY", 0.9, "MODEL.RANDWIRE.CHANNELS", 7]
    ours.merge_from_list(pairs)
    assert ours.SOLVER.EPOCHS == 3 and ours.SOLVER.EMA.DECAY == 0.9
    (tmp_path / "config.yaml").write_text(ours.dump())
    assert not caplog.text
    theirs = get_cfg()
    theirs.merge_from_file(str(tmp_path / "config.yaml"))
    assert theirs.MODEL.RANDWIRE.CHANNELS == 7 and "EPOCHS" not in theirs.SOLVER
    for key in ("SOLVER.EPOCHS", "SOLVER.EMA", "SOLVER.AMP.PRECISION", "TEST.LOSS"):
        assert f"(ignoring): {key}" in caplog.text
    # Their own keys of these names are theirs, in files and on the command line, and in copies.
    theirs.SOLVER.EPOCHS = 12
    for cfg in (theirs, theirs.clone(), pickle.loads(pickle.dumps(theirs))):
        cfg.merge_from_list(["SOLVER.EPOCHS", "50", "SOLVER.PATIENCE", "5"])
        assert cfg.SOLVER.EPOCHS == 50 and "PATIENCE" not in cfg.SOLVER
    assert theirs.clone().SOLVER.EPOCHS == 50 and "EPOCHS" not in get_cfg().SOLVER
    theirs.merge_from_file(str(tmp_path / "config.yaml"))
    assert theirs.SOLVER.EPOCHS == 3
    again = detector_config()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.SOLVER == ours.SOLVER and again.MODEL.RANDWIRE == ours.MODEL.RANDWIRE


# -------------------------------------------------------------------------------------------------
# The wheel
# -------------------------------------------------------------------------------------------------

SOURCE = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "randwire_d2",
          "configs", "tools")  # fmt: skip


def build(folder: Path) -> Path:
    """A wheel made from an sdist of the checkout; neither leaves anything in the checkout."""
    checkout = folder / "checkout"
    checkout.mkdir(parents=True)
    for name in SOURCE:
        (checkout / name).symlink_to(ROOT / name)
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call([sys.executable, "-W", "ignore", "-c", hook, str(folder)], checkout)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist], folder)
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/tools/install.py") for name in archive.getnames())
    (wheel,) = folder.glob("*.whl")
    return wheel


def call(command: list[object], cwd: Path, **environment: str) -> str:
    """What a command printed, which must succeed, and which sees nothing of the checkout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs programs of a fresh environment that has the wheel; PyTorch and the like are lent."""
    folder = tmp_path_factory.mktemp("package")
    wheel = build(folder / "dist")
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Only folders with packages: .pth files in them, such as an editable checkout's, are not read.
    lent = {str(Path(module.__file__).parents[1]) for module in (torch, detectron2, pytest)}
    (packages / "lent.pth").write_text("\n".join(sorted(lent)))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    python = folder / "venv" / "bin" / "python"
    call([*pip, "--python", python, "install", "-q", "--no-deps", wheel], folder)
    (folder / "empty").mkdir()
    return lambda name, *arguments: call([python.with_name(name), *arguments], folder / "empty")


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    """Wrong: a room, a config or a source file of the operators is missing in the package."""
    with zipfile.ZipFile(build(tmp_path)) as archive:
        held = set(archive.namelist())
    kinds = {".py", ".cpp", ".cu", ".h", ".typed"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "randwire_d2").rglob("*")
        if path.suffix in kinds
    }
    wanted |= {
        f"randwire_d2/configs/{path.relative_to(CONFIGS)}"
        for kind in KINDS
        for path in CONFIGS.rglob(f"*{kind}")
    }
    assert not wanted - held


@pytest.mark.slow
def test_from_nothing_to_predictions_without_a_checkout(
    installed: Callable[..., str], tmp_path: Path
) -> None:
    """Wrong: something in the package needs a file of the checkout, or names one to the user."""
    where = installed("python", "-W", "ignore", "-c", "import randwire_d2; print(randwire_d2)")
    assert "site-packages" in where and str(ROOT) not in where
    assert "compare-generators" in installed("randwire-d2", "--help")

    run, backbone = tmp_path / "demo" / "run" / "pretrain", tmp_path / "backbone.pth"
    few = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "0"]
    pretrain = " ".join([*SMALL, *few, "SOLVER.EPOCHS 0 SOLVER.MAX_ITER 2"])
    said = installed(
        "randwire-d2", "demo", "--output", tmp_path / "demo", "--pretrain-opts", pretrain, *few,
        "SOLVER.MAX_ITER", 2,
    )  # fmt: skip
    assert "$ randwire-d2 train --config-file " in said and "Pictures: " in said
    said = installed("randwire-d2", "convert", run / "model_final.pth", backbone)
    (use,) = re.findall(r"^train +(randwire-d2 train --config-file \S+) ", said, re.MULTILINE)
    assert get_config_file(use.split()[-1])
    assert "tools/" not in said

    output = tmp_path / "detector"
    said = installed(
        "randwire-d2", "train", "--config-file", SHAPES, "--config-from-weights", "--num-gpus", 2,
        *few, "SOLVER.MAX_ITER", 10, "MODEL.WEIGHTS", backbone, "OUTPUT_DIR", output,
    )  # fmt: skip
    assert f"Next: randwire-d2 predict {output} path/to/images" in said
    draw_image_folders(tmp_path / "images", classes="a", train=2, val=0)
    found = tmp_path / "predictions"
    installed("randwire-d2", "predict", output, tmp_path / "images", "--output", found)
    assert (found / "results.json").is_file()

    script = tmp_path / "their_demo.py"
    script.write_text(DEMO)
    said = installed(
        "python", script, "--config-file", output / "config.yaml", "--input",
        next((tmp_path / "images").rglob("*.png")), "--output", tmp_path / "their.png",
        "--opts", "MODEL.WEIGHTS", output / "model_final.pth",
    )  # fmt: skip
    assert "it found" in said and (tmp_path / "their.png").is_file()
