"""Checkpoints of a training: how many stay on disk."""

import logging
import os
from typing import Any

from detectron2.engine import hooks

from ..checksum import is_whole

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, which deletes an older checkpoint only if the new one is whole on disk."""

    max_to_keep: int | None

    def step(self, iteration: int, **kwargs: Any) -> None:
        most, self.max_to_keep = self.max_to_keep, None  # else it deletes without looking
        super().step(iteration, **kwargs)
        self.max_to_keep = most
        if most is None or (iteration + 1) % self.period:
            return
        newest = os.path.join(self.checkpointer.save_dir, f"{self.file_prefix}_{iteration:07d}.pth")
        self.recent_checkpoints.append(newest)
        if len(self.recent_checkpoints) > most and not is_whole(newest):
            logger.warning(f"{newest} is damaged: {self.recent_checkpoints[0]} is kept beside it")
            return
        while len(self.recent_checkpoints) > most:
            oldest = self.recent_checkpoints.pop(0)
            if os.path.isfile(oldest) and not oldest.endswith(f"{self.file_prefix}_final.pth"):
                os.remove(oldest)
