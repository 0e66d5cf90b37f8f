"""Graph damage: a trained network without one of its nodes, or one of its edges (§4.1, Figure 5).

The effects of a removal:

- A removed node takes its edges with it. A removed edge takes its term out of its target's weighted
  sum. The weights of the other terms do not change, as in the edge dropping of training.
- A node that loses its only input gets zeros, so its output is the constant that its norm makes of
  their convolution. It does not become an input node.
- A removed output node leaves the stage's mean, which is then that of the others. If it was the
  only one, the stage's output is zero.
- Input and output nodes stay those of the trained network: a node that loses its last consumer is
  not connected to the output node, so its result is not used.
- The edges of the extra input and output nodes (§3.2) belong to the stage, not to its random graph:
  they are not removed alone. An isolated node can be removed, as a node.

The work before a damage is shared. The intact stage runs once and keeps the results of its nodes;
each damage then recomputes the nodes downstream of it, the later stages, and the head. (Each of
these nodes still leads to the stage's output, so all of them are needed.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling import RandWireClassifier, RandWireStage
from ..wiring import Complexity, Dag, NetworkSpec, StageSpec, complexity
from ..wiring.complexity import halve, node_complexities

KINDS = ("node", "edge")
# The later stages run on the results of several damages at once, up to so many images. A larger
# batch is no faster on a CPU (measured).
STACKED_IMAGES = 128


class Damage(NamedTuple):
    """The removal of one node or one edge.

    Attributes:
        stage: the stage of the node or edge, such as ``"res3"``.
        removed: the node, or the edge (u, v).
        degree: Figure 5's x: the node's output degree, or the input degree of the edge's target,
            before the damage. The edges of the extra input and output nodes do not count, so an
            output node has the degree 0; the paper does not say whether they do.
    """

    stage: str
    removed: int | tuple[int, int]
    degree: int

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return "node" if isinstance(self.removed, int) else "edge"


def all_damages(spec: NetworkSpec, kinds: Sequence[str] = KINDS) -> list[Damage]:
    """Every node and every edge of every random graph, stage by stage.

    Raises:
        ValueError: a kind is not one of ``KINDS``.
    """
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}; got {kinds}")
    damages = []
    for stage in spec.stages:
        dag = stage.dag
        if "node" in kinds:
            damages += [Damage(stage.name, v, len(s)) for v, s in enumerate(dag.successors)]
        if "edge" in kinds:
            damages += [Damage(stage.name, (u, v), len(dag.predecessors[v])) for u, v in dag.edges]
    return damages


def downstream(dag: Dag, removed: int | tuple[int, int]) -> list[int]:
    """The nodes whose results a damage changes, ascending: the consumers of a removed node, or the
    target of a removed edge, and all their descendants."""
    changed = {removed} if isinstance(removed, int) else {removed[1]}
    for v in range(dag.num_nodes):
        if not changed.isdisjoint(dag.predecessors[v]):
            changed.add(v)
    return sorted(v for v in changed if v != removed)


@torch.no_grad()
def damaged_logits(
    network: RandWireClassifier, images: Tensor, damages: Sequence[Damage]
) -> Iterator[tuple[Damage | None, Tensor]]:
    """Compute the logits of a network with each of the damages, and of the intact network.

    The memory holds the results of all nodes of one stage, and those that a damage changes.

    Args:
        network: a network in eval mode.
        images: (N, 3, H, W), preprocessed.
        damages: damages of the network's spec, in any order.

    Yields:
        (damage, logits (N, num_classes)), stage by stage; at the end (None, the logits of the
        intact network).

    Raises:
        ValueError: the network is in training mode, where the logits depend on the whole batch.
    """
    if network.training:
        raise ValueError("the network is in training mode; call its eval() first")
    backbone = network.backbone
    names = [layer.name for layer in backbone.spec.layers]
    dags = {stage.name: stage.dag for stage in backbone.spec.stages}
    together = max(1, STACKED_IMAGES // len(images))
    # The memory format of the fused operators.
    x = images.contiguous(memory_format=torch.channels_last)
    for i, name in enumerate(names):
        stage = getattr(backbone, name)
        if name not in dags:
            x = stage(x)
            continue
        results = _intact(stage, dags[name], x)
        here = [damage for damage in damages if damage.stage == name]
        for start in range(0, len(here), together):
            group = here[start : start + together]
            y = torch.cat([_damaged(stage, dags[name], results, d.removed) for d in group])
            for later in names[i + 1 :]:
                y = getattr(backbone, later)(y)
            yield from zip(group, network.head(y).chunk(len(group)), strict=True)
        x = _mean([results[v] for v in dags[name].output_nodes])
    yield None, network.head(x)


def _intact(stage: RandWireStage, dag: Dag, x: Tensor) -> list[Tensor]:
    """The results of all nodes of a stage."""
    results: list[Tensor] = []
    for v, predecessors in enumerate(dag.predecessors):  # edges point to the larger index
        results.append(stage.nodes[v]([results[u] for u in predecessors] or [x]))
    return results


def _damaged(
    stage: RandWireStage, dag: Dag, intact: Sequence[Tensor], removed: int | tuple[int, int]
) -> Tensor:
    """The output of a stage with a damage, from the results of its intact nodes."""
    # A removed node or edge contributes zeros: they take its term out of the weighted sum.
    zeros = torch.zeros_like(intact[0])
    results = list(intact)
    if isinstance(removed, int):
        results[removed] = zeros
    for v in downstream(dag, removed):
        results[v] = stage.nodes[v](
            [zeros if (u, v) == removed else results[u] for u in dag.predecessors[v]]
        )
    return _mean([results[v] for v in dag.output_nodes if v != removed] or [zeros])


def _mean(results: Sequence[Tensor]) -> Tensor:
    first, *others = results
    return sum(others, first) / len(results)


def count_correct(
    network: RandWireClassifier,
    images: Tensor,
    labels: Tensor,
    damages: Sequence[Damage],
    progress: Callable[[], object] = lambda: None,
) -> tuple[int, list[int]]:
    """Count the images that the intact network, and each damaged one, classifies correctly (top-1).

    Args:
        network, images, damages: see ``damaged_logits``.
        labels: (N,), class indices; a label outside of the classes is never correct.
        progress: called after each damage.

    Returns:
        tuple[int, list[int]]: the count of the intact network, and one for each damage.
    """
    labels = labels.to(images.device)
    correct: dict[Damage | None, Tensor] = {}  # on the device: the loop does not synchronise
    for damage, logits in damaged_logits(network, images, damages):
        correct[damage] = (logits.argmax(1) == labels).sum()
        if damage is not None:
            progress()
    intact, *damaged = torch.stack([correct[d] for d in (None, *damages)]).tolist()
    return intact, damaged


class Work(NamedTuple):
    """Multiply-adds for one image, counted by ``complexity``.

    Attributes:
        full: those of one evaluation of the intact network.
        shared: those of the intact network and all damages, as ``damaged_logits`` computes them.
    """

    full: int
    shared: int


def count_work(
    spec: NetworkSpec, damages: Sequence[Damage], height: int, width: int, num_classes: int
) -> Work:
    """Count the multiply-adds of ``damaged_logits`` for one image of height × width pixels."""
    whole = complexity(spec, height, width, num_classes)
    names = [*whole.stages]
    dags = {stage.name: stage.dag for stage in spec.stages}
    nodes: dict[str, list[Complexity]] = {}
    for layer in spec.layers:
        height, width = halve(height), halve(width)
        if isinstance(layer, StageSpec):
            nodes[layer.name] = node_complexities(layer, spec.node_op, height, width)
    shared = whole.flops
    for stage, removed, _ in damages:
        shared += sum(nodes[stage][v].flops for v in downstream(dags[stage], removed))
        shared += sum(whole.stages[later].flops for later in names[names.index(stage) + 1 :])
    return Work(whole.flops, shared)
