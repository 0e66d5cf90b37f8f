"""Synchronised norms: statistics of a batch of which each process has a share.

Statistics are (nodes, 2, C), for nodes that do not depend on each other, sent in one message.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Shares:
    """How a batch is shared.

    Attributes:
        group: the processes.
        counts: (processes,), the values per channel that each of them has.
    """

    group: Any
    counts: Tensor

    @classmethod
    def of(cls, group: Any, count: int, like: Tensor) -> "Shares":
        """Ask all processes of a group.

        Args:
            count: this process's values per channel.
            like: a tensor of the type and device of statistics.
        """
        return cls(group, _gather(like.new_full((1,), count), group).flatten())

    @property
    def total(self) -> Tensor:
        return self.counts.sum()

    def normalise(
        self, own: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The moments of the whole batch, and the norms as affine functions of each channel.

        Args:
            own: (nodes, 2, C), the mean and biased variance of this process's share.
            weight, bias: (nodes, C), of the norms.

        Returns:
            tuple: both (nodes, 2, C); see ``randwire_d2.ops``.
        """
        means, variances = _gather(own, self.group).unbind(2)
        share = (self.counts / self.total)[:, None, None]
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean) ** 2)).sum(0)
        scale = weight * torch.rsqrt(var + eps)
        affines = torch.stack((scale, bias - mean * scale), 1)
        return torch.stack((mean, var), 1), affines

    def correct(
        self, sums: Tensor, products: Tensor, moments: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """The correction of a norm's gradient that was computed with this process's sums only.

        With x̂ = (x − mean) · r, the gradient is γ · r · (∂y − s − x̂ · t), where s and t are the
        sums of ∂y and of ∂y · x̂, divided by the number of values. With the sums of all processes
        instead, the difference is an affine function of x.

        Args:
            sums, products: (nodes, C), this process's Σ ∂y and Σ ∂y · x̂.
            moments: (nodes, 2, C), of the whole batch.
            weight: (nodes, C), γ.

        Returns:
            Tensor: (nodes, 2, C), the affine functions of x to be added.
        """
        both = torch.stack((sums, products))
        everywhere = both.clone()
        distributed.all_reduce(everywhere, group=self.group)
        own = self.counts[distributed.get_rank(self.group)]
        s, t = (both / own - everywhere / self.total).unbind(0)
        mean, var = moments.unbind(1)
        r = torch.rsqrt(var + eps)
        scale = weight * r
        return torch.stack((scale * r * t, scale * (s - r * t * mean)), 1)


def _gather(tensor: Tensor, group: Any) -> Tensor:
    """(processes, *sizes of the tensor)."""
    number = distributed.get_world_size(group)
    found = tensor.new_empty(number * tensor.numel())
    # Not a list of tensors, into which NCCL copies them one by one.
    distributed.all_gather_into_tensor(found, tensor.flatten(), group=group)
    return found.view(number, *tensor.shape)
