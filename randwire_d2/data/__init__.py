"""The data set that the project draws itself. Importing this registers it in Detectron2."""

from .builtin import make_dataset, register_shapes
from .shapes import ShapesConfig

__all__ = ["ShapesConfig", "make_dataset", "register_shapes"]
