"""A stand-in for what records CUDA graphs, without a GPU.

It records by keeping the function, and replays by running it and writing over what it returned
before, as a graph does.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from randwire_d2.modeling.graph_recorder import Recording


class StandIn:
    """Records on any device.

    Attributes:
        recorded: how many graphs were.
        replays: how often any was replayed.
        broken: what it does to the results of replays.
    """

    def __init__(self) -> None:
        self.recorded = self.replays = 0
        self.broken: Callable[[Tensor], Any] = lambda result: None
        self._left: dict[object, int] = {}  # which recording has left something in a pool

    def place(self, x: Tensor) -> str:
        return "here"

    def aside(self, x: Tensor) -> Any:
        return nullcontext()

    def record(
        self, x: Tensor, functions: Sequence[Callable[[], list[Tensor]]], pool: object
    ) -> list[Recording]:
        self.recorded += 1
        number = self._left[pool] = self.recorded

        def replayed(first: bool) -> None:
            assert first or self._left[pool] == number, "another one has written there"
            self._left[pool] = number

        return [
            self._recording(function, partial(replayed, i == 0))
            for i, function in enumerate(functions)
        ]

    def _recording(
        self, function: Callable[[], list[Tensor]], replayed: Callable[[], None]
    ) -> Recording:
        trains = torch.is_grad_enabled()
        amp = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        results = function()

        def replay() -> None:
            replayed()
            self.replays += 1
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(trains),
                torch.autocast("cpu", amp[1], enabled=amp[0], cache_enabled=False),
            ):
                again = function()
            with torch.no_grad():
                for result, value in zip(results, again, strict=True):
                    result.copy_(value)
                    self.broken(result)

        return Recording(results, replay)
