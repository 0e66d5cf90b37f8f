"""A stage as a CUDA graph: its kernels are recorded once, and replayed by one launch.

A step through a stage of 32 nodes launches some three hundred kernels. Unless the batch is large,
that takes the host longer than a fast GPU needs to run them. A graph contains the addresses of all
tensors that it reads and writes. So each call copies its input to the place that the graph reads,
and copies the results, which the next call will overwrite. If a weight moves, the graph is dropped.

The kernels and their order are those of ``run_fused``, so the results are equal to the bit.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as _unflatten

from .difference import LIMITS, error, random_gradient, unchanged
from .fused import compute_dtype, replaced, tensors_of
from .graph_recorder import CudaRecorder, Recorder, Recording
from .once import once_differentiable
from .weights import narrower_image, padding_of, whole_image, with_zeros, zeros_of

Launch = Callable[[Tensor, Tensor | None], Tensor]

recorder: Recorder = CudaRecorder()  # tests have one for CPUs


class Memory:
    """Memory that the graphs of a stage share; only one of them may be busy at a time.

    Args:
        pool: the memory pool that they compute in, see ``Recorder``; by default their own.
    """

    def __init__(self, pool: object = None) -> None:
        self.pool = pool or object()  # who records holds on to it, and is not to hold the tensors
        self._largest: dict[Hashable, Tensor] = {}
        self.last: Callable[[], _Pass | None] = lambda: None  # whose input it has

    def flat(self, name: str, place: Hashable, like: Tensor, size: int) -> Tensor:
        """``size`` elements of the type of ``like``; all calls with the same name share them."""
        key = name, place, like.dtype
        if key not in self._largest or self._largest[key].numel() < size:
            self._largest[key] = like.new_empty(size)
        return self._largest[key].detach()[:size]

    def image(self, name: str, place: Hashable, like: Tensor, zeros: int) -> Tensor:
        """``flat`` as an image of the shape of ``like``, with so many channels of padding."""
        n, c, h, w = like.shape
        flat = self.flat(name, place, like, n * h * w * (c + zeros))
        return narrower_image(flat.view(n, h, w, c + zeros).permute(0, 3, 1, 2), zeros)


def _fill(image: Tensor, x: Tensor) -> None:
    """Copy x into an image, and zeros into its padding."""
    whole = whole_image(image)
    if zeros_of(x) == zeros_of(image):
        whole.copy_(whole_image(x))  # one launch on contiguous memory
    else:
        image.copy_(x)
        whole[:, x.shape[1] :].zero_()


class NotFinite(ValueError):
    """The operators gave NaN or infinity, so a replay can't be compared with them."""


class _Pass:
    """A forward pass; ``over`` once its backward pass is done."""

    over = False


