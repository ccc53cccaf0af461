"""Models of each kind, tiny and random, and their KV."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig

from lcguard.segment import KVSegment

FIRST, SECOND, SUFFIX = torch.arange(3, 14), torch.arange(40, 25, -1), torch.tensor([7, 50, 9])


FIELDS: dict[str, Any] = {
    "model_id": "tiny",
    "revision": "r1",
    "source_agent": "clerk",
    "edge": "clerk>analyst",
    "policy_digest": "a" * 64,
    "guard_digest": "b" * 64,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-partial": (
        "phi3",
        {"sliding_window": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "gemma2": ("gemma2", {"sliding_window": 64}),
}


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What configs of every kind have."""


def make_config(kind: str, **changes: Any) -> PretrainedConfig:
    """Two layers, H = 2 KV heads, D = 8."""
    fields = dict(SMALL)
    if kind != "phi3":
        fields["head_dim"] = 8
    if "rope_parameters" in changes:
        changes["rope_parameters"] = {"rope_theta": 1e4, **changes["rope_parameters"]}
    return CONFIG_MAPPING[kind](**(fields | changes))


def make_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, offset: int = 0, cache: Any = None) -> DynamicCache:
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = torch.arange(offset, offset + len(ids))[None]
    model(input_ids=ids[None], position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


def segment_of(model: Any, ids: torch.Tensor = FIRST, offset: int = 0, **changes: Any) -> KVSegment:
    cache = prefill(model, ids, offset)
    return KVSegment.from_cache(cache, model.config, offset=offset, **(FIELDS | changes))
