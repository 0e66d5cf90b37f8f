"""The network generator g(θ, s) of §3.1 and the symbolic networks n that it returns (Table 1)."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..text import brief, one_line, parse_json, prefixed
from .dag import Dag, as_integer, as_positive
from .limits import MOST_CHANNELS, MOST_CHARACTERS, MOST_NODES, MOST_WEIGHTS, check_limit
from .random_graphs import check_seed, random_graph, registered_graph

# Table 1, conv2 to conv5, as (name, channels / C, nodes / N). conv1 is a single convolution with
# C/2 channels in both regimes, and so is conv2, with C channels, in the small one.
REGIMES: dict[str, tuple[tuple[str, int, float], ...]] = {
    "small": (("res3", 1, 1), ("res4", 2, 1), ("res5", 4, 1)),
    "regular": (("res2", 1, 0.5), ("res3", 2, 1), ("res4", 4, 1), ("res5", 8, 1)),
}
HEAD_CHANNELS = 1280  # Table 1, classifier: "1×1 conv, 1280-d"
JSON_FORMAT = 1


@dataclass(frozen=True)
class ConvSpec:
    """A single dense 3×3 convolution with stride 2: conv1, and conv2 in the small regime."""

    name: str
    in_channels: int
    channels: int


@dataclass(frozen=True)
class StageSpec:
    """A randomly wired stage: one random graph, ``channels`` channels in each of its nodes."""

    name: str
    in_channels: int
    channels: int
    dag: Dag


@dataclass(frozen=True)
class NetworkSpec:
    """A symbolic network: "the type of operations … and the flow of data", no weights (§3.1).

    Modules are built from it, complexity is computed from it, checkpoints carry it. Two specs are
    equal exactly if they describe the same network, whatever drew them.

    Attributes:
        regime: ``"small"`` or ``"regular"`` (Table 1).
        channels: C.
        node_op: the convolution of every node, a name such as ``"sep_conv3x3"``.
        dags: the wiring of each randomly wired stage, from high to low resolution.

    Raises:
        ValueError: the regime is unknown, the number of stages is not the regime's, C < 2, or the
            network is larger than ``limits`` allows.
    """

    regime: str
    channels: int
    node_op: str
    dags: tuple[Dag, ...]

    def __post_init__(self) -> None:
        _check_regime(self.regime)
        object.__setattr__(self, "channels", _check_channels(self.channels))
        if not isinstance(self.node_op, str):
            raise ValueError(f"node_op must be a name; got {brief(self.node_op)}")
        object.__setattr__(self, "dags", tuple(self.dags))
        names = [name for name, _, _ in REGIMES[self.regime]]
        if len(self.dags) != len(names):
            raise ValueError(
                f"the {self.regime} regime has {len(names)} randomly wired stages "
                f"({', '.join(names)}); got {len(self.dags)}"
            )
        weights = sum(
            dag.num_nodes * (width * self.channels) ** 2
            for (_, width, _), dag in zip(REGIMES[self.regime], self.dags, strict=True)
        )
        what = f"the weights of the 1×1 convolutions of C={self.channels}"
        check_limit(what, weights, MOST_WEIGHTS, "choose a smaller C or fewer nodes")

    @cached_property
    def convs(self) -> tuple[ConvSpec, ...]:
        """conv1 as ``"stem"``, followed in the small regime by conv2 as ``"res2"``."""
        # 3 for RGB. Like the number of classes, other input channels are no part of a spec.
        stem = ConvSpec("stem", 3, self.channels // 2)
        if self.regime == "regular":
            return (stem,)
        return (stem, ConvSpec("res2", stem.channels, self.channels))

    @cached_property
    def stages(self) -> tuple[StageSpec, ...]:
        """The randomly wired stages, named after the strides they have in Detectron2."""
        stages: list[StageSpec] = []
        in_channels = self.convs[-1].channels
        for (name, width, _), dag in zip(REGIMES[self.regime], self.dags, strict=True):
            stages.append(StageSpec(name, in_channels, width * self.channels, dag))
            in_channels = stages[-1].channels
        return tuple(stages)

    @property
    def layers(self) -> tuple[ConvSpec | StageSpec, ...]:
        """``convs``, then ``stages``; layer i has stride 2^(i+1)."""
        return (*self.convs, *self.stages)

    def to_json(self) -> str:
        """The canonical JSON text: equal specs give the same bytes."""
        spec = {
            "format": JSON_FORMAT,
            "regime": self.regime,
            "channels": self.channels,
            "node_op": self.node_op,
            "stages": [{"num_nodes": dag.num_nodes, "edges": dag.edges} for dag in self.dags],
        }
        return json.dumps(spec, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, fingerprint: str | None = None) -> "NetworkSpec":
        """The inverse of ``to_json``.

        Args:
            fingerprint: that of the expected spec, if it is known.

        Raises:
            ValueError: the text is not the JSON of a spec, has another fingerprint, or is larger
                than ``limits`` allows; one line that says what is wrong.
        """
        if not isinstance(text, str):
            raise ValueError(f"not the JSON of a NetworkSpec: got {brief(text)}")
        # Before it is parsed; callers that read a file stop one character after this limit.
        way_out = "is it the JSON of a spec?"
        check_limit("the characters of a NetworkSpec's JSON", len(text), MOST_CHARACTERS, way_out)
        try:
            content = parse_json(text)
            if content["format"] != JSON_FORMAT:
                raise ValueError(
                    f"format {brief(content['format'])} is unknown; known is {JSON_FORMAT}"
                )
            _check_keys(content, ("format", "regime", "channels", "node_op", "stages"))
            for stage in content["stages"]:
                _check_keys(stage, ("num_nodes", "edges"))
            spec = cls(
                regime=content["regime"],
                channels=content["channels"],
                node_op=content["node_op"],
                dags=tuple(Dag(s["num_nodes"], tuple(s["edges"])) for s in content["stages"]),
            )
        except KeyError as e:
            raise ValueError(f"not the JSON of a NetworkSpec: the key {e} is missing") from None
        except (TypeError, ValueError) as e:
            raise ValueError(f"not the JSON of a NetworkSpec: {e}") from e
        if fingerprint is not None and spec.fingerprint != fingerprint:
            raise ValueError(
                f"its spec has the fingerprint {spec.fingerprint}, but it states "
                f"{one_line(fingerprint, 80)}: one of the two was changed"
            )
        return spec

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON, in hexadecimal: the identity of the network."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def check_spec(doing: str, spec: Any) -> None:
    """
    Args:
        doing: what is done with it, for the error.

    Raises:
        ValueError: ``spec`` is no spec; a generator, say.
    """
    if not isinstance(spec, NetworkSpec):
        raise ValueError(
            f"{doing} a NetworkSpec; got {type(spec).__name__}. A generator draws one from a seed, "
            "generator(seed=1); in a LazyConfig: "
            "L(RandWire)(spec=L(L(NetworkGenerator)(channels=109))(seed=1))"
        )


def _check_keys(content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"the key {brief(unknown[0])} is unknown; known are {', '.join(known)}")


class _Parameters(dict[str, Any]):
    """A graph model's parameters: a dict that can be hashed, and not changed."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "a generator's graph_params can't be changed; dataclasses.replace(generator, "
            "graph_params=…) makes another generator"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)  # else pickle and copy set the items one by one


