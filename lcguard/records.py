"""Records as batches: policies as masks, padding, and questions packed into one row.

The records themselves are in ``lcguard.tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES, own_names
from lcguard.protocols import Mask
from lcguard.rule import Rule
from lcguard.tokens import TokenQuestion as TokenQuestion
from lcguard.tokens import TokenRecord as TokenRecord
from lcguard.tokens import TokenSpan as TokenSpan

IGNORE = -100


def mask_of(rules: Sequence[Rule]) -> Mask:
    """Category masks ``[B, C]``, one rule a record.

    Raises ``ValueError`` for a category that no guard learnt: it would pass unseen.
    """
    if own := [c for r in rules for c in own_names(r.forbid)]:
        raise ValueError(f"no guard learnt the category {own[0]!r}, which a policy defines itself")
    both = [r.forbid for r in rules], [r.derive for r in rules]
    rows = [[[c in names for c in CATEGORIES] for names in which] for which in both]
    return Mask(*(torch.tensor(r, dtype=torch.bool).view(-1, len(CATEGORIES)) for r in rows))


def masks(records: Sequence[TokenRecord]) -> Mask:
    """The records' own policies as masks ``[B, C]``."""
    return mask_of([r.rule for r in records])


def value_labels(records: Sequence[TokenRecord], like: Tensor) -> Tensor:
    """``[B, T, C]`` for ``like [B, T, ...]``: one where a token belongs to a value of the category,
    forbidden on this edge or not."""
    labels = torch.zeros(*like.shape[:2], len(CATEGORIES), device=like.device)
    for row, record in zip(labels, records, strict=True):
        for span, c in record.categorised():
            row[span.start : span.end, c] = 1.0
    return labels


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Right-padded ``[B, T]`` long tensor."""
    width = max((len(r) for r in rows), default=0)
    full = [list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(full, dtype=torch.long).view(len(rows), width)  # two-dimensional if empty


@dataclass(frozen=True)
class PackedQuestions:
    """Several questions a record in one row; each sees the context and itself alone."""

    ids: Tensor
    """``[B, S]``."""
    block: Tensor
    """``[B, S]`` index of the question a token belongs to; -1 at padding."""
    step: Tensor
    """``[B, S]`` position inside the question."""
    labels: Tensor
    """``[B, S]`` the next answer token where one is due, else ``IGNORE``."""

    def positions(self, context_lengths: Tensor) -> Tensor:
        """Absolute positions ``[B, S]``: every question directly follows the context."""
        return context_lengths[:, None] + self.step

    def mask(self, context_valid: Tensor) -> Tensor:
        """Who sees what: bool ``[B, 1, S, T + S]``."""
        same = (self.block[:, :, None] == self.block[:, None, :]) & (self.block >= 0)[:, None, :]
        causal = self.step[:, :, None] >= self.step[:, None, :]
        eye = torch.eye(self.ids.shape[1], dtype=torch.bool, device=self.ids.device)
        own = (same & causal) | eye  # padding sees itself, or its softmax would be empty
        context = context_valid[:, None, :].expand(-1, self.ids.shape[1], -1)
        return torch.cat((context, own), -1)[:, None]


def pack_questions(
    records: Sequence[TokenRecord],
    wanted: Callable[[TokenRecord, TokenQuestion], bool] = lambda r, q: True,
    pad_id: int = 0,
) -> PackedQuestions:
    """Packs the wanted questions of every record, in order."""
    return pack_rows([[q for q in r.questions if wanted(r, q)] for r in records], pad_id)


def pack_rows(rows: Sequence[Sequence[TokenQuestion]], pad_id: int = 0) -> PackedQuestions:
    """Packs each row's questions, in order."""
    ids: list[list[int]] = []
    block: list[list[int]] = []
    step: list[list[int]] = []
    labels: list[list[int]] = []
    for asked in rows:
        row: list[list[int]] = [[], [], [], []]
        for i, q in enumerate(asked):
            tokens = (*q.prompt, *q.answer[:-1])
            row[0] += tokens
            row[1] += [i] * len(tokens)
            row[2] += range(len(tokens))
            row[3] += [IGNORE] * (len(q.prompt) - 1) + list(q.answer)
        for target, part in zip((ids, block, step, labels), row, strict=True):
            target.append(part)
    return PackedQuestions(pad(ids, pad_id), pad(block, -1), pad(step, 0), pad(labels, IGNORE))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean attention mask as the additive one that every attention backend takes."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
