"""Contexts with a planted message, and the segments that their senders publish.

The message stands behind the special tokens that a context opens with. Records are unchanged
otherwise: each secret has moved by the length of the message, and so has every later token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lcguard.attacks.base import Knowledge
from lcguard.attacks.soft import embedding_table
from lcguard.noise import noise_key
from lcguard.protocols import AttackData, KVBatch, Secret
from lcguard.records import IGNORE, pad
from lcguard.tokens import Special
from lcguard.training.twins import found_twin


def context_of(data: AttackData, i: int) -> list[int]:
    """Token ids of one record's context, without padding."""
    return [t for t in data.context_ids[i].tolist() if t != IGNORE]


def context_known(data: AttackData, i: int) -> bool:
    """False for a blind floor's record and for one whose guard moves tokens."""
    n = int(data.kv.valid[i].sum())
    return n > 0 and len(context_of(data, i)) >= n


def lead(context: Sequence[int], special: Collection[int]) -> int:
    """Special tokens that a context opens with."""
    return next((i for i, t in enumerate(context) if t not in special), len(context))


def insert(context: Sequence[int], message: Sequence[int], special: Collection[int]) -> list[int]:
    """The context with the message behind its opening special tokens."""
    at = lead(context, special)
    return [*context[:at], *message, *context[at:]]


def with_message(
    data: AttackData, message: tuple[int, ...], special: Collection[int]
) -> AttackData:
    """Contexts and positions with the message; the KV is still that without."""
    rows = [insert(context_of(data, i), message, special) for i in range(len(data))]
    n = len(message)
    secrets = [
        [replace(s, positions=(s.positions[0] + n, s.positions[1] + n)) for s in row]
        for row in data.secrets
    ]
    ids = pad(rows, IGNORE)
    return replace(data, context_ids=ids, secrets=secrets, planted=message)


def publish(data: AttackData, known: Knowledge, salt: str) -> AttackData:
    """Prefills the contexts anew and guards them; noise is a function of salt and record."""
    rows = [context_of(data, i) for i in range(len(data))]
    before = data.on  # what the senders had consumed, on a hop after the first
    parts = []
    for first in range(0, len(rows), 64):
        cut = slice(first, first + 64)
        on = None if before is None else before[cut]
        kv = known.source.prefill(rows[cut], on=on)
        if known.guard is not None:
            keys = [noise_key(0, f"{salt} {name}") for name in data.record_ids[cut]]
            twin = None
            if known.guard.needs_twin:
                filler, marks = neutral_token(known), known.guard.marks(kv, data.mask[cut])
                pairs = zip(rows[cut], data.secrets[cut], strict=True)
                contexts: list[Sequence[int]] = [_neutral(r, s, filler) for r, s in pairs]
                if marks is not None:  # a guard that finds them itself
                    contexts = [
                        found_twin(r, m[: len(r)], "neutral", Special(0, filler, 0))
                        for r, m in zip(rows[cut], marks.tolist(), strict=True)
                    ]
                twin = known.source.prefill(contexts, on=on)
            kv = known.guard(kv, data.mask[cut], keys=keys, twin=twin).kv
        parts.append(kv)
    return data.with_kv(KVBatch.stack(parts))


def neutral_token(known: Knowledge) -> int:
    """The token that stands for a redacted one: the letter X, as in the twins of training."""
    table = len(embedding_table(known.source))
    return next((i for i in range(table) if known.decode([i]).strip() == "X"), 0)


def _neutral(context: Sequence[int], secrets: Sequence[Secret], filler: int) -> list[int]:
    out = list(context)
    for s in secrets:
        out[s.positions[0] : s.positions[1]] = [filler] * (s.positions[1] - s.positions[0])
    return out
