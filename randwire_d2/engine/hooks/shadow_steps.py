"""Compare fused stages with their nodes run one by one, in results and time, during a training."""

import logging
from collections.abc import Mapping
from operator import itemgetter

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...command import in_users_words
from ...errors import is_out_of_memory
from ...modeling import RandWireStage
from ...modeling.shadow import MODES, Shadow, shadow
from ...modeling.weights import with_zeros
from ...runs import RunFolder

ROUNDS = 3  # how often a stage is timed
WORTH = 0.95  # nodes run one by one if they take less than this part of the fused stage's time
# A process that runs out of memory would leave the others waiting for its messages. So only one in
# so many images is used: node by node, they take no more memory than all fused with RECOMPUTE.
SYNCHRONISED = 5

logger = logging.getLogger(__name__)


class ShadowSteps(HookBase):
    """Runs stages both ways, fused and node by node, on their inputs in a training step.

    In the first iteration of a process it runs every stage. With ``MODEL.RANDWIRE.FUSED`` "auto" it
    also times them, in training and inference, and each stage keeps the faster way. The choice is
    saved in the run's folder, and a resumed training uses it again, so that its results are the
    same to the bit. After that it runs one stage every ``period`` iterations.

    With synchronised norms, both ways use a part of the images, and all processes exchange the same
    messages. Such a stage stays fused, which needs fewer messages.

    Args:
        model: the network, which may be wrapped; all processes have the same.
        folder: the folder of the run.
        period: the iterations from one stage to the next; 0 for only the first iteration.

    Raises:
        RuntimeError: a fused stage computes other results than its nodes.
    """

    def __init__(self, model: nn.Module, folder: RunFolder, period: int) -> None:
        self._stages = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, RandWireStage) and module.fused != "off"
        }
        self._folder, self._period = folder, period
        self._found: dict[str, Shadow] = {}
        self._handles: list[RemovableHandle] = []
        self._decided = False

    def before_train(self) -> None:
        if not self.trainer.start_iter:
            return
        # The first process's choice, since another machine may have the checkpoint without it.
        decided = comm.all_gather(self._folder.slower_stages())[0]
        if decided is not None and decided.keys() == self._stages.keys():
            self._decided = True
            self._decide(decided)

    def before_step(self) -> None:
        names = [*self._stages]
        since = self.trainer.iter - self.trainer.start_iter
        if since:
            if not names or not self._period or self.trainer.iter % self._period:
                return
            names = [names[self.trainer.iter // self._period % len(names)]]
        for name in names:
            stage = self._stages[name]
            timed = not since and not self._decided and stage.fused == "auto"
            self._handles.append(
                stage.register_forward_pre_hook(
                    lambda stage, args, name=name, rounds=ROUNDS if timed else 0: self._look(
                        name, stage, args[0], rounds
                    )
                )
            )

    def _look(self, name: str, stage: RandWireStage, x: Tensor, rounds: int) -> None:
        if stage.obstacle(x):
            return
        if stage.synchronised:
            some, rounds = slice(-(-len(x) // SYNCHRONISED)), 0
            x = with_zeros(itemgetter(some), x).requires_grad_(x.requires_grad)
        try:
            self._found[name] = shadow(stage, x, rounds)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            # The other processes wait in vain for this one's messages.
            if stage.synchronised:
                raise
            logger.warning(f"{name}: there is no memory to run it both ways; it stays fused")

    def after_step(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if torch.cuda.is_initialized():
            # Nodes one by one need more memory than a step; CUDA graphs leave the peak free.
            torch.cuda.reset_peak_memory_stats()
        everywhere = comm.all_gather(self._found)
        self._found = {}
        # A stage that was not run both ways in every process is left out.
        common = [name for name in self._stages if all(name in found for found in everywhere)]
        worst = {name: _worst([found[name] for found in everywhere]) for name in common}
        for name, found in worst.items():
            _check(name, found)
        if worst:
            logger.info(f"Shadow step: {'; '.join(_say(*item) for item in worst.items())}")
        if self.trainer.iter == self.trainer.start_iter and not self._decided:
            slower = {name: _slower(worst.get(name)) for name in self._stages}
            self._decide(slower)
            if comm.is_main_process():
                self._folder.write_slower_stages(slower)

    def _decide(self, slower: Mapping[str, Mapping[str, str]]) -> None:
        for name, stage in self._stages.items():
            why = slower[name]
            stage.slower = {key: why[mode] for key, mode in MODES.items() if mode in why}


def _worst(found: list[Shadow]) -> Shadow:
    """The longest times and the largest errors of all processes."""
    first = found[0]
    common = set.intersection(*(set(f.errors) for f in found))
    return Shadow(
        {what: max(f.errors[what] for f in found) for what in first.errors if what in common},
        first.limit,
        {
            training: tuple(max(f.seconds[training][i] for f in found) for i in (0, 1))  # type: ignore[misc]
            for training in first.seconds
        },
    )


def _check(name: str, found: Shadow) -> None:
    """
    Raises:
        RuntimeError: the fused stage computes other results than its nodes.
    """
    try:
        found.check()
    except RuntimeError as e:
        raise RuntimeError(
            f"{name} runs fused, and {e}. Train with MODEL.RANDWIRE.FUSED off, and report what "
            f"{in_users_words('tools/check_gpu.py')} prints"
        ) from e


def _slower(found: Shadow | None) -> dict[str, str]:
    """The modes, "training" or "inference", in which nodes one by one are faster: mode -> text."""
    slower = {}
    for training, (fused, nodes) in (found.seconds if found else {}).items():
        if nodes < WORTH * fused:
            mode = MODES[training]
            slower[mode] = f"that takes {nodes / fused:.2f} of the time in {mode}"
    return slower


def _say(name: str, found: Shadow) -> str:
    errors = ", ".join(f"{what} {error:.1e}" for what, error in found.errors.items())
    times = [
        f"{MODES[training]} {nodes / fused:.2f}"
        for training, (fused, nodes) in found.seconds.items()
    ]
    speed = f", times as fast as node by node: {', '.join(times)}" if times else ""
    return f"{name} fused: relative errors: {errors or 'none'}{speed}"
