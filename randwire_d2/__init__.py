"""Randomly wired networks (Xie et al., 2019) as a Detectron2 backbone."""

import warnings
from pathlib import Path

from .garbage import uncollected

try:
    # PyTorch's millions of objects stay: to search them for garbage takes a quarter of the import.
    with warnings.catch_warnings(), uncollected():
        # Detectron2 and fvcore would print this warning before any output of a tool.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        import detectron2.modeling  # noqa: F401
except Exception as e:  # broken builds raise various errors: missing symbols, pkg_resources, …
    # A checkout's script does more: another wheel if GitHub can't be reached, setuptools, …
    _script = Path(__file__).parents[1] / "tools" / "install.py"
    _way = (
        "python tools/install.py"
        if _script.is_file()
        else "pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git (it needs 'setuptools<81')"
    )
    raise ImportError(
        f"randwire_d2 needs Detectron2, which could not be imported here "
        f"({type(e).__name__}: {e}). Install it with: {_way}"
    ) from e

from typing import TYPE_CHECKING, Any

from .config import add_randwire_config, extend_detectron2_defaults
from .config_files import get_config_file
from .modeling import RandWire, RandWireClassifier
from .wiring import NetworkGenerator, NetworkSpec, complexity

if TYPE_CHECKING:
    from .inference import from_pretrained, load_classifier, load_detector

__version__ = "0.1.0"  # setup.py reads it

extend_detectron2_defaults()

__all__ = [
    "NetworkGenerator",
    "NetworkSpec",
    "RandWire",
    "RandWireClassifier",
    "add_randwire_config",
    "complexity",
    "from_pretrained",
    "get_config_file",
    "load_classifier",
    "load_detector",
]


def __getattr__(name: str) -> Any:
    # Imported on demand: a project that trains a backbone needs neither OpenCV nor data sets.
    if name in ("from_pretrained", "load_classifier", "load_detector"):
        from . import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
