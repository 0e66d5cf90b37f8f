"""The config of a command line, and checks for all errors that can be found before any work."""

import argparse
import logging
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from fvcore.common.registry import Registry
from torch import nn

from ... import data
from ...checkpoint import PREPROCESSING_KEY, Preprocessing, Wiring
from ...config import (
    detector_config,
    family,
    flat,
    forget_other_generators,
    is_classifier,
    merge_config,
    merge_in_one_line,
    set_spec,
)
from ...config_files import config_path
from ...data.images.reading import check_channels
from ...devices import usable_device
from ...files import check_folder, without_options
from ...modeling.on_meta import build_on_meta
from ...runs import RunFolder
from ...text import prefixed, similar
from ..processes.slurm import is_submitted
from ..processes.torchrun import Launched, count_processes
from .continuation import check_continuation, check_split
from .datasets import (
    check_evaluator,
    count_training_images,
    forget_classes,
    settle_classes,
    take_data,
)
from .keypoints import settle_keypoints
from .keys import UNSET
from .limits import LIMITS, check_augmented_test, check_images, check_limits
from .metric import check_best_metric
from .schedule import check_length, check_solver, scale_schedule, scale_to_processes
from .weights import check_resumed, check_weights, read_weights

logger = logging.getLogger(__name__)


