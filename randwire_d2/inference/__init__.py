"""Inference with a trained model, loaded from its checkpoint alone, on images and videos."""

from .models.classifier import Classifier
from .models.detector import Detector
from .models.loading import from_pretrained, load_classifier, load_detector, load_model

__all__ = [
    "Classifier",
    "Detector",
    "from_pretrained",
    "load_classifier",
    "load_detector",
    "load_model",
]
