"""From pages to a guarded segment through ``lcguard.ops``: where there are kernels, on a GPU.

For guards whose work is per token and layer once the gate's context network has decided. Others
(``regress``, composed ones, a third party's), and all on a CPU, run as modules on some tokens at a
time (``lcguard.guards.passage``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.ops.dispatch import CHOICE, choose, rewrite_layer
from lcguard.ops.work import KINDS, Decision, work_of
from lcguard.protocols import Mask
from lcguard.vllm.pages import LayerPages
from lcguard.vllm.rank_pages import PageTokens

BLOCK_TOKENS = 4096
"""Rewritten at a time: what a kernel keeps in between is a small part of a segment then."""


def has_page_form(guard: object) -> bool:
    """Whether ``rewrite_pages`` does all that the guard does."""
    return type(guard) is FrozenGuard and type(guard.module) in KINDS


def by_pages(guard: object, layers: Sequence[LayerPages]) -> bool:
    """Whether ``rewrite_pages`` is what this engine uses: where there is a kernel, or where
    ``LCGUARD_OPS`` asks for one of its implementations."""
    chosen = choose(layers[0].keys, layers[0].values) == "triton"
    return has_page_form(guard) and (chosen or bool(os.environ.get(CHOICE)))


def arithmetic(guard: object, layers: Sequence[LayerPages]) -> str:
    """How this engine computes a mean: another way gives other last bits."""
    how = choose(layers[0].keys, layers[0].values) if by_pages(guard, layers) else "tiles"
    return f"{how} {layers[0].pages.device.type} torch {torch.__version__}"


@torch.inference_mode()
def rewrite_pages(
    guard: FrozenGuard,
    tokens: PageTokens,
    mask: Mask,
    noise_key: bytes,
    seen: Sequence[Any],
    keys: Tensor,
    values: Tensor,
) -> None:
    """Guards ``tokens``, position-free, straight from the pages into ``[L, H, T, D]``.

    Args:
        seen: what the guard's passage saw when it looked.

    Raises:
        GuardError: KV of another shape, a mask over other categories, or output that is not finite.
    """
    module, layers = guard.module, tokens.layers
    shape = len(layers), layers[0].heads, layers[0].dim
    if shape != tuple(module.shape) or mask.forbid.shape != (1, module.n_categories):
        raise GuardError(
            f"guard {guard.name!r} is for KV of (layers, heads, dim) {tuple(module.shape)} and "
            f"{module.n_categories} categories, the pages have {shape} and the mask "
            f"{tuple(mask.forbid.shape)}; load the guard made for this model"
        )
    closed = words = None
    if module.looks:
        closed, words = (torch.cat([getattr(s, n)[0] for s in seen]) for n in ("closed", "words"))
    for start in range(0, tokens.n_tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens.n_tokens)
        decision = None
        if closed is not None and words is not None:
            decision = Decision(closed[start:end], words[start:end], mask)
        slots, position = tokens.slots[start:end], tokens.start + start
        for i, layer in enumerate(layers):
            work = work_of(module, i, noise_key=noise_key, first_token=start, decision=decision)
            page = layer.pages
            size = 2, layer.heads, end - start, layer.dim
            out = torch.empty(size, dtype=page.dtype, device=page.device)
            rewrite_layer(
                layer.keys, layer.values, slots, tokens.rotary, position, work, out[0], out[1]
            )
            if not bool(torch.isfinite(out).all()):
                raise GuardError(f"guard {guard.name!r} gave values that are not finite; withheld")
            keys[i, :, start:end], values[i, :, start:end] = out[0], out[1]
