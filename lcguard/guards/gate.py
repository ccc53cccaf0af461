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

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lcguard.guards.base import GuardModule, KVShape, Rewrite, register
from lcguard.guards.context import ContextNetwork
from lcguard.protocols import Mask

NEVER = -30.0
"""Logit of a gate that the policy does not ask for; finite, or its gradient would be NaN."""


def hard_clamp(x: Tensor) -> Tensor:
    """Clamp to 0..1 whose gradient passes: a closed gate can open again."""
    return x + (x.clamp(0, 1) - x).detach()


@register("gate")
class GateGuard(GuardModule):
    reads_policy = True
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

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        c = self.config
        if c.words < 1:
            raise ValueError(f"words {c.words} must be at least 1: word 0 is the constant")
        channels = shape.kv_heads * shape.head_dim
        self.context = ContextNetwork(shape, 0, c.width, c.blocks)
        # every category has a gate to hide its values and one to hide all but the derived value
        self.gate = nn.Linear(c.width, n_categories * 2 * shape.layers * 2)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.constant_(self.gate.bias, c.start_bias)
        self.word = nn.Linear(c.width, n_categories * c.words)
        self.codebook = nn.Parameter(torch.randn(c.words, shape.layers, 2, channels) * 0.02)
        eye = torch.eye(channels).expand(shape.layers, 2, channels, channels)
        self.squeeze, self.expand = nn.Parameter(eye.clone()), nn.Parameter(eye.clone())

    @torch.no_grad()
    def start_codebook(self, words: Tensor) -> None:
        """Starts the words at standardised KV, ``[words, L, 2, H * D]``."""
        self.codebook.copy_(words)

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        hidden = self.context(z, valid)
        own = self.gate(hidden).unflatten(-1, (self.n_categories, 2, self.shape.layers, 2))
        forbid, derive = (
            m.to(z.device)[:, None, :, None, None] for m in (mask.forbid, mask.derive)
        )
        asked = torch.where(derive, own[:, :, :, 1], own[:, :, :, 0])
        asked = asked.masked_fill(~forbid, NEVER)  # [B, T, C, L, 2]
        logit = asked.logsumexp(2)
        g = hard_clamp(1.2 * logit.sigmoid() - 0.1)[..., None]
        word_logits = self.word(hidden).unflatten(-1, (self.n_categories, -1))
        p = self._words(word_logits, asked, mask)
        constant = torch.einsum("btw,wlkc->btlkc", p, self.codebook)
        squeezed = self._where_forbidden(z, self.squeeze, mask)
        mean = (1 - g) * squeezed + g * constant
        return Rewrite(mean, g.mean((2, 3, 4)) * valid, own, word_logits)

    def finish(self, noisy: Tensor, mask: Mask) -> Tensor:
        """Undoes the squeeze as well as the noise allows."""
        return self._where_forbidden(noisy, self.expand, mask)

    def unfinish(self, sent: Tensor, mask: Mask) -> Tensor:
        back = torch.linalg.pinv(self.expand.detach().double()).to(sent.dtype)
        return self._where_forbidden(sent, back, mask)

    def _where_forbidden(self, z: Tensor, matrix: Tensor, mask: Mask) -> Tensor:
        """A linear map per layer and K or V; nothing forbidden, nothing changed."""
        changed = torch.einsum("btlkc,lkcd->btlkd", z, matrix)
        return torch.where(mask.forbid.any(1).to(z.device)[:, None, None, None, None], changed, z)

    def _words(self, word_logits: Tensor, asked: Tensor, mask: Mask) -> Tensor:
        """``[B, T, W]``: word 0, or a mixture where the entry belongs to a derived category."""
        p: Tensor = word_logits.softmax(-1)
        first = torch.zeros_like(p)
        first[..., 0] = 1.0
        derives = (mask.forbid & mask.derive).to(p.device)[:, None, :, None]
        belongs = asked.mean((3, 4)).softmax(-1)[..., None]
        # word 0 to the last bit where nothing is derived: a sum of shares would be 1 only nearly
        return first[:, :, 0] + ((p - first) * derives * belongs).sum(2)
