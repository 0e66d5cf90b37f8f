"""Settings that every test shares."""

import torch
from hypothesis import settings

# Small tensors: a second thread costs more than it brings, and sums keep their order.
torch.set_num_threads(1)

# The same examples on every run; a slow machine is no failure.
settings.register_profile("randwire", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("randwire")
