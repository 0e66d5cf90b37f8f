"""Networks that are built only to be inspected, without memory for their weights."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..text import one_line

# What PyTorch says where a tensor on "meta" would need values.
_NO_VALUES = ("meta tensor", "device meta", "device 'meta'", "meta device")

logger = logging.getLogger(__name__)


def build_on_meta(build: Callable[[], nn.Module], most: float = math.inf) -> nn.Module:
    """What ``build`` returns, built on the device "meta".

    If a module computes with its tensors while it is built, as Detectron2's ViT and Swin do, it is
    built on the CPU instead, because tensors on "meta" have no values.

    Args:
        most: how many bytes it may take on the CPU.

    Raises:
        ValueError: it takes more.
    """
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError as e:
        if not any(said in str(e).lower() for said in _NO_VALUES):
            raise
        logger.info(f"A part of the network computes while it is built: {one_line(e)}")
    with torch.device("cpu"), _Bounded(most):
        return build()


class _Bounded(TorchDispatchMode):
    """Raises an error once the tensors made in it have more than ``most`` bytes. Linux provides
    memory only when it is written to, so the error comes in time."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self._most, self._made = most, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable and not func.is_view:
            tensors = (t for t in tree_leaves(result) if isinstance(t, Tensor))
            self._made += sum(t.numel() * t.element_size() for t in tensors)
        if self._made > self._most:
            raise ValueError(
                f"the network takes more than {self._most:.0f} bytes while it is built"
            )
        return result
