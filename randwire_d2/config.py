"""The config keys of this project, MODEL.RANDWIRE, and the network that they describe."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from yaml import YAMLError

from .wiring import NetworkGenerator, NetworkSpec


def add_randwire_config(cfg: CfgNode) -> None:
    """Add MODEL.RANDWIRE, and two keys of SOLVER, to a Detectron2 config.

    The default is the paper's regular network with C=109, WS(4, 0.75), seed 1.
    """
    # What SOLVER.AMP.ENABLED computes in: "float16" or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # How many of the checkpoints that SOLVER.CHECKPOINT_PERIOD makes are kept; 0: all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    cfg.MODEL.RANDWIRE = CfgNode()
    node = cfg.MODEL.RANDWIRE
    # Table 1's column: "small" or "regular".
    node.REGIME = "regular"
    # C: the channels of conv2's nodes ("regular") or conv3's ("small"); later stages double them.
    node.CHANNELS = 109
    # N: the nodes of each random graph; the regular regime's conv2 has N/2.
    node.NUM_NODES = 32
    # The random graph model: "ER", "BA", "WS", "NAS", or what a project added to GRAPH_REGISTRY.
    # Its parameters are the node of the same name below, in upper case.
    node.GRAPH = "WS"
    # WS(K, P): neighbours of each node in the ring (even), and the probability of rewiring an edge.
    node.WS = CfgNode({"K": 4, "P": 0.75})
    # ER(P): the probability of each edge.
    node.ER = CfgNode({"P": 0.2})
    # BA(M): the edges that each added node brings.
    node.BA = CfgNode({"M": 5})
    # NAS(cell_nodes): the merging nodes of a NAS-style cell.
    node.NAS = CfgNode({"CELL_NODES": 5})
    # The s of g(θ, s); all stages are drawn with it.
    node.SEED = 1
    # The convolution of every node: "sep_conv3x3", "conv3x3", "max_pool3x3" or "avg_pool3x3".
    node.NODE_OP = "sep_conv3x3"
    # A file with a network's JSON; if set, it is the network, and the keys above are not read.
    node.SPEC_FILE = ""
    # Any norm of Detectron2's. FrozenBN needs pretrained weights; from scratch: BN, SyncBN or GN.
    node.NORM = "FrozenBN"
    # The features handed to the FPN or the heads: any of stem, res2, res3, res4, res5.
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # The probability with which a training mini-batch loses one edge; the paper's ImageNet
    # training in the regular regime has 0.1, its fine-tuning does not mention it.
    node.EDGE_DROP_PROB = 0.0
    # Fused operators for separable convolutions with batch norms: the same function, faster. Turn
    # them off to compare, or where something wants each node's module to run.
    node.FUSED = True
    # Save about half as much for the backward pass, and compute it again. Turn it on if the
    # batch does not fit into memory.
    node.RECOMPUTE = False


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
    # missing _BASE_.
    except (
        KeyError, ValueError, AssertionError, AttributeError, TypeError, OSError, YAMLError,
    ) as e:  # fmt: skip
        reason = str(e.args[0] if isinstance(e, KeyError) and e.args else e)
        raise ValueError(f"{source}: {' '.join(reason.split())}") from e


def spec_from_config(cfg: CfgNode) -> NetworkSpec:
    """The symbolic network that MODEL.RANDWIRE describes.

    Raises:
        ValueError: for values that describe none, naming the key or the file.
    """
    node = cfg.MODEL.RANDWIRE
    if node.SPEC_FILE:
        try:
            with PathManager.open(node.SPEC_FILE) as f:
                return NetworkSpec.from_json(f.read())
        except (OSError, ValueError) as e:
            raise ValueError(f"MODEL.RANDWIRE.SPEC_FILE {node.SPEC_FILE!r}: {e}") from e
    generator = generator_from_config(cfg)
    try:
        return generator(node.SEED)
    except ValueError as e:
        raise ValueError(f"MODEL.RANDWIRE: {e}") from e


def generator_from_config(cfg: CfgNode) -> NetworkGenerator:
    """The generator that MODEL.RANDWIRE describes, whatever SPEC_FILE says.

    Raises:
        ValueError: for values that describe none.
    """
    node = cfg.MODEL.RANDWIRE
    params = node.get(node.GRAPH)
    try:
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
    except ValueError as e:
        raise ValueError(f"MODEL.RANDWIRE: {e}") from e
