"""Losses that are NaN or infinite: a training stops, or skips up to a number of steps in a row."""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.amp import GradScaler

from ...checkpoint import RandWireCheckpointer
from ..config.continuation import check_groups, rates_kept
from ..config.keys import YAML_KEYS
from ..processes.agreement import largest, means

SPIKE = 5.0  # a loss of more than so many times the median is logged
WINDOW = 100  # iterations of the median, and at least from one such line in the log to the next
FEW = 20  # the fewest iterations whose median is used
NAMED = 8  # images in a message; a batch may have hundreds

logger = logging.getLogger(__name__)


class _NotFinite(Exception):
    """Leaves a step before the optimizer's, in all processes.

    Attributes:
        where: the losses and the images of each process whose loss is not finite.
    """

    def __init__(self, where: Sequence[str]) -> None:
        super().__init__()
        self.where = where


class _Losses:
    """The losses of a forward pass, which are copied to the host asynchronously.

    ``read`` waits only for the forward pass. If it is called after the backward pass was launched,
    the GPU has work until the optimizer's step is launched.

    Args:
        losses: scalar tensors, by name.
        figures: other scalar tensors to write to the metrics, by name.
    """

    def __init__(self, losses: Mapping[str, Tensor], figures: Mapping[str, Tensor]) -> None:
        found = [value.detach() for value in (*losses.values(), *figures.values())]
        devices = {value.device for value in found if value.is_cuda}
        copies = [value.to("cpu", non_blocking=True) for value in found]
        self._losses = dict(zip(losses, copies))
        self._figures = dict(zip(figures, copies[len(losses) :]))
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def read(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        for event in self._copied:
            event.synchronize()
        return self._losses, {name: float(value) for name, value in self._figures.items()}


class FiniteTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one. Those check the losses only in the main
    process, and wait there until the device has finished all its work.

    If the loss is NaN or infinite in any process, all processes skip the step: its gradients are
    not applied, and the norms' statistics are restored. The steps that a GradScaler skips have
    finite losses, and do not count.

    Args:
        precision: the dtype of autocast; None for no autocast. Only float16 gradients are scaled,
            because bfloat16 has the range of float32.

    Attributes:
        skip_nonfinite: the largest number of steps in a row that are skipped.
        keys: the names of the config's keys, for messages.
        image_names: returns the names of a batch's images in an iteration.
        figures: returns other scalar tensors of a step; their means over all processes are written
            to the metrics.
        checkpointer: the training's checkpointer, for messages; None if there is none.
    """

    iter: int
    skip_nonfinite = 0
    keys = YAML_KEYS
    image_names: Callable[[Any, int], Sequence[str]]
    figures: Callable[[], Mapping[str, Tensor]]
    checkpointer: RandWireCheckpointer | None = None

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.precision = precision
        self.grad_scaler = GradScaler(enabled=precision == torch.float16)
        self.image_names = file_names
        self.figures = dict
        self._batch: Any = None
        self._skipped = 0
        self._buffers: list[Tensor] = []
        self._totals: deque[float] = deque(maxlen=WINDOW)
        self._quiet_until = 0

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        scaler = {} if self.precision is None else {"grad_scaler": self.grad_scaler.state_dict()}
        spikes = {"totals": [*self._totals], "quiet_until": self._quiet_until}
        return {**state, **scaler, "skipped": self._skipped, **spikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's state, of any precision; the learning rates stay the config's.

        Raises:
            ValueError: the optimizer differs from the checkpoint's in more than rates; one line.
        """
        saved = state_dict["optimizer"]["param_groups"]
        check_groups(saved, self.optimizer.param_groups, self.keys)
        with rates_kept(self.optimizer, self.keys):
            super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        # An older version's checkpoint has none of these.
        self._skipped = state_dict.get("skipped", 0)
        self._totals.extend(state_dict.get("totals", ()))
        self._quiet_until = state_dict.get("quiet_until", 0)

    def run_step(self) -> None:
        if self.skip_nonfinite:
            self._keep_buffers()
        try:
            self._step()
        except _NotFinite as e:
            self._skip_or_stop(e.where)
        except FloatingPointError as e:  # raised by Detectron2's RPN, in the forward pass
            where = f"{str(e).partition('.')[0]} {self._images()}"
            if comm.get_world_size() > 1:  # other processes already wait for these gradients
                raise FloatingPointError(
                    f"iteration {self.iter}: {where}. Look at the images, or {self.keys.lower}"
                ) from e
            self._skip_or_stop([where])
        finally:
            self._batch = None

    def _step(self) -> None:
        """Run a step as Detectron2 does, but copy the losses before the backward pass."""
        assert self.model.training, "the model was changed to eval mode"
        begun = time.perf_counter()
        self._batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - begun
        with self._autocast():
            losses = self.model(self._batch)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values())
        on_the_way = _Losses(losses, self.figures())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()
        self._look_at(*on_the_way.read(), data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.iter % WINDOW == 0:
            self._check_scale()

    def _check_scale(self) -> None:
        """Raise an error if the GradScaler's factor, which each skipped step halves, is 0."""
        if self.grad_scaler.get_scale() == 0:
            raise FloatingPointError(
                f"no gradients of late, up to iteration {self.iter}, were finite in float16, so no "
                f"step was taken. {last_good(self.checkpointer)}. To go on, compute in bfloat16, "
                f"or {self.keys.lower}"
            )

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.precision)

    def _keep_buffers(self) -> None:
        buffers = [*self.model.buffers()]
        if len(self._buffers) != len(buffers):
            self._buffers = [buffer.clone() for buffer in buffers]
        else:
            torch._foreach_copy_(self._buffers, buffers)

    def _look_at(
        self, losses: dict[str, Tensor], figures: dict[str, float], data_time: float
    ) -> None:
        values = {name: float(value) for name, value in losses.items()}
        total = sum(values.values())
        own = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        own = "" if math.isfinite(total) else f"{own} {self._images()}"
        if largest(bool(own)):
            raise _NotFinite([found for found in comm.all_gather(own) if found])
        self._skipped = 0
        self._look_for_spike(total)
        self._write_metrics(losses, data_time)
        get_event_storage().put_scalars(**dict(zip(figures, means(figures.values()))))

    def _images(self) -> str:
        names = list(self.image_names(self._batch, self.iter))
        if len(names) > NAMED:
            logger.warning(f"The images of iteration {self.iter}: {', '.join(names)}")
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"of {', '.join(names[:NAMED])}{more}"

    def _skip_or_stop(self, where: Sequence[str]) -> None:
        """Forget the step in all processes, or end the training in all of them."""
        self._skipped += 1
        what = f"the loss of iteration {self.iter} is not finite: {'; '.join(where)}"
        if self._skipped <= self.skip_nonfinite and are_finite(self.model.parameters()):
            torch._foreach_copy_([*self.model.buffers()], self._buffers)
            if comm.is_main_process():
                logger.warning(
                    f"{what}. The step is skipped, number {self._skipped} in a row "
                    f"({self.keys.skip} {self.skip_nonfinite})"
                )
            return
        raise FloatingPointError(
            f"{what}. {last_good(self.checkpointer)}. Look at the images, or {self.keys.lower}; "
            f"{self.keys.skip} sets how many such steps in a row are skipped"
        )

    def _look_for_spike(self, total: float) -> None:
        if len(self._totals) >= FEW and self.iter >= self._quiet_until:
            median = statistics.median(self._totals)
            if total > SPIKE * median > 0:
                self._quiet_until = self.iter + WINDOW
                logger.warning(
                    f"The loss of iteration {self.iter} is {total:.4g}, {total / median:.1f} times "
                    f"the median of the {len(self._totals)} before it, {self._images()}"
                )
        self._totals.append(total)


