"""Error analysis of detectors: errors are counted, plotted, and reported on an HTML page."""

from .measures import Analysis, analyze
from .report import summary, write_analysis
from .source import Source, ground_truth, source_of_run

__all__ = [
    "Analysis",
    "Source",
    "analyze",
    "ground_truth",
    "source_of_run",
    "summary",
    "write_analysis",
]
