"""The exponential moving average of a training's weights, which is what its evaluations test."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...modeling.stage import RandWireStage


class AveragedWeights(AveragedModel):
    """PyTorch's average of a network's weights and batch statistics, with the network's own names
    in checkpoints. Integers, which have no average, are the network's.

    Args:
        model: not wrapped.
        decay: of the average, per iteration: 0 … 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=_average(decay), use_buffers=True)
        self.module.requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.n_averaged.fill_(1)  # it goes on, and does not begin with the next weights
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def begin(self, model: nn.Module) -> None:
        """Be the network's weights until there is one iteration to average."""
        if not self.n_averaged:
            self.module.load_state_dict(model.state_dict())


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: list[Tensor], current: list[Tensor], number: Any) -> None:
        """Of tensors of one type."""
        if averaged[0].is_floating_point():
            average(averaged, current, number)
        else:
            torch._foreach_copy_(averaged, current)

    return update


class AverageWeights(HookBase):
    """Averages after each iteration, ahead of all hooks that test or save.

    Args:
        model: what is trained, not wrapped.
    """

    def __init__(self, average: AveragedWeights, model: nn.Module) -> None:
        self._average, self._model = average, model

    def before_train(self) -> None:
        self._run_as_trained()  # what a resumed training evaluates first, too

    def after_step(self) -> None:
        self._average.update_parameters(self._model)
        if self.trainer.iter == self.trainer.start_iter:
            self._run_as_trained()

    def _run_as_trained(self) -> None:
        """Run the average's stages as those that were timed."""
        for module, trained in zip(self._average.module.modules(), self._model.modules()):
            if isinstance(module, RandWireStage) and isinstance(trained, RandWireStage):
                module.slower = trained.slower
