"""What an engine would refuse after minutes of loading, found before it is started.

The connector checks all of it again, on what vLLM really loaded; but vLLM wraps the reason into
hundreds of lines, and a supervisor would start it again in vain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcguard.cache import kv_shape
from lcguard.hub import local_folder, quiet_hub, read_tokenizer, supported_config
from lcguard.model_files import check_readable
from lcguard.vllm.checks import check_config, check_installed
from lcguard.vllm.errors import StartError
from lcguard.vllm.setup import (
    digest_of,
    gatekeeper_of,
    guards_of,
    key_of,
    saved_guard,
    settings_of,
)


def check_start(model: str, guards: Mapping[str, str], tokenizer: bool = True) -> None:
    """Key, model and guards, as far as they lie on this machine: weights that are still to be
    downloaded are the connector's to check.

    Args:
        model: folder or hub repository.
        tokenizer: whether the engine takes the model's own.

    Raises ``StartError`` in one line, for a damaged model folder ``ModelFolderError``.
    """
    key_of()
    if Path(model).is_dir():
        check_readable(Path(model))
    try:
        shape = kv_shape(supported_config(model))
    except ValueError as error:
        raise StartError(str(error)) from None
    try:
        folder = local_folder(model)
    except ValueError:
        folder = None
    if folder is not None and tokenizer:
        with quiet_hub():
            read_tokenizer(str(folder))
    # reading gigabytes takes a while: only where a guard is bound to them
    digest = digest_of(folder) if folder is not None and guards else None
    for name, path in guards.items():
        saved_guard(name, path, digest, shape)


def check_engine(config: Any) -> None:
    """The same for a ``VllmConfig``, in the process of vLLM's own server: versions, options, key,
    policy, store and guards. Raises ``StartError``, for a damaged model folder
    ``ModelFolderError``."""
    from vllm import envs

    settings = settings_of(config)
    check_installed(settings.untested_vllm)
    check_config(config)
    key_of()  # first: it is the likeliest, and all else reads the weights
    keeper = gatekeeper_of(config, not envs.VLLM_ENABLE_V1_MULTIPROCESSING)
    try:
        guards_of(config, settings, keeper.facts)
    finally:
        keeper.store.close()
