"""Proves at start that the engine's own rewriting path does what the guard says.

``rewrite_pages`` may run Triton kernels on whatever device, dtype and page layout this engine has.
Here known numbers go through vLLM's write into its null block, then through the path from the pages
that this engine takes and, gathered, through the guard's module, which shares no code with the
kernels. An engine whose paths
differ does not start: a guard that is computed wrong leaks, and nothing later would notice. On a
GPU this also compiles the kernels before the first request.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.grid import step_size
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.protocols import KVBatch, Mask
from lcguard.records import mask_of
from lcguard.rope import Rotary
from lcguard.rule import Rule
from lcguard.vllm.errors import StartError
from lcguard.vllm.pages import LayerPages, gather_layers, write_layers
from lcguard.vllm.rank_pages import PageTokens
from lcguard.vllm.rewrite import by_pages, has_page_form, rewrite_pages

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""Largest difference over max(standard deviation of the channel, value): some roundings to the
pages' dtype. A wrong row, head, rotation, gate or noise is off by about one."""
GRID_STEPS = 4
"""Steps of the noise's grid that may come on top: a mean near a tie may go to either side, and a
gate's expansion adds a few such up."""
TOKENS = 16
"""At most; a block may be smaller."""
START = 5
"""Position of the first token: anything but 0, where rotation does nothing."""
KEY = bytes(range(32))
"""Noise of the check alone: nothing that it guards leaves this file."""


def check_rewriting(
    guards: Mapping[str, FrozenGuard], layers: list[LayerPages], rotary: Rotary
) -> None:
    """Every guard with a page form, with everything forbidden, with and without derived values.

    Raises ``StartError`` naming guard, largest difference and how to go on.
    """
    paged = {name: guard for name, guard in guards.items() if has_page_form(guard)}
    if not paged:
        return
    block, page = layers[0].block, layers[0].pages
    slots = torch.arange(max(0, block - TOKENS), block, device=page.device)
    with ExitStack() as kept:
        for layer in layers:
            kept.enter_context(layer.null_block_kept())
        for name, guard in paged.items():
            _write_numbers(guard, layers, slots, rotary)
            raw = _read(layers, slots, rotary)
            tokens = PageTokens(layers, slots, rotary, START)
            limit = TOLERANCE[page.dtype] + GRID_STEPS * step_size(guard.module.config.noise)
            for rule in (Rule(CATEGORIES), Rule(CATEGORIES, DERIVABLE)):
                mask = mask_of([rule])
                try:
                    off = _difference(guard, tokens, raw, mask)
                except (GuardError, RuntimeError) as error:  # a kernel that does not compile, say
                    raise StartError(
                        f"guard {name!r}: rewriting this engine's pages ({page.dtype}, "
                        f"{page.device}) failed: {str(error).splitlines()[0]}"
                    ) from error
                if not off <= limit:  # NaN too
                    raise StartError(
                        f"guard {name!r}: rewriting this engine's pages ({page.dtype}, "
                        f"{page.device}) differs from the guard's own module by {off:.3g} of a "
                        f"channel's scale (at most {limit:.3g}): set LCGUARD_OPS=reference to "
                        "rewrite without kernels, and report it"
                    )


def _write_numbers(
    guard: FrozenGuard, layers: list[LayerPages], slots: Tensor, rotary: Rotary
) -> None:
    """Random KV with the guard's statistics into vLLM's null block, which no request owns."""
    module, n = guard.module, len(slots)
    layers_, heads, dim = module.shape
    z = torch.randn(1, n, layers_, 2, heads * dim, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, n, dtype=torch.bool, device=slots.device)
    like = KVBatch(torch.empty(0), torch.empty(0), valid)
    kv = module.restore(z.to(slots.device), like)
    keys = rotary.rotate(kv.keys[0], _positions(slots))
    write_layers(layers, slots, keys, kv.values[0])


def _read(layers: list[LayerPages], slots: Tensor, rotary: Rotary) -> KVBatch:
    """The tokens' KV without positions, ``[1, L, H, T, D]``, in float32 from before the rotation
    is undone: what is rounded after it would be a difference of this check's own."""
    keys, values = gather_layers(layers, slots)
    keys = rotary.unrotate(keys.float(), _positions(slots))
    valid = torch.ones(1, len(slots), dtype=torch.bool, device=slots.device)
    return KVBatch(keys[None], values[None].float(), valid)


def _positions(slots: Tensor) -> Tensor:
    return torch.arange(START, START + len(slots), device=slots.device)


@torch.inference_mode()
def _difference(guard: FrozenGuard, tokens: PageTokens, raw: KVBatch, mask: Mask) -> float:
    """Largest difference of the engine's path from the guard's own module on gathered KV, over
    max(standard deviation of the channel, value)."""
    layers, page = tokens.layers, tokens.layers[0].pages
    passage = guard.passage(tokens, mask, dtype=page.dtype)
    passage.look()
    size = len(layers), layers[0].heads, tokens.n_tokens, layers[0].dim
    keys, values = (torch.empty(size, dtype=page.dtype, device=page.device) for _ in range(2))
    if by_pages(guard, layers):
        rewrite_pages(guard, tokens, mask, KEY, passage.seen or (), keys, values)
    else:
        passage.fill(KEY, keys, values)
    found = KVBatch(keys[None], values[None], raw.valid)
    wanted = guard(raw, mask, keys=[KEY]).kv
    got, right = (guard.module.channels(kv).float() for kv in (found, wanted))
    off = (got - right).abs() / right.abs().maximum(guard.module.scale)
    return float(off.max())
