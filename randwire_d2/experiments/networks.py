"""The network of a run: its name in a table, and what distinguishes its seeds."""

from contextlib import suppress
from pathlib import Path

from detectron2.config import CfgNode

from ..config import drawn_network, family, generator_from_config, is_classifier, spec_from_config
from ..wiring import NetworkGenerator, NetworkSpec, graph_label


def network_name(cfg: CfgNode) -> str:
    """The name of a config's network: the paper's name if it is one of the paper's networks.

    Raises:
        ValueError: the config describes no network.
    """
    kind = family(cfg)
    if kind is None and is_classifier(cfg):
        node = cfg.MODEL.CLASSIFIER.TORCHVISION
        pairs = zip(node.OPTIONS[::2], node.OPTIONS[1::2])
        options = ", ".join(f"{key}={value}" for key, value in pairs)
        return f"{node.NAME}({options})" if options else str(node.NAME)
    if kind is None:
        return str(cfg.MODEL.BACKBONE.NAME)
    if kind == "RESNETS":
        resnets = cfg.MODEL.RESNETS
        groups, width = resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP
        names = {(1, 64): f"ResNet-{resnets.DEPTH}", (32, 4): f"ResNeXt-{resnets.DEPTH}"}
        return names.get((groups, width), f"ResNet-{resnets.DEPTH} {groups}×{width}d")
    node = cfg.MODEL.RANDWIRE
    if drawn_network(cfg):
        if (spec := _spec(cfg)) is None:
            return f"RandWire of {node.SPEC_FILE}"
        # A spec does not say which generator drew it: try the config's and the paper's.
        drawn_by = [NetworkGenerator(spec.regime, spec.channels, node_op=spec.node_op)]
        with suppress(ValueError):  # with a spec, these keys are not used and may be invalid
            drawn_by.append(generator_from_config(cfg))
        seeds = (node.SEED, *range(1, 6))  # the seeds of the paper's networks are 1 … 5
        known = [g for g in drawn_by if any(_draws(g, seed, spec) for seed in seeds)]
        if not known:
            return f"RandWire {spec.fingerprint[:12]}"
        generator = known[0]
    else:
        generator = generator_from_config(cfg)
    regime = {78: "small", 109: "regular", 154: "regular"}.get(generator.channels)
    if regime and generator == NetworkGenerator(regime, generator.channels):
        return f"RandWire-WS, C={generator.channels}"
    label = graph_label(generator.graph, generator.graph_params)
    return (
        f"RandWire-{label}, {generator.regime}, N={generator.num_nodes}, C={generator.channels}, "
        f"{generator.node_op}"
    )


def wiring_of(cfg: CfgNode) -> str:
    """A text that distinguishes a config's wiring from those of other seeds; "" if it has none."""
    if family(cfg) != "RANDWIRE":
        return ""
    node = cfg.MODEL.RANDWIRE
    if not drawn_network(cfg):
        return str(node.SEED)
    spec = _spec(cfg)
    return str(node.SPEC_FILE) if spec is None else spec.fingerprint


def _spec(cfg: CfgNode) -> NetworkSpec | None:
    """The drawn network of a config; None if its file was moved or deleted."""
    node = cfg.MODEL.RANDWIRE
    there = node.SPEC or Path(node.SPEC_FILE).is_file()
    return spec_from_config(cfg) if there else None


def _draws(generator: NetworkGenerator, seed: int, spec: NetworkSpec) -> bool:
    try:
        return generator(seed) == spec
    except ValueError:  # such as K ≥ N
        return False
