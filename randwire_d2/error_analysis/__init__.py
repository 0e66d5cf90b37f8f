"""What a detector gets wrong: errors counted, drawn, and put on a page that opens from disk."""

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