class FiniteWeights(HookBase):
    """Keeps weights that are NaN or infinite out of the checkpoints: the gradient of a finite loss
    may be infinite.

    It belongs ahead of the hooks that save, in all processes.

    Args:
        checkpointer: the training's checkpointer.
        period: the iterations from one checkpoint to the next.

    Raises:
        FloatingPointError: in all processes, in place of the checkpoint.
    """

    def __init__(self, checkpointer: RandWireCheckpointer, period: int) -> None:
        self._checkpointer, self._period = checkpointer, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            self.check()

    def check(self) -> None:
        """Check the weights before a checkpoint; all processes call this.

        Raises:
            FloatingPointError: in all processes: the weights of one are not finite.
        """
        finite = are_finite(self._checkpointer.model.state_dict().values())
        if all(comm.all_gather(finite)):
            return
        raise FloatingPointError(
            f"the weights are not finite after iteration {self.trainer.iter}, and are not saved. "
            f"{last_good(self._checkpointer)}. To go on, {self.trainer.keys.lower}"
        )


def are_finite(tensors: Any) -> bool:
    """Whether all numbers in all tensors are finite; this synchronises with the device once."""
    finite = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())


def last_good(checkpointer: RandWireCheckpointer | None) -> str:
    """Say which checkpoint a failed training can go on from; all processes call this."""
    newest = comm.all_gather(checkpointer.newest if checkpointer else "")[0]
    return f"The last good checkpoint is {newest}" if newest else "There is no checkpoint before it"


def file_names(batch: Any, iteration: int) -> list[str]:
    """The file names of the images in a detector's batch, which is Detectron2's list of dicts."""
    return [str(image["file_name"]) for image in batch if "file_name" in image]
