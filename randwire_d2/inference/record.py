"""The sections of a model card, from the files of the run that trained the model."""

import ast
import os
import re
import shlex

from detectron2.config import CfgNode

from .. import __version__
from ..command import in_users_words
from ..config import family, flat, is_classifier
from ..runs import EVALUATIONS, RunFolder

Sections = dict[str, str | dict[str, object]]

_RECIPE = (
    "SOLVER.MAX_ITER", "SOLVER.EPOCHS", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR",
    "SOLVER.LR_SCHEDULER_NAME", "SOLVER.WARMUP_ITERS",
    "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.EMA.DECAY", "SOLVER.AMP.ENABLED", "MODEL.BACKBONE.FREEZE_AT", "SEED",
)  # fmt: skip
_STEPS = ("SOLVER.STEPS", "SOLVER.GAMMA")
_DETECTORS = ("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST")
# The recipe's keys for a LazyConfig; only its own file contains the others.
_LAZY = (
    "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.EMA.DECAY", "SOLVER.AMP.ENABLED",
    "MODEL.BACKBONE.FREEZE_AT", "SEED", "MODEL.RANDWIRE.NORM", "INPUT.MIN_SIZE_TEST",
)  # fmt: skip
_CLASSIFIERS = (
    "INPUT.TRAIN_CROP_SIZE", "INPUT.TEST_CROP_SIZE", "MODEL.CLASSIFIER.LABEL_SMOOTHING",
    "MODEL.CLASSIFIER.DROPOUT",
)  # fmt: skip
# The tasks of Detectron2's evaluators and this project's, as metrics.json names them.
_TASKS = "bbox|segm|keypoints|sem_seg|panoptic_seg|classification"
_WHOLE = re.compile(rf"(.*/)?({_TASKS})/[^/-]+", re.DOTALL)
# The libraries, as the table of Detectron2's collect_env_info names them.
_LIBRARIES = "Python|PyTorch|torchvision|detectron2|GPU 0|CUDA_HOME"


def sections_of(
    file: str, cfg: CfgNode, class_names: list[str] | None, iteration: int | None
) -> Sections:
    """The sections on data, recipe, metrics, command and versions.

    Args:
        file: the checkpoint; its folder is the run's.
        cfg: the model's config, used if the run has none.
        class_names: the model's class names.
        iteration: the checkpoint's iteration, whose evaluation the card shows.
    """
    run = RunFolder(os.path.dirname(os.path.abspath(file)))
    if run.config_file.is_file():
        cfg = run.config()
    log = run.log_file.read_text(errors="replace") if run.log_file.is_file() else ""
    command = _command(log, cfg)
    classes: Sections = {}
    if class_names is not None:
        classes["Classes"] = f"{len(class_names)}: {', '.join(class_names)}"
    return {
        "Data": _data(cfg),
        **classes,
        "Recipe": _recipe(cfg),
        "Figures": _figures(run, file, cfg, iteration)
        or "No evaluation of these weights is on record.",
        "Command": f"```sh\n{command}\n```" if command else "The command is not on record.",
        "Versions": {**_versions(log), "randwire_d2, which wrote this folder": __version__},
    }


def _data(cfg: CfgNode) -> dict[str, object]:
    return {
        "trained on": _names(cfg, cfg.DATASETS.TRAIN),
        "tested on": _names(cfg, cfg.DATASETS.TEST),
        "channels": cfg.INPUT.FORMAT,
        "mean": cfg.MODEL.PIXEL_MEAN,
        "standard deviation": cfg.MODEL.PIXEL_STD,
    }


def _names(cfg: CfgNode, sets: tuple[str, ...]) -> str:
    # A data set that was given by its path has this path in its name. Keep only the last part:
    # neither the folder nor the digest under which a detector's set is registered is for readers.
    names = [os.path.basename(name.rstrip("/")) for name in sets]
    if cfg.DATASETS.PATH:
        names = [re.sub(r"_[0-9a-f]{8}_(train|val)$", r" (\1)", name) for name in names]
    return ", ".join(names)


def _recipe(cfg: CfgNode) -> dict[str, object]:
    weights = cfg.MODEL.WEIGHTS
    start = weights if "://" in weights else os.path.basename(weights)
    norm = (f"MODEL.{node}.NORM",) if (node := family(cfg)) else ()
    steps = _STEPS if "Step" in cfg.SOLVER.LR_SCHEDULER_NAME else ()
    keys = (*_RECIPE, *steps, *norm, *(_CLASSIFIERS if is_classifier(cfg) else _DETECTORS))
    keys = _LAZY if cfg.MODEL.LAZY else keys
    values = dict(flat(cfg))
    return {"starts from": start or "random weights", **{key: values[key] for key in keys}}


def _figures(run: RunFolder, file: str, cfg: CfgNode, iteration: int | None) -> dict[str, object]:
    """The metrics of all evaluations of exactly these weights, during training and later."""
    try:
        metrics = run.metrics()
    except (OSError, ValueError):
        metrics = {}
    found = {}
    if iteration is not None:
        found = _results(metrics.get(iteration, {}))
        if not found and iteration + 1 == cfg.SOLVER.MAX_ITER:
            # Detectron2 logs the final evaluation under the next iteration.
            found = _results(metrics.get(iteration + 1, {}))
    rows: dict[str, object] = {name: f"{value:.2f}" for name, value in found.items()}
    for path in sorted((run.path / EVALUATIONS).glob("*/results.json")):
        evaluation = RunFolder(path.parent).evaluation()
        if os.path.abspath(evaluation.weights) == os.path.abspath(file):
            for task, values in evaluation.results.items():
                results = _results({f"{task}/{name}": v for name, v in values.items()})
                rows |= {
                    f"{name} (evaluation {path.parent.name})": f"{value:.2f}"
                    for name, value in results.items()
                }
    return rows


def _results(values: dict[str, float]) -> dict[str, float]:
    """The metrics of whole tasks: AP, but not AP-person or AP-nut/bolt."""
    return {name: value for name, value in values.items() if _WHOLE.fullmatch(name)}


def _command(log: str, cfg: CfgNode) -> str:
    """The command line of a training's first start, as ``default_setup`` logged it."""
    for text in re.findall(r"Command line arguments: (Namespace\(.*\))$", log, re.MULTILINE):
        try:
            call = ast.parse(text, mode="eval").body
            assert isinstance(call, ast.Call)
            given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError, AssertionError):
            continue
        if given.get("eval_only"):
            continue
        tool = "lazyconfig_train_net" if cfg.MODEL.LAZY else "train_net"
        tool = "pretrain_imagenet" if is_classifier(cfg) else tool
        command = [given.get("script") or f"tools/{tool}.py"]
        # Readers know the config by its name in the package, not by this machine's path.
        path = str(given.get("config_file") or "")
        given["config_file"] = re.sub(r".*/randwire_d2/configs/", "configs/", path)
        for name in ("config_file", "data", "data_val"):
            if given.get(name):
                command += [f"--{name.replace('_', '-')}", str(given[name])]
        for name in ("num_gpus", "num_machines"):
            if given.get(name, 1) != 1:
                command += [f"--{name.replace('_', '-')}", str(given[name])]
        if given.get("config_from_weights"):
            command.append("--config-from-weights")
        command = ["python", *command, *map(str, given.get("opts") or ())]
        return in_users_words(shlex.join(command))
    return ""


def _versions(log: str) -> dict[str, object]:
    """The versions of the training's libraries, from its log."""
    rows = re.findall(rf"^({_LIBRARIES}) {{2,}}(\S+)", log, re.MULTILINE)
    return dict(rows)
