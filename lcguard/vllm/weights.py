"""Sees to it that vLLM loads the very weights whose digest guards are bound to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcguard.model_files import weight_files
from lcguard.vllm.errors import StartError


def loaded_folder(load_config: Any, model: str, revision: str | None = None) -> Path:
    """Where the weights lie that vLLM's own loader takes for ``model``, a folder or a hub
    repository.

    Raises ``StartError`` where these are other files than transformers takes, and the digest is
    of, and ``ModelFolderError`` where there are none.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = get_model_loader(load_config)
    if not isinstance(loader, DefaultModelLoader):
        raise StartError(
            f"load_format={load_config.load_format!r} was not proved to load the weights that "
            "guards are bound to: leave it out"
        )
    try:
        found, files, _, _ = loader._prepare_weights(model, None, revision, True, None)
    except (RuntimeError, OSError) as error:
        raise StartError(f"vLLM finds no weights: {str(error).splitlines()[0]}") from None
    folder, names = Path(found), {Path(f).name for f in files}
    wanted = {f.name for f in weight_files(folder)}
    if other := sorted(names - wanted):
        if wanted & names:
            fix = f"move {other[0]} out of {folder}"
        else:
            fix = "start it with --load-format hf --config-format hf"
        raise StartError(
            f"vLLM would load {other[0]}, which transformers does not and no guard is bound to: "
            f"{fix}"
        )
    if missing := sorted(wanted - names):
        raise StartError(f"vLLM would not load {missing[0]}: leave --load-format out")
    return folder
