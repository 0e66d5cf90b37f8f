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
    """Whether a text may name a repository: owner/name, hf:// and @revision optional."""
    return bool(_REPO.fullmatch(text))


def download(repo: str, names: Sequence[str]) -> Path:
    """Download a repository's missing files; returns its folder in huggingface_hub's cache.

    Args:
        repo: ``hf://owner/name``, or ``hf://owner/name@revision``: a branch, a tag or a commit.
        names: the names of the files.

    Raises:
        ValueError: the name is invalid, a download fails, or huggingface_hub is missing; one line.
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
    except Exception as e:  # downloads can raise any exception
        reason = one_line(e, 300)
        raise ValueError(
            f"{repo!r} can't be had from the Hugging Face Hub ({type(e).__name__}: {reason})"
        ) from e
    return Path(folder)
