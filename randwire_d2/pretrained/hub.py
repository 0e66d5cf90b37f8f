"""Repositories of the Hugging Face Hub, by names such as hf://owner/name@revision."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingLibrary
from ..text import one_line

PREFIX = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPO = re.compile(rf"(?:{PREFIX})?({_NAME}/{_NAME})(?:@(\w[\w./-]*))?")


def is_repo(text: str) -> bool:
    """Whether a text may name a repository: owner/name, with hf:// or without, or @revision."""
    return bool(_REPO.fullmatch(text))


def download(repo: str, names: Sequence[str]) -> Path:
    """The folder of a repository's files in huggingface_hub's cache; what is missing is loaded.

    Args:
        repo: ``hf://owner/name``, or ``hf://owner/name@revision``: a branch, a tag or a commit.
        names: the files wanted.

    Raises:
        ValueError: it is no such name, it can't be had, or huggingface_hub is missing; one line.
    """
    match = _REPO.fullmatch(repo)
    if match is None:
        raise ValueError(f"{repo!r} names no repository: it is hf://owner/name[@revision]")
    try:
        import huggingface_hub
    except ImportError as e:
        raise MissingLibrary(
            f"{repo!r} needs a library that is not installed: pip install huggingface_hub"
        ) from e
    try:
        folder = huggingface_hub.snapshot_download(
            match[1], revision=match[2], allow_patterns=list(names)
        )
    except Exception as e:  # networks fail in as many ways as there are networks
        reason = one_line(e, 300)
        raise ValueError(
            f"{repo!r} can't be had from the Hugging Face Hub ({type(e).__name__}: {reason})"
        ) from e
    return Path(folder)
