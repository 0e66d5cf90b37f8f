"""A path handler of Detectron2 for MODEL.WEIGHTS hf://owner/name[@revision]."""

from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager

from .folder import read_folder
from .hub import PREFIX


class HubHandler(PathHandler):
    """Resolves a repository to the local file of its weights, after verifying them."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return str(read_folder(path).weights)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise ValueError(f"{path!r} can only be read; got the mode {mode!r}")
        return open(self._get_local_path(path, **kwargs), mode, buffering)


PathManager.register_handler(HubHandler())
