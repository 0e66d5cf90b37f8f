"""Decides which calls of a stage are replayed as a CUDA graph; the others are launched as usual.

Here and in ``cuda_graphs``, four things are handled that ``torch.cuda.make_graphed_callables``
leaves to its caller. A graph keeps the activations of one forward pass, so another forward pass
before its backward pass is launched as usual. Gradients are copied out of the graph's memory. A
weight that has moved is noticed. No graph is used that was not compared with the operators.
"""

import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..text import one_line
from . import cuda_graphs
from .cuda_graphs import Graph, Launch, Memory, NotFinite
from .fused import compute_dtype, settings, tensors_of, wants_gradients

# A graph is recorded at the third call with the same key. If a training has several keys, as a
# detector's images have several sizes, it is recorded at the tenth call, for at most MOST_TRAINING
# keys. These graphs share the memory of the largest, so only one can be busy at a time.
FIRST_CALLS = 3
LATER_CALLS = 10
MOST_TRAINING = 16
MOST_INFERENCE = 8
# If a stage has all the graphs that it may have, this many calls in a row with another key replace
# them. There are MOST_RECORDINGS recordings, and one more for each MANY_CALLS replays, because
# precise batch norms replace buffers at each evaluation, which drops the graphs.
MANY_CALLS = 50
MOST_RECORDINGS = 50
# Seconds that a thread waits for another thread's replay, which is faster than its own launches. It
# does not wait for a recording, because that waits for autograd's threads, perhaps this one.
WAIT = 0.01
_ALL_STAGES = object()  # the pool that all stages share in inference

logger = logging.getLogger(__name__)
# Held during a forward pass, which is several launches: passes of several threads share memory.
_lock = threading.RLock()
_all: weakref.WeakSet["StageGraphs"] = weakref.WeakSet()


