"""Runs an evaluation, unit by unit: every unit's attempts are committed to a journal, so a run
that was killed goes on where it stopped and ends in the same report.

A unit is one guard (or none), policy, attack and seed. Fresh attacks are fitted here, on guarded
segments of the attacker's own records, after the guard was frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from lcguard.evaluation.answers import Scoring, said_right
from lcguard.evaluation.lists import as_extra
from lcguard.evaluation.outcomes import Attempt, Journal, Outcome
from lcguard.evaluation.parallel import side_by_side
from lcguard.evaluation.plan import AttackSpec, EvalConfig, GuardSpec, PolicySpec
from lcguard.evaluation.said import says
from lcguard.evaluation.statistics import mean_over_categories
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import Attack, AttackData, Guess, KVBatch
from lcguard.records import IGNORE, TokenQuestion, TokenRecord
from lcguard.source import ModelSource
from lcguard.training.dataset import Special, attack_data, blind, guard_all, with_policy

AttackFactory = Callable[[AttackSpec, Attack | None, bool, FrozenGuard | None], Attack]
"""``(spec, warm, stop_early, guard) -> unfitted attack`` that knows the guard."""
EDGE = "edge"
"""Policy label: every record under its own edge's policy."""


class Fit(NamedTuple):
    """One attack to fit and score: on which guard (None: none), under which policy (None: each
    record's own), with which seed; ``kind`` floor takes segments of other records."""

    spec: GuardSpec | None
    policy: PolicySpec | None
    attack: AttackSpec
    seed: int
    kind: str = "attack"

    @property
    def names(self) -> tuple[str, str]:
        """The journal's names of guard and policy."""
        return (
            self.spec.name if self.spec else "none",
            self.policy.name if self.policy else EDGE,
        )


@dataclass
class Setup:
    """Everything a run needs, composed by the caller."""

    config: EvalConfig
    source: ModelSource
    special: Special
    decode: Callable[[Sequence[int]], str]
    train: list[TokenRecord]
    test: list[TokenRecord]
    guards: dict[str, FrozenGuard]
    attack: AttackFactory
    scoring: Scoring = "exact"
    """How a receiver's answers count, those to an injection's questions too."""
    say: Callable[[str], None] = lambda text: None
    timing: dict[str, dict[str, float]] = field(default_factory=dict)


