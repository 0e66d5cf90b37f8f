"""A stage as a CUDA graph: what it launches is recorded once, and replayed by one launch.

A step through a stage of 32 nodes launches some three hundred kernels, which takes the host longer
than a fast GPU needs to run them, unless the batch is large. A graph has the addresses of all that
it reads and writes. So a call copies its input to where the graph reads it, and its results from
where the graph has written them: the next call writes there, too. And a graph is dropped when a
weight has moved.

Kernels and their order are those of ``run_fused``, and so are the results, to the bit. What
``torch.cuda.make_graphed_callables`` leaves to its caller is seen to here: a forward pass while
another one's backward pass is still to come is launched as without a graph, because a graph keeps
the activations of one; gradients are nobody else's; nothing is run until it has been compared.
"""

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as _flatten
from torch._utils import _unflatten_dense_tensors as _unflatten
from torch.autograd.function import once_differentiable

from .difference import LIMITS, error, random_gradient, unchanged
from .fused import compute_dtype, settings, tensors_of

# A graph is recorded at the third call with the same key. One with a backward pass takes as much
# memory as a training step, so that there is but one, for calls in a row: where shapes change, as a
# detector's do, it takes many. Others share their memory; they need not be called in a row.
FIRST_CALLS = 3
LATER_CALLS = 50
MOST_INFERENCE = 8
MOST_RECORDINGS = 20  # in the life of a stage, whatever drops its graphs

Launch = Callable[[Tensor, Tensor | None], Tensor]
Function = Callable[[], list[Tensor]]

logger = logging.getLogger(__name__)
# Of all graphs: some share their memory, and a forward pass is more than one launch.
_lock = threading.RLock()


class Recording(NamedTuple):
    """What ``replay`` does again, and where it leaves its results."""

    results: list[Tensor]
    replay: Callable[[], object]


