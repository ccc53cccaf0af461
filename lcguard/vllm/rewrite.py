"""From pages to a guarded segment through ``lcguard.ops``: Triton on a GPU, PyTorch elsewhere.

For guards whose work is per token and layer once the gate's context network has decided. Others
(``regress``, composed ones, a third party's) run as modules on the gathered KV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.guards.gate import GateGuard
from lcguard.ops.dispatch import rewrite_layer
from lcguard.ops.work import KINDS, decide, work_of
from lcguard.protocols import Guarded, KVBatch, Mask
from lcguard.rope import Rotary
from lcguard.vllm.pages import LayerPages


def has_page_form(guard: object) -> bool:
    """Whether ``rewrite_pages`` does all that the guard does."""
    return type(guard) is FrozenGuard and type(guard.module) in KINDS


def rewrite_pages(
    guard: FrozenGuard,
    layers: list[LayerPages],
    slots: Tensor,
    rotary: Rotary,
    start: int,
    mask: Mask,
    noise_key: bytes,
    raw: KVBatch | None,
) -> Guarded:
    """Guards the tokens at ``slots [T]``, position-free, straight from the pages.

    Args:
        start: position of the first token.
        raw: the same tokens' KV ``[1, L, H, T, D]`` in float32, for a gate's context network.

    Raises:
        GuardError: KV of another shape, a mask over other categories, a gate without ``raw``, or
            output that is not finite.
    """
    module, n, page = guard.module, len(slots), layers[0].pages
    shape = len(layers), layers[0].heads, layers[0].dim
    if shape != tuple(module.shape) or mask.forbid.shape != (1, module.n_categories):
        raise GuardError(
            f"guard {guard.name!r} is for KV of (layers, heads, dim) {tuple(module.shape)} and "
            f"{module.n_categories} categories, the pages have {shape} and the mask "
            f"{tuple(mask.forbid.shape)}; load the guard made for this model"
        )
    decision, withheld = None, torch.zeros(1, n)
    if isinstance(module, GateGuard):
        if raw is None:
            raise GuardError(f"guard {guard.name!r} reads the whole segment: pass raw=...")
        decision = decide(module, module.standardise(raw)[0], mask)
        withheld = decision.closed.mean((1, 2))[None].cpu()
    keys = torch.empty(*shape[:2], n, shape[2], dtype=page.dtype, device=page.device)
    values = torch.empty_like(keys)
    for i, layer in enumerate(layers):
        work = work_of(module, i, noise_key=noise_key, decision=decision)
        rewrite_layer(layer.keys, layer.values, slots, rotary, start, work, keys[i], values[i])
    if not bool(torch.isfinite(keys).all() and torch.isfinite(values).all()):
        raise GuardError(f"guard {guard.name!r} gave values that are not finite; withheld")
    valid = torch.ones(1, n, dtype=torch.bool, device=keys.device)
    return Guarded(KVBatch(keys[None], values[None], valid), withheld)
