"""Which of a stage's calls are replayed as a CUDA graph; the others are launched as ever.

What ``torch.cuda.make_graphed_callables`` leaves to its caller is seen to here and in
``cuda_graphs``: a forward pass while another one's backward pass is still to come is launched,
because a graph keeps the activations of one; gradients share no memory with the next; a weight that
has moved is noticed; and nothing is replayed that was not compared.
"""

import logging
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..text import one_line
from . import cuda_graphs
from .cuda_graphs import Graph, Launch
from .fused import compute_dtype, settings, tensors_of

# A graph is recorded at the third call with the same key. One with a backward pass takes as much
# memory as a training step, so that there is but one, for calls in a row: where shapes change, as a
# detector's do, it takes many. Others share their memory; they need not be called in a row.
FIRST_CALLS = 3
LATER_CALLS = 50
MOST_INFERENCE = 8
# In the life of a stage, whatever drops its graphs, and one more for each LATER_CALLS replays: the
# buffers that precise batch norms replace at each evaluation do.
MOST_RECORDINGS = 20

logger = logging.getLogger(__name__)
# Of all forward passes: some share their memory, and each is more than one launch.
_lock = threading.RLock()


class StageGraphs:
    """The graphs of a stage; a copy of them, or what is pickled, is empty.

    Attributes:
        replayed: whether any call was, of those that are counted.
    """

    def __init__(self) -> None:
        self._failed = False
        self._recordings = self._replays = 0
        self.drop()

    def __reduce__(self) -> Any:
        return StageGraphs, ()

    def drop(self) -> None:
        """Forget the graphs, and the calls that were counted."""
        self.replayed = False
        self._read: list[Tensor] = []
        self._state: Sequence[Hashable] = ()
        self._graphs: dict[Hashable, Graph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._row: tuple[Hashable, int] = (None, 0)
        self._rows = 0

    def run(self, launch: Launch, nodes: Sequence[Any], x: Tensor, kept: Tensor | None) -> Tensor:
        """What ``launch`` returns, which runs these nodes fused."""
        place = None if self._failed else cuda_graphs.recorder.place(x)
        if place is None:
            return launch(x, kept)
        # Who waited for a thread that records would be waited for, if it was autograd's.
        if _lock.acquire(blocking=False):
            try:
                graph = self._graph(place, launch, nodes, x, kept)
                if graph is not None and not graph.busy:
                    self.replayed = True
                    self._replays += 1
                    return graph(x, kept)
            finally:
                _lock.release()
        return launch(x, kept)

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
        trained = any(p.requires_grad for p in parameters)
        backward = torch.is_grad_enabled() and (x.requires_grad or trained)
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
                graph = Graph(launch, nodes, x, kept, backward)
            # Whatever a driver, or memory, makes of it: training goes on.
            except Exception as e:
                self.drop()
                self._failed = True
                cause = e.__context__ or e  # the end of a recording that fails raises as well
                why = one_line(cause, 300) or type(cause).__name__
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
        most = MOST_RECORDINGS + self._replays // LATER_CALLS
        if key in self._graphs or not due or self._recordings >= most:
            return False
        if backward:  # the new graph gets the memory of the one before
            self._graphs = {k: g for k, g in self._graphs.items() if not g.trains}
        return True
