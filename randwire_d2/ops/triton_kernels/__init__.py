"""The operators as Triton kernels: what runs on CUDA.

For these kernels a batch of images is a matrix with a row for each pixel and a column for each
channel (channels_last). Memory limits their speed, so they read and write as few tensors as the
dependencies allow. Sums over pixels are deterministic: every program writes its own sums, which are
added up later, in a fixed order and for several nodes at once.
"""

from .common import compiling_ahead
from .depthwise import aggregate, aggregate_backward
from .norms import batch_norm_backward, batch_norm_statistics
from .sums import weighted_sum, weighted_sum_backward

__all__ = [
    "aggregate",
    "aggregate_backward",
    "batch_norm_backward",
    "batch_norm_statistics",
    "compiling_ahead",
    "weighted_sum",
    "weighted_sum_backward",
]
