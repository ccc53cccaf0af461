"""Many candidates for one next token in one forward pass, behind a cache that they share.

The candidates stand at the same position as siblings: each sees what came before and itself, none
of the others. The cache is held once, whatever their number; the chosen one's entries join it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lcguard.cache import check_window, kv_to_cache
from lcguard.protocols import KVBatch
from lcguard.records import additive
from lcguard.source import ModelSource


@dataclass(frozen=True)
class _Candidate:
    keys: Tensor
    """``[L, H, D]``, rotated."""
    values: Tensor
    hidden: Tensor
    """``[d]``: what the next token is predicted from."""


class Siblings:
    """A growing text of at most ``n_tokens``, behind the consumed segments ``on`` (B = 1)."""

    def __init__(self, source: ModelSource, on: KVBatch | None, n_tokens: int) -> None:
        layers, heads, dim = source.shape
        self.source = source
        self._keys = torch.zeros(layers, heads, 0, dim, dtype=source.dtype, device=source.device)
        self._values = self._keys.clone()
        if on is not None:
            cache = kv_to_cache(on.trim(), source.rotary, source.config, suffix_tokens=n_tokens)
            past: list[Any] = list(cache.layers)
            self._keys = torch.cat([layer.keys for layer in past]).to(self._keys)
            self._values = torch.cat([layer.values for layer in past]).to(self._keys)
        self._start = self._keys.shape[2]
        check_window(source.config, self._start, n_tokens)
        self._hidden: Tensor | None = None
        self._new: tuple[Tensor, Tensor, Tensor] | None = None

    def log_probs(self) -> Tensor | None:
        """Of the next token, ``[V]`` up to the model's last scaling; None before the first."""
        if self._hidden is None:
            return None
        logits: Tensor = self.source.model.get_output_embeddings()(self._hidden)
        return logits.float().log_softmax(-1)

    def look(self, ids: Tensor) -> None:
        """Runs candidates ``[N]``."""
        n, past = len(ids), self._keys.shape[2]
        pairs = list(zip(self._keys[:, None], self._values[:, None], strict=True))
        cache = DynamicCache(pairs) if past else DynamicCache(config=None)
        device = self.source.device
        ones = torch.ones(n, past, dtype=torch.bool, device=device)
        seen = torch.cat((ones, torch.eye(n, dtype=torch.bool, device=device)), 1)
        hidden = self.source.model.base_model(
            input_ids=ids[None],
            position_ids=torch.full((1, n), past, device=device),
            attention_mask=additive(seen[None, None], self.source.dtype),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
        layers: list[Any] = list(cache.layers)
        keys = torch.cat([layer.keys[:, :, past:] for layer in layers])
        values = torch.cat([layer.values[:, :, past:] for layer in layers])
        self._new = keys, values, hidden

    def entries(self) -> KVBatch:
        """The candidates' own raw entries, ``[N, L, H, 1, D]``."""
        assert self._new is not None
        keys, values, _ = self._new
        at = torch.tensor([self._keys.shape[2]], device=keys.device)
        keys = self.source.rotary.unrotate(keys, at).permute(2, 0, 1, 3)[..., None, :]
        values = values.permute(2, 0, 1, 3)[..., None, :]
        valid = torch.ones(len(keys), 1, dtype=torch.bool, device=keys.device)
        return KVBatch(keys, values, valid)

    def before(self) -> KVBatch:
        """The text's own raw entries so far, without ``on``: ``[1, L, H, t, D]``."""
        past = self._keys.shape[2]
        at = torch.arange(self._start, past, device=self._keys.device)
        own = self._keys[:, :, self._start :]
        keys = self.source.rotary.unrotate(own, at) if len(at) else own
        valid = torch.ones(1, len(at), dtype=torch.bool, device=keys.device)
        return KVBatch(keys[None], self._values[None, :, :, self._start :], valid)

    def pick(self, i: int) -> _Candidate:
        """Candidate ``i`` of the last look."""
        assert self._new is not None
        keys, values, hidden = self._new
        return _Candidate(keys[:, :, i].clone(), values[:, :, i].clone(), hidden[i].clone())

    def grow(self, chosen: _Candidate) -> None:
        """Makes it the text's next token."""
        self._keys = torch.cat((self._keys, chosen.keys[:, :, None]), 2)
        self._values = torch.cat((self._values, chosen.values[:, :, None]), 2)
        self._hidden = chosen.hidden
