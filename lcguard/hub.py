"""Asking the Hugging Face hub for a model without its chatter, and what to say when it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub


def local_folder(name: str, revision: str | None = None) -> Path:
    """A model's folder: the one of that name, or where the hub's files were downloaded to.

    Raises ``ValueError`` where it is not on this machine.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(f"model {name!r} is not on this machine: download it first") from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub's warnings of each retry stay unsaid: the error that follows says it once."""
    before = hub.get_verbosity()
    hub.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub.set_verbosity(before)


def why_not_loaded(name: str, error: Exception) -> str:
    """One line. A name that is no folder was looked for on the hub: whoever mistyped a folder has
    to be told."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if Path(name).expanduser().is_dir():
        return f"model {name!r} cannot be loaded: {first}"
    return f"model {name!r} is no folder here, and as a hub repository: {first}"
