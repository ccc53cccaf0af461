"""Inversion: solve the first layer's projections for the hidden state, name the nearest token.

At layer 0 keys and values are a function of the token alone: with x its normed embedding,

    [K; V] = [W_K; W_V] x + b,    x' = argmin ||M x + b - y||,    token = nearest row of the table,

nearest in the metric M^T M, which is distance in KV space: what the guard blurred is blurred there.
From *Shadow in the Cache* (arXiv 2508.09442), with one stacked solve instead of the mean of two. A
key norm keeps only the direction of a key, so M is W_V alone there and the direction decides among
the shortlist. At another layer a token's entry depends on what stands before it: there is no
solve, and it is matched with the rows of tokens that stand alone, as well as these agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from lcguard.attacks.base import BaseAttack, register
from lcguard.attacks.decoder import aligned
from lcguard.cache import cache_to_kv
from lcguard.protocols import AttackData, Guess, KVBatch
from lcguard.records import IGNORE
from lcguard.source import ModelSource


@dataclass(frozen=True)
class Rows:
    """What every token of the vocabulary, alone, is at one layer."""

    hidden: Tensor
    """``[V, d]``: what the attention projects, after the input norm."""
    kv: Tensor
    """``[V, 2 * H * D]``: its keys, then its values, position-free."""


class _Far(Exception):
    """The forward pass has gone far enough."""


@torch.no_grad()
def vocabulary_rows(source: ModelSource, layer: int = 0, batch: int = 1024) -> Rows:
    """Runs the real model on each token alone, up to ``layer``."""
    blocks: Any = source.model.base_model.layers
    caught: list[Tensor] = []
    parts: list[Tensor] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"])[:, 0].float())

    def stop(module: Any, args: Any) -> None:
        raise _Far

    hooks = [blocks[layer].self_attn.register_forward_pre_hook(catch, with_kwargs=True)]
    if layer + 1 < len(blocks):
        hooks.append(blocks[layer + 1].register_forward_pre_hook(stop))
    try:
        n = source.model.get_input_embeddings().weight.shape[0]
        for ids in torch.arange(n, device=source.device).split(batch):
            cache = DynamicCache(config=None)
            try:
                source.model.base_model(
                    input_ids=ids[:, None], past_key_values=cache, use_cache=True
                )
            except _Far:
                pass
            parts.append(entries(cache_to_kv(cache, source.rotary), layer)[:, 0])
    finally:
        for hook in hooks:
            hook.remove()
    return Rows(torch.cat(caught), torch.cat(parts))


def entries(kv: KVBatch, layer: int) -> Tensor:
    """Keys, then values of one layer, float32 ``[B, T, 2 * H * D]``."""
    both = torch.stack((kv.keys[:, layer], kv.values[:, layer]), 1)  # [B, 2, H, T, D]
    return both.permute(0, 3, 1, 2, 4).flatten(2).float()


def projections(source: ModelSource, rows: Rows) -> tuple[Tensor, Tensor]:
    """``M [E, d]`` and the entries ``[E]`` of ``rows.kv`` that are linear in the hidden state.

    Checked against the rows themselves: entries that a norm or anything else has bent are left out.
    """
    attention: Any = source.model.base_model.layers[0].self_attn
    half = rows.kv.shape[1] // 2
    if hasattr(attention, "qkv_proj"):  # Phi-3: queries, keys, values in one matrix
        weight = attention.qkv_proj.weight[-2 * half :]
    elif hasattr(attention, "k_proj") and hasattr(attention, "v_proj"):
        weight = torch.cat((attention.k_proj.weight, attention.v_proj.weight))
    else:
        weight = rows.hidden.new_zeros(0, rows.hidden.shape[1])
    weight = weight.float()
    if len(weight) == 0:
        return weight, torch.zeros(0, dtype=torch.long)
    # differences, so that a bias cancels
    wanted, got = rows.kv - rows.kv[:1], (rows.hidden - rows.hidden[:1]) @ weight.T
    off = (wanted - got).abs().amax(0) > 1e-2 * wanted.abs().amax(0).clamp_min(1e-6)
    linear = [part for part in range(2) if not off[part * half : (part + 1) * half].any()]
    index = torch.cat([torch.arange(half) + part * half for part in linear] or [torch.arange(0)])
    index = index.to(weight.device)
    return weight[index], index


@register("inversion")
class InversionAttack(BaseAttack):
    goal = "solve the first layer's projections for each forbidden token"
    reference = "arXiv 2508.09442"
    fitted: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        layer: int = 0
        shortlist: int = 64
        """Tokens nearest to the solved hidden state, among which keys and values decide."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._table: _Table | None = None
        self._shift: tuple[Tensor, Tensor] | None = None

    def fit(self, pairs: AttackData, *, seed: int = 0) -> InversionAttack:
        """Makes the table; of a guard, learns each channel's mean and spread if that helps.

        Raises ``ValueError`` for a layer that the model does not have.
        """
        source, c = self.known.source, self.config
        if not 0 <= c.layer < source.shape[0]:
            raise ValueError(f"layer {c.layer} is none of the model's {source.shape[0]}: give 0")
        if c.shortlist < 1:
            raise ValueError(f"shortlist {c.shortlist} leaves no token to name: give 1 or more")
        rows = vocabulary_rows(source, c.layer)
        ids = aligned(pairs.context_ids, pairs.kv.valid.shape[1]).to(rows.kv.device)
        known = pairs.kv.valid & (ids != IGNORE)
        # channels weigh as they vary in what is really written
        center, scale = _moments(rows.kv[ids[known]] if bool(known.any()) else rows.kv)
        matrix, index = projections(source, rows) if c.layer == 0 else (None, None)
        self._table = _Table(rows, center, scale, matrix, index)
        self._shift = None
        if self.known.guard is not None and bool(known.any()):
            seen, true = entries(pairs.kv, c.layer), ids[known][:4096]
            plain = self._match(seen[known][:4096])
            self._shift = _moments(seen[pairs.kv.valid])
            moved = self._match(seen[known][:4096])
            if int((moved == true).sum()) <= int((plain == true).sum()):
                self._shift = None
        return self

    @torch.no_grad()
    def read(self, kv: KVBatch) -> list[tuple[int, ...]]:
        """The token of every entry, record by record. Raises ``ValueError`` if not fitted."""
        found = self._match(entries(kv, self.config.layer)[kv.valid]).tolist()
        lengths = kv.valid.sum(1).tolist()
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        return [tuple(found[end - n : end]) for n, end in zip(lengths, ends, strict=True)]

    def recover(self, data: AttackData) -> list[Guess]:
        """One guess a secret, read off its own positions; raises ``ValueError`` if not fitted."""
        return guesses(data, range(len(data)), self.read(data.kv))

    def _match(self, seen: Tensor) -> Tensor:
        """``[N, 2 * H * D]`` to token ids ``[N]``."""
        if self._table is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        if self._shift is not None:
            center, scale = self._shift
            seen = (seen - center) / scale * self._table.scale + self._table.center
        parts = [self._table.nearest(part, self.config.shortlist) for part in seen.split(256)]
        return torch.cat(parts) if parts else seen.new_zeros(0, dtype=torch.long)


