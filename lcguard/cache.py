"""transformers Cache <-> KVBatch: position off on the way out, position on on the way in.

A receiver's cache is made of plain dynamic layers, never of sliding-window ones, so that no token
is dropped. Models with sliding-window layers are handled as long as segment and suffix together
fit the window: the sliding mask is then the full causal mask. Everything whose state is not one
key and one value per token and layer is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from lcguard.protocols import KVBatch
from lcguard.rope import Rotary, UnsupportedModelError

_STATEFUL_PREFIXES = ("mamba_", "ssm_", "linear_num_", "linear_key_", "linear_value_", "conv_L_")
_STATEFUL_FIELDS = ("layers_block_type", "hybrid_override_pattern", "ssm_cfg", "attn_layer_period")


def kv_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """``(L, H, D)`` of the model's KV."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers), int(heads), int(dim)


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """Kind of each layer as transformers names it, length L; inferred where the config is silent.

    Phi-3, Mistral and others say nothing per layer and use ``sliding_window`` in all of them.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    if getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    elif getattr(config, "sliding_window", None) is None:
        kind = "full_attention"
    else:
        kind = "sliding_attention"
    return [kind] * int(config.num_hidden_layers)


def window_tokens(config: PretrainedConfig) -> int | None:
    """The sliding window of the model's sliding layers, in tokens; None where all are full."""
    if "sliding_attention" not in layer_kinds(config):
        return None
    return int(config.sliding_window)


def check_supported(config: PretrainedConfig) -> None:
    """Refuses models whose KV cannot cross a hop exactly.

    Raises:
        UnsupportedModelError: with the offending value and the fix in one line.
    """
    name = f"model_type={config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder: use a decoder-only model")
    if hasattr(config, "text_config"):
        raise UnsupportedModelError(f"{name} has several parts: give config.get_text_config()")
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        raise UnsupportedModelError(
            f"{name} has multi-head latent attention (kv_lora_rank={rank}): "
            "use a model that caches keys and values"
        )
    stateful = sorted(
        k
        for k, v in vars(config).items()
        if v is not None and (k.startswith(_STATEFUL_PREFIXES) or k in _STATEFUL_FIELDS)
    )
    if stateful:
        raise UnsupportedModelError(
            f"{name} has recurrent layers ({stateful[0]}={getattr(config, stateful[0])!r}): "
            "use a model with attention in every layer"
        )
    odd = sorted({*layer_kinds(config)} - {"full_attention", "sliding_attention"})
    if odd:
        raise UnsupportedModelError(
            f"{name} has layer types {odd}: use a model with full or sliding attention only"
        )
    shared = getattr(config, "num_kv_shared_layers", None) or getattr(config, "use_cla", None)
    if shared:
        raise UnsupportedModelError(
            f"{name} shares KV between layers ({shared}): use a model with KV of its own per layer"
        )
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModelError(f"{name} has layers of different shapes: use a uniform model")
    if _quantised_kv(config):
        raise UnsupportedModelError(
            f"{name} quantises its KV cache (kv_cache_scheme): use an unquantised cache"
        )
    Rotary.from_config(config)


def _quantised_kv(config: PretrainedConfig) -> bool:
    quantisation: Any = getattr(config, "quantization_config", None)
    if quantisation is None:
        return False
    if not isinstance(quantisation, dict):
        quantisation = vars(quantisation)
    return quantisation.get("kv_cache_scheme") is not None


def check_window(config: PretrainedConfig, n_tokens: int, suffix_tokens: int = 0) -> None:
    """Refuses a segment that a sliding layer could not see whole.

    Args:
        n_tokens: tokens in the cache.
        suffix_tokens: tokens the receiver will add, prompt and generation together.

    Raises:
        UnsupportedModelError: naming both numbers.
    """
    window = window_tokens(config)
    if window is not None and n_tokens + suffix_tokens > window:
        raise UnsupportedModelError(
            f"{n_tokens} segment + {suffix_tokens} suffix tokens = {n_tokens + suffix_tokens} "
            f"exceed sliding_window={window} of model_type={config.model_type!r}: shorten them"
        )


