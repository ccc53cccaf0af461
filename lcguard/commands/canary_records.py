"""Records to plant: generated, chosen for what the attack has to see, encoded for the agents.

A fitted attack cannot name a word that it never saw. So the records to fit on are drawn from a
larger pool, rare words first, and planted two by two: a request then teaches twice as much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.load import load_hops
from lcguard.agents.scenarios.types import Hop, Record
from lcguard.protocols import AttackData
from lcguard.records import IGNORE, TokenRecord
from lcguard.training.dataset import with_policy

_POOL = 6
"""Records generated for each one chosen."""


def fitting_records(
    encoder: Encoder, forbid: Sequence[str], n: int, seed: int
) -> list[TokenRecord]:
    """``n`` pairs of records that hold forbidden values, together of as many words as possible."""
    pool = holding(encoder, forbid, 2 * _POOL * n, "coined", seed, min_fields=7)
    chosen = [pool[i][0] for i in _varied([record for _, record in pool], 2 * n)]
    pairs = [_join(a, b) for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
    return with_policy(encoder.encode(pairs), forbid)


def screening_records(
    encoder: Encoder, forbid: Sequence[str], n: int, seed: int
) -> list[TokenRecord]:
    """``n`` records that hold forbidden values, of names that no fitting record has."""
    return [record for _, record in holding(encoder, forbid, n, "test", seed)]


def holding(
    encoder: Encoder, forbid: Sequence[str], n: int, split: str, seed: int, min_fields: int = 5
) -> list[tuple[Hop, TokenRecord]]:
    """The first ``n`` generated records with a forbidden value."""
    found: list[tuple[Hop, TokenRecord]] = []
    wanted = n
    while len(found) < n:  # every category is in some type of record, so this ends
        hops = load_hops("generator", seed=seed, split=split, n=wanted, min_fields=min_fields)
        records = with_policy(encoder.encode(hops), forbid)
        found = [(h, r) for h, r in zip(hops, records, strict=True) if r.secrets()]
        wanted *= 2
    return found[:n]


def _varied(records: Sequence[TokenRecord], n: int) -> Iterator[int]:
    """Indices of ``n`` records, each time the one whose secrets have the least seen tokens."""
    words = [{t for s in r.secrets() for t in s.ids} for r in records]
    seen: Counter[int] = Counter()
    left = list(range(len(records)))
    for _ in range(n):
        best = max(left, key=lambda i: sum((1 + seen[t]) ** -2 for t in words[i]))
        left.remove(best)
        seen.update(words[best])
        yield best


def _join(first: Hop, second: Hop) -> Hop:
    """Both records one after the other, as one text without questions."""
    a, b = first.record, second.record
    text = a.text + "\n"
    moved = (replace(s, start=s.start + len(text), end=s.end + len(text)) for s in b.spans)
    record = Record(
        f"{a.record_id}+{b.record_id}",
        a.record_type,
        a.vertical,
        text + b.text,
        (*a.spans, *moved),
        (),
    )
    return replace(first, record=record)


@dataclass(frozen=True)
class Words:
    """The tokens that an attack can have learned, renumbered: a head over a vocabulary of 150,000
    would take minutes to fit, nearly all of it for tokens that never occur."""

    ids: tuple[int, ...]

    @classmethod
    def of(cls, train: AttackData) -> Words:
        """Those of the training contexts and secrets, and the special ones."""
        seen = set(train.context_ids.unique().tolist()) - {IGNORE}
        seen |= {t for row in train.secrets for s in row for t in s.ids}
        return cls(tuple(sorted({*seen, train.special.end_id, *train.special.special_ids})))

    def rename(self, data: AttackData) -> AttackData:
        """``data`` in the new numbers; every unseen token becomes the last one."""
        new = {old: i for i, old in enumerate(self.ids)}
        unseen = len(self.ids)
        context = data.context_ids.clone().apply_(
            lambda t: IGNORE if t == IGNORE else new.get(t, unseen)
        )
        secrets = [
            [replace(s, ids=tuple(new.get(t, unseen) for t in s.ids)) for s in row]
            for row in data.secrets
        ]
        special = replace(
            data.special,
            vocab=unseen + 1,
            end_id=new[data.special.end_id],
            special_ids=tuple(new[t] for t in data.special.special_ids),
        )
        return replace(data, context_ids=context, secrets=secrets, special=special)

    def back(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Old numbers; -1 for the unseen one, which is no token."""
        return tuple(self.ids[i] if i < len(self.ids) else -1 for i in ids)
