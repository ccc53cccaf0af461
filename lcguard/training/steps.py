"""What one training step sees: records with their policies, questions and counterfactuals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.guards.base import GuardModule
from lcguard.protocols import KVBatch, Mask
from lcguard.records import TokenQuestion, TokenRecord, masks
from lcguard.rule import Rule
from lcguard.source import ModelSource
from lcguard.training.config import PolicyMix, TrainConfig
from lcguard.training.dataset import with_policy
from lcguard.training.shards import ALONE, Shards, widened
from lcguard.training.twins import ValuePool, neutral_twin


def sample_policy(rng: random.Random, mix: PolicyMix) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Forbidden categories, and those of them that keep their derived value."""
    kind = rng.random()
    if kind < mix.none_rate:
        return (), ()
    everything = kind < mix.none_rate + mix.all_rate
    # every number of categories as often as every other: one alone is a policy too
    count = len(CATEGORIES) if everything else rng.randint(1, len(CATEGORIES) - 1)
    drawn = set(rng.sample(CATEGORIES, count))
    forbid = Rule.hiding(drawn).forbid
    derive = tuple(c for c in forbid if c in DERIVABLE and rng.random() < mix.derive_rate)
    return forbid, derive


def permitted(record: TokenRecord, question: TokenQuestion) -> bool:
    """May this audience have the answer?"""
    if question.category is None or question.category not in record.forbid:
        return True
    return question.kind == "derived" and question.category in record.derive