def cache_to_kv(
    cache: Cache,
    rotary: Rotary,
    offset: int | Tensor = 0,
    valid: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
) -> KVBatch:
    """Position-free keys and values of cache entries ``start .. stop``.

    Args:
        cache: B records in layers of ``[B, H, T, D]``.
        rotary: rotation of the model that filled it.
        offset: position of entry 0; ``[B]`` for one per record.
        valid: ``[B, T]`` over all T entries; None = all are.
        start, stop: half-open range of entries to keep.

    Raises:
        UnsupportedModelError: quantised, static, recurrent layers; sliding ones that dropped
            tokens.
        ValueError: an empty cache or range, or a ``valid`` of another shape.
    """
    n_tokens = _check_layers(cache)
    stop = n_tokens if stop is None else stop
    if not 0 <= start < stop <= n_tokens:
        raise ValueError(f"entries {start}..{stop} are not in a cache of {n_tokens} tokens")
    layers: list[Any] = list(cache.layers)
    keys = torch.stack([layer.keys[..., start:stop, :] for layer in layers], 1)
    values = torch.stack([layer.values[..., start:stop, :] for layer in layers], 1)
    n_records = keys.shape[0]
    if valid is None:
        valid = torch.ones(n_records, n_tokens, dtype=torch.bool, device=keys.device)
    if valid.shape != (n_records, n_tokens):
        raise ValueError(
            f"valid is {tuple(valid.shape)}, the cache holds {(n_records, n_tokens)} [B, T]"
        )
    positions = _positions(offset, start, stop, keys)
    return KVBatch(rotary.unrotate(keys, positions), values, valid[:, start:stop].bool())


def kv_to_cache(
    kv: KVBatch,
    rotary: Rotary,
    config: PretrainedConfig,
    offset: int | Tensor = 0,
    suffix_tokens: int = 0,
) -> DynamicCache:
    """A cache that holds ``kv`` at positions ``offset .. offset + T - 1``.

    Differentiable through keys and values. Padding stays in the cache: the caller masks it with
    ``kv.valid`` and gives the suffix its positions.

    Args:
        offset: position of the first token; ``[B]`` for one per record.
        suffix_tokens: tokens the receiver will add, for the check of sliding windows.

    Raises:
        UnsupportedModelError: see ``check_supported`` and ``check_window``.
        ValueError: KV of another shape than the model's.
    """
    check_supported(config)
    _, n_layers, n_heads, n_tokens, dim = kv.keys.shape
    if (n_layers, n_heads, dim) != kv_shape(config) or kv.values.shape != kv.keys.shape:
        raise ValueError(
            f"keys {tuple(kv.keys.shape)} and values {tuple(kv.values.shape)} do not fit a model "
            f"of (L, H, D) = {kv_shape(config)}"
        )
    check_window(config, n_tokens, suffix_tokens)
    keys = rotary.rotate(kv.keys, _positions(offset, 0, n_tokens, kv.keys))
    return DynamicCache(list(zip(keys.unbind(1), kv.values.unbind(1), strict=True)))


def _positions(offset: int | Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
    """``[T]``, or ``[B, 1, 1, T]`` for an offset per record of ``keys [B, L, H, T, D]``."""
    steps = torch.arange(start, stop, device=keys.device)
    if isinstance(offset, int):
        return steps + offset
    if offset.shape != keys.shape[:1]:
        raise ValueError(f"offset is {tuple(offset.shape)}: give an int or [B] = {keys.shape[:1]}")
    return offset.to(keys.device)[:, None, None, None] + steps


def _check_layers(cache: Cache) -> int:
    """T, the same in all layers, of a cache that holds every token it has seen."""
    if isinstance(cache, EncoderDecoderCache):
        raise UnsupportedModelError("EncoderDecoderCache: use a decoder-only model")
    lengths = set()
    layers: list[Any] = list(cache.layers)
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"layer {index} of the cache is a {type(layer).__name__}: prefill a DynamicCache"
            )
        keys = layer.keys
        if not layer.is_initialized or keys is None or not keys.numel():
            raise ValueError(f"layer {index} of the cache is empty: prefill it first")
        seen = layer.get_seq_length()
        if keys.shape[-2] != seen:
            raise UnsupportedModelError(
                f"layer {index} saw {seen} tokens and kept {keys.shape[-2]} "
                f"(sliding_window={getattr(layer, 'sliding_window', None)}): "
                "prefill a DynamicCache() without config, or shorten the text"
            )
        lengths.add(seen)
    if len(lengths) != 1:
        raise ValueError(f"cache layers hold {sorted(lengths)} tokens: they must agree")
    return int(lengths.pop())
