"""The digest of a checkpoint's weights, read from its files: what guards are bound to.

Equal to ``lcguard.guards.frozen.weights_digest`` of the model that transformers loads, but without
a model: an engine that holds the weights in a form of its own has the same digest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def add_tensor(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Adds a weight's name, type, shape and bytes to a digest."""
    raw = tensor.detach().cpu().contiguous()
    sha.update(name.encode())
    sha.update(str((raw.dtype, tuple(raw.shape))).encode())
    sha.update(raw.flatten().view(torch.uint8).numpy().tobytes())


def checkpoint_digest(folder: str | Path) -> str:
    """SHA-256 over names, types and bytes of all weights of a safetensors checkpoint.

    Raises ``ValueError`` for a folder without safetensors weights.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        shards = [p for p in shards if p.name in wanted]
    if not shards:
        raise ValueError(f"{folder.name} has no safetensors weights: convert the checkpoint")
    where = {}
    try:
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                where.update(dict.fromkeys(file.keys(), shard))
        config = json.loads((folder / "config.json").read_text())
        names = {name: name for name in where}
        tied = "model.embed_tokens.weight"
        if config.get("tie_word_embeddings", False) and "lm_head.weight" not in names:
            names["lm_head.weight"] = tied  # transformers' state holds the tied weight twice
        sha = hashlib.sha256()
        for name, stored in sorted(names.items()):
            with safe_open(where[stored], framework="pt") as file:
                add_tensor(sha, name, file.get_tensor(stored))
    except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {folder.name} is unreadable: {first}") from error
    return sha.hexdigest()
