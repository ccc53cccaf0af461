"""An adversary that names the category of what was withheld (after arXiv 2605.11502, 1505.07818).

A small network reads each guarded token and says which category's value it belongs to, or that it
belongs to none. Its gradient reaches the guard reversed, at tokens of forbidden values alone: they
should look alike whatever they were. The network itself learns from all tokens, downhill.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.categories import CATEGORIES
from lcguard.records import TokenRecord
from lcguard.training.shards import ALONE, Shards
from lcguard.training.twins import forbidden_spans

NONE = len(CATEGORIES)
"""The class of tokens outside values."""


def reverse_gradient(x: Tensor, hidden: Tensor) -> Tensor:
    """``x [..., d]`` as it is; backwards the negative gradient where ``hidden [...]``, bool, is
    true, and none elsewhere."""
    fixed = x.detach()
    return torch.where(hidden[..., None], 2 * fixed - x, fixed)  # 2 x - x is x to the last bit


class CategoryAdversary(nn.Module):
    """From a guarded token's standardised channels to its category."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(), nn.Linear(width, NONE + 1)
        )

    def loss(
        self,
        guarded: Tensor,
        valid: Tensor,
        records: Sequence[TokenRecord],
        shards: Shards = ALONE,
    ) -> Tensor:
        """Cross-entropy in nats a token of ``guarded [B, T, L, 2, H * D]``, all tokens of values
        weighing as much as all others; the guard's gradient is reversed."""
        labels, hidden = (x.to(guarded.device) for x in category_labels(records, valid.shape[1]))
        logits = self.layers(reverse_gradient(guarded.flatten(2), hidden))[valid]
        each = F.cross_entropy(logits, labels[valid], reduction="none")
        inside = labels[valid] != NONE
        total = each.sum() * 0.0
        for part in (each[inside], each[~inside]):
            share = shards.share(len(part))
            total = total + part.sum() / max(1, len(part)) * share / 2
        return total


def category_labels(records: Sequence[TokenRecord], tokens: int) -> tuple[Tensor, Tensor]:
    """``[B, T]`` each: the category's number of the value that a token belongs to, ``NONE`` outside
    of values; and whether the policy forbids it."""
    labels = torch.full((len(records), tokens), NONE)
    hidden = torch.zeros(len(records), tokens, dtype=torch.bool)
    for i, record in enumerate(records):
        for span, c in record.categorised():
            labels[i, span.start : span.end] = c
        for span in forbidden_spans(record, record.forbid):
            hidden[i, span.start : span.end] = True
    return labels, hidden
