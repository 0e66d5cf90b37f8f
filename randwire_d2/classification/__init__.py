"""Training classifiers on ImageNet, or any folder of images, on Detectron2's engine."""

from ..config import add_classification_config
from ..modeling import ImageClassifier
from .recipe import load_config
from .trainer import ClassificationTrainer, measure_input

__all__ = [
    "ClassificationTrainer",
    "ImageClassifier",
    "add_classification_config",
    "load_config",
    "measure_input",
]
