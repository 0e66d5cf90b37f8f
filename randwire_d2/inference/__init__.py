"""A trained model out of its checkpoint alone, and what it finds in images, folders and videos."""

from .classifier import Classifier
from .detector import Detector
from .hub import from_pretrained
from .loading import load_classifier, load_detector, load_model

__all__ = [
    "Classifier",
    "Detector",
    "from_pretrained",
    "load_classifier",
    "load_detector",
    "load_model",
]