def draw_batch(rng: random.Random, records: Sequence[TokenRecord], size: int) -> list[TokenRecord]:
    """``size`` records of similar length, so that little of a batch is padding.

    ``records`` are sorted by length: the batch comes from an eighth of them around a random place.
    """
    size = min(size, len(records))
    width = max(size, len(records) // 8)
    first = rng.randint(-(width // 2), len(records) - width // 2)
    first = max(0, min(first, len(records) - width))
    return rng.sample(records[first : first + width], size)


@dataclass(frozen=True)
class StepData:
    """What one step sees."""

    records: list[TokenRecord]
    raw: KVBatch
    mask: Mask
    n_paths: int
    """Of the whole batch, and hops of each: what this process has is its part of them."""
    hops: int
    everyone: list[TokenRecord]
    """The records of the whole batch."""
    pair: KVBatch | None = None
    twin: KVBatch | None = None
    one_other: KVBatch | None = None
    """As ``pair``, with one of the forbidden secrets resampled alone."""
    before: KVBatch | None = None
    """What the receiver reads in front of each segment, row by row; nothing where no token is
    valid."""


@dataclass(frozen=True)
class Steps:
    """Draws what the steps of a run see, and prefills it."""

    records: Sequence[TokenRecord]
    """Sorted by length."""
    pool: ValuePool
    source: ModelSource
    config: TrainConfig
    neutral_id: int
    hard: Sequence[TokenRecord] = ()
    """Those that the first ``hard_steps`` are for, sorted by length; ``records`` has them too."""
    shards: Shards = ALONE

    def seen_at(self, step: int) -> Sequence[TokenRecord]:
        """What a step draws from."""
        return self.hard if self.hard and step < self.config.hard_steps else self.records

    def draw(
        self,
        rng: random.Random,
        module: GuardModule,
        generator: torch.Generator,
        step: int,
    ) -> StepData:
        """One step's records, policies, questions and counterfactuals.

        With ``path_hops`` above 1 the batch is so many hops of as many paths, hop after hop: each
        hop's contexts and their counterfactuals are prefilled on top of the same guarded segment of
        the hop before. No gradient runs back through a hop: given the segment that was handed on,
        nothing later depends on its sender's secrets, so what a path leaks is the sum of what its
        segments leak.

        Everything is drawn for the whole batch; the data are this process's rows of it.
        """
        config = self.config.at(step)
        chosen = []
        for record in draw_batch(rng, self.seen_at(step), config.batch):
            (record,) = with_policy([record], *sample_policy(rng, config.policies))
            questions = [q for q in record.questions if permitted(record, q)]
            rng.shuffle(questions)
            # allowed derived answers first: they are rare and the hardest to keep
            questions.sort(key=lambda q: q.category not in record.derive)
            chosen.append(replace(record, questions=tuple(questions[: config.questions])))
        n_paths = max(1, len(chosen) // config.path_hops)
        chosen = chosen[: n_paths * config.path_hops]  # fewer than a batch: whole paths only
        merge = config.path_hops > 1 and rng.random() < config.merge_rate
        hops: list[StepData] = []
        before: KVBatch | None = None
        for first in range(0, len(chosen), n_paths):
            hop = self._hop(rng, chosen[first : first + n_paths], before, config)
            if config.path_hops > 1:
                past = None if before is None else before[: len(hop.records)]
                if merge:
                    hop = _merged(hop, past, hops[-1] if hops else None)
                with torch.no_grad():
                    draws = self.shards.draws(generator, n_paths)
                    before = module(hop.raw, hop.mask, draws)[0]
            hops.append(hop)
        return hops[0] if len(hops) == 1 else _stack(hops)

    def _hop(
        self,
        rng: random.Random,
        chosen: list[TokenRecord],
        on: KVBatch | None,
        config: TrainConfig,
    ) -> StepData:
        """Contexts of one hop with their counterfactuals, in one forward pass."""
        everyone, rows = chosen, self.shards.rows(len(chosen))
        width = max(len(r.ids) for r in everyone)  # the same in every process, as is the noise
        chosen = [everyone[i] for i in rows]
        contexts, n = [r.ids for r in chosen], len(chosen)
        pool = self.pool
        more: dict[str, list[tuple[int, ...]]] = {}
        if config.pair_weight > 0:
            more["pair"] = [pool.resample(rng, r, r.forbid, r.derive) for r in everyone]
        if config.twin_weight > 0 or config.teacher == "twin":
            more["twin"] = [neutral_twin(r, r.forbid, self.neutral_id) for r in everyone]
        if config.tail_weight > 0:
            more["one_other"] = [pool.resample_one(rng, r, r.forbid, r.derive) for r in everyone]
        for other in more.values():
            contexts += [other[i] for i in rows]
        if on is not None:
            on = KVBatch.stack([on[:n]] * (len(contexts) // n))
        kv = widened(self.source.prefill(contexts, len(contexts), on), width)
        others = {name: kv[(i + 1) * n : (i + 2) * n] for i, name in enumerate(more)}
        return StepData(chosen, kv[:n], masks(chosen), len(everyone), 1, everyone, **others)


def _merged(hop: StepData, past: KVBatch | None, last: StepData | None) -> StepData:
    """The receiver reads what came before first, and is not asked about a field of both."""
    if past is None or last is None:
        raw = hop.raw
        past = KVBatch(
            raw.keys[..., :1, :], raw.values[..., :1, :], torch.zeros_like(raw.valid[:, :1])
        )
        return replace(hop, before=past)
    records = _not_asked_twice(hop.records, last.records)
    everyone = _not_asked_twice(hop.everyone, last.everyone)
    return replace(hop, records=records, everyone=everyone, before=past)


def _not_asked_twice(
    records: Sequence[TokenRecord], others: Sequence[TokenRecord]
) -> list[TokenRecord]:
    out = []
    for record, other in zip(records, others, strict=False):
        twice = {s.field for s in other.spans}
        questions = tuple(q for q in record.questions if q.field not in twice)
        out.append(replace(record, questions=questions))
    return out


def _stack(hops: Sequence[StepData]) -> StepData:
    """Hops as one batch, hop after hop."""

    def stacked(parts: Sequence[KVBatch | None]) -> KVBatch | None:
        found = [p for p in parts if p is not None]
        return KVBatch.stack(found) if found else None

    raw = stacked([h.raw for h in hops])
    assert raw is not None
    return StepData(
        [r for h in hops for r in h.records],
        raw,
        Mask(torch.cat([h.mask.forbid for h in hops]), torch.cat([h.mask.derive for h in hops])),
        hops[0].n_paths,
        len(hops),
        [r for h in hops for r in h.everyone],
        stacked([h.pair for h in hops]),
        stacked([h.twin for h in hops]),
        stacked([h.one_other for h in hops]),
        stacked([h.before for h in hops]),
    )