class Recorder(Protocol):
    """What records; tests have one for CPUs."""

    def place(self, x: Tensor) -> Hashable:
        """Where a call with this input would be replayed; None if it can't be."""

    def aside(self, x: Tensor) -> AbstractContextManager[object]:
        """For a first run of what will be recorded."""

    def record(self, x: Tensor, functions: Sequence[Function], alone: bool) -> list[Recording]:
        """
        Args:
            x: a tensor on the device.
            functions: what each of them launches is recorded; they may run.
            alone: whether their memory must not be other recordings', because the second reads
                what the first leaves there.
        """


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pools: dict[Hashable, Any] = {}

    def place(self, x: Tensor) -> Hashable:
        # What looks at each operator would see none.
        if x.device.type != "cuda" or torch._C._len_torch_dispatch_stack():
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        return x.device, torch.cuda.current_stream(x.device).cuda_stream

    @contextmanager
    def aside(self, x: Tensor) -> Any:
        stream, current = self._stream(x.device), torch.cuda.current_stream(x.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    def record(self, x: Tensor, functions: Sequence[Function], alone: bool) -> list[Recording]:
        new = torch.cuda.graph_pool_handle
        pool = new() if alone else self._pools.setdefault(self.place(x), new())
        needed = torch.cuda.max_memory_allocated(x.device) - torch.cuda.memory_allocated(x.device)
        found = []
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            # Other threads, those of NCCL and of data loaders, may go on.
            with torch.cuda.graph(
                graph, pool, self._stream(x.device), capture_error_mode="thread_local"
            ):
                results = function()
            found.append(Recording(results, graph.replay))
        free, _ = torch.cuda.mem_get_info(x.device)
        if free < needed:
            raise RuntimeError(
                f"it would leave {free >> 20} MiB of GPU memory, where {needed >> 20} were in use"
            )
        return found

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


recorder: Recorder = CudaRecorder()


def can_record(x: Tensor) -> bool:
    """Whether a stage with this input can be replayed as a graph."""
    return recorder.place(x) is not None


class StageGraphs:
    """The graphs of a stage; a copy of them, or what is pickled, is empty.

    Attributes:
        replayed: whether any call was, of those that are counted.
    """

    def __init__(self) -> None:
        self._failed = False
        self._recordings = 0
        self.drop()

    def __reduce__(self) -> Any:
        return StageGraphs, ()

    def drop(self) -> None:
        """Forget the graphs, and the calls that were counted."""
        self.replayed = False
        self._read: list[Tensor] = []
        self._state: Sequence[Hashable] = ()
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._row: tuple[Hashable, int] = (None, 0)
        self._rows = 0

    def run(self, launch: Launch, nodes: Sequence[Any], x: Tensor, kept: Tensor | None) -> Tensor:
        """What ``launch`` returns, which runs these nodes fused."""
        place = None if self._failed else recorder.place(x)
        if place is None:
            return launch(x, kept)
        with _lock:
            graph = self._graph(place, launch, nodes, x, kept)
        if graph is None or graph.busy:
            return launch(x, kept)
        self.replayed = True
        return graph(x, kept)

    def _graph(
        self,
        place: Hashable,
        launch: Launch,
        nodes: Sequence[Any],
        x: Tensor,
        kept: Tensor | None,
    ) -> "_Graph | None":
        parameters, buffers = tensors_of(nodes)
        read = [*parameters, *buffers]
        state = [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in read]
        if state != self._state:
            self.drop()
            self._read, self._state = read, state  # no other tensor gets their ids
        own = settings(nodes[0].norm)
        wanted = [p for p in parameters if p.requires_grad]
        backward = torch.is_grad_enabled() and (x.requires_grad or bool(wanted))
        # Who moves saved tensors, or computes them again, could not.
        hooked = backward and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if hooked or own.group is not None:
            return None
        cudnn = torch.backends.cudnn
        key = (
            *(place, backward, backward and x.requires_grad, own, kept is None),
            *(x.shape, x.dtype, compute_dtype(x)),
            *(cudnn.deterministic, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        )
        if self._due(key, backward):
            self._recordings += 1
            try:
                graph = _Graph(launch, wanted if backward else [], buffers, x, kept, backward)
            # Whatever a driver, or memory, makes of it: training goes on.
            except Exception as e:
                self.drop()
                self._failed = True
                why = " ".join(str(e).split())[:300] or type(e).__name__
                logger.warning(
                    f"A stage of {nodes[0].norm.num_features} channels launches its operators one "
                    f"by one from now on: its CUDA graph failed: {why}"
                )
                return None
            self._graphs[key] = graph
        return self._graphs.get(key)

    def _due(self, key: Hashable, backward: bool) -> bool:
        """Count a call; whether a graph is to be recorded in it."""
        if backward:
            before, calls = self._row
            self._row = key, calls + 1 if key == before else 1
            self._rows += key != before
            needed = FIRST_CALLS if self._rows == 1 else LATER_CALLS
            due = self._row[1] >= needed
        else:
            if len(self._calls) > 1000:
                self._calls.clear()
            self._calls[key] += 1
            held = sum(not graph.trains for graph in self._graphs.values())
            due = self._calls[key] >= FIRST_CALLS and held < MOST_INFERENCE
        if key in self._graphs or not due or self._recordings >= MOST_RECORDINGS:
            return False
        if backward:  # the new graph gets the memory of the one before
            self._graphs = {k: g for k, g in self._graphs.items() if not g.trains}
        return True


class _Pass:
    """A forward pass, as long as its backward pass is to come."""

    over = False


class _Graph:
    """A stage's launches for one kind of call, held against the same launched one by one.

    Args:
        launch: see ``StageGraphs.run``.
        parameters: those that will get gradients.
        buffers: what ``launch`` may write to.
        x, kept: of the call.
        trains: whether there is a backward pass.

    Raises:
        RuntimeError: a replay is not what is launched; or whatever a recording raises.
    """

    def __init__(
        self,
        launch: Launch,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        x: Tensor,
        kept: Tensor | None,
        trains: bool,
    ) -> None:
        if any(p._backward_hooks for p in parameters):
            raise RuntimeError("a parameter has a hook, which would be recorded")
        self.parameters, self.trains = parameters, trains
        self._pending: Callable[[], _Pass | None] = lambda: None
        self._gradients: Recording | None = None
        kind = x.device.type
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(trains),
            # What is cast once for several calls would be cast, or not, in one that is recorded.
            torch.autocast(
                *(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
                cache_enabled=False,
            ),
            unchanged(buffers),
        ):
            self._record(launch, buffers, x, kept)

    def _record(
        self, launch: Launch, buffers: Sequence[Tensor], x: Tensor, kept: Tensor | None
    ) -> None:
        with torch.no_grad():
            self.x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
            self.kept = None if kept is None else kept.clone()
        if self.trains:
            self.x.requires_grad_(x.requires_grad)
        wanted = [*([self.x] if self.x.requires_grad else []), *self.parameters]
        output = self.x

        def forward() -> list[Tensor]:
            nonlocal output
            output = launch(self.x, self.kept)
            return [output.detach()]

        def backward() -> list[Tensor]:
            with torch.autocast(x.device.type, enabled=False):
                gradients = [*torch.autograd.grad(output, wanted, self.grad)]
            # Those of parameters as one tensor, of which a copy takes one launch.
            own = gradients[len(wanted) - len(self.parameters) :]
            others = gradients[: len(wanted) - len(self.parameters)]
            return others + ([_flatten(own)] if own else [])

        functions = [forward, backward] if self.trains else [forward]
        with recorder.aside(x), unchanged(buffers):
            expected = forward()
            self.grad = random_gradient(*expected)
            expected += backward() if self.trains else []
            expected_buffers = [buffer.clone() for buffer in buffers]
        # Of what is cast, the graph has a copy.
        dtype = expected[0].dtype
        self.originals = [p for p in self.parameters if p.dim() == 4 and p.dtype == dtype]
        with unchanged(buffers):
            self._output, *gradients = recorder.record(x, functions, alone=self.trains)
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
        compared = (("results", results, expected), ("statistics", buffers, expected_buffers))
        # The kernels are the same; those that sum in no fixed order lose less than others do.
        limit = LIMITS[expected[0].dtype] / 10
        for what, actual, right in compared:
            off = error(actual, right) if right else 0.0
            if not off <= limit:
                raise RuntimeError(f"its {what} are off by {off:.2g} of what they are without it")

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
        self._pending = weakref.ref(begun)
        return begun

    @torch.no_grad()
    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        with _lock:
            self.x.copy_(x)
            if self.kept is not None and kept is not None:
                self.kept.copy_(kept)
            self._output.replay()
            return self._output.results[0].clone()

    def backward(self, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The gradients of x, if there is one, and of the parameters."""
        assert self._gradients is not None, "there is a backward pass"
        with _lock:
            self.grad.copy_(grad)
            self._gradients.replay()
            results = [gradient.clone() for gradient in self._gradients.results]
        grad_x = results.pop(0) if self.x.requires_grad else None
        return grad_x, [g for flat in results for g in _unflatten(flat, self.parameters)]


class _Replay(torch.autograd.Function):
    """(graph, x, kept, *parameters) -> output."""

    @staticmethod
    def forward(
        ctx: Any, graph: _Graph, x: Tensor, kept: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.graph, ctx.own = graph, graph.begin()
        ctx.save_for_backward(*graph.originals)  # to hear of one that was written to since
        return graph.forward(x, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Any) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        if ctx.own.over:
            raise RuntimeError(
                "a second backward pass through a stage that was replayed as a CUDA graph, whose "
                "activations are gone; set MODEL.RANDWIRE.CUDA_GRAPHS False (cuda_graphs=False)"
            )
        ctx.own.over = True
        grad_x, gradients = ctx.graph.backward(grad_output)
        return None, grad_x, None, *gradients
