"""Asking the Hugging Face hub for a model without its chatter, and what to say when it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import logging as hub


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