def load_config(args: argparse.Namespace) -> CfgNode:
    """Build and check the frozen config of a command line (``argument_parser``).

    Raises:
        ValueError: something would make the run fail later: an unknown key, a missing file, data
            set or device, a network that can't be built, a training that can't succeed. The message
            is one line that names the value and the way out.
    """
    cfg = detector_config()
    default_classes = forget_classes(cfg)
    node = cfg.MODEL.ROI_KEYPOINT_HEAD
    default_keypoints, node.NUM_KEYPOINTS = node.NUM_KEYPOINTS, UNSET
    cfg = read_config(args, cfg)
    check_limits(cfg, LIMITS)
    check_channels(cfg)
    if not args.eval_only:
        check_solver(cfg)
    check_device(cfg, args)
    check_output("OUTPUT_DIR", cfg.OUTPUT_DIR, args, cfg.MODEL.WEIGHTS)
    own = check_continuation(cfg, args)
    take_data(cfg)
    check_split(own, cfg)
    _check_datasets(cfg, args)
    names = [*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    classes = settle_classes(cfg, default_classes, names)
    settle_keypoints(cfg, default_keypoints, names)
    check_model(cfg, args, classes)
    if not args.eval_only:
        check_best_metric(cfg)
        data.check_jitter(cfg)
        check_images(cfg)
        cfg = scale_schedule(cfg, count_training_images(cfg) if cfg.SOLVER.EPOCHS else 0)
        cfg = scale_to_processes(cfg, check_processes(args)[0])
    cfg.freeze()
    return cfg


def data_config(args: argparse.Namespace) -> CfgNode:
    """Build the config of a command line and register its data sets; the model and the machine are
    not checked, and a validation split may be missing.

    Raises:
        ValueError: a key is unknown, or the data can't be used; one line.
    """
    cfg = read_config(args, detector_config())
    check_limits(cfg, LIMITS)
    check_solver(cfg)
    check_images(cfg)
    take_data(cfg, needs_val=False)
    _check_datasets(cfg, args)
    cfg.freeze()
    return cfg


def read_config(args: argparse.Namespace, cfg: CfgNode) -> CfgNode:
    """Merge the config of a command line into ``cfg``, which has all known keys.

    Raises:
        ValueError: a file is missing, a key is unknown, or a value has the wrong type; one line.
    """
    check_options(args)
    args.config_file = config_path(args.config_file)  # default_setup logs the file
    if args.config_file.endswith(".py"):
        raise ValueError(
            f"--config-file {args.config_file!r} is Python: a LazyConfig is for "
            "tools/lazyconfig_train_net.py"
        )
    try:
        merge_config(cfg, args.config_file, args.opts)
    except ValueError as e:
        raise ValueError(f"{e}{_way_out(str(e), cfg)}") from e
    forget_other_generators(cfg)
    if not args.eval_only:
        check_length(cfg, args.opts)
    _take_flags(cfg, args)
    if args.config_from_weights:
        merge_in_one_line("--config-from-weights", lambda: _take_config_from_weights(cfg))
    return cfg


def check_output(key: str, folder: str, args: argparse.Namespace, weights: str) -> None:
    """Check the folder for a run's output.

    Args:
        key: the config key that names the folder.
        weights: the weights that the run starts from; "" for none.

    Raises:
        ValueError: the folder can't be written; ``weights`` belong to an earlier training in it,
            which would be moved (``set_earlier_aside``); or they are a file: URL; one line.
    """
    if weights.startswith("file:"):
        raise ValueError(f"{weights!r} is a URL; name the weights' file by its path")
    check_folder(key, folder)
    run = RunFolder(folder)
    if args.eval_only or (args.resume and run.can_resume):
        return
    left = run.left(weights)
    file = Path(without_options(weights)).resolve()
    if weights and any(path.resolve() in (file, *file.parents) for path in left):
        raise ValueError(
            f"{weights!r}, from which the training would start, belongs to an earlier training in "
            f"{key} {folder!r}, whose checkpoints would be set aside: set another {key}"
        )
    if run.can_resume:
        logger.warning(
            f"{key} {folder!r} holds an earlier training, whose checkpoints are set aside; "
            "--resume would continue it"
        )


def check_options(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an option comes after the config's KEY VALUE pairs, or would have no effect;
            one line.
    """
    late = [given for given in args.opts if given.startswith("--")]
    if late:
        raise ValueError(f"{late[0]} belongs ahead of {args.opts[0]!r}: keys and values come last")
    if getattr(args, "renamed_class", ()) and not (args.resume or args.eval_only):
        raise ValueError(
            "--renamed-class goes with --resume or --eval-only: a new training takes the names of "
            "its data anyway; add one of the two, or leave out --renamed-class"
        )


def _way_out(error: str, cfg: CfgNode) -> str:
    """A hint for an error of yacs, to append to its message; "" if there is none."""
    if unknown := re.search(r"Non-existent (?:config )?key: (\S+)$", error):
        if unknown[1].startswith("MODEL.CLASSIFIER"):
            return "; this is a classifier's, which tools/pretrain_imagenet.py trains"
        return similar(unknown[1], (key for key, _ in flat(cfg)))
    if "Type mismatch (<class 'tuple'> vs. <class 'str'>)" in error:
        return "; a tuple of one name is \"('NAME',)\""
    if "Type mismatch (<class 'str'> vs. <class 'bool'>)" in error:
        return "; YAML reads on, off, yes and no as truth values: quote the word, as in 'on'"
    return ""


def _take_flags(cfg: CfgNode, args: argparse.Namespace) -> None:
    for flag, key in (("data", "PATH"), ("data_val", "PATH_VAL")):
        if given := getattr(args, flag) or cfg.DATASETS[key]:
            if is_classifier(cfg):
                raise ValueError(
                    f"--{flag.replace('_', '-')} (DATASETS.{key}) is a detector's; a classifier's "
                    "data sets are folders with one folder per class, such as DATASETS.TRAIN "
                    "\"('my/train',)\""
                )
            cfg.DATASETS[key] = given
    named = {"DATASETS.TRAIN", "DATASETS.TEST"}.intersection(args.opts[::2])
    if cfg.DATASETS.PATH and named:
        raise ValueError(
            f"{min(named)} and DATASETS.PATH {cfg.DATASETS.PATH!r} (--data) both name the data; "
            "leave one out, or set DATASETS.PATH ''"
        )


def _take_config_from_weights(cfg: CfgNode) -> None:
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise ValueError("it takes the config from MODEL.WEIGHTS, which is empty")
    checkpoint = read_weights("MODEL.WEIGHTS", path)
    wiring, preprocessing = Wiring.of(checkpoint), checkpoint.get(PREPROCESSING_KEY)
    if wiring is None and preprocessing is None:
        raise ValueError(f"MODEL.WEIGHTS {path!r} holds neither a wiring nor a preprocessing")
    if wiring is not None:
        set_spec(cfg, wiring.spec)
        if wiring.head_relu is not None and is_classifier(cfg):
            cfg.MODEL.CLASSIFIER.HEAD_RELU = wiring.head_relu
    if preprocessing is not None:
        cfg.merge_from_list(Preprocessing.from_dict(preprocessing).options)


def check_processes(args: argparse.Namespace) -> tuple[int, int]:
    """The number of processes of a command line's run, in total and on this machine.

    Raises:
        ValueError: the options for processes and machines are invalid; one line.
    """
    for flag, least in (("num_gpus", 0), ("num_machines", 1)):
        if (given := getattr(args, flag)) < least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}; got {given}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank must be 0 … {args.num_machines - 1}, as --num-machines is "
            f"{args.num_machines}; got {args.machine_rank}"
        )
    url = args.dist_url
    if url == "auto" and args.num_machines > 1 and Launched.here() is None:
        raise ValueError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, an address of "
            "the first one; auto is for one machine"
        )
    if url != "auto" and not re.fullmatch(r"tcp://[^/]+:\d{1,5}|(file|env)://.*", url):
        raise ValueError(f"--dist-url must be tcp://HOST:PORT, file:///PATH or auto; got {url!r}")
    return count_processes(args)


def check_device(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise a ValueError if the devices don't suit the run, or can't share the batch evenly."""
    processes, here = check_processes(args)
    device = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
    if device.type == "cuda" and device.index is not None and processes > 1:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which {processes} processes can't share; each "
            "has a GPU of its own with MODEL.DEVICE cuda"
        )
    if device.type == "cuda" and not is_submitted(args):
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise ValueError(
                f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch sees no GPU; to train on the "
                "CPU, add MODEL.DEVICE cpu"
            )
        if (device.index or 0) >= gpus:
            raise ValueError(
                f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine's last GPU is "
                f"cuda:{gpus - 1}"
            )
        if here > gpus:
            flag = "--num-gpus" if here == args.num_gpus else "torchrun --nproc-per-node"
            raise ValueError(f"{flag} {here}: this machine has {gpus}")
    if args.eval_only:
        return
    if device.type == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise ValueError("SOLVER.AMP.ENABLED needs a GPU, and MODEL.DEVICE is cpu")
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise ValueError(
            f"SOLVER.AMP.PRECISION is float16 or bfloat16; got {cfg.SOLVER.AMP.PRECISION!r}"
        )
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    number = reference or max(processes, 1)
    if batch % number:
        key = "SOLVER.REFERENCE_WORLD_SIZE " if reference else ""
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {batch} is the batch of all {key}{number} processes together, "
            f"and must be a multiple of their number, such as {-(-batch // number) * number}"
        )


