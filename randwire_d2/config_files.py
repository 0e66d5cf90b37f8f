"""Find this project's config files, in configs/ of a checkout or of the installed package."""

import difflib
import os
from pathlib import Path

from .text import brief

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "configs"
# The folder of the config files. A folder beside an installed package belongs to other packages.
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"

KINDS = (".yaml", ".py")  # Detectron2's two


def get_config_file(name: str) -> str:
    """The path of one of this project's config files, like ``model_zoo.get_config_file``.

    Args:
        name: the file's path below configs/, such as "faster_rcnn_randwire_c109_fpn_1x.yaml" or
            "imagenet/randwire_c109_100ep.yaml"; "configs/" may precede it.

    Raises:
        ValueError: there is no such file; the message suggests similar names.
    """
    wanted = name.removeprefix("configs/")
    files = (path for kind in KINDS for path in CONFIGS.rglob(f"*{kind}"))
    known = sorted(path.relative_to(CONFIGS).as_posix() for path in files)
    if wanted in known:
        return str(CONFIGS / wanted)
    near = [other for other in known if Path(other).stem == Path(wanted).stem]
    near = near or difflib.get_close_matches(wanted, known, cutoff=0.7)
    hint = " or ".join(map(repr, near)) if near else f"one of those in {CONFIGS}"
    raise ValueError(f"randwire_d2 has no config {brief(name)}; did you mean {hint}?")


def config_path(given: str | os.PathLike[str]) -> str:
    """Resolve a command line's config: a file, a URL, or a name for ``get_config_file``.

    Raises:
        ValueError: the config is none of these; one line.
    """
    path = os.fspath(given)
    if not path or "://" in path or os.path.isfile(path):
        return path
    try:
        return get_config_file(path)
    except ValueError as e:
        raise ValueError(f"the file {brief(path)} does not exist, and {e}") from e
