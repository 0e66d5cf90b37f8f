"""Recording CUDA graphs, and sharing their memory."""

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Function = Callable[[], list[Tensor]]


class Recording(NamedTuple):
    """A recorded graph: ``replay`` runs it again, and writes into ``results``."""

    results: list[Tensor]
    replay: Callable[[], object]


class Recorder(Protocol):
    """The interface of a recorder; tests have one for CPUs."""

    def place(self, x: Tensor) -> Hashable:
        """The device and stream on which a call with this input would be replayed, or None."""

    def aside(self, x: Tensor) -> AbstractContextManager[object]:
        """A context for the first run, before the recording."""

    def record(self, x: Tensor, functions: Sequence[Function], pool: object) -> list[Recording]:
        """
        Args:
            x: a tensor on the device.
            functions: each one's launches become a recording. The second function may read what
                the first has left in memory.
            pool: recordings with the same pool share memory: results last until another of these
                recordings is made or replayed.
        """


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # For each place and pool, its graphs. (CUDA frees a pool with its last graph.)
        self._sharing: dict[Hashable, weakref.WeakSet[Any]] = {}

    def place(self, x: Tensor) -> Hashable:
        # Under a dispatch mode, which must see each operator, there is no replay.
        if x.device.type != "cuda" or torch._C._len_torch_dispatch_stack():
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        return x.device, torch.cuda.current_stream(x.device).cuda_stream

    @contextmanager
    def aside(self, x: Tensor) -> Iterator[None]:
        stream, current = self._stream(x.device), torch.cuda.current_stream(x.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            current.wait_stream(stream)

    def record(self, x: Tensor, functions: Sequence[Function], pool: object) -> list[Recording]:
        self._sharing = {key: graphs for key, graphs in self._sharing.items() if graphs}
        sharing = self._sharing.setdefault((self.place(x), pool), weakref.WeakSet())
        other, stream = next(iter(sharing), None), self._stream(x.device)
        handle = other.pool() if other else torch.cuda.graph_pool_handle()
        found = []
        with torch.cuda.device(x.device), _no_collection():
            peak = torch.cuda.max_memory_allocated()
            needed = peak - torch.cuda.memory_allocated()
            for function in functions:
                graph = torch.cuda.CUDAGraph()
                with _recording(graph, handle, stream):
                    results = function()
                found.append(Recording(results, graph.replay))
            free, total = torch.cuda.mem_get_info()
            # So much must stay free that the peak so far still fits, and a larger image, too.
            needed += max(total // 20, peak // 4)
            if free < needed:
                torch.cuda.empty_cache()  # also frees the memory of dropped graphs
                free, _ = torch.cuda.mem_get_info()
        if free < needed:
            raise torch.OutOfMemoryError(
                f"it would leave {free >> 20} MiB of GPU memory, and {needed >> 20} may be needed"
            )
        sharing.add(graph)
        return found

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


@contextmanager
def _no_collection() -> Iterator[None]:
    """In the block, no garbage collection: if it destroyed a graph, the recording would fail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _recording(graph: Any, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record, and restore stream, allocator and random generator even if the recording fails."""
    before, begun = torch.cuda.current_stream(), False
    try:
        # With "global", calls of other threads (an allocation, a query of NCCL's watchdog or of a
        # data loader) would fail and end the recording. With "relaxed", unrecorded work of this
        # thread would pass, and be missing in replays (CUDA's runtime API,
        # cudaThreadExchangeStreamCaptureMode). In no mode may another thread synchronise the device
        # (CUDA's programming guide, "Prohibited and Unhandled Operations").
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            begun = True
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        # Otherwise the allocator would stay in recording mode and free less, and the graph's memory
        # would leak. PyTorch 2.13 leaves that mode at the end of a recording, but a reset does not
        # free the memory; from 2.14 on, a reset does both.
        held = begun and torch.__version__.startswith("2.13.")
        with suppress(Exception):
            graph.pool()  # raises if the recording did not end well
            held = False
        with suppress(Exception):
            graph.reset()
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            held = True
        if held:
            with suppress(Exception):
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        # The random generator would stay in recording mode, too, and dropout fail. The end of
        # another recording resets it.
        with suppress(Exception):
            zero = torch.zeros(1, device="cuda")
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                zero.add_(0)
        raise
