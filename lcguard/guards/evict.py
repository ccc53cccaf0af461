"""What cache managers do: drop the secret's own entries after prefill, keep everything else.

The told values' entries are overwritten by those of neutral tokens; the tokens behind them keep
theirs, which were made while the values stood there. It is here to be measured beside ``redact``,
which prefills again: the difference is what the later tokens remember.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcguard.guards.base import register
from lcguard.guards.redact import RedactGuard
from lcguard.protocols import KVBatch

SAME = 0.05
"""Entries of one token differ by less, relative to their size, whatever batch they were made in."""


@register("evict")
class EvictGuard(RedactGuard):
    keeps_later = True
    by_token = True
    claim = (
        "The told values' own entries are gone. Later tokens keep what they took from them: "
        "nothing is claimed against a receiver who reads those."
    )

    def start(self, kv: KVBatch, twin: KVBatch) -> KVBatch:
        """The twin's entries where its token is another, the segment's own elsewhere. Raises
        ``ValueError`` for a twin whose tokens do not stand where the segment's do."""
        if not torch.equal(kv.valid, twin.valid):
            raise ValueError(
                "the twin has another length than the segment: 'evict' takes neutral tokens, one "
                "for one"
            )
        replaced = _own(kv, twin)[:, None, None, :, None]  # [B, 1, 1, T, 1]
        return KVBatch(
            torch.where(replaced, twin.keys, kv.keys),
            torch.where(replaced, twin.values, kv.values),
            kv.valid,
        )


def _own(kv: KVBatch, twin: KVBatch) -> Tensor:
    """``[B, T]``: where the two contexts have different tokens. The first layer's entries are a
    function of the token alone."""
    a, b = (torch.cat((x.keys[:, 0], x.values[:, 0]), 1).float() for x in (kv, twin))
    off = (a - b).square().sum((1, 3))
    return (off > SAME**2 * a.square().sum((1, 3))) & kv.valid
