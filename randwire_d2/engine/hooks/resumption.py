"""Hooks with which a training that was killed can be resumed with bitwise identical results.

They belong ahead of the hooks that save. Their state is in the checkpoint's "trainer" entry.
"""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count, dropwhile
from typing import Any, Protocol, runtime_checkable

import torch
from detectron2.engine import HookBase, hooks
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn

from ...runs import RunFolder
from ..processes.random_state import mix_seeds, seed_all, seed_torch

WINDOW = 20  # Detectron2's writers write the median of so many values


@runtime_checkable
class Repeatable(Protocol):
    """A loader whose batches are a function of a seed and the iteration.

    Attributes:
        seed: the seed of the batches.
        start_iter: the iteration that a new iterator begins with.
    """

    seed: int
    start_iter: int


def resumption_hooks(model: nn.Module, loader: Any, batch_size: int, drawn: bool) -> list[HookBase]:
    """The hooks for a training; none without a ``Repeatable`` loader, as results would differ then.

    Args:
        batch_size: the images of an iteration in all processes together.
        drawn: whether the loader's seed was drawn.
    """
    if not isinstance(loader, Repeatable):
        return []
    dense = [m for m in model.modules() if isinstance(m, DenseDetector)]
    return [
        SeedIterations(loader, drawn),
        SampleByImage(loader, model, batch_size),
        *([KeepNormalizers(dense)] if dense else []),
        KeepMedians(),
        ScriptsAsWritten(model),
    ]


class EndOnce(HookBase):
    """Makes a resumed training that had already ended evaluate at the same iteration again.

    It belongs ahead of all hooks.
    """

    def after_train(self) -> None:
        end = min(self.trainer.iter, self.trainer.max_iter)
        self.trainer.iter = self.trainer.storage.iter = end


class SeedIterations(HookBase):
    """Makes the images a function of seed and iteration. Random choices in the model, such as
    dropout, dropped edges and sampled regions, become a function of seed, iteration and process.

    Args:
        drawn: whether the loader's seed was drawn; a resumed training then uses the checkpoint's.
    """

    def __init__(self, loader: Repeatable, drawn: bool) -> None:
        self._loader, self._drawn = loader, drawn

    def before_train(self) -> None:
        self._loader.start_iter = self.trainer.start_iter
        for hook in self.trainer._hooks:
            if self._drawn and isinstance(hook, hooks.PreciseBN):
                hook._data_loader.seed = self._loader.seed  # else it would keep its own seed

    def before_step(self) -> None:
        seed_all(mix_seeds(self._loader.seed, self.trainer.iter, comm.get_rank()))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._loader.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._drawn:
            self._loader.seed = state["seed"]


class SampleByImage(HookBase):
    """Makes the anchors and proposals that are sampled from an image a function of seed, iteration
    and the image's position in the whole batch, independent of the process.

    Args:
        batch_size: the images of an iteration in all processes together.
    """

    # Detectron2's RPN and ROIHeads call these methods for one image after the other.
    METHODS = ("_subsample_labels", "_sample_proposals")

    def __init__(self, loader: Repeatable, model: nn.Module, batch_size: int) -> None:
        self._loader = loader
        self._samplers = [(m, n) for m in model.modules() for n in self.METHODS if hasattr(m, n)]
        self._first = batch_size // comm.get_world_size() * comm.get_rank()

    def before_step(self) -> None:
        for which, (module, name) in enumerate(self._samplers):
            setattr(module, name, self._by_image(which, getattr(module, name)))

    def after_step(self) -> None:
        for module, name in self._samplers:
            delattr(module, name)  # the class's own method is visible again

    def _by_image(self, which: int, sample: Callable[..., Any]) -> Callable[..., Any]:
        images = count(self._first)

        def sample_next(*args: Any) -> Any:
            seed_torch(mix_seeds(self._loader.seed, self.trainer.iter, next(images), which))
            return sample(*args)

        return sample_next


class KeepNormalizers(HookBase):
    """Saves the ``loss_normalizer`` of RetinaNet and FCOS: each process has its own moving average,
    which is not in the model's state dict."""

    def __init__(self, detectors: list[DenseDetector]) -> None:
        self._detectors = detectors
        self._everywhere: list[list[float]] = []

    def after_step(self) -> None:
        self._everywhere = comm.all_gather([d.loss_normalizer for d in self._detectors])

    def state_dict(self) -> dict[str, Any]:
        return {"processes": self._everywhere} if self._everywhere else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._everywhere = state["processes"]
        own = self._everywhere[comm.get_rank() % len(self._everywhere)]
        for detector, value in zip(self._detectors, own):
            detector.loss_normalizer = value


class KeepMedians(HookBase):
    """Saves the last values of each metric that is written as a median, except times. So a resumed
    training writes the same values to metrics.json as an uninterrupted one."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def before_train(self) -> None:
        if self.trainer.start_iter >= self.trainer.max_iter:
            return  # the writers would write the last iteration again, without its evaluation
        for name, values in self._loaded.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, cur_iter=iteration)

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # a checkpoint is saved before the training goes on
            return self._loaded
        hints = storage.smoothing_hints()
        return {
            name: [(float(value), int(i)) for value, i in history.values()[-WINDOW:]]
            for name, history in storage.histories().items()
            if hints[name] and not name.endswith("time")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state


class FinishIteration(HookBase):
    """Completes the last checkpoint's iteration in a resumed training: its evaluation, its line in
    metrics.json, and what depends on them, if the training was killed after the checkpoint.

    It belongs behind all other hooks. The hook that saves checkpoints comes before the first
    EvalHook, so this one repeats the hooks from there on.

    Args:
        run: the folder of the training.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._figures: dict[str, float] = {}

    def before_train(self) -> None:
        trainer, done = self.trainer, self.trainer.start_iter - 1
        if not 0 <= done < trainer.max_iter - 1 or self._is_written(done):
            return
        trainer.iter = trainer.storage.iter = done
        trainer.storage.put_scalars(**self._figures, smoothing_hint=False)
        for hook in dropwhile(lambda hook: not isinstance(hook, hooks.EvalHook), trainer._hooks):
            hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter

    def _is_written(self, iteration: int) -> bool:
        written = comm.is_main_process() and iteration in self._run.iterations()
        return bool(comm.all_gather(written)[0])

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # a checkpoint is saved before the training goes on
            return {"figures": self._figures}
        hints, now = storage.smoothing_hints(), self.trainer.iter  # KeepMedians saves the others
        latest = storage.latest().items()
        return {"figures": {n: float(v) for n, (v, i) in latest if i == now and not hints[n]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._figures = state["figures"]


class ScriptsAsWritten(HookBase):
    """Turns off TorchScript's optimisation on a CPU.

    TorchScript runs the first two calls of a function unoptimised, and optimised code, such as that
    of RetinaNet's and FCOS's focal loss, rounds differently. After an interruption these two calls
    would come again. On a GPU the optimisation stays: it saves time there, and results are not
    reproducible to the bit anyway.
    """

    def __init__(self, model: nn.Module) -> None:
        self._on_cpu = next(model.parameters()).device.type == "cpu"
        self._training = ExitStack()

    def before_train(self) -> None:
        if self._on_cpu:
            self._training.enter_context(torch.jit.optimized_execution(False))

    def after_train(self) -> None:
        self._training.close()
