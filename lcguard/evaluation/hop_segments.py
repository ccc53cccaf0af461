"""Segments over one hop: records of any data set, under their own policies or another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lcguard.agents.backends.hf import HFBackend
from lcguard.evaluation.answers import Scoring, said_right
from lcguard.evaluation.outcomes import Kind
from lcguard.evaluation.plan import DataConfig, GuardSpec, PolicySpec
from lcguard.evaluation.segments import (
    ATTACKER,
    VICTIM,
    Answer,
    Observed,
    Segments,
    Side,
    noise_seed,
)
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import AttackData, KVBatch
from lcguard.records import IGNORE, TokenQuestion, TokenRecord
from lcguard.source import Wanted
from lcguard.training.dataset import attack_data, guard_all, with_policy

Timing = dict[str, dict[str, float]]
Key = tuple[str, str, int, Side]
"""Guard, policy, seed and side."""


class HopSegments(Segments):
    """A sender's records and what reaches the receiver. The last guard's segments are kept, and
    those of every guard that has the model prefill again.

    Raises ``ValueError`` where a scenario is on both sides.
    """

    name = "hop"
    several = False

    def __init__(
        self,
        model: HFBackend,
        guards: Mapping[str, FrozenGuard],
        sides: tuple[list[TokenRecord], list[TokenRecord]],
        data: DataConfig,
        *,
        scoring: Scoring = "exact",
    ) -> None:
        overlap = {r.scenario_id for r in sides[0]} & {r.scenario_id for r in sides[1]}
        if overlap:
            raise ValueError(
                f"{len(overlap)} scenarios are in both train and test, such as "
                f"{sorted(overlap)[0]!r}: attackers must not be fitted on test records"
            )
        self.model, self.guards, self.sides, self.data = model, guards, sides, data
        self.replies = scoring == "said"
        self.timing: Timing = {}
        """Milliseconds a record, under ``prefill`` and each guard's name."""
        self._raw: dict[Side, KVBatch] = {}
        self._seen: dict[Key, Observed] = {}
        self._twins: dict[Key, Observed] = {}

    @property
    def identity(self) -> dict[str, Any]:
        return {"data": asdict(self.data)}

    def raw(self, side: Side) -> KVBatch:
        """Unguarded KV of one side's records."""
        if side not in self._raw:
            records, started = self.sides[side], time.perf_counter()
            self._raw[side] = self.model.source.prefill([r.ids for r in records])
            spent = (time.perf_counter() - started) / max(1, len(records)) * 1e3
            self.timing["prefill"] = {"ms": spent}
        return self._raw[side]

    def records(self, policy: PolicySpec | None, side: Side) -> list[TokenRecord]:
        if policy is None:
            return self.sides[side]
        return with_policy(self.sides[side], policy.forbid, policy.derive)

    def prepare(self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int) -> None:
        for side in (ATTACKER, VICTIM):  # a child guards what it attacks itself
            self.raw(side)
            if guard is not None and self.guards[guard.name].needs_twin:  # but does not prefill
                self.observed(guard, policy, seed, side)

    def observed(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int, side: Side
    ) -> Observed:
        key = (guard.name if guard else "", policy.name if policy else "", seed, side)
        kept = self._seen
        if guard is not None and self.guards[guard.name].needs_twin:
            kept = self._twins
        elif any(k[:3] != key[:3] for k in kept):
            kept.clear()
        if key not in kept:
            records = self.records(policy, side)
            kept[key] = Observed(self._attacked(guard, records, seed, side), tuple(records))
        return kept[key]

    def _attacked(
        self, guard: GuardSpec | None, records: Sequence[TokenRecord], seed: int, side: Side
    ) -> AttackData:
        kv, special = self.raw(side), self.model.special
        if guard is None or (guard.passes_raw and not guard.fixed_length):
            return attack_data(records, kv, special)  # not a copy for every child
        frozen, started = self.guards[guard.name], time.perf_counter()
        kv = guard_all(
            frozen,
            records,
            kv,
            self.model.source,
            special,
            seed=noise_seed(seed, side),
            fixed_length=guard.fixed_length,
        )
        spent = (time.perf_counter() - started) / len(records) * 1e3
        self.timing.setdefault(guard.name, {})["ms"] = spent
        data = attack_data(records, kv, special)
        if guard.fixed_length or frozen.placeholder != "neutral":
            # no token stands where it stood: no per-position target
            data = replace(data, context_ids=torch.full_like(data.context_ids, IGNORE))
        if guard.fixed_length:
            data = replace(data, fixed_length=True)
        return data

    def answers(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> Iterator[Answer]:
        """``utility`` are task questions; ``allowed`` are values of categories that the policy
        allows; ``derived`` are allowed derived answers to forbidden values."""
        records = self.records(policy, VICTIM)
        kv = self.observed(guard, policy, seed, VICTIM).single.kv
        if guard is not None:
            kv = self.guards[guard.name].opened(kv)
        source = self.model.source
        for kind, wanted in QUESTIONS.items():
            exact = source.exact_match(records, kv, wanted)
            right = exact
            if self.replies:
                right = said_right(source, self.model.decode, records, kv, wanted)
            for r, *row in zip(records, right, exact, strict=True):
                asked = [q for q in r.questions if wanted(r, q)]
                for i, (q, ok, forced) in enumerate(zip(asked, *row, strict=True)):
                    yield Answer(r, q, f"{q.field}/{q.kind}/{i}", kind, ok, float(forced))

    def unguarded(self) -> AttackData:
        """The attackers' records with every value a secret."""
        own = self.sides[ATTACKER]
        categories = {s.category for r in own for s in r.spans if s.category is not None}
        records = with_policy(own, sorted(categories))
        return attack_data(records, self.raw(ATTACKER), self.model.special)

    def secrets(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> dict[str, TokenRecord]:
        return {r.record_id: r for r in self.records(policy, VICTIM)}


def is_task(record: TokenRecord, question: TokenQuestion) -> bool:
    return question.task and question.kind != "absent"


def is_allowed(record: TokenRecord, question: TokenQuestion) -> bool:
    """A direct question about a value of a category that the policy does not forbid."""
    return (
        question.kind == "direct"
        and question.category is not None
        and question.category not in record.forbid
    )


def is_derived(record: TokenRecord, question: TokenQuestion) -> bool:
    """An allowed derived answer to a forbidden value."""
    return question.kind == "derived" and question.category in record.derive


QUESTIONS: dict[Kind, Wanted] = {"utility": is_task, "allowed": is_allowed, "derived": is_derived}
