"""Which of a stage's calls are replayed as a CUDA graph; the others are launched as ever.

What ``torch.cuda.make_graphed_callables`` leaves to its caller is seen to here and in
``cuda_graphs``: a forward pass while another one's backward pass is still to come is launched,
because a graph keeps the activations of one; gradients share no memory with the next; a weight that
has moved is noticed; and nothing is replayed that was not compared.
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

# A graph is recorded at the third call with the same key. In training, once there were other keys,
# as where a detector's images have many sizes: at the tenth, and for so many of them. They share
# their memory, which is as much as a training step of the largest takes; and so only one is busy.
FIRST_CALLS = 3
LATER_CALLS = 10
MOST_TRAINING = 16
MOST_INFERENCE = 8
# A stage that has as many graphs as it may gets new ones after so many calls in a row with another
# key. As many replays allow one more recording, beside MOST_RECORDINGS: precise batch norms replace
# buffers at each evaluation, which drops the graphs.
MANY_CALLS = 50
MOST_RECORDINGS = 50
# Seconds that a thread waits for another's replay, which takes less than launches of its own. Not
# until a recording is over: it waits for autograd's threads, which may be the ones that wait here.
WAIT = 0.01
_ALL_STAGES = object()  # compute in one pool, without a backward pass

logger = logging.getLogger(__name__)
# Held during a forward pass: some passes share their memory, and each is more than one launch.
_lock = threading.RLock()
_all: weakref.WeakSet["StageGraphs"] = weakref.WeakSet()


class StageGraphs:
    """The graphs of a stage; a copy of them, or what is pickled, is empty.

    Attributes:
        replayed: whether any call was, of those that are counted.
        failure: why there are fewer than there might be, or none; empty if nothing has failed.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._recordings = self._replays = 0
        # By whether there is a backward pass: how many there can be, and of what size.
        self._most = {True: MOST_TRAINING, False: MOST_INFERENCE}
        self._too_large = {True: math.inf, False: math.inf}
        self.drop()
        _all.add(self)

    def __reduce__(self) -> Any:
        return StageGraphs, ()

    def drop(self) -> None:
        """Forget the graphs, and the calls that were counted."""
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
        """What ``launch`` returns, which runs these nodes fused."""
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
            # Not a stage that sends messages: the other processes would get them twice.
            if settings(nodes[0].norm).group is not None or not _give_up_all(e):
                raise
        # After the block: in it, the error would keep the tensors that its traceback sees.
        return launch(x, kept)

    @property
    def held(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def give_up(self, why: str) -> None:
        """Have no graphs from now on."""
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
            self._read, self._state = read, state  # no other tensor gets their ids
        own = settings(nodes[0].norm)
        backward = wants_gradients(x, parameters)
        # Hooks that move saved tensors, or compute them again, would not get those of a graph.
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
            # Whatever a driver, or memory, makes of it: training goes on.
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
        """Count a call; whether a graph is to be recorded in it, for which there is room then."""
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
        # A larger one would find no room among what the others have, but they do in what it has: so
        # it comes first, and they again after it.
        if full or all(x.numel() > graph.x.numel() for graph in held):
            self._drop_kind(trains)
        return True


def _give_up_all(error: Exception) -> bool:
    """Free the memory of all graphs, for the rest of the process; whether there were any."""
    if not _lock.acquire(timeout=WAIT):
        return False
    try:
        # Where there are none, they are not to blame: whoever tries less next may have some.
        if not any(graphs.held for graphs in _all):
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