def _check_datasets(cfg: CfgNode, args: argparse.Namespace) -> None:
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN), ("TEST", cfg.DATASETS.TEST)):
        if args.eval_only and key == "TRAIN":
            continue
        if not names and (key == "TRAIN" or args.eval_only):
            raise ValueError(f"DATASETS.{key} is empty; name registered data sets, or --data PATH")
        for name in names:
            check_dataset(f"DATASETS.{key}", name)
            if key == "TEST":
                check_evaluator(name)


def check_dataset(key: str, name: str) -> None:
    """
    Args:
        key: the config key that names the data set.

    Raises:
        ValueError: no such data set is registered, or its files are missing; one line.
    """
    if name not in DatasetCatalog:
        raise ValueError(
            f"{key}: no data set {name!r} is registered" + similar(name, DatasetCatalog.list())
        )
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if not path or "://" in path:
            continue
        with prefixed(key):
            # This draws a built-in set, once, before other processes are started.
            data.existing_path(name, path)


def _check_registered(key: str, name: str, registry: Registry) -> None:
    if name not in registry:
        known = [registered for registered, _ in registry]
        raise ValueError(f"{key}: no {name!r} is registered{similar(name, known)}")


def check_model(cfg: CfgNode, args: argparse.Namespace, classes: Sequence[str] = ()) -> nn.Module:
    """Build the network on the meta device, if possible, and check it and its weights.

    Args:
        classes: the classes of the data, as far as they are known.

    Raises:
        ValueError: the network can't be built or trained as configured, or its weights can't be
            loaded; one line.
    """
    _check_registered("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    _check_registered("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
    node = family(cfg)
    if cfg.MODEL.DEVICE == "cpu" and not args.eval_only:
        for part in (node, "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"):
            if part and cfg.MODEL[part].NORM == "SyncBN":
                raise ValueError(
                    f"MODEL.{part}.NORM SyncBN needs GPUs; on a CPU use naiveSyncBN, BN or GN"
                )
    own, others = cfg.MODEL.RANDWIRE.NORM, cfg.MODEL.RESNETS.NORM
    if node == "RANDWIRE" and not is_classifier(cfg) and others not in (own, "FrozenBN"):
        logger.warning(
            f"The backbone's norm is MODEL.RANDWIRE.NORM {own}: MODEL.RESNETS.NORM {others} is for "
            "ResNets"
        )
    run = RunFolder(cfg.OUTPUT_DIR)
    resumes = args.resume and run.can_resume
    if not cfg.MODEL.WEIGHTS and not resumes and (node is not None or is_classifier(cfg)):
        _check_untrained(cfg, node, args.eval_only)
    model = _build(cfg)
    check_augmented_test(cfg, model)
    if resumes:
        check_resumed(run, model, classes, args.renamed_class)
    else:
        norm = f"MODEL.{node}.NORM BN " if node else ""
        scratch = f"MODEL.WEIGHTS '' {norm}MODEL.BACKBONE.FREEZE_AT 0"
        ways = "" if is_classifier(cfg) else scratch
        tested = classes if args.eval_only else None
        weights = cfg.MODEL.WEIGHTS
        check_weights("MODEL.WEIGHTS", weights, model, ways, tested, args.renamed_class)
    return model


def _check_untrained(cfg: CfgNode, node: str | None, eval_only: bool) -> None:
    if eval_only:
        raise ValueError("--eval-only needs weights: set MODEL.WEIGHTS, or --resume a run")
    if node and (cfg.MODEL[node].NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0):
        raise ValueError(
            f"training starts without MODEL.WEIGHTS, but MODEL.{node}.NORM is "
            f"{cfg.MODEL[node].NORM!r} and MODEL.BACKBONE.FREEZE_AT is "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT}: a batch norm that is frozen before it was trained "
            "diverges, and a frozen random stage learns nothing. Set MODEL.WEIGHTS to a "
            f"pretrained backbone, or MODEL.{node}.NORM BN (or SyncBN, GN) and "
            "MODEL.BACKBONE.FREEZE_AT 0"
        )


def _build(cfg: CfgNode) -> nn.Module:
    try:
        return build_on_meta(lambda: META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg))
    # The errors with which Detectron2 refuses a value, and PyTorch a size.
    except (AssertionError, KeyError, RuntimeError, ValueError) as e:
        reason = str(e.args[0]) if e.args else traceback.extract_tb(e.__traceback__)[-1].line
        if isinstance(e, KeyError) and " " not in str(reason):
            keys = [k for k, v in flat(cfg) if isinstance(v, list | tuple) and reason in v]
            where = [f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME}"]
            where += [f"{k} names it" for k in keys]
            reason = f"there is no {reason!r} ({'; '.join(where)})"
        raise ValueError(f"the config's network can't be built: {reason}") from e
