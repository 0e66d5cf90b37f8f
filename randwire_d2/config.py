"""Every config key of this project, the kinds of configs, and the networks that they describe."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.config.defaults import _C
from detectron2.utils.file_io import PathManager
from yaml import YAMLError

from .config_files import config_path
from .ignored_keys import any_generator, ignore_keys, new_keys
from .text import no_python, one_line, prefixed
from .wiring import GRAPH_REGISTRY, NetworkGenerator, NetworkSpec
from .wiring.limits import MOST_CHARACTERS
from .yaml_tags import check_yaml, compose_yaml


def add_randwire_config(cfg: CfgNode) -> None:
    """Add MODEL.RANDWIRE to a Detectron2 config: every key that the backbone reads.

    The defaults are the paper's regular network with C=109, WS(4, 0.75), seed 1.
    """
    cfg.MODEL.RANDWIRE = CfgNode()
    node = cfg.MODEL.RANDWIRE
    # The column of Table 1: "small" or "regular".
    node.REGIME = "regular"
    # C: the channels of conv2's nodes ("regular") or conv3's ("small"); later stages double them.
    node.CHANNELS = 109
    # N: the nodes of each random graph; the regular regime's conv2 has N/2.
    node.NUM_NODES = 32
    # The graph model: "ER", "BA", "WS", "NAS", or a project's own in GRAPH_REGISTRY. Its parameters
    # are in the node of the same name, such as WS.K.
    node.GRAPH = "WS"
    # WS(K, P): neighbours of each node in the ring (even), and the probability of rewiring an edge.
    node.WS = CfgNode({"K": 4, "P": 0.75})
    # ER(P): the probability of each edge.
    node.ER = CfgNode({"P": 0.2})
    # BA(M): the number of edges that each added node brings.
    node.BA = CfgNode({"M": 5})
    # NAS(CELL_NODES): the number of merging nodes of a NAS-style cell.
    node.NAS = CfgNode({"CELL_NODES": 5})
    # The seed s of g(θ, s). Every stage's graph is drawn with it.
    node.SEED = 1
    # The operation of every node: "sep_conv3x3", "conv3x3", "max_pool3x3" or "avg_pool3x3".
    node.NODE_OP = "sep_conv3x3"
    # A network as JSON. If it is set, the keys above are not read.
    node.SPEC = ""
    # A file with a network as JSON, instead of SPEC.
    node.SPEC_FILE = ""
    # Any norm of Detectron2. FrozenBN needs pretrained weights; from scratch use BN, SyncBN or GN.
    # GN's number of groups is the largest, up to 32, that divides the number of channels: 1, 2, 4
    # and 8 in res2 … res5 with C=109; 22, 28, 28 and 28 with C=154.
    node.NORM = "FrozenBN"
    # The mode of the convolutions' He initialisation: "fan_in", or "fan_out" as in pycls.
    node.INIT = "fan_in"
    # The features for the FPN or the heads: any of stem, res2, res3, res4, res5.
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Whether a ReLU follows these features, as in a ResNet. (A classifier's head always has one.)
    node.RELU_FEATURES = True
    # The probability with which a training mini-batch loses one edge. The paper has 0.1 for
    # ImageNet in the regular regime; for fine-tuning it mentions none.
    node.EDGE_DROP_PROB = 0.0
    # Which images of an iteration lose the same edge: those of one "process", or the whole "batch"
    # of all processes. §4.2 may mean either.
    node.EDGE_DROP_SCOPE = "process"
    # Fused operators for separable convolutions with batch norms: the same function with less
    # memory traffic. "auto" uses them where they work and, in trainings by this project's tools,
    # are not slower. "on" raises an error where they do not work. "off" runs the modules of the
    # nodes one by one. In YAML, quote the value: on without quotes is True.
    node.FUSED = "auto"
    # Whether to save about half as much for the backward pass and compute the rest again, for
    # batches that do not fit into memory.
    node.RECOMPUTE = False
    # Whether a GPU replays a fused stage as a CUDA graph, after several calls with images of one
    # size. The results are the same; the host needs less time, and the graphs use free GPU memory.
    node.CUDA_GRAPHS = True
    # The JSON of a LazyConfig's detector (``modeling.lazy_detector``), for LazyDetector.
    cfg.MODEL.LAZY = ""


def add_engine_config(cfg: CfgNode) -> None:
    """Add the keys that only this project's trainers read."""
    # The data type of mixed precision (SOLVER.AMP.ENABLED True): "float16" or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # In its first iteration, a training also runs each fused stage node by node, and stops if the
    # results differ. If not 0, it repeats this with one stage every so many iterations.
    cfg.SOLVER.SHADOW_PERIOD = 0
    # With several processes: the seconds for which an iteration may wait for images or compile;
    # then the training ends, and the error says where it hangs. An iteration that does neither may
    # take 40 s or 20 times the longest recent iteration, whichever is longer. 0 sets no limit.
    cfg.SOLVER.HANG_TIMEOUT = 600
    # The number of periodic checkpoints (SOLVER.CHECKPOINT_PERIOD) that are kept; 0 keeps all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    # A loss that is NaN or infinite ends a training, unless this is n > 0: then up to n such steps
    # in a row are skipped first.
    cfg.SOLVER.SKIP_NONFINITE = 0
    # A detector's data set by its path, instead of DATASETS.TRAIN and TEST: COCO's format, YOLO's,
    # Pascal VOC's or LabelMe's (data/formats/layouts.py has the layouts). Set by --data of
    # tools/train_net.py.
    cfg.DATASETS.PATH = ""
    # The path of the validation split, if PATH does not contain it. Set by --data-val.
    cfg.DATASETS.PATH_VAL = ""
    # About this share of the training images is held back for validation if PATH has no validation
    # split. Only an image's name and SEED (0 if SEED is negative) decide whether it is held back.
    cfg.DATASETS.HOLD_BACK = 0.0
    # If SIZE is not 0, a detector's training images get large-scale jitter, as in Detectron2's
    # new_baselines, instead of MIN_SIZE_TRAIN and CROP: an image is resized to fit into a square
    # whose side is SIZE times a random number from the range SCALES, then cropped or padded to
    # SIZE × SIZE.
    cfg.INPUT.LSJ = CfgNode({"SIZE": 0, "SCALES": [0.1, 2.0]})
    # If DECAY is not 0, evaluations test an exponential moving average of the weights, and
    # checkpoints contain it as "ema". In each iteration, average = DECAY · average + (1 - DECAY) ·
    # weights; 0.999 is usual.
    cfg.SOLVER.EMA = CfgNode({"DECAY": 0.0})
    # If not 0, the length of the training in epochs; MAX_ITER is computed from it. STEPS keep their
    # share of the config's MAX_ITER (60000 of 90000: after two thirds). BASE_LR, WARMUP_ITERS,
    # CHECKPOINT_PERIOD and TEST.EVAL_PERIOD are for REFERENCE_BATCH_SIZE: with a larger
    # IMS_PER_BATCH, the learning rate grows in proportion, and the others shrink. WARMUP_ITERS is
    # at most a quarter of the training. If 0, all keys are taken literally.
    cfg.SOLVER.EPOCHS = 0
    # The batch size for which learning rate and schedule are given; 256 for a classifier.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 16
    # The metric that chooses model_best.pth, by its name in metrics.json. A loss is better if it is
    # lower, any other metric if it is higher. With several test sets, put the name of a set before
    # it; otherwise it is the first set's.
    cfg.SOLVER.BEST_METRIC = "bbox/AP"
    # If not 0, the training ends after this many evaluations in a row without a better BEST_METRIC.
    cfg.SOLVER.PATIENCE = 0
    # Whether evaluations during training also write the losses of the test images, without
    # augmentation: val_total_loss and its parts.
    cfg.TEST.LOSS = False


