"""What a publish holds in memory beside its segment, counted tensor by tensor."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcguard.categories import CATEGORIES
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.frozen import FrozenGuard
from lcguard.noise import new_noise_key
from lcguard.records import mask_of
from lcguard.rope import Rotary
from lcguard.rule import Rule
from lcguard.vllm.pages import LayerPages
from lcguard.vllm.rank_pages import PageTokens

BLOCK = 128
"""Tokens of a page of vLLM's CPU engine."""


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and somebody still holds.

    Weights and whatever else was there before do not count, nor do NumPy's arrays, of which the
    noise keeps a quarter of a megabyte, nor what an operation needs while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _storage(x) not in before | self._known:
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that ``call`` held at once: see ``Held``."""
    with Held() as held:
        call()
    return held.peak


def pages_of(shape: KVShape, n_tokens: int, dtype: torch.dtype) -> list[LayerPages]:
    """Random pages as vLLM's CPU engine has them, one block more than the tokens need."""
    size = -(-n_tokens // BLOCK) + 1, shape.kv_heads, BLOCK, 2 * shape.head_dim
    generator = torch.Generator().manual_seed(0)
    made = []
    for layer in range(shape.layers):
        page = torch.empty(size, dtype=dtype)
        for block in page:  # a block at a time: random numbers are float32 first
            block.copy_(torch.randn(size[1:], generator=generator))
        made.append(LayerPages(f"layer {layer}", SimpleNamespace(isa="vec"), page))
    return made


def guarded(
    guard: FrozenGuard, layers: list[LayerPages], n_tokens: int, rotary: Rotary
) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole segment through the guard, as a worker of one rank does it on a CPU."""
    tokens = PageTokens(layers, torch.arange(BLOCK, BLOCK + n_tokens), rotary, 0)
    page, shape = layers[0].pages, guard.module.shape
    passage = guard.passage(tokens, mask_of([Rule(CATEGORIES)]), dtype=page.dtype)
    passage.look()
    tokens.digest()
    size = shape.layers, shape.kv_heads, n_tokens, shape.head_dim
    keys, values = (torch.empty(size, dtype=page.dtype) for _ in range(2))
    passage.fill(new_noise_key(), keys, values)
    return keys, values


def measure(
    shape: KVShape, n_tokens: int, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Any]:
    """One synthetic segment through a gate of that shape, beside a copy of its bytes."""
    module = guard_class("gate").build(shape, len(CATEGORIES), options)
    with torch.no_grad():  # as after training: no longer the identity
        module.expand.mul_(0.9)
    guard = FrozenGuard(module)
    layers = pages_of(shape, n_tokens, dtype)
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    rotary = Rotary("default", shape.head_dim, tuple((1e6**-half).tolist()))
    out: list[torch.Tensor] = []
    started, used = time.perf_counter(), time.process_time()
    peak = peak_bytes(lambda: out.extend(guarded(guard, layers, n_tokens, rotary)))
    spent, used = time.perf_counter() - started, time.process_time() - used
    segment = sum(t.nbytes for t in out)
    target, started = torch.empty_like(out[0]), time.perf_counter()
    for tensor in out:
        target.copy_(tensor)
    return {
        "tokens": n_tokens,
        "layers": shape.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "maps": options.get("maps", "full"),
        "guard_bytes": sum(t.nbytes for t in module.state_dict().values()),
        "segment_bytes": segment,
        "peak_extra_bytes": peak - segment,
        "share": round((peak - segment) / segment, 4),
        "s": round(spent, 1),
        "processor_s": round(used, 1),
        "copy_s": round(time.perf_counter() - started, 3),
    }