class StageGraphs:
    """The graphs of a stage. Copies and pickles of it are empty.

    Attributes:
        replayed: whether any call was replayed since the graphs were last dropped.
        failure: why a graph could not be recorded or kept; empty if nothing has failed.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._recordings = self._replays = 0
        # With (True) and without (False) a backward pass: the most graphs, and their largest size.
        self._most = {True: MOST_TRAINING, False: MOST_INFERENCE}
        self._too_large = {True: math.inf, False: math.inf}
        self.drop()
        _all.add(self)

    def __reduce__(self) -> Any:
        return StageGraphs, ()

    def drop(self) -> None:
        """Drop all graphs, and reset the counts of calls."""
        self.replayed = False
        self._read: list[Tensor] = []
        self._state: Sequence[Hashable] = ()
        self._graphs: dict[Hashable, Graph] = {}
        self._memory: dict[bool, Memory] = {}
        for trains in (True, False):
            self._drop_kind(trains)
        self._calls: Counter[Hashable] = Counter()
        self._row: tuple[Hashable, int] = (None, 0)
        self._several = False  # keys, in training

    def run(self, launch: Launch, nodes: Sequence[Any], x: Tensor, kept: Tensor | None) -> Tensor:
        """Run the nodes fused, as ``launch`` does, by a replay if possible."""
        place = cuda_graphs.recorder.place(x) if any(self._most.values()) else None
        if place is None:
            return launch(x, kept)
        if _lock.acquire(timeout=WAIT):
            try:
                graph = self._graph(place, launch, nodes, x, kept)
                if graph is not None and not (graph.trains and self._busy):
                    self.replayed = True
                    self._replays += 1
                    return graph(x, kept)
            finally:
                _lock.release()
        try:
            return launch(x, kept)
        except torch.OutOfMemoryError as e:
            # A stage with synchronised norms can't be run again: it would send messages twice.
            if settings(nodes[0].norm).group is not None or not _give_up_all(e):
                raise
        # Outside of the block, because in it the error's traceback keeps tensors alive.
        return launch(x, kept)

    def give_up(self, why: str) -> None:
        """Drop all graphs, and record no new ones."""
        self.failure, self._most = why, dict.fromkeys(self._most, 0)
        self.drop()

    def _graph(
        self,
        place: Hashable,
        launch: Launch,
        nodes: Sequence[Any],
        x: Tensor,
        kept: Tensor | None,
    ) -> Graph | None:
        parameters, buffers = tensors_of(nodes)
        read = [*parameters, *buffers]
        state = [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in read]
        if state != self._state:
            self.drop()
            self._read, self._state = read, state  # keeps the tensors, so that ids stay unique
        own = settings(nodes[0].norm)
        backward = wants_gradients(x, parameters)
        # Hooks on saved tensors (offloading, checkpointing) would not see a graph's tensors.
        hooked = backward and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if hooked or own.group is not None:
            return None
        cudnn = torch.backends.cudnn
        key = (
            *(place, backward, backward and x.requires_grad, own, kept is None),
            *(x.shape, x.dtype, compute_dtype(x)),
            *(cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
            cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        )
        if self._due(key, backward, x):
            self._recordings += 1
            try:
                memory = self._memory[backward]
                self._graphs[key] = Graph(launch, nodes, x, kept, backward, memory)
            except NotFinite:
                self._calls[key] = 0
            # Training goes on after any error of the driver, or for want of memory.
            except Exception as e:
                self._fail(e, x, backward, nodes[0].norm.num_features)
        return self._graphs.get(key)

    @property
    def _busy(self) -> bool:
        return any(graph.busy for graph in self._graphs.values())

    def _fail(self, error: Exception, x: Tensor, trains: bool, channels: int) -> None:
        cause = error.__context__ or error  # the end of a recording that fails raises as well
        self.failure = one_line(cause, 300) or type(cause).__name__
        number, size = len(self._held(trains)), tuple(x.shape)
        self._drop_kind(trains)
        where = "in training, " if trains else "in inference, "
        if not is_out_of_memory(cause):
            self._most[trains] = 0
        elif number:
            self._most[trains] = number
            where += f"where inputs have more than {number} sizes, "
        else:
            self._too_large[trains] = x.numel()
            where += f"where inputs are as large as {size}, "
        logger.warning(
            f"From now on, {where}a stage of {channels} channels launches its operators one by "
            f"one: its CUDA graph failed: {self.failure}"
        )

    def _drop_kind(self, trains: bool) -> None:
        self._graphs = {key: graph for key, graph in self._graphs.items() if graph.trains != trains}
        self._memory[trains] = Memory(None if trains else _ALL_STAGES)

    def _held(self, trains: bool) -> list[Graph]:
        return [graph for graph in self._graphs.values() if graph.trains == trains]

    def _due(self, key: Hashable, trains: bool, x: Tensor) -> bool:
        """Count a call, and decide whether to record a graph now; if so, make room for it."""
        if len(self._calls) > 1000:
            self._calls.clear()
        self._calls[key] += 1
        if trains:
            before, calls = self._row
            self._row = key, calls + 1 if key == before else 1
            self._several |= before not in (None, key)
        needed = LATER_CALLS if trains and self._several else FIRST_CALLS
        allowed = MOST_RECORDINGS + self._replays // MANY_CALLS
        if key in self._graphs or self._calls[key] < needed or self._recordings >= allowed:
            return False
        if not self._most[trains] or x.numel() >= self._too_large[trains]:
            return False
        if trains and self._busy:
            return False
        held = self._held(trains)
        full = len(held) >= self._most[trains]
        if not trains:
            return not full
        if full and self._row[1] < MANY_CALLS:
            return False
        # Graphs share the memory of the largest. If this one is larger than all others, they are
        # dropped, and later recorded again in its memory.
        if full or all(x.numel() > graph.x.numel() for graph in held):
            self._drop_kind(trains)
        return True


def _give_up_all(error: Exception) -> bool:
    """Free all graphs, and record none in this process any more; return whether there were any."""
    if not _lock.acquire(timeout=WAIT):
        return False
    try:
        # Without graphs, the batch alone is too large: graphs stay possible for smaller batches.
        if not any(graphs._graphs for graphs in _all):
            return False
        for graphs in _all:
            graphs.give_up(one_line(error, 300))
    finally:
        _lock.release()
    logger.warning(
        "Memory ran out, so there are no CUDA graphs from now on, which keep the memory that they "
        f"compute in: {one_line(error, 300)}"
    )
    torch.cuda.empty_cache()
    return True
