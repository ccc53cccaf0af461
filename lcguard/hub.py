"""Asking the Hugging Face hub for a model without its chatter, and what to say when it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub

from lcguard.model_files import ModelFolderError


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


def supported_config(name: str) -> Any:
    """The text model's configuration in a folder or hub repository, without its weights.

    Raises ``ValueError`` in one line where it cannot be loaded or is not supported.
    """
    from transformers import AutoConfig

    from lcguard.cache import check_supported
    from lcguard.rope import UnsupportedModelError

    try:
        with quiet_hub():
            config = AutoConfig.from_pretrained(name).get_text_config()
        check_supported(config)
    except UnsupportedModelError as error:
        raise ValueError(f"model {name!r} cannot be served: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(why_not_loaded(name, error)) from None
    return config


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a model's folder or hub repository.

    Raises ``ModelFolderError`` where it has none: transformers makes one then that reads nothing.
    """
    from transformers import AutoTokenizer

    why = ""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        if tokenizer("X", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except Exception as error:  # tokenizers of rare formats raise what they like
        why = f" ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    raise ModelFolderError(
        f"{path} has no tokenizer that can be read{why}: put tokenizer.json, or tokenizer.model, "
        "and tokenizer_config.json beside its weights"
    )


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
