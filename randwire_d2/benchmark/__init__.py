"""What a network costs: counted on fake tensors, timed on the present device, and drawn.

Counts need no device and run nothing; times are paired, so that a machine's moods hit every network
alike; the roofline says how far a network is from what the device could do.
"""

from .comparison import Benchmark, Row, Settings, run
from .counting import Count, Operation, count
from .growth import AXES, GROWTH_MODELS, Point, grow, plot_growth
from .markdown import to_json, to_markdown
from .models import MODELS, REFERENCE, STEPS, Case, available_models, build
from .roofline import Ceilings, floor, measure_ceilings
from .timing import Ratio, clock_of, paired, ratio

__all__ = [
    "AXES",
    "GROWTH_MODELS",
    "MODELS",
    "REFERENCE",
    "STEPS",
    "Benchmark",
    "Case",
    "Ceilings",
    "Count",
    "Operation",
    "Point",
    "Ratio",
    "Row",
    "Settings",
    "available_models",
    "build",
    "clock_of",
    "count",
    "floor",
    "grow",
    "measure_ceilings",
    "paired",
    "plot_growth",
    "ratio",
    "run",
    "to_json",
    "to_markdown",
]
