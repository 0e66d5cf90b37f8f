"""A stage that runs fused where it can: whether it does, and why not."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor

from .. import ops
from ..ops.launches import MOST_GRADS, MOST_INPUTS, shared
from ..ops.probe import Variants, failure, needs_probe
from ..wiring import StageSpec
from ..wiring.plan import Plan
from .fused import (
    Fused,
    compute_dtype,
    run_fused,
    sharing,
    tensors_of,
    uses_batch,
    wants_gradients,
)
from .fusible import EXPORTING, conv_settings, why_not
from .stage import PlainStage
from .stage_graphs import StageGraphs
from .weights import dense_image, padding_of


class RandWireStage(PlainStage):
    """A random graph as a stage, with the function and the weights of ``PlainStage``.

    Args:
        spec, node_op, norm: see ``PlainStage``.
        fused: whether the nodes run as one function of fused operators: ``"auto"``, if that is
            possible and the operators work; ``"on"``, always (an error if it is impossible);
            ``"off"``, never.
        recompute: save less for the backward pass of that function, and compute it again.
        cuda_graphs: on a GPU, once shapes repeat, replay that function as a CUDA graph.

    Attributes:
        slower: for training (True) and inference (False), the reason to run nodes one by one with
            ``"auto"`` although fused is possible: a timing found it slower. An absent key means
            that it is not. The nodes then run in channels_last.
        plain_because: why the last pass ran the nodes one by one; empty if it ran fused, None
            before the first pass.
        padding: how many channels of zeros padded the nodes' results in that pass.
        edges: for each plan, its ``by_target``, ``by_source`` and ``by_coefficient`` in one tensor
            on the stage's device. They are not buffers: averaging a model's buffers would change
            them, and ``to_empty`` would leave them without values.
    """

    def __init__(
        self,
        spec: StageSpec,
        node_op: str,
        norm: str,
        *,
        fused: Fused = "auto",
        recompute: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__(spec, node_op, norm)
        self._built = [conv_settings(node) for node in self.nodes]
        self.fused = fused
        self.recompute = recompute
        self.cuda_graphs = cuda_graphs
        self.graphs = StageGraphs()
        self.slower: dict[bool, str] = {}
        self.plain_because: str | None = None
        self.padding = 0
        self._failures: dict[tuple[torch.device, torch.dtype, bool, bool, bool], str] = {}
        self._plans = plans = self.plan, Plan(spec.dag, by_level=True)
        self._sizes = (
            _sharing(plans[1:], spec.dag.predecessors, MOST_INPUTS),
            _sharing(plans, [s or (0,) for s in spec.dag.successors], MOST_GRADS),
            tuple(sorted({len(g) for plan in plans for g in plan.groups})),
            len(spec.dag.input_nodes),
            len(spec.dag.output_nodes),
        )
        self.edges = self._edges_on(self._device())
        if fused == "on":  # a training should not learn it in its first iteration
            _check_possible(why_not([*self.nodes], self._built))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """As ``PlainStage.forward``. If the nodes were padded, the padding lies in memory between
        the output's pixels (``dense_image`` removes it)."""
        reason = self._why_plain(x)
        if not torch.compiler.is_compiling():
            self.plain_because = reason
            # Not asked of every device: on "meta", say, there is no autocast to ask about.
            self.padding = (
                0 if reason else padding_of(self.out_channels, compute_dtype(x), x.device)
            )
        return self.run_nodes(x, kept) if reason else self.run_replayed(x, kept)

    def _why_plain(self, x: Tensor) -> str:
        """The reason to run the nodes one by one; empty to run them fused.

        Raises:
            ValueError: ``fused`` is "on", and the nodes can't run fused.
        """
        if self.fused == "off":
            return "MODEL.RANDWIRE.FUSED is off"
        reason = self.obstacle(x)
        if self.fused == "auto":
            return reason or self.slower.get(self.training, "")
        _check_possible(reason)
        return reason

    @property
    def synchronised(self) -> bool:
        """Whether the statistics of its norms include the images of other processes."""
        norm: Any = self.nodes[0].norm
        return sharing(norm) is not None

    def obstacle(self, x: Tensor) -> str:
        """Why the nodes can't run fused on this input; empty if they can.

        On a GPU, all processes must make the first call in training together.
        """
        if reason := why_not([*self.nodes], self._built):
            return reason
        # Of a wrong input, torch's operators raise the error.
        if x.dim() != 4 or x.shape[1] != self.in_channels or not (x.numel() or self.synchronised):
            return f"the input is {tuple(x.shape)}, and not (N > 0, {self.in_channels}, H, W)"
        return self._failure(x)

    def _failure(self, x: Tensor) -> str:
        """Why the operators don't work for this stage on x's device; see ``ops.probe``."""
        if not needs_probe(x.device):
            return ops.unavailable(x.device)
        norm: Any = self.nodes[0].norm
        device, dtype, batch = x.device, compute_dtype(x), uses_batch(norm)
        backward = wants_gradients(x, tensors_of([*self.nodes])[0])
        key = (device, dtype, self.training, batch, backward)
        if key in self._failures and not torch.compiler.is_compiling():
            return self._failures[key]
        in_channels, channels = (
            own + padding_of(own, dtype, device) for own in (self.in_channels, self.out_channels)
        )
        variants = Variants(in_channels, channels, *self._sizes, batch, backward)
        if torch.compiler.is_compiling():
            return failure(device, dtype, variants)
        self._failures[key] = _in_all_processes(
            lambda: failure(device, dtype, variants), together=self.training
        )
        return self._failures[key]

    @property
    def failed(self) -> bool:
        """Whether the operators have been found not to work for this stage."""
        return any(self._failures.values())

    def run_fused(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """``forward`` as one function. The caller must know that the stage can run fused."""
        if self.edges[0].device != x.device:  # weights were moved without _apply, as by FSDP
            self.edges = self._edges_on(x.device)
        # torch can't save tensors of inference mode for a backward pass; the nodes' own modules
        # don't need to save this one.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_inference():
            x = x.clone()
        return run_fused(self._plans, self.edges, [*self.nodes], x, kept, self.recompute)

    def run_replayed(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """``run_fused``, as the replay of a CUDA graph if possible."""
        if not self.cuda_graphs or torch.compiler.is_compiling():
            return self.run_fused(x, kept)
        return self.graphs.run(self.run_fused, [*self.nodes], x, kept)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.graphs.drop()
        super()._apply(*args, **kwargs)
        self.edges = self._edges_on(self._device())
        return self

    def _device(self) -> torch.device | None:
        return next((t.device for t in chain(self.parameters(), self.buffers())), None)

    def _edges_on(self, device: torch.device | None) -> list[Tensor]:
        with torch.inference_mode(False):  # they may be trained with later
            return [
                torch.tensor([*p.by_target, *p.by_source, *p.by_coefficient], device=device)
                for p in self._plans
            ]

    def run_nodes(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """``forward`` node by node."""
        x = dense_image(x)
        if self.training in self.slower:
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x, kept)


def _check_possible(obstacle: str) -> None:
    if obstacle and obstacle != EXPORTING:
        raise ValueError(
            f"MODEL.RANDWIRE.FUSED is on, but {obstacle}; with auto, nodes run one by one"
        )


def _sharing(
    plans: Iterable[Plan], edges: Sequence[Sequence[int]], most: int
) -> tuple[tuple[int, int], ...]:
    """The kernels that nodes share, each as (the most edges of one node, the number of nodes)."""
    numbers = [len(own) for own in edges]
    found = {(n, 1) for n in numbers}
    for group in (group for plan in plans for group in plan.groups):
        own = [numbers[v] for v in group]
        found |= {(max(own[some]), len(own[some])) for some in shared(own, most)}
    return tuple(sorted((n, nodes) for n, nodes in found if n))


def _in_all_processes(find: Callable[[], str], *, together: bool) -> str:
    """The first reason that any process finds; empty if none finds one.

    One process of each machine starts, and the others then find its compiled kernels in the cache.
    With ``together`` False (in inference, where a process may be alone), only this process looks.
    """
    if not together or comm.get_world_size() == 1:
        return find()
    found = find() if _comes_first() else ""
    comm.synchronize()
    found = found or find()
    return next(filter(None, comm.all_gather(found)), "")


def _comes_first() -> bool:
    if comm._LOCAL_PROCESS_GROUP is None:  # another program than Detectron2's has started them
        return comm.is_main_process()
    return comm.get_local_rank() == 0
