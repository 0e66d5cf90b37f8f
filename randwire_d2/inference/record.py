"""What a run's own files say of a model, as the sections of its card."""

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
# Of a LazyConfig; its file alone has the rest.
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
# As the table of Detectron2's collect_env_info names them.
_LIBRARIES = "Python|PyTorch|torchvision|detectron2|GPU 0|CUDA_HOME"


def sections_of(
    file: str, cfg: CfgNode, class_names: list[str] | None, iteration: int | None
) -> Sections:
    """Data, recipe, figures, command and versions.

    Args:
        file: the checkpoint; its run is the one in whose folder it lies.
        cfg: the model's config, which stands for that of the run if there is none.
        class_names: the model's.
        iteration: the checkpoint's: the figures are those of its evaluation.
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
    # One that was given by its path is called after it: where it lay is nobody's business, nor is
    # the digest of that which a detector's is registered with.
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
    """What evaluations of exactly these weights found, the training's own and later ones."""
    try:
        metrics = run.metrics()
    except (OSError, ValueError):
        metrics = {}
    found = {}
    if iteration is not None:
        found = _results(metrics.get(iteration, {}))
        if not found and iteration + 1 == cfg.SOLVER.MAX_ITER:
            # Detectron2 counts one further before the evaluation that ends a training.
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
    """Those of a task as a whole: AP, not AP-person, nor AP-nut/bolt."""
    return {name: value for name, value in values.items() if _WHOLE.fullmatch(name)}


def _command(log: str, cfg: CfgNode) -> str:
    """The command line of a training's first start, out of what ``default_setup`` logged."""
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
        # The reader has the config by its name, not where this machine has the package.
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
    """Those of the training, out of its log."""
    rows = re.findall(rf"^({_LIBRARIES}) {{2,}}(\S+)", log, re.MULTILINE)
    return dict(rows)
