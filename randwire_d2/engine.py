"""Training on Detectron2's engine: config checks, evaluators, and a trainer for GPUs and CPUs."""

import argparse
import difflib
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    hooks,
    launch,
)
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.modeling import BACKBONE_REGISTRY, GeneralizedRCNNWithTTA, build_backbone
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from . import data  # noqa: F401 (registers the built-in data set)
from .checkpoint import (
    PREPROCESSING_KEY,
    WIRING_KEY,
    Preprocessing,
    RandWireCheckpointer,
    load_checkpoint,
)
from .config import add_randwire_config, merge_in_one_line
from .files import atomic_open

# By a data set's ``evaluator_type``, as Detectron2's own tools/train_net.py chooses them.
_EVALUATORS: dict[str, tuple[Callable[[str, str], DatasetEvaluator], ...]] = {
    "coco": (lambda name, folder: COCOEvaluator(name, output_dir=folder),),
    "coco_panoptic_seg": (
        lambda name, folder: SemSegEvaluator(name, distributed=True, output_dir=folder),
        lambda name, folder: COCOEvaluator(name, output_dir=folder),
        lambda name, folder: COCOPanopticEvaluator(name, folder),
    ),
    "sem_seg": (lambda name, folder: SemSegEvaluator(name, distributed=True, output_dir=folder),),
    "cityscapes_instance": (lambda name, folder: CityscapesInstanceEvaluator(name),),
    "cityscapes_sem_seg": (lambda name, folder: CityscapesSemSegEvaluator(name),),
    "pascal_voc": (lambda name, folder: PascalVOCDetectionEvaluator(name),),
    "lvis": (lambda name, folder: LVISEvaluator(name, output_dir=folder),),
}


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with this project's checkpoints, for GPUs and CPUs."""

    def __init__(self, cfg: CfgNode) -> None:
        # In place of DefaultTrainer's, which hands DistributedDataParallel a GPU index on any
        # device and fixes the class of the checkpointer; the steps are the same.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp_options = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_options)
        if cfg.SOLVER.AMP.ENABLED:
            precision = getattr(torch, cfg.SOLVER.AMP.PRECISION)
            self._trainer = AMPTrainer(model, data_loader, optimizer, precision=precision)
        else:
            self._trainer = SimpleTrainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RandWireCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = self.cfg.SOLVER.CHECKPOINTS_TO_KEEP or None
        if self.cfg.TEST.AUG.ENABLED:
            # Ahead of the writers, if this process has them, so that they write its results.
            last = isinstance(built[-1], hooks.PeriodicWriter)
            built.insert(
                len(built) - last,
                hooks.EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model)),
            )
        return built

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; a run that was killed at its very end still gets model_final.pth."""
        super().resume_or_load(resume)
        if self.start_iter:
            for hook in self._hooks:
                if isinstance(hook, hooks.PeriodicCheckpointer):
                    hook.recent_checkpoints = [self.checkpointer.get_checkpoint_file()]
        final = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
        if self.start_iter >= self.max_iter and not os.path.isfile(final):
            self.checkpointer.save("model_final", iteration=self.start_iter - 1)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """As DefaultTrainer's; all processes evaluate the first one's network, which is saved."""
        if comm.get_world_size() > 1:
            for buffer in model.buffers():  # each process has batch statistics of its own
                torch.distributed.broadcast(buffer, 0)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation (``cfg.TEST.AUG``); its results end in ``_TTA``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator of a data set, by its ``evaluator_type``.

        Raises:
            ValueError: if the type is unknown.
        """
        kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
        if kind not in _EVALUATORS:
            raise ValueError(
                f"no evaluator for {dataset_name!r}: its evaluator_type is {kind!r}, known are "
                f"{sorted(_EVALUATORS)}"
            )
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = [build(dataset_name, folder) for build in _EVALUATORS[kind]]
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's command line with one flag more."""
    parser = default_argument_parser(epilog)
    parser.add_argument(
        "--config-from-weights",
        action="store_true",
        help="take the wiring and the preprocessing (MODEL.RANDWIRE.SPEC_FILE, INPUT.FORMAT, "
        "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD) from the checkpoint MODEL.WEIGHTS",
    )
    return parser