def extend_detectron2_defaults() -> None:
    """Make the configs of Detectron2's ``get_cfg`` accept this project's detector configs.

    ``import randwire_d2`` calls this, because Detectron2's own tools and other projects' call
    ``get_cfg`` and merge a file at once, without a chance to call ``add_randwire_config``. (To call
    that as well does no harm.) The config.yaml of every run also has the keys of
    ``add_engine_config``, which other trainers do not read: a config without these keys ignores
    them with a warning.
    """
    add_randwire_config(_C)
    ours = get_cfg()
    add_engine_config(ours)
    ignore_keys(_C, new_keys(ours, _C))


def add_classification_config(cfg: CfgNode) -> None:
    """Add the keys that a classifier needs to a Detectron2 config.

    The defaults are the paper's training of the regular regime on ImageNet (§4, §4.2), in the
    recipe that it follows (Goyal et al., 2017).
    """
    cfg.MODEL.CLASSIFIER = CfgNode()
    node = cfg.MODEL.CLASSIFIER
    node.NUM_CLASSES = 1000
    # RandWire's dropout before the fc layer. The paper has 0.2 in the regular regime, and none in
    # the small one.
    node.DROPOUT = 0.0
    # Whether RandWire has a ReLU between the norm of the 1280-d layer and the pool. Table 1 has
    # none.
    node.HEAD_RELU = False
    node.LABEL_SMOOTHING = 0.1
    # If it has a NAME, the network is torchvision's classifier of that name, such as
    # "mobilenet_v2", and MODEL.BACKBONE.NAME is not read. OPTIONS are more arguments of its
    # builder, each name before its value: ["width_mult", 1.4].
    node.TORCHVISION = CfgNode({"NAME": "", "OPTIONS": []})
    # Whether training uses torch.compile. Then nodes run one by one, and the compiler fuses them.
    # Checkpoints stay the same; evaluations are not compiled.
    cfg.SOLVER.COMPILE = False
    cfg.SOLVER.BEST_METRIC = "classification/top1"

    # A training crop covers this part of the image's area, has an aspect ratio of 3/4 … 4/3, and is
    # resized to TRAIN_CROP_SIZE; INPUT.RANDOM_FLIP, "horizontal" or "none", is Detectron2's key.
    cfg.INPUT.TRAIN_CROP_AREA = [0.08, 1.0]
    cfg.INPUT.TRAIN_CROP_SIZE = 224
    # The standard deviation of AlexNet's colour noise along ImageNet's principal components
    # (Krizhevsky et al., 2012, section 4.1; theirs is 0.1). The paper mentions none.
    cfg.INPUT.PCA_LIGHTING = 0.0
    # RandAugment (Cubuk et al., 2020) of each training image: the number of operations, and their
    # magnitude, 0 … 30. The paper has none.
    cfg.INPUT.RAND_AUGMENT = CfgNode({"NUM_OPS": 0, "MAGNITUDE": 9})
    # The α of MixUp (Zhang et al., 2018) and of CutMix (Yun et al., 2019), which mix the images of
    # a process's training batch; 0 for neither. With both, each batch draws one of them.
    cfg.INPUT.MIXUP_ALPHA = 0.0
    cfg.INPUT.CUTMIX_ALPHA = 0.0
    # A test image is resized until its shorter side is TEST_CROP_SIZE / TEST_CROP_RATIO, and its
    # centre is cropped: 256 and 224. Table 4 tests at 320.
    cfg.INPUT.TEST_CROP_SIZE = 224
    cfg.INPUT.TEST_CROP_RATIO = 0.875

    cfg.SOLVER.REFERENCE_BATCH_SIZE = 256
    # With EPOCHS, WARMUP_ITERS 0 and a batch larger than REFERENCE_BATCH_SIZE, the learning rate
    # grows from BASE_LR to its own value in this many epochs (Goyal et al., section 2.2).
    cfg.SOLVER.WARMUP_EPOCHS = 5

    # The batch size of evaluations, per process.
    cfg.TEST.IMS_PER_PROCESS = 100


