"""Pickles of arrays, as Detectron2's model zoo has them, read without running code."""

import collections
import pickle
from typing import Any

import numpy as np


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays in plain containers; anything else in it could run code."""

    # numpy has moved its reconstruction functions between modules; files keep the old names.
    _ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{
            (f"numpy.{package}.multiarray", name): example.__reduce__()[0]
            for package in ("core", "_core")
            for name, example in (("_reconstruct", np.empty(0)), ("scalar", np.float32()))
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: a .pkl checkpoint may hold only arrays"
            ) from None
