"""A stage as a CUDA graph: what it launches is recorded once, and replayed by one launch.

A step through a stage of 32 nodes launches some three hundred kernels, which takes the host longer
than a fast GPU needs to run them, unless the batch is large. A graph has the addresses of all that
it reads and writes. So a call copies its input to where the graph reads it, and its results from
where the graph has written them: the next call writes there, too. And a graph is dropped when a
weight has moved.

Kernels and their order are those of ``run_fused``, and so are the results, to the bit.
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
    """What graphs of a stage share, of which one is busy at a time.

    Args:
        pool: where they compute: see ``Recorder``. By default nobody else does.
    """

    def __init__(self, pool: object = None) -> None:
        self.pool = pool or object()  # who records holds on to it, and is not to hold the tensors
        self._largest: dict[Hashable, Tensor] = {}
        self.last: Callable[[], _Pass | None] = lambda: None  # whose input it has

    def flat(self, name: str, place: Hashable, like: Tensor, size: int) -> Tensor:
        """So many elements, of the type of ``like``, that others of that name share."""
        key = name, place, like.dtype
        if key not in self._largest or self._largest[key].numel() < size:
            self._largest[key] = like.new_empty(size)
        return self._largest[key].detach()[:size]

    def image(self, name: str, place: Hashable, like: Tensor, zeros: int) -> Tensor:
        """The same as an image of that shape, with so many channels of zeros."""
        n, c, h, w = like.shape
        flat = self.flat(name, place, like, n * h * w * (c + zeros))
        return narrower_image(flat.view(n, h, w, c + zeros).permute(0, 3, 1, 2), zeros)


def _fill(image: Tensor, x: Tensor) -> None:
    """Copy x into it, and zeros into the channels that it has beside x's."""
    whole = whole_image(image)
    if zeros_of(x) == zeros_of(image):
        whole.copy_(whole_image(x))  # in one launch, which reads and writes without gaps
    else:
        image.copy_(x)
        whole[:, x.shape[1] :].zero_()


class NotFinite(ValueError):
    """The launches give NaN or infinity, so that a replay can't be compared with them."""


class _Pass:
    """A forward pass, as long as its backward pass is to come."""

    over = False


class Graph:
    """A stage's launches for one kind of call, held against the same launched one by one.

    Args:
        launch: what runs the stage, with (x, kept).
        nodes: the stage's.
        x, kept: of the call.
        trains: whether there is a backward pass.
        memory: no other graph that has it may be busy.

    Raises:
        NotFinite: in this call; another one may be.
        RuntimeError: a replay is not what is launched; or whatever a recording raises.
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
            # Not the parameters themselves: their hooks would be recorded as well. And what adds up
            # their gradients may be left from an earlier step, and would wait on its stream.
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
            # Those of parameters as one tensor, of which a copy takes one launch.
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
        # Of what is cast, the graph has a copy.
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
        # The kernels are the same; those that sum in no fixed order lose less than others do.
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
        """Whether its activations are still needed."""
        last = self._pending()
        return last is not None and not last.over

    def __call__(self, x: Tensor, kept: Tensor | None) -> Tensor:
        if self.trains:
            output: Tensor = _Replay.apply(self, x, kept, *self.parameters)
            return output
        return self.forward(x, kept)

    def begin(self) -> _Pass:
        """A forward pass, which is over when its backward pass is, or nobody holds it."""
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
        """Compute the activations of the last forward pass once more."""
        with unchanged(self.buffers):
            self._output.replay()

    def backward(self, grad: Tensor, zeros: int) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The gradients of x, if there is one, with zeros if x had some; and of the parameters."""
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
        ctx.save_for_backward(*graph.originals)  # to hear of one that was written to since
        ctx.versions = [p._version for p in graph.parameters]
        return graph.forward(x, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Any) -> tuple[Tensor | None, ...]:
        graph: Graph = ctx.graph
        # What gathers weights for each pass, as FSDP does, may gather them elsewhere.
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
