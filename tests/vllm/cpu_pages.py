"""Pages of vLLM's CPU backend without an engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcguard.vllm.pages import LayerPages


class Writer:
    """vLLM's write for the CPU layout: keys ``[D, N]``, then values ``[N, D]``, in each page."""

    def do_kv_cache_update(
        self, layer: Any, keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor
    ) -> None:
        at = LayerPages("writer", layer, pages)
        block, row = slots // at.block, slots % at.block
        at.keys[block, :, row] = keys
        at.values[block, :, row] = values
