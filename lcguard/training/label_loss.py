"""What spans of the training data teach a guard with gates: where values stand, and their bands.

Cheaper than counterfactuals, which then only have to say what else to withhold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.guards.base import GuardModule
from lcguard.protocols import KVBatch, Mask
from lcguard.records import IGNORE, TokenRecord, value_labels
from lcguard.training.shards import ALONE, Shards
from lcguard.training.twins import ValuePool


def word_loss(
    words: Tensor, records: Sequence[TokenRecord], pool: ValuePool, shards: Shards = ALONE
) -> Tensor:
    """Cross-entropy in nats: on a secret with a band, the word that stands for its band.

    ``words``: logits ``[B, T, C, W]``. Only which word it is is taught here; what a word says to
    the receiver, the receiver's loss teaches the codebook.
    """
    label = torch.full(words.shape[:3], IGNORE, device=words.device)
    for i, record in enumerate(records):
        for span, c in record.categorised():
            word = pool.word(span, words.shape[-1])
            if word is not None:
                label[i, span.start : span.end, c] = word
    n = int((label != IGNORE).sum())
    share = shards.share(n)
    if not n:
        return words.sum() * 0.0
    return F.cross_entropy(words.flatten(0, 2), label.flatten(), ignore_index=IGNORE) * share


def label_loss(
    module: GuardModule,
    records: Sequence[TokenRecord],
    raw: KVBatch,
    pool: ValuePool,
    shards: Shards = ALONE,
) -> Tensor:
    """Cross-entropy in nats a token: each category's gates close on its values, and there alone;
    and the words name the bands.

    Raises ``ValueError`` for a guard without gates.
    """
    everything = torch.ones(len(records), module.n_categories, dtype=torch.bool)
    out = module.rewrite(module.standardise(raw), raw.valid, Mask(everything, ~everything))
    if out.by_category is None:
        raise ValueError(f"guard {module.name!r} has no gates to label; set label_steps to 0")
    own = out.by_category.flatten(3)[raw.valid]
    value = value_labels(records, out.by_category)[raw.valid][..., None].expand_as(own)
    # open, but not so firmly that the pair leak could not close it any more
    value = value.clamp(0.01, 1.0)
    loss = F.binary_cross_entropy_with_logits(own, value, reduction="none")
    labels = loss.mean(-1).sum(-1).mean() * shards.share(len(loss))
    if out.words is None:
        return labels
    return labels + 0.1 * word_loss(out.words, records, pool, shards)


def closing_loss(
    by_category: Tensor,
    records: Sequence[TokenRecord],
    open_weight: float = 0.0,
    shards: Shards = ALONE,
) -> Tensor:
    """Cross-entropy in nats of closing each category's gates on its own values and, weighted by
    ``open_weight``, of opening them on those of the other categories.

    What else they close on, what follows a value, is for the pair leak to say.
    """
    value = value_labels(records, by_category).bool()
    others = value.any(2, keepdim=True) & ~value
    closed, opened = shards.share(int(value.sum())), shards.share(int(others.sum()))
    if not bool(value.any()):
        return by_category.sum() * 0.0
    own = by_category[:, :, :, 0]
    loss = F.softplus(-own[value]).mean() * closed
    if open_weight:
        loss = loss + open_weight * F.softplus(own[others]).mean() * opened
    return loss
