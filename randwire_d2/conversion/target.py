"""The target of a conversion: a detector's or a classifier's config, completed for the weights."""

from collections.abc import Sequence
from typing import Any

from ..checkpoint import Preprocessing
from ..config import (
    classifier_config,
    drawn_network,
    flat,
    is_classifier,
    merge_config,
    set_spec,
    spec_from_config,
)
from ..config_files import config_path
from ..wiring import NetworkSpec
from .source import STAGES, ResNetArch, Source

# The prefixes of a backbone's weights, by ``to``.
PREFIXES = {
    "fpn": "backbone.bottom_up.",
    "bare": "backbone.",
    "classifier": "network.backbone.",
}
# Detectron2's builders of ResNets, and ours that replace them.
_BUILDERS = {
    "build_resnet_backbone": "build_randwire_backbone",
    "build_resnet_fpn_backbone": "build_randwire_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_randwire_retinanet_fpn_backbone",
}
_BOX_HEAD: list[Any] = [
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
]  # fmt: skip
# The smallest Faster R-CNN on either backbone, and a classifier; configs/ contains the recipes.
_DEFAULTS: dict[str, list[Any]] = {
    "fpn": [
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES", list(STAGES),
        "MODEL.FPN.IN_FEATURES", list(STAGES),
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
        *_BOX_HEAD,
    ],
    "bare": [
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES", list(STAGES),
        "MODEL.RPN.IN_FEATURES", ["res5"],
        "MODEL.ROI_HEADS.IN_FEATURES", ["res5"],
        *_BOX_HEAD,
    ],
    "classifier": [
        "MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.RANDWIRE.NORM", "BN",
    ],
}  # fmt: skip