def detector_config() -> CfgNode:
    """Detectron2's defaults, with the keys that tools/train_net.py knows."""
    cfg = get_cfg()
    add_engine_config(cfg)
    return cfg


def classifier_config() -> CfgNode:
    """Detectron2's defaults, with every key of this project: tools/pretrain_imagenet.py's."""
    cfg = detector_config()
    add_classification_config(cfg)
    return cfg


def is_classifier(cfg: CfgNode) -> bool:
    """Whether a config is one of tools/pretrain_imagenet.py."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "ImageClassifier")


def family(cfg: CfgNode) -> str | None:
    """The node of MODEL that describes the backbone: "RANDWIRE", "RESNETS", or None of others."""
    if is_classifier(cfg) and cfg.MODEL.CLASSIFIER.TORCHVISION.NAME:
        return None
    name = cfg.MODEL.BACKBONE.NAME
    return "RANDWIRE" if "randwire" in name else "RESNETS" if "resnet" in name else None


def drawn_network(cfg: CfgNode) -> str:
    """The key that holds a network that was drawn already, for a message; "" of a generator's."""
    node = cfg.MODEL.RANDWIRE
    if node.SPEC:
        return "MODEL.RANDWIRE.SPEC"
    return f"MODEL.RANDWIRE.SPEC_FILE {node.SPEC_FILE!r}" if node.SPEC_FILE else ""


def set_spec(cfg: CfgNode, spec: NetworkSpec) -> None:
    """Make a network that was drawn already the config's (MODEL.RANDWIRE.SPEC)."""
    cfg.MODEL.RANDWIRE.SPEC = no_python(spec.to_json())


