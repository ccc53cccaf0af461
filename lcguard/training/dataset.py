"""Records with their KV: prefilled once, guarded often."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lcguard.noise import noise_key
from lcguard.protocols import AttackData, Guard, KVBatch, Mask
from lcguard.records import IGNORE, TokenRecord, masks, pad
from lcguard.rule import Rule
from lcguard.source import ModelSource
from lcguard.tokens import Special
from lcguard.training.twins import fixed_length_twin, found_twin, neutral_twin


def with_policy(
    records: Sequence[TokenRecord], forbid: Sequence[str], derive: Sequence[str] = ()
) -> list[TokenRecord]:
    """The same records under another policy: which values are secrets changes with it."""
    rule = Rule.of(forbid, derive)
    return [
        replace(
            r,
            rule=rule,
            spans=tuple(replace(s, secret=s.category in forbid) for s in r.spans),
        )
        for r in records
    ]


def _prompts(record: TokenRecord) -> list[tuple[int, ...]]:
    """For every secret the direct question about its field, or any question of the record."""
    direct = {q.field: q.prompt for q in record.questions if q.kind == "direct"}
    fallback = next((q.prompt for q in record.questions), ())
    return [direct.get(s.field, fallback) for s in record.secrets()]


def attack_data(records: Sequence[TokenRecord], kv: KVBatch, special: Special) -> AttackData:
    """Pairs of segment and secrets."""
    return AttackData(
        kv=kv,
        context_ids=pad([r.ids for r in records], IGNORE),
        secrets=[r.secrets() for r in records],
        record_ids=[r.record_id for r in records],
        mask=masks(records),
        special=special,
        prompts=[_prompts(r) for r in records],
        records=records,
    )


def guard_all(
    guard: Guard,
    records: Sequence[TokenRecord],
    kv: KVBatch,
    source: ModelSource,
    special: Special,
    *,
    seed: int = 0,
    fixed_length: bool = False,
    batch: int = 128,
) -> KVBatch:
    """Every record's segment through the guard, under the record's own policy."""
    mask = masks(records)
    twin = None
    if guard.needs_twin:
        twin = source.prefill(twin_contexts(guard, records, kv, special, fixed_length, seed=seed))
    parts, own = list[KVBatch](), None
    for first in range(0, len(records), batch):
        rows = slice(first, first + batch)
        part = Mask(mask.forbid[rows], mask.derive[rows])
        keys = [noise_key(seed, r.record_id) for r in records[rows]]
        own = None if twin is None else twin[rows]
        parts.append(guard(kv[rows], part, keys=keys, twin=own).kv)
    del twin, own  # as large as what is stacked now
    return KVBatch.stack(parts)


def twin_contexts(
    guard: Guard,
    records: Sequence[TokenRecord],
    kv: KVBatch,
    special: Special,
    fixed_length: bool = False,
    batch: int = 16,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """What is prefilled again for a guard that sends a twin: the contexts without what it finds in
    raw ``kv``, or, for a guard that is told, without the values that each policy forbids. ``seed``
    is what surrogates are drawn from."""
    make = fixed_length_twin if fixed_length else neutral_twin
    mask, out = masks(records), list[tuple[int, ...]]()
    for first in range(0, len(records), batch):
        rows = slice(first, first + batch)
        found = guard.marks(kv[rows], mask[rows])
        for i, record in enumerate(records[rows]):
            if found is None:
                out.append(make(record, record.forbid, special.neutral_id))
            else:
                placeholder = "fixed_length" if fixed_length else guard.placeholder
                out.append(context_without(record, found[i], placeholder, special, seed))
    return out


def context_without(
    record: TokenRecord, marks: Tensor, placeholder: str, special: Special, seed: int
) -> tuple[int, ...]:
    """The context without what a detector marked in it: ``marks [T]`` or longer, as of a batch."""
    key = noise_key(seed, f"surrogates {record.record_id}")
    return found_twin(record.ids, marks[: len(record.ids)].tolist(), placeholder, special, key)


def blind(data: AttackData, seed: int = 0) -> AttackData:
    """The same pairs with every segment replaced by another record's: the floor's data."""
    n = len(data)
    if n < 2:
        raise ValueError(f"{n} records cannot be shuffled; a blind floor needs at least 2")
    order = list(range(n))
    random.Random(seed).shuffle(order)
    other = torch.empty(n, dtype=torch.long)
    other[order] = torch.tensor(order[1:] + order[:1])  # a cycle: no record keeps its own
    ids = torch.full_like(data.context_ids, IGNORE)
    return replace(data, kv=data.kv[other], context_ids=ids)