def split_pairs(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and the KEY VALUE pairs that follow them, which argparse can't tell apart."""
    pairs = (i for i, text in enumerate(given) if re.fullmatch(r"[A-Z]\w*(\.[A-Z]\w*)+", text))
    first = next(pairs, len(given))
    return list(given[:first]), list(given[first:])


def load_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line (``argument_parser``), checked.

    Raises:
        ValueError: for whatever would make the run fail later: an unknown key, a missing file, data
            set or device, a network that can't be built, a training that can't succeed. The message
            is one line that names the value and the way out.
    """
    cfg = read_config(args, add_randwire_config)
    cfg.freeze()
    check_device(cfg, args)
    _check_datasets(cfg, args)
    check_model(cfg, args)
    return cfg


def read_config(args: argparse.Namespace, *add_configs: Callable[[CfgNode], None]) -> CfgNode:
    """The config of a command line, of Detectron2's keys and those that ``add_configs`` add.

    Raises:
        ValueError: for a missing file, an unknown key, or a value of the wrong type.
    """
    cfg = merge_config(args.config_file, args.opts, *add_configs)
    if args.config_from_weights:
        merge_in_one_line("--config-from-weights", lambda: _take_config_from_weights(cfg))
    return cfg


def merge_config(
    config_file: str, opts: Sequence[str], *add_configs: Callable[[CfgNode], None]
) -> CfgNode:
    """A config file with KEY VALUE pairs, as ``read_config``."""
    cfg = get_cfg()
    for add_config in add_configs:
        add_config(cfg)
    if config_file:
        if "://" not in config_file and not os.path.isfile(config_file):
            raise ValueError(f"--config-file {config_file!r} does not exist")
        merge_in_one_line(config_file, lambda: cfg.merge_from_file(config_file))
    if len(opts) % 2:
        raise ValueError(f"options come as pairs KEY VALUE; got {' '.join(opts)!r}")
    merge_in_one_line("the command line", lambda: cfg.merge_from_list(list(opts)))
    return cfg


def _take_config_from_weights(cfg: CfgNode) -> None:
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise ValueError("it takes the config from MODEL.WEIGHTS, which is empty")
    try:
        checkpoint = load_checkpoint(PathManager.get_local_path(path))
    except (OSError, RuntimeError, EOFError, UnpicklingError) as e:
        raise ValueError(f"MODEL.WEIGHTS {path!r} can't be read: {e}") from e
    wiring, preprocessing = checkpoint.get(WIRING_KEY), checkpoint.get(PREPROCESSING_KEY)
    if wiring is None and preprocessing is None:
        raise ValueError(f"MODEL.WEIGHTS {path!r} holds neither a wiring nor a preprocessing")
    if wiring is not None:
        spec_file = os.path.join(cfg.OUTPUT_DIR, "spec.json")
        PathManager.mkdirs(cfg.OUTPUT_DIR)
        with atomic_open(spec_file, "w") as f:
            f.write(wiring["spec"])
        cfg.MODEL.RANDWIRE.SPEC_FILE = spec_file
    if preprocessing is not None:
        cfg.merge_from_list(Preprocessing.from_dict(preprocessing).options)


def check_device(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise a ValueError if the machine has not what the run needs, or the batch can't be split."""
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as e:
        raise ValueError(f"MODEL.DEVICE {cfg.MODEL.DEVICE!r}: {e}".splitlines()[0]) from e
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise ValueError(
                f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch sees no GPU; to train on the "
                "CPU, add MODEL.DEVICE cpu"
            )
        if args.num_gpus > gpus:
            raise ValueError(f"--num-gpus {args.num_gpus}: this machine has {gpus}")
    if args.eval_only:
        return
    if device.type == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise ValueError("SOLVER.AMP.ENABLED needs a GPU: Detectron2's AMPTrainer has no CPU path")
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise ValueError(
            f"SOLVER.AMP.PRECISION is float16 or bfloat16; got {cfg.SOLVER.AMP.PRECISION!r}"
        )
    workers = args.num_gpus * args.num_machines
    if cfg.SOLVER.REFERENCE_WORLD_SIZE == 0 and cfg.SOLVER.IMS_PER_BATCH % max(workers, 1):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is the batch of all {workers} "
            "processes together, and must be a multiple of their number"
        )