class Graph:
    """The graph of a stage for one kind of call, compared with the same operators without a graph.

    Args:
        launch: runs the stage, with (x, kept).
        nodes: the nodes of the stage.
        x, kept: the arguments of the call.
        trains: whether there is a backward pass.
        memory: its memory; no other graph with this memory may be busy.

    Raises:
        NotFinite: this call's results are not finite; another call's may be.
        RuntimeError: a replay gives other results, or the recording fails.
    """

    def __init__(
        self,
        launch: Launch,
        nodes: Sequence[Any],
        x: Tensor,
        kept: Tensor | None,
        trains: bool,
        memory: Memory,
    ) -> None:
        parameters, buffers = tensors_of(nodes)
        self.trains, self.memory, self.buffers = trains, memory, buffers
        self.parameters = [p for p in parameters if p.requires_grad and trains]
        self._pending: Callable[[], _Pass | None] = lambda: None
        self._gradients: Recording | None = None
        kind = x.device.type
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(trains),
            # Without autocast's cache: a recording needs its own casts, not an earlier call's.
            torch.autocast(
                *(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
                cache_enabled=False,
            ),
            unchanged(buffers),
        ):
            # Aliases, because the parameters' hooks would be recorded, and their accumulation nodes
            # may be left from an earlier step, and would synchronise with its stream.
            aliases = {p: p.detach().requires_grad_() for p in self.parameters}

            def launch_aliases(x: Tensor, kept: Tensor | None) -> Tensor:
                with replaced(nodes, aliases):
                    return launch(x, kept)

            self._record(launch_aliases, [*aliases.values()], buffers, x, kept)

    def _record(
        self,
        launch: Launch,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        x: Tensor,
        kept: Tensor | None,
    ) -> None:
        place = recorder.place(x)
        self.memory.last = lambda: None
        with torch.no_grad():
            zeros = padding_of(x.shape[1], x.dtype, x.device) if x.dtype == compute_dtype(x) else 0
            self.x = self.memory.image("x", place, x, zeros)
            _fill(self.x, x)
            self.kept = None if kept is None else kept.clone()
        if self.trains:
            self.x.requires_grad_(x.requires_grad)
        wanted = [*([self.x] if self.x.requires_grad else []), *parameters]
        output = self.x

        def forward() -> list[Tensor]:
            nonlocal output
            output = launch(self.x, self.kept)
            return [with_zeros(Tensor.detach, output)]

        def backward(flat: Tensor | None = None) -> list[Tensor]:
            with torch.autocast(x.device.type, enabled=False):
                gradients = [*torch.autograd.grad(output, wanted, self.grad)]
            # The gradients of parameters as one tensor, so that one launch copies them.
            others = len(wanted) - len(parameters)
            rows = [gradient.contiguous().view(-1) for gradient in gradients[others:]]
            return gradients[:others] + ([torch.cat(rows, out=flat)] if rows else [])

        functions = [forward]
        with recorder.aside(x), unchanged(buffers):
            expected = forward()
            if self.trains:
                gradient = random_gradient(*expected)
                zeros = zeros_of(*expected)
                self.grad = self.memory.image("gradient", place, gradient, zeros)
                _fill(self.grad, gradient)
                expected += backward()
                own = None
                if parameters:
                    flat = expected[-1]
                    own = self.memory.flat("parameters", place, flat, flat.numel())
                functions.append(partial(backward, own))
            expected_buffers = [buffer.clone() for buffer in buffers]
        # The graph reads these parameters in place; it has its own copies of those that it casts.
        dtype = expected[0].dtype
        self.originals = [p for p in self.parameters if p.dim() == 4 and p.dtype == dtype]
        self.places = [p.data_ptr() for p in self.originals]
        with unchanged(buffers):
            self._output, *gradients = recorder.record(x, functions, self.memory.pool)
        self._gradients = gradients[0] if gradients else None
        self._check(expected, buffers, expected_buffers)

    def _check(
        self,
        expected: Sequence[Tensor],
        buffers: Sequence[Tensor],
        expected_buffers: Sequence[Tensor],
    ) -> None:
        results: list[Tensor] = []
        for recording in filter(None, (self._output, self._gradients)):
            recording.replay()
            results += recording.results
        # The kernels are the same. Only sums in no fixed order differ, by less than other rounding.
        limit = LIMITS[expected[0].dtype] / 10
        right = [*map(whole_image, expected), *expected_buffers]
        if not all(value.isfinite().all() for value in right):
            raise NotFinite
        found = [*map(whole_image, results), *buffers]
        for actual, value in zip(found, right, strict=True):
            off = error([actual], [value])
            if not off <= limit:
                raise RuntimeError(f"a result is off by {off:.2g} of what it is without a graph")

    @property
    def busy(self) -> bool:
        """Whether its activations are still needed for a backward pass."""
        last = self._pending()
        return last is not None and not last.over

    def __call__(self, x: Tensor, kept: Tensor | None) -> Tensor:
        if self.trains:
            output: Tensor = _Replay.apply(self, x, kept, *self.parameters)
            return output
        return self.forward(x, kept)

    def begin(self) -> _Pass:
        """Begin a forward pass. It ends with its backward pass, or when it is garbage-collected."""
        begun = _Pass()
        self._pending = self.memory.last = weakref.ref(begun)
        return begun

    @torch.no_grad()
    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        _fill(self.x, x)
        if self.kept is not None and kept is not None:
            self.kept.copy_(kept)
        self._output.replay()
        return with_zeros(Tensor.clone, self._output.results[0])

    def again(self) -> None:
        """Compute the activations of the last forward pass again."""
        with unchanged(self.buffers):
            self._output.replay()

    def backward(self, grad: Tensor, zeros: int) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The gradients of x (None if it needs none; padded if x was) and of the parameters."""
        assert self._gradients is not None, "there is a backward pass"
        _fill(self.grad, grad)
        self._gradients.replay()
        copy = partial(with_zeros, Tensor.clone) if zeros else Tensor.clone
        results = [copy(own) for own in self._gradients.results]
        grad_x = results.pop(0) if self.x.requires_grad else None
        return grad_x, [g for flat in results for g in _unflatten(flat, self.parameters)]


class _Replay(torch.autograd.Function):
    """(graph, x, kept, *parameters) -> output."""

    @staticmethod
    def forward(
        ctx: Any, graph: Graph, x: Tensor, kept: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.graph, ctx.own, ctx.zeros = graph, graph.begin(), zeros_of(x)
        ctx.save_for_backward(*graph.originals)  # torch then notices writes to them
        ctx.versions = [p._version for p in graph.parameters]
        return graph.forward(x, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Any) -> tuple[Tensor | None, ...]:
        graph: Graph = ctx.graph
        # FSDP gathers the weights for each pass, perhaps at other addresses.
        moved = [weight.data_ptr() for weight in ctx.saved_tensors] != graph.places
        written = ctx.versions != [p._version for p in graph.parameters]
        gone = ctx.own.over and (written or graph.memory.last() is not ctx.own)
        if moved or gone:
            raise RuntimeError(
                "a stage that was replayed as a CUDA graph can't do this backward pass: its "
                f"{'weights have moved' if moved else 'activations are gone since the first'}; "
                "set MODEL.RANDWIRE.CUDA_GRAPHS False (cuda_graphs=False)"
            )
        if ctx.own.over:
            graph.again()
        try:
            grad_x, gradients = graph.backward(grad_output, ctx.zeros)
        finally:
            ctx.own.over = True  # not earlier: another thread may begin a pass as soon as it is
        return None, grad_x, None, *gradients