class Target:
    """The config of the model that the weights are for, and which of its keys the user set.

    Args:
        config_file: the user's config; by default a Faster R-CNN on the backbone, or a classifier.
        options: the user's KEY VALUE pairs.
        to: ``"fpn"``, ``"bare"`` or ``"classifier"``, as for ``convert``.

    Raises:
        ValueError: for a missing file, an unknown key, a value of the wrong type, an unknown
            ``to``, or a detector's config with ``to="classifier"``, and vice versa.
    """

    def __init__(self, config_file: str | None, options: Sequence[str], to: str) -> None:
        if to not in PREFIXES:
            raise ValueError(f"to must be one of {sorted(PREFIXES)}; got {to!r}")
        self.to = to
        self.with_head = to == "classifier"  # whether the classifier is converted, too
        self.config_file = config_file
        self.cfg = classifier_config()
        if config_file is None:
            self.cfg.merge_from_list(_DEFAULTS[to])
        merge_config(self.cfg, config_file or "", options)
        if is_classifier(self.cfg) != self.with_head:
            raise ValueError(
                f"--to {to}, but the config's MODEL.META_ARCHITECTURE is "
                f"{self.cfg.MODEL.META_ARCHITECTURE}: choose another --to or another config"
            )
        self.explicit = set(options[::2])
        if config_file is not None:
            # merge_config has checked the YAML tags; Detectron2's own RetinaNet config has some.
            stated = self.cfg.load_yaml_with_base(config_path(config_file), allow_unsafe=True)
            self.explicit |= {key for key, _ in flat(stated)}
        self.cfg.MODEL.DEVICE = "cpu"

    def stated(self, key: str) -> Any:
        """The value that the user set for a key; None if the user did not set it."""
        return dict(flat(self.cfg))[key] if key in self.explicit else None

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing that the user set; None unless all three of its keys are set."""
        keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
        return Preprocessing.from_config(self.cfg) if self.explicit.issuperset(keys) else None

    def spec(self) -> NetworkSpec:
        """The network that the user described.

        Raises:
            ValueError: if the user set no key of MODEL.RANDWIRE: its defaults state nothing.
        """
        if not any(key.startswith("MODEL.RANDWIRE.") for key in self.explicit):
            raise ValueError(
                "the checkpoint does not hold its wiring; name it with MODEL.RANDWIRE.SPEC_FILE "
                "FILE, or with the keys it was drawn from, such as MODEL.RANDWIRE.SEED"
            )
        return spec_from_config(self.cfg)

    def graph_config(self) -> dict[str, Any]:
        """MODEL.RANDWIRE's graph model, seed and parameters, under JiaminRen's keys."""
        node = self.cfg.MODEL.RANDWIRE
        if node.GRAPH not in ("ER", "BA", "WS"):
            raise ValueError(f"MODEL.RANDWIRE.GRAPH {node.GRAPH!r} is none of ER, BA, WS")
        return {"graph_model": node.GRAPH, "seed": node.SEED, **node[node.GRAPH]}

    def fit(self, source: Source, spec_file: str | None = None) -> list[str]:
        """Set the config's keys that the source determines and the user did not set.

        Args:
            source: the converted network.
            spec_file: the name of a file with its spec, for a wiring that no keys draw.

        Returns:
            list[str]: the KEY VALUE pairs that the config of a network with these weights needs. No
            key of MODEL.RANDWIRE is among them if no keys draw the wiring and there is no file.

        Raises:
            ValueError: if the user's config describes another network; it names the keys.
        """
        network = source.network
        self._refuse_contradictions(source)
        needed: dict[str, Any] = {"MODEL.BACKBONE.NAME": self._backbone_name(network)}
        if isinstance(network, NetworkSpec):
            needed |= self._wiring(network, spec_file)
            set_spec(self.cfg, network)
        else:
            needed |= _describe(network)
        # HEAD_RELU is listed only if it is True: False is the default.
        needed |= {key: value for key, value in _describe_head(source).items() if value}
        pairs = [text for pair in needed.items() for text in map(str, pair)]
        self.cfg.merge_from_list(pairs)
        # A config file keeps Detectron2's default preprocessing: a training with it would have it.
        options = source.preprocessing.options
        for key, value in zip(options[::2], options[1::2]):
            if self.config_file is None and key not in self.explicit:
                self.cfg.merge_from_list([key, value])
        return pairs + options

    def _wiring(self, spec: NetworkSpec, spec_file: str | None) -> dict[str, Any]:
        """The keys of MODEL.RANDWIRE that give the network; empty if none do."""
        node = self.cfg.MODEL.RANDWIRE
        if node.SPEC_FILE and not node.SPEC:
            return {"MODEL.RANDWIRE.SPEC_FILE": node.SPEC_FILE}  # it was checked: the same network
        keys = _describe(spec)
        self.cfg.merge_from_list([part for pair in keys.items() for part in pair])
        try:
            drawn = not drawn_network(self.cfg) and spec_from_config(self.cfg) == spec
        except ValueError:  # the graph model has no graph of so few nodes
            drawn = False
        if not drawn:
            return {} if spec_file is None else {"MODEL.RANDWIRE.SPEC_FILE": spec_file}
        params = node.get(node.GRAPH, {})  # a graph model without parameters has none
        graph = {f"{node.GRAPH}.{k}": v for k, v in params.items()}
        drawn_from = {"GRAPH": node.GRAPH, **graph, "SEED": node.SEED}
        return keys | {f"MODEL.RANDWIRE.{key}": value for key, value in drawn_from.items()}

    def _refuse_contradictions(self, source: Source) -> None:
        ours = _describe(source.network) | _describe_head(source)
        # A wiring that no keys draw may have any number of nodes.
        explicit = [k for k in ours if k in self.explicit and not k.endswith("NUM_NODES")]
        values = dict(flat(self.cfg))
        theirs = {key: values[key] for key in explicit}
        if isinstance(source.network, NetworkSpec) and drawn_network(self.cfg):
            spec = spec_from_config(self.cfg)
            theirs |= {**_describe(spec), "fingerprint": spec.fingerprint}
            ours["fingerprint"] = source.network.fingerprint
        wrong = [(key, value, ours[key]) for key, value in theirs.items() if value != ours[key]]
        if wrong:
            raise ValueError(
                "the config describes another network than the checkpoint holds: "
                + "; ".join(f"{key} is {a}, the checkpoint's {b}" for key, a, b in wrong)
            )

    def _backbone_name(self, network: NetworkSpec | ResNetArch) -> str:
        name = self.cfg.MODEL.BACKBONE.NAME
        if "MODEL.BACKBONE.NAME" not in self.explicit:
            name = f"build_resnet_{'fpn_' if self.to == 'fpn' else ''}backbone"
        randwire = isinstance(network, NetworkSpec)
        table = _BUILDERS if randwire else {v: k for k, v in _BUILDERS.items()}
        return table.get(name, name)


def _describe(network: NetworkSpec | ResNetArch) -> dict[str, Any]:
    """The keys that describe a network, without its wiring."""
    if isinstance(network, ResNetArch):
        return {f"MODEL.RESNETS.{key}": value for key, value in vars(network).items()}
    return {
        "MODEL.RANDWIRE.REGIME": network.regime,
        "MODEL.RANDWIRE.CHANNELS": network.channels,
        "MODEL.RANDWIRE.NODE_OP": network.node_op,
        "MODEL.RANDWIRE.NUM_NODES": network.dags[-1].num_nodes,
    }


def _describe_head(source: Source) -> dict[str, Any]:
    if source.head is None:
        return {}
    return {
        "MODEL.CLASSIFIER.NUM_CLASSES": source.head.num_classes,
        "MODEL.CLASSIFIER.HEAD_RELU": source.head.relu,
    }
