"""The cost of networks: counted on fake tensors, timed on the present device, and plotted.

Counting needs no device and computes nothing. Times are paired, so that a slow moment of the
machine affects every network alike. The roofline tells how far a network is from the best that the
device could do.
"""

from .comparison import Settings, run
from .growth import AXES, GROWTH_MODELS, grow, plot_growth
from .markdown import to_json, to_markdown
from .models import MODELS, STEPS, Case
from .runtimes import RUNTIMES, compare_runtimes, runtimes_to_markdown

__all__ = [
    "AXES",
    "GROWTH_MODELS",
    "MODELS",
    "RUNTIMES",
    "STEPS",
    "Case",
    "Settings",
    "compare_runtimes",
    "grow",
    "plot_growth",
    "run",
    "runtimes_to_markdown",
    "to_json",
    "to_markdown",
]