class _Table:
    """The rows in units of their own spread, and the linear system that made them."""

    def __init__(
        self, rows: Rows, center: Tensor, scale: Tensor, matrix: Tensor | None, index: Tensor | None
    ) -> None:
        self.center, self.scale = center, scale
        self.kv = (rows.kv - center) / scale
        self.matrix: Tensor | None = None
        if matrix is not None and index is not None and len(index):
            self.index = index
            self.matrix = matrix / scale[index, None]
            self.inverse = torch.linalg.pinv(self.matrix)
            self.anchor = rows.hidden[0]
            self.images = (rows.hidden - self.anchor) @ self.matrix.T

    def solve(self, y: Tensor) -> Tensor:
        """The hidden states ``[N, d]`` that explain ``y`` best, the shortest where many do."""
        assert self.matrix is not None
        state: Tensor = self.anchor + (y - self.kv[0])[:, self.index] @ self.inverse.T
        return state

    def nearest(self, seen: Tensor, shortlist: int) -> Tensor:
        y = (seen - self.center) / self.scale
        if self.matrix is None:
            return torch.cdist(y, self.kv).argmin(1)
        image = (self.solve(y) - self.anchor) @ self.matrix.T
        near = torch.cdist(image, self.images).topk(min(shortlist, len(self.kv)), 1, largest=False)
        picked = self.kv[near.indices]  # [N, shortlist, 2 * H * D]
        best = (picked - y[:, None]).square().sum(-1).argmin(1, keepdim=True)
        return near.indices.gather(1, best)[:, 0]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread per channel of ``[N, C]``."""
    return x.mean(0), x.std(0).clamp_min(1e-4)


def guesses(data: AttackData, rows: Sequence[int], read: Sequence[Sequence[int]]) -> list[Guess]:
    """What was read of records ``rows``, at the positions of their secrets."""
    out = []
    for i, tokens in zip(rows, read, strict=True):
        for s in data.secrets[i]:
            found = tuple(tokens[slice(*s.positions)])
            right = sum(a == b for a, b in zip(found, s.ids, strict=False)) / max(1, len(s.ids))
            out.append(Guess(data.record_ids[i], s.category, s.field, found, None, right))
    return out