@dataclass(frozen=True)
class NetworkGenerator:
    """The stochastic network generator g: θ is given here, the seed s with each call.

    Every stage's graph is drawn with the same seed, as by the paper's authors: the networks'
    parameters and FLOPs match Tables 2 to 4 to the last digit.

    Attributes:
        regime: ``"small"`` or ``"regular"`` (Table 1).
        channels: C.
        num_nodes: N. The regular regime's conv2 has N/2 nodes, rounded down, but at least 1.
        graph: a name in ``GRAPH_REGISTRY``: ``"ER"``, ``"BA"``, ``"WS"``, or your own, which must
            be registered before the generator is made.
        graph_params: the graph model's parameters: ``{"p": …}``, ``{"m": …}``,
            ``{"k": …, "p": …}``. The generator has a copy, which can't be changed.
        node_op: the convolution of every node.

    Raises:
        ValueError: from the constructor, if the regime, C, N or the graph model is wrong, or
            graph_params is no mapping; from the call, if the graph model refuses the parameters.
    """

    regime: str = "regular"
    channels: int = 109
    num_nodes: int = 32
    graph: str = "WS"
    graph_params: Mapping[str, Any] = field(default_factory=lambda: {"k": 4, "p": 0.75})
    node_op: str = "sep_conv3x3"

    def __post_init__(self) -> None:
        _check_regime(self.regime)
        _check_channels(self.channels)
        num_nodes = as_positive("num_nodes (N)", self.num_nodes)
        check_limit("num_nodes (N)", num_nodes, MOST_NODES, "choose a smaller N")
        registered_graph(self.graph)
        if not isinstance(self.graph_params, Mapping):
            raise ValueError(
                'graph_params must be a mapping, such as {"k": 4, "p": 0.75}; got '
                f"{brief(self.graph_params)}"
            )
        parameters = _Parameters(copy.deepcopy(dict(self.graph_params)))
        object.__setattr__(self, "graph_params", parameters)

    def __call__(self, seed: int) -> NetworkSpec:
        """Draw the network n = g(θ, s)."""
        seed = as_integer("seed (s)", seed)  # None would draw another network each time
        check_seed(seed)
        dags = []
        for name, _, fraction in REGIMES[self.regime]:
            num_nodes = max(1, int(self.num_nodes * fraction))
            half = f", with half of num_nodes {self.num_nodes} (§3.2)" if fraction < 1 else ""
            with prefixed(f"{name} of the {self.regime} regime{half}"):
                graph = random_graph(self.graph, num_nodes, seed, **self.graph_params)
            dags.append(Dag.from_graph(graph))
        return NetworkSpec(self.regime, self.channels, self.node_op, tuple(dags))


def _check_regime(regime: str) -> None:
    known = sorted(REGIMES)
    if regime not in known:
        raise ValueError(f"regime must be one of {known}; got {brief(regime)}")


def _check_channels(channels: int) -> int:
    channels = as_integer("channels (C)", channels)
    if channels < 2:
        raise ValueError(f"channels (C) must be at least 2, for conv1 has C/2; got {channels}")
    check_limit("channels (C)", channels, MOST_CHANNELS, "choose a smaller C")
    return channels
