"""Soft inputs: KV of embeddings instead of tokens, through the guard, differentiable in both.

``KV(e)`` for ``e [B, T, d]`` is what prefill would give for tokens with these embeddings; at a
token's own row of the embedding table the two agree. A guard is passed without its noise.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from lcguard.cache import cache_to_kv
from lcguard.guards.base import GuardModule
from lcguard.protocols import Guard, KVBatch, Mask
from lcguard.source import ModelSource


def embedding_table(source: ModelSource) -> Tensor:
    """``[V, d]``."""
    table: Tensor = source.model.get_input_embeddings().weight
    return table


def first_layers(source: ModelSource, layers: int) -> nn.Module:
    """The model's body with its first layers alone (0: all of them); weights are shared.

    Raises ``ValueError`` for more layers than it has.
    """
    body: Any = getattr(source.model, source.model.base_model_prefix)
    n = source.shape[0]
    if not 0 <= layers <= n:
        raise ValueError(f"layers={layers}: the model has {n}, so give 0 (all) to {n}")
    if layers in (0, n):
        return body  # type: ignore[no-any-return]
    short = copy.copy(body)
    short._modules = dict(body._modules)  # or the model itself would lose its layers
    short.layers = body.layers[:layers]
    short.config = copy.copy(body.config)
    short.config.num_hidden_layers = layers
    return short  # type: ignore[no-any-return]


def soft_prefill(
    source: ModelSource, embeds: Tensor, valid: Tensor, body: nn.Module | None = None
) -> KVBatch:
    """KV of soft tokens ``[B, T, d]``, right-padded where ``valid [B, T]`` is False."""
    cache = DynamicCache(config=None)
    backbone = first_layers(source, 0) if body is None else body
    # causal attention: padding on the right never reaches the tokens before it
    backbone(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    kv = cache_to_kv(cache, source.rotary)
    live = valid[:, None, None, :, None]
    return KVBatch(kv.keys * live, kv.values * live, valid)


def guard_module(guard: Guard) -> GuardModule:
    """The network inside a guard. Raises ``ValueError`` for one that cannot be looked into."""
    module = getattr(guard, "module", None)
    if not isinstance(module, GuardModule):
        raise ValueError(f"guard {guard.name!r} has no module to look into: give a FrozenGuard")
    return module


def guarded_mean(guard: Guard | None, kv: KVBatch, mask: Mask) -> KVBatch:
    """What the guard sends of ``kv`` without its noise; differentiable in ``kv``."""
    if guard is None:
        return kv
    module = guard_module(guard)
    out = module.rewrite(module.standardise(kv), kv.valid, mask)
    return module.restore(module.finish(out.mean, mask), kv)
