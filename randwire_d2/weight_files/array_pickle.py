"""Pickles of arrays, as Detectron2's model zoo has them, read without running code."""

import collections
import pickle
import re
from typing import Any, ClassVar

import numpy as np

_scalar = np.float32().__reduce__()[0]


class _Refusal(pickle.UnpicklingError):
    pass


class _NewArray:
    """numpy's _reconstruct: an empty array, whose content follows in the pickle.

    Unlike a function, this object has no attributes that a pickle could change.
    """

    __slots__ = ()

    def __call__(self, kind: object, shape: object, dtype: object) -> np.ndarray:
        # Another shape would allocate memory regardless of the file's size.
        if shape != (0,) or not isinstance(kind, _ArrayType):
            raise _Refusal("an array does not begin as numpy pickles it")
        return np.empty(0, np.int8)


class _ArrayType:
    """numpy.ndarray, as an argument only."""

    __slots__ = ()


class _NewDtype:
    """numpy.dtype of numbers and texts; always a new object, as a pickle may change it."""

    __slots__ = ()

    def __call__(self, name: object, align: object = False, copy: object = True) -> np.dtype:
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d{1,6}", name):
            raise _Refusal("an array is not of numbers")
        return np.dtype(name, copy=True)


class _FromBuffer:
    """numpy's _frombuffer of protocol 5: an array from bytes in the file."""

    __slots__ = ()

    def __call__(
        self, buffer: object, dtype: object, shape: Any, order: Any, axes: Any = None
    ) -> np.ndarray:
        if not isinstance(buffer, bytes | bytearray) or not isinstance(dtype, np.dtype):
            raise _Refusal("an array is not as numpy pickles it")
        array = np.frombuffer(buffer, dtype)
        if axes is not None:  # newer versions of numpy say how an array's axes were moved
            return array.reshape(shape).transpose(axes)
        return array.reshape(shape, order=order)


class _Encode:
    """codecs.encode: in protocols 0 to 2, Python 3 pickles bytes as a text of as many characters,
    which this function encodes, so that Python 2 can read them."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refusal("bytes are not as Python pickles them")
        return text.encode("latin1")


class ArrayUnpickler(pickle._Unpickler):
    """Reads a pickle of arrays in plain containers; it refuses anything else, which could run code.

    This is Python's unpickler, not the one in C: that one allocates a list as long as the largest
    memo index in a pickle, so ten bytes can fill the memory.
    """

    # numpy has moved its reconstruction functions between modules; files keep the old names.
    _ALLOWED = {
        ("_codecs", "encode"): _Encode(),
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("numpy", "ndarray"): _ArrayType(),
        ("numpy", "dtype"): _NewDtype(),
        **{
            (f"numpy.{package}.{module}", name): function
            for package in ("core", "_core")
            for module, name, function in (
                ("multiarray", "_reconstruct", _NewArray()),
                ("multiarray", "scalar", _scalar),
                ("numeric", "_frombuffer", _FromBuffer()),
            )
        },
    }

    def _load_bytearray(self) -> None:
        # Python's method allocates as many bytes as a pickle states, whatever follows.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))  # type: ignore[attr-defined]

    def _load_build(self) -> None:
        # numpy trusts a pickled dtype state, even flags that make its numbers pointers to objects.
        # So only the name and the byte order are taken from the file.
        made, state = self.stack[-2:]  # type: ignore[attr-defined]
        if isinstance(made, np.dtype):
            own = made.__reduce__()[2]
            if state[1] not in ("<", ">", "|"):
                raise _Refusal("an array's type is not as numpy pickles it")
            self.stack[-1] = (own[0], state[1], *own[2:])  # type: ignore[attr-defined]
        self.load_build()  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _load_bytearray,
        pickle.BUILD[0]: _load_build,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: a .pkl checkpoint may hold only arrays"
            ) from None
