"""What records a CUDA graph, and what shares its memory."""

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Function = Callable[[], list[Tensor]]


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

    def record(self, x: Tensor, functions: Sequence[Function], pool: object) -> list[Recording]:
        """
        Args:
            x: a tensor on the device.
            functions: what each of them launches is recorded; they may run. The second may read
                what the first leaves in memory.
            pool: recordings with the same one share memory. What one leaves there lasts until
                another of them is replayed, or recorded.
        """


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # By place and pool, the graphs that have it. (CUDA's pools end with their graphs.)
        self._sharing: dict[Hashable, weakref.WeakSet[Any]] = {}

    def place(self, x: Tensor) -> Hashable:
        # What looks at each operator would see none.
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
            # So that what has fitted into memory so far still does, and some larger images, of
            # which a detector finds more.
            needed += max(total // 20, peak // 4)
            if free < needed:
                torch.cuda.empty_cache()  # what graphs that were dropped had, too
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
    """In the block, Python looks for no cycles: a graph in one, if destroyed, ends a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _recording(graph: Any, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Leaves stream, allocator and random generator as they were, even if its end raises."""
    before, begun = torch.cuda.current_stream(), False
    try:
        # With "global", what other threads do meanwhile (an allocation, a query of NCCL's watchdog
        # or of a data loader) would fail, and end the recording; with "relaxed", what this one does
        # aside would pass, and no replay do it (CUDA's runtime API on
        # cudaThreadExchangeStreamCaptureMode). In no mode may another thread synchronise the device
        # (its programming guide, "Prohibited and Unhandled Operations").
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            begun = True
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        # Else the allocator would go on as if something were recorded, and free less; and the
        # graph's memory would be nobody's for ever. PyTorch 2.13 does the first at the end of a
        # recording, but not the second in a reset; from 2.14 on, a reset does both.
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
        # Nor would the random generator draw, as for dropout. The end of another one ends that.
        with suppress(Exception):
            zero = torch.zeros(1, device="cuda")
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                zero.add_(0)
        raise
