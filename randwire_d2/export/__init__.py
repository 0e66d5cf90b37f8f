"""Models as graphs that other runtimes run: ONNX, TorchScript and torch.export."""

from .comparison import TOLERANCE, difference
from .folding import fold_batch_norms
from .formats import FORMATS, Format, Run, format_of
from .graphs import (
    BACKBONE,
    CLASSIFIER,
    DETECTOR,
    SEM_SEG,
    BackboneGraph,
    ClassifierGraph,
    DetectorGraph,
    Graph,
    Signature,
)
from .quantisation import quantise
from .runtimes import RUNTIMES, check_runtime, installed_runtimes

__all__ = [
    "BACKBONE",
    "CLASSIFIER",
    "DETECTOR",
    "FORMATS",
    "RUNTIMES",
    "SEM_SEG",
    "TOLERANCE",
    "BackboneGraph",
    "ClassifierGraph",
    "DetectorGraph",
    "Format",
    "Graph",
    "Run",
    "Signature",
    "check_runtime",
    "difference",
    "fold_batch_norms",
    "format_of",
    "installed_runtimes",
    "quantise",
]
