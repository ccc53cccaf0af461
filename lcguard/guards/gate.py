"""The counterfactual gate: keep an entry, or replace it by a learned constant.

A context network reads the segment and emits one gate per (category, token, layer, K or V). Those
of the forbidden categories are joined, so any subset of categories is a policy and one that forbids
nothing changes nothing. A closed gate (g = 1) replaces the standardised entry by a word of a small
learned codebook; an open one lets it pass; fixed Gaussian noise lies on both:

    z' = B ([(1 - g) A z + g sum_w p_w c_w] + sigma n),     [.] to the grid that n is on
    g = clamp(1.2 sigmoid(logsumexp over forbidden categories) - 0.1, 0, 1).

A and B, one matrix each per layer and K or V, start as the identity: A shrinks the directions in
which later tokens carry traces of earlier secrets, so that the noise covers them, and B undoes it.
Word 0 is the constant. The other words carry *derived* values that
the policy allows (a band without the amount); they are unreachable unless the policy derives a
forbidden category.
Our own; see ``lcguard.training.objective`` for how it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcguard.guards import channel_maps
from lcguard.guards.base import GuardModule, KVShape, Rewrite, register
from lcguard.guards.channel_maps import Kind
from lcguard.guards.context import ContextNetwork
from lcguard.protocols import KVBatch, Mask

NEVER = -30.0
"""Logit of a gate that the policy does not ask for; finite, or its gradient would be NaN."""


def hard_clamp(x: Tensor) -> Tensor:
    """Clamp to 0..1 whose gradient passes: a closed gate can open again."""
    return x + (x.clamp(0, 1) - x).detach()


class Decision(NamedTuple):
    """What the context network says of B segments."""

    closed: Tensor
    """g ``[B, T, L, 2]`` in 0..1: 1 replaces the entry."""
    words: Tensor
    """p ``[B, T, W]``: weights of the words."""


@register("gate")
class GateGuard(GuardModule):
    reads_policy = True
    by_token = True
    looks = True
    claim = (
        "What the policy forbids is withheld from any receiver, fresh attackers included, in "
        "expectation over records like those it was trained on; see the certificate."
    )

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        noise: float = 0.3
        width: int = 96
        blocks: int = 2
        words: int = 8
        """Codebook size: word 0 and the words for derived values."""
        start_bias: float = -4.0
        """Initial logit of each category's gate: starts at keep."""
        reach_tokens: int = 256
        """How far the context network's blocks see, to either side; 0: the whole segment."""
        maps: Kind = "full"
        """What A and B are: matrices of all channels, one of each KV head, or of low rank beside
        the identity. At 8 heads of 128 they take 8.4, 1.0 and 0.26 MB a layer and K or V."""
        rank: int = 16
        """Of A - 1 and B - 1, for ``maps: low_rank``."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        c = self.config
        if c.words < 1:
            raise ValueError(f"words {c.words} must be at least 1: word 0 is the constant")
        channels = shape.kv_heads * shape.head_dim
        self.context = ContextNetwork(shape, 0, c.width, c.blocks, c.reach_tokens)
        # every category has a gate to hide its values and one to hide all but the derived value
        self.gate = nn.Linear(c.width, n_categories * 2 * shape.layers * 2)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.constant_(self.gate.bias, c.start_bias)
        self.word = nn.Linear(c.width, n_categories * c.words)
        self.codebook = nn.Parameter(torch.randn(c.words, shape.layers, 2, channels) * 0.02)
        start = channel_maps.identity(c.maps, shape, c.rank)
        self.squeeze, self.expand = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    @torch.no_grad()
    def start_codebook(self, words: Tensor) -> None:
        """Starts the words at standardised KV, ``[words, L, 2, H * D]``."""
        self.codebook.copy_(words)

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        hidden = self.context(z, valid)
        own, word_logits = self._logits(hidden)
        seen = self._decided(own, word_logits, mask)
        mean = self._mean(z, seen, mask)
        return Rewrite(mean, seen.closed.mean((2, 3)) * valid, own, word_logits)

    def in_tiles(self) -> bool:
        return super().in_tiles() and bool(self.config.reach_tokens)

    def look(self, tiles: Iterable[KVBatch], mask: Mask) -> Iterator[Decision]:
        for hidden in self.context.stream(self.standardise(kv) for kv in tiles):
            yield self.decision(hidden, mask)

    def rewrite_seen(self, z: Tensor, valid: Tensor, mask: Mask, seen: Any) -> Rewrite:
        return Rewrite(self._mean(z, seen, mask), seen.closed.mean((2, 3)) * valid)

    def decision(self, hidden: Tensor, mask: Mask) -> Decision:
        """From the context network's hidden states ``[B, T, d]``."""
        return self._decided(*self._logits(hidden), mask)

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of gates ``[B, T, C, 2, L, 2]`` and of words ``[B, T, C, W]``."""
        own = self.gate(hidden).unflatten(-1, (self.n_categories, 2, self.shape.layers, 2))
        return own, self.word(hidden).unflatten(-1, (self.n_categories, -1))

    def _decided(self, own: Tensor, word_logits: Tensor, mask: Mask) -> Decision:
        forbid, derive = (
            m.to(own.device)[:, None, :, None, None] for m in (mask.forbid, mask.derive)
        )
        asked = torch.where(derive, own[:, :, :, 1], own[:, :, :, 0])
        asked = asked.masked_fill(~forbid, NEVER)  # [B, T, C, L, 2]
        closed = hard_clamp(1.2 * asked.logsumexp(2).sigmoid() - 0.1)
        return Decision(closed, self._words(word_logits, asked, mask))

    def _mean(self, z: Tensor, seen: Decision, mask: Mask) -> Tensor:
        g = seen.closed[..., None]
        constant = torch.einsum("btw,wlkc->btlkc", seen.words, self.codebook)
        passed = self._where_forbidden(z, self.squeeze, mask)
        if torch.is_grad_enabled() or passed is z:
            return (1 - g) * passed + g * constant
        return passed.mul_(1 - g).add_(constant.mul_(g))  # the same, in less memory

    def finish(self, noisy: Tensor, mask: Mask) -> Tensor:
        """Undoes the squeeze as well as the noise allows."""
        return self._where_forbidden(noisy, self.expand, mask)

    def unfinish(self, sent: Tensor, mask: Mask) -> Tensor:
        kind = self.config.maps
        back = channel_maps.inverse(kind, self.expand.detach().double()).to(sent.dtype)
        return self._where_forbidden(sent, back, mask, channel_maps.OF_INVERSE[kind])

    def _where_forbidden(
        self, z: Tensor, matrix: Tensor, mask: Mask, kind: Kind | None = None
    ) -> Tensor:
        """A linear map per layer and K or V; nothing forbidden, nothing changed."""
        hides = mask.forbid.any(1)
        if not bool(hides.any()):
            return z
        changed = channel_maps.apply(kind or self.config.maps, z, matrix)
        if bool(hides.all()):
            return changed
        return torch.where(hides.to(z.device)[:, None, None, None, None], changed, z)

    def _words(self, word_logits: Tensor, asked: Tensor, mask: Mask) -> Tensor:
        """``[B, T, W]``: word 0, or a mixture where the entry belongs to a derived category."""
        derived = mask.forbid & mask.derive
        if not bool(derived.any()):
            only = torch.zeros_like(word_logits[:, :, 0])
            only[..., 0] = 1.0
            return only
        p: Tensor = word_logits.softmax(-1)
        first = torch.zeros_like(p)
        first[..., 0] = 1.0
        derives = derived.to(p.device)[:, None, :, None]
        belongs = asked.mean((3, 4)).softmax(-1)[..., None]
        # word 0 to the last bit where nothing is derived: a sum of shares would be 1 only nearly
        return first[:, :, 0] + ((p - first) * derives * belongs).sum(2)
