"""Digests of a model: of its weights, which guards are bound to, and of its architecture, which
segments are.

The weights' is read from the very files that transformers and vLLM load
(``lcguard.model_files``), as they are stored: it does not depend on the precision in which an
engine holds them, nor on what else is in the folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from lcguard.cache import kv_shape, layer_kinds, window_tokens
from lcguard.canonical import canonical_digest
from lcguard.model_files import CONFIG, read_json, stored_tensors, weight_files
from lcguard.rope import Rotary

_CONFIG_FIELDS = """
    model_type hidden_size intermediate_size num_attention_heads hidden_act hidden_activation
    rms_norm_eps norm_epsilon attention_bias mlp_bias use_bias attn_logit_softcapping
    query_pre_attn_scalar attention_multiplier embedding_multiplier residual_multiplier
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    shared_expert_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers
""".split()


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


def config_digest(config: PretrainedConfig) -> str:
    """SHA-256 of what makes the KV of two models comparable: architecture and rotation.

    Weights are told apart by model id and revision. A fixed list of fields, because the rest of a
    config changes with the version of transformers that writes it.
    """
    shape = dict(zip(("layers", "kv_heads", "head_dim"), kv_shape(config), strict=True))
    fields = {k: getattr(config, k) for k in _CONFIG_FIELDS if getattr(config, k, None) is not None}
    described: dict[str, Any] = {
        **fields,
        **shape,
        "layer_kinds": layer_kinds(config),
        "window_tokens": window_tokens(config),
        "rope": Rotary.from_config(config).describe(),
    }
    return canonical_digest(described)


def model_fields(config: PretrainedConfig) -> dict[str, object]:
    """What the manifest of a segment of this model says of it."""
    return {
        "config_digest": config_digest(config),
        "rope": Rotary.from_config(config).describe(),
    }