def _check_datasets(cfg: CfgNode, args: argparse.Namespace) -> None:
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN), ("TEST", cfg.DATASETS.TEST)):
        if args.eval_only and key == "TRAIN":
            continue
        if not names and (key == "TRAIN" or args.eval_only):
            raise ValueError(f"DATASETS.{key} is empty")
        for name in names:
            if name not in DatasetCatalog:
                raise ValueError(
                    f"DATASETS.{key}: no data set {name!r} is registered"
                    + _similar(name, DatasetCatalog.list())
                )
            metadata = MetadataCatalog.get(name)
            for path in (metadata.get("json_file"), metadata.get("image_root")):
                if not path or "://" in path:
                    continue
                try:
                    # To ask for its path makes the built-in set: once, before there are processes.
                    path = PathManager.get_local_path(path)
                except (OSError, RuntimeError) as e:
                    raise ValueError(f"DATASETS.{key}: {name!r}: {e}") from e
                if not os.path.exists(path):
                    raise ValueError(
                        f"DATASETS.{key}: {name!r} needs {path!r}, which does not exist; set the "
                        "environment variable DETECTRON2_DATASETS to the folder that holds it"
                    )


def _similar(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def check_model(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise a ValueError if the backbone can't be built, or can't be trained as configured."""
    name = cfg.MODEL.BACKBONE.NAME
    family = "RANDWIRE" if "randwire" in name else "RESNETS" if "resnet" in name else None
    if name not in BACKBONE_REGISTRY:
        known = [registered for registered, _ in BACKBONE_REGISTRY]
        raise ValueError(
            f"MODEL.BACKBONE.NAME: no backbone {name!r} is registered" + _similar(name, known)
        )
    trains_on_cpu = cfg.MODEL.DEVICE == "cpu" and not args.eval_only
    if trains_on_cpu and family and cfg.MODEL[family].NORM == "SyncBN":
        raise ValueError(f"MODEL.{family}.NORM SyncBN needs GPUs; on a CPU use BN or GN")
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.isfile(weights.split("?")[0]):
        raise ValueError(f"MODEL.WEIGHTS {weights!r} does not exist")
    resumes = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    untrained = family is not None and not weights and not resumes
    if untrained and args.eval_only:
        raise ValueError("--eval-only needs weights: set MODEL.WEIGHTS, or --resume a run")
    if untrained and (cfg.MODEL[family].NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0):
        raise ValueError(
            f"training starts without MODEL.WEIGHTS, but MODEL.{family}.NORM is "
            f"{cfg.MODEL[family].NORM!r} and MODEL.BACKBONE.FREEZE_AT is "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT}: a batch norm that is frozen before it was trained "
            "diverges, and a frozen random stage learns nothing. Set MODEL.WEIGHTS to a "
            f"pretrained backbone, or MODEL.{family}.NORM BN (or SyncBN, GN) and "
            "MODEL.BACKBONE.FREEZE_AT 0"
        )
    if family == "RANDWIRE":
        with torch.device("meta"):  # without memory or time, and with every check of the real one
            build_backbone(cfg)


def setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``, and this project's log beside its."""
    default_setup(cfg, args)
    several = comm.get_world_size() > 1  # then this process was started without a log
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="randwire_d2", configure_stdout=several)


def train_or_evaluate(
    cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer] = Trainer
) -> Any:
    """What each process of a training tool does, with ``--resume`` and ``--eval-only``."""
    setup(cfg, args)
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        RandWireCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = trainer_class.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer_class.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run_distributed(main: Callable[..., Any], cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Call ``main(cfg, args)`` in ``--num-gpus`` processes on each of ``--num-machines`` machines.

    With ``MODEL.DEVICE cpu`` the processes share the machine's cores.
    """
    if cfg.MODEL.DEVICE == "cpu" and args.num_gpus > 1:
        # Inherited by the processes. Each would otherwise start a thread for every core.
        threads = max(1, (os.cpu_count() or 1) // args.num_gpus)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )
