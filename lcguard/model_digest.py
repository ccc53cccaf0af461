"""The digest of a model's weights, read from its files: what guards are bound to.

Of the very files that transformers and vLLM load (``lcguard.model_files``), as they are stored: it
does not depend on the precision in which an engine holds them, nor on what else is in the folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lcguard.model_files import CONFIG, read_json, stored_tensors, weight_files


def add_tensor(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Adds a weight's name, type, shape and bytes to a digest."""
    raw = tensor.detach().cpu().contiguous()
    sha.update(name.encode())
    sha.update(str((raw.dtype, tuple(raw.shape))).encode())
    sha.update(raw.flatten().view(torch.uint8).numpy().tobytes())


def checkpoint_digest(folder: str | Path) -> str:
    """SHA-256 over names, types and bytes of all tensors in the files that a model is loaded from.

    Raises ``ModelFolderError`` for a folder without safetensors weights, or with damaged ones.
    """
    folder = Path(folder)
    where = stored_tensors(weight_files(folder))
    names = {name: name for name in where}
    tied = "model.embed_tokens.weight"
    if tied in names and read_json(folder / CONFIG).get("tie_word_embeddings", False):
        names.setdefault("lm_head.weight", tied)  # loaded twice, though stored once
    sha = hashlib.sha256()
    for name, stored in sorted(names.items()):
        with safe_open(where[stored], framework="pt") as file:
            add_tensor(sha, name, file.get_tensor(stored))
    return sha.hexdigest()
