"""Training classifiers on ImageNet, or any folder of images, on Detectron2's engine."""

from ..modeling import ImageClassifier
from .recipe import load_config
from .trainer import ClassificationTrainer, measure_input

__all__ = [
    "ClassificationTrainer",
    "ImageClassifier",
    "load_config",
    "measure_input",
]