class Runner:
    """One evaluation run over a journal."""

    def __init__(self, setup: Setup, journal: Journal) -> None:
        overlap = {r.scenario_id for r in setup.train} & {r.scenario_id for r in setup.test}
        if overlap:
            raise ValueError(
                f"{len(overlap)} scenarios are in both train and test, such as "
                f"{sorted(overlap)[0]!r}: attackers must not be fitted on test records"
            )
        self.s, self.journal = setup, journal
        self._raw: tuple[KVBatch, KVBatch] | None = None
        self._warm: dict[tuple[str, int], Attack] = {}
        self._pairs: dict[Any, AttackData] = {}

    # -- data

    def raw(self) -> tuple[KVBatch, KVBatch]:
        """Unguarded KV of the train and test records."""
        if self._raw is None:
            started = time.perf_counter()
            self._raw = tuple(  # type: ignore[assignment]
                self.s.source.prefill([r.ids for r in rs]) for rs in (self.s.train, self.s.test)
            )
            n = len(self.s.train) + len(self.s.test)
            self.s.timing["prefill"] = {"ms": (time.perf_counter() - started) / n * 1e3}
        assert self._raw is not None
        return self._raw

    def records(self, policy: PolicySpec | None) -> tuple[list[TokenRecord], list[TokenRecord]]:
        if policy is None:
            return self.s.train, self.s.test
        return tuple(
            with_policy(rs, policy.forbid, policy.derive) for rs in (self.s.train, self.s.test)
        )  # type: ignore[return-value]

    def pairs(
        self, spec: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> tuple[AttackData, AttackData]:
        """Attacker's and victim's pairs behind a guard (None: no guard)."""
        return self._half(spec, policy, seed, 0), self._half(spec, policy, seed, 1)

    def _half(
        self, spec: GuardSpec | None, policy: PolicySpec | None, seed: int, which: int
    ) -> AttackData:
        """The attacker's pairs (0) or the victim's (1); those of the last guard are kept."""
        key = (spec.name if spec else "", policy.name if policy else EDGE, seed)
        if any(k[:3] != key for k in self._pairs):
            self._pairs.clear()
        if (*key, which) in self._pairs:
            return self._pairs[*key, which]
        records, kv = self.records(policy)[which], self.raw()[which]
        if spec is not None:
            started = time.perf_counter()
            # the victim's noise is not the attacker's
            kv = guard_all(
                self.s.guards[spec.name],
                records,
                kv,
                self.s.source,
                self.s.special,
                seed=seed * 1_000_003 + which * 500_009,
                fixed_length=spec.fixed_length,
            )
            spent = (time.perf_counter() - started) / len(records) * 1e3
            self.s.timing.setdefault(spec.name, {})["ms"] = spent
        data = attack_data(records, kv, self.s.special)
        moved = spec is not None and (
            spec.fixed_length or self.s.guards[spec.name].placeholder != "neutral"
        )
        if moved:  # no token stands where it stood: no per-position target
            data = replace(data, context_ids=torch.full_like(data.context_ids, IGNORE))
        if spec is not None and spec.fixed_length:
            data = replace(data, meta={**data.meta, "fixed_length": True})
        self._pairs[*key, which] = data
        return data

    # -- units

    def unit(
        self,
        kind: str,
        guard: str,
        policy: str,
        attack: str,
        seed: int,
        make: Callable[[], list[Attempt]],
        detail: Any = None,
    ) -> list[Attempt]:
        """Attempts of a unit, from the journal or made and committed now."""
        identity = self._identity(kind, guard, policy, attack, seed, detail)
        known = self.journal.done(identity)
        if known is None:
            known = make()
            self.journal.write(identity, known)
        return known

    def _identity(
        self, kind: str, guard: str, policy: str, attack: str, seed: int, detail: Any
    ) -> dict[str, Any]:
        """What the journal knows a unit by."""
        return {
            "kind": kind,
            "guard": guard,
            "policy": policy,
            "attack": attack,
            "seed": seed,
            "data": asdict(self.s.config.data),
            "model": self.s.config.model,
            "detail": detail,
        }

    def utility(
        self, spec: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> list[Attempt]:
        """Is every question that the audience may ask answered right from the segment?

        ``utility`` are task questions; ``allowed`` are values of categories that the policy
        allows; ``derived`` are allowed derived answers to forbidden values.
        """

        def make() -> list[Attempt]:
            records = self.records(policy)[1]
            kv = self._half(spec, policy, seed, 1).kv
            if spec is not None:
                kv = self.s.guards[spec.name].opened(kv)
            out = []
            for kind, wanted in QUESTIONS.items():
                exact = self.s.source.exact_match(records, kv, wanted)
                right = exact
                if self.s.scoring == "said":
                    right = said_right(self.s.source, self.s.decode, records, kv, wanted)
                for r, *row in zip(records, right, exact, strict=True):
                    asked = [q for q in r.questions if wanted(r, q)]
                    for i, (q, ok, forced) in enumerate(zip(asked, *row, strict=True)):
                        out.append(
                            self._attempt(
                                r,
                                spec,
                                policy,
                                "receiver",
                                seed,
                                q.category or "task",
                                f"{q.field}/{q.kind}/{i}",
                                kind,
                                Outcome.SUCCESS if ok else Outcome.RESISTED,
                                float(forced),
                            )
                        )
            return out

        return self.unit(
            "utility",
            spec.name if spec else "none",
            policy.name if policy else EDGE,
            "receiver",
            seed,
            make,
            self._detail(spec, None),
        )

    def attack(
        self,
        spec: GuardSpec | None,
        policy: PolicySpec | None,
        attack: AttackSpec,
        seed: int,
        kind: str = "attack",
    ) -> list[Attempt]:
        """A fresh attack on a guard; with ``kind`` floor on segments of other records."""
        return self.fit([Fit(spec, policy, attack, seed, kind)])[0]

    def fit(self, fits: Sequence[Fit]) -> list[list[Attempt]]:
        """Fresh attacks, those not yet in the journal side by side."""
        missing = [f for f in fits if self.journal.done(self._fit_identity(f)) is None]
        if missing:
            self.raw()  # here, so that the children share it, and what the warm ones start from
            for f in missing:
                if f.attack.warm and f.spec is not None:
                    self.clean(f.attack, f.seed)
            done = side_by_side([partial(self._job, f) for f in missing], self.s.source.device.type)
            for f, (guesses, seconds) in zip(missing, done, strict=True):
                self.s.say(
                    f"{f.kind:9} {f.names[0]:20} {f.names[1]:14} {f.attack.name:14} "
                    f"seed {f.seed} {seconds:6.1f} s"
                )
                self.journal.write(self._fit_identity(f), self.score(guesses, f))
        return [self.journal.done(self._fit_identity(f)) or [] for f in fits]

    def _fit_identity(self, f: Fit) -> dict[str, Any]:
        return self._identity(
            f.kind, *f.names, f.attack.name, f.seed, self._detail(f.spec, f.attack)
        )

    def _job(self, f: Fit) -> tuple[list[Guess], float]:
        """Guesses, and the seconds that fitting and guessing took."""
        train, test = self.pairs(f.spec, f.policy, f.seed)
        if f.kind == "floor":
            train, test = blind(train, f.seed), blind(test, f.seed + 1)
        started = time.perf_counter()
        warm = self.clean(f.attack, f.seed) if f.attack.warm and f.spec is not None else None
        early = f.kind == "attack" and self.s.config.broken_at is not None
        guard = self.s.guards[f.spec.name] if f.spec is not None else None
        fitted = self.s.attack(f.attack, warm, early, guard).fit(train, seed=f.seed)
        return fitted.recover(test), time.perf_counter() - started

    def clean(self, attack: AttackSpec, seed: int) -> Attack:
        """The attack fitted on unguarded KV of the attacker's own records, for a warm start."""
        key = (attack.name, seed)
        if key not in self._warm:
            data = attack_data(
                with_policy(self.s.train, _all(self.s.train)), self.raw()[0], self.s.special
            )
            cold = replace(attack, warm=False, options={**attack.options, "fit": attack.clean_fit})
            self._warm[key] = self.s.attack(cold, None, True, None).fit(data, seed=seed)
        return self._warm[key]

    def score(self, guesses: Sequence[Guess], f: Fit) -> list[Attempt]:
        """Guesses against the truth, as text; one attempt per secret."""
        truth: dict[str, TokenRecord] = {r.record_id: r for r in self.records(f.policy)[1]}
        out = []
        for record_id, group in _by_record(guesses).items():
            record = truth[record_id]
            secrets = record.secrets()
            for i, (guess, secret) in enumerate(zip(group, secrets, strict=True)):
                outcome = Outcome.ERROR
                if guess.ids is not None:
                    guessed, value = (self.s.decode(x).strip() for x in (guess.ids, secret.ids))
                    replies = self.s.scoring == "said" and f.attack.attack == "injection"
                    same = says(guessed, value) if replies else guessed == value
                    outcome = Outcome.SUCCESS if same else Outcome.RESISTED
                out.append(
                    self._attempt(
                        record,
                        f.spec,
                        f.policy,
                        f.attack.name,
                        f.seed,
                        secret.category,
                        f"{secret.field}/{i}",
                        f.kind,
                        outcome,
                        guess.token_accuracy,
                        guess.nll_nats,
                        as_extra(guess),
                    )
                )
        return out

    def _attempt(
        self,
        r: TokenRecord,
        spec: GuardSpec | None,
        policy: PolicySpec | None,
        attack: str,
        seed: int,
        category: str,
        field_name: str,
        kind: Any,
        outcome: Outcome,
        score: float | None = None,
        nll: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Attempt:
        return Attempt(
            scenario=r.scenario_id,
            edge=r.edge,
            record=r.record_id,
            guard=spec.name if spec else "none",
            policy=policy.name if policy else EDGE,
            attack=attack,
            seed=seed,
            category=category,
            field=field_name,
            kind=kind,
            outcome=outcome,
            score=score,
            nll_nats=nll,
            extra=extra or {},
        )

    def _detail(self, spec: GuardSpec | None, attack: AttackSpec | None) -> dict[str, Any]:
        """What must be the same for a stored unit to count as done."""
        guard = self.s.guards[spec.name].digest if spec else None
        return {
            "guard": guard,
            "fixed_length": bool(spec and spec.fixed_length),
            "attack": asdict(attack) if attack else None,
            "broken_at": self.s.config.broken_at,
        }

    def run_guard(
        self,
        spec: GuardSpec | None,
        policy: PolicySpec | None,
        seed: int,
        attacks: Sequence[AttackSpec],
    ) -> list[Attempt]:
        """All attacks on a guard; only the first, the cheapest, where that has broken it."""
        first, *rest = chosen(spec, attacks)
        found = self.attack(spec, policy, first, seed)
        if self.broken(found):
            return found
        more = self.fit([Fit(spec, policy, a, seed) for a in rest])
        return found + [a for group in more for a in group]

    def broken(self, attempts: Sequence[Attempt]) -> bool:
        """Did an attack recover so much that others are not asked?"""
        limit = self.s.config.broken_at
        value = mean_over_categories(attempts, n_boot=2).value
        return limit is not None and value is not None and value >= limit


def chosen(spec: GuardSpec | None, attacks: Sequence[AttackSpec]) -> list[AttackSpec]:
    """Those of the attacks that the guard's entry asks for, but for those on lists."""
    return [a for a in _asked(spec, attacks) if not a.lists]


def on_lists(
    spec: GuardSpec | None, policy: PolicySpec | None, attacks: Sequence[AttackSpec],
    seeds: Sequence[int],
) -> list[Fit]:  # fmt: skip
    """The attacks that choose from lists: on every guard, also one that is broken already."""
    return [
        Fit(spec, policy, a, seed, "likelihood")
        for seed in seeds
        for a in _asked(spec, attacks)
        if a.lists
    ]


def _asked(spec: GuardSpec | None, attacks: Sequence[AttackSpec]) -> list[AttackSpec]:
    return [a for a in attacks if not spec or not spec.attacks or a.name in spec.attacks]


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


QUESTIONS = {"utility": is_task, "allowed": is_allowed, "derived": is_derived}


def _all(records: Sequence[TokenRecord]) -> tuple[str, ...]:
    return tuple(sorted({s.category for r in records for s in r.spans if s.category is not None}))


def _by_record(guesses: Sequence[Guess]) -> dict[str, list[Guess]]:
    out: dict[str, list[Guess]] = {}
    for guess in guesses:
        out.setdefault(guess.record_id, []).append(guess)
    return out
