"""The exponential moving average (EMA) of a training's weights, which its evaluations test."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...modeling import RandWireStage


class AveragedWeights(AveragedModel):
    """PyTorch's AveragedModel for a network's weights and batch statistics, with the network's own
    names in checkpoints. Integer buffers are not averaged but copied.

    Args:
        model: the network, not wrapped.
        decay: the decay of the average per iteration, 0 … 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=_average(decay), use_buffers=True)
        self.module.requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.n_averaged.fill_(1)  # the next update averages; with 0 it would copy the weights
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def begin(self, model: nn.Module) -> None:
        """Copy the network's weights, if no iteration has been averaged yet."""
        if not self.n_averaged:
            self.module.load_state_dict(model.state_dict())


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: list[Tensor], current: list[Tensor], number: Any) -> None:
        """Update a list of tensors of one dtype."""
        if averaged[0].is_floating_point():
            average(averaged, current, number)
        else:
            torch._foreach_copy_(averaged, current)

    return update


class AverageWeights(HookBase):
    """Updates the average after each iteration; it belongs ahead of all hooks that test or save.

    Args:
        average: the averaged weights.
        model: the network that is trained, not wrapped.
    """

    def __init__(self, average: AveragedWeights, model: nn.Module) -> None:
        self._average, self._model = average, model

    def before_train(self) -> None:
        self._run_as_trained()  # a resumed training may evaluate before its first step

    def after_step(self) -> None:
        self._average.update_parameters(self._model)
        if self.trainer.iter == self.trainer.start_iter:
            self._run_as_trained()

    def _run_as_trained(self) -> None:
        """Make the averaged network run each stage in the way that was timed to be faster."""
        for module, trained in zip(self._average.module.modules(), self._model.modules()):
            if isinstance(module, RandWireStage) and isinstance(trained, RandWireStage):
                module.slower = trained.slower