def merge_config(cfg: CfgNode, config_file: str | os.PathLike[str], opts: Sequence[str]) -> None:
    """Merge a config file, if it has a name, and KEY VALUE pairs into a config.

    Args:
        config_file: a file, a URL, or a name that ``get_config_file`` knows.

    Raises:
        ValueError: for a missing file, an unknown key, or a value of the wrong type; one line.
    """
    if path := config_path(config_file):
        merge_file(cfg, path)
    if len(opts) % 2:
        raise ValueError(f"options come as pairs KEY VALUE; got {' '.join(opts)!r}")
    merge_in_one_line(
        "the command line", lambda: _merge_values(cfg, lambda: cfg.merge_from_list(list(opts)))
    )


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a config file, which may be a stranger's, into a config.

    Raises:
        ValueError: if it can't be, or would run code; its message is one line.
    """

    def merge() -> None:
        check_yaml(path)
        _merge_values(cfg, lambda: cfg.merge_from_file(path))

    merge_in_one_line(path, merge)


def merge_text(cfg: CfgNode, text: str, source: str) -> None:
    """Merge a config's YAML into a config; no tag in it runs code.

    Args:
        text: what ``cfg.dump()`` gave.
        source: where it lies, for errors.

    Raises:
        ValueError: if it can't be; its message is one line.
    """

    def merge() -> None:
        compose_yaml(text)  # its limits
        other = CfgNode.load_cfg(text)  # reads a text with yaml.safe_load
        _merge_values(cfg, lambda: cfg.merge_from_other_cfg(other))

    merge_in_one_line(source, merge)


def _merge_values(cfg: CfgNode, merge: Callable[[], Any]) -> None:
    """Merge, and refuse keys without a value. YAML reads these as None, which yacs accepts for any
    type. None is allowed only where it is Detectron2's default."""
    before = _without_value(cfg) | _without_value(_C)
    with any_generator(cfg.MODEL.RANDWIRE):
        merge()
    if empty := sorted(_without_value(cfg) - before):
        raise ValueError(f"{empty[0]} has no value: give it one, or leave it out")


def _without_value(cfg: CfgNode) -> set[str]:
    return {key for key, value in flat(cfg) if value is None}


def flat(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a config, such as "SOLVER.MAX_ITER", and its value."""
    for name, value in cfg.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def merge_in_one_line(source: str, merge: Callable[[], Any]) -> None:
    """Call what merges something into a config.

    Args:
        source: what is merged, named in errors.

    Raises:
        ValueError: if it can't be; its message is one line.
    """
    try:
        merge()
    # yacs raises KeyError for unknown keys, ValueError or AssertionError for wrong types and for
    # unknown versions, AttributeError or TypeError for a file that is no mapping; OSError is a
    # missing _BASE_. PyYAML raises LookupError for !!int "", ArithmeticError for large floats; a
    # text of many brackets is Python that is nested too deep.
    except (
        LookupError, ValueError, AssertionError, AttributeError, TypeError, ArithmeticError,
        OSError, YAMLError, RecursionError, MemoryError, SyntaxError,
    ) as e:  # fmt: skip
        reason: object = e.args[0] if isinstance(e, KeyError) and e.args else e
        if isinstance(e, AttributeError | TypeError):
            reason = "it is no mapping of keys to values"
        text = one_line(reason, 300) or type(e).__name__
        if "(<class 'float'> vs. <class 'int'>)" in text:
            text += "; write the number with a point, such as 1.0"
        raise ValueError(text if text.startswith(source) else f"{source}: {text}") from e


def forget_other_generators(cfg: CfgNode) -> None:
    """Delete the parameters of a user's own graph models, except GRAPH's: tools that don't know
    these models would refuse the run's config.yaml."""
    node, ours = cfg.MODEL.RANDWIRE, CfgNode({"MODEL": CfgNode()})
    add_randwire_config(ours)
    for name, _ in GRAPH_REGISTRY:
        if name in node and name not in (*ours.MODEL.RANDWIRE, node.GRAPH):
            del node[name]


def spec_from_config(cfg: CfgNode) -> NetworkSpec:
    """The symbolic network that MODEL.RANDWIRE describes.

    Raises:
        ValueError: for values that describe none, naming the key or the file.
    """
    node = cfg.MODEL.RANDWIRE
    if node.SPEC:
        with prefixed("MODEL.RANDWIRE.SPEC"):
            return NetworkSpec.from_json(node.SPEC)
    if node.SPEC_FILE:
        subject = f"MODEL.RANDWIRE.SPEC_FILE {node.SPEC_FILE!r}"
        with prefixed(subject, (OSError, ValueError)), PathManager.open(node.SPEC_FILE) as f:
            return NetworkSpec.from_json(f.read(MOST_CHARACTERS + 1))
    generator = generator_from_config(cfg)
    with prefixed("MODEL.RANDWIRE"):
        return generator(node.SEED)


def generator_from_config(cfg: CfgNode) -> NetworkGenerator:
    """The generator that MODEL.RANDWIRE describes, whatever SPEC and SPEC_FILE say.

    Raises:
        ValueError: for values that describe none.
    """
    node = cfg.MODEL.RANDWIRE
    params = node.get(node.GRAPH)
    with prefixed("MODEL.RANDWIRE"):
        return NetworkGenerator(
            regime=node.REGIME,
            channels=node.CHANNELS,
            num_nodes=node.NUM_NODES,
            graph=node.GRAPH,
            # A graph model without parameters has no node.
            graph_params={k.lower(): v for k, v in params.items()}
            if isinstance(params, CfgNode)
            else {},
            node_op=node.NODE_OP,
        )
