"""Runs an evaluation, unit by unit: every unit's attempts are committed to a journal, so a run
that was killed goes on where it stopped and ends in the same report.

A unit is one case: attack, guard, policy and seed on one topology. Attacks are fitted here, on
guarded segments of the attacker's own records, after the guard was frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lcguard.agents.backends.hf import HFBackend
from lcguard.attacks.base import BaseAttack, attack_class
from lcguard.evaluation.hashing import digest
from lcguard.evaluation.leakage import GRAPH
from lcguard.evaluation.lists import as_extra
from lcguard.evaluation.load import make_attack
from lcguard.evaluation.outcomes import Attempt, Journal, Kind, Outcome
from lcguard.evaluation.parallel import Executor, side_by_side
from lcguard.evaluation.plan import AttackSpec, GuardSpec, Plan, PolicySpec
from lcguard.evaluation.said import outcome_of
from lcguard.evaluation.segments import ATTACKER, VICTIM, Segments, Side
from lcguard.evaluation.statistics import mean_over_categories
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import AttackData, Guess, Secret
from lcguard.records import TokenRecord
from lcguard.training.dataset import blind

EDGE = "edge"
"""Policy label: every record under its own edge's policy."""
RECEIVER = "receiver"
"""Who is questioned for utility, in the place of an attack."""
WON = 0.97
"""A fit ends at this share of its own held-back pairs, where a broken guard is let go."""


@dataclass(frozen=True)
class Case:
    """One unit of work: an attack to fit and score, or the receiver to question."""

    hops: Segments
    """The topology, with both sides' records on it."""
    guard: GuardSpec | None = None
    """With its variant; None: segments cross unguarded."""
    policy: PolicySpec | None = None
    """None: each record's own."""
    attack: AttackSpec | None = None
    """None: the receiver."""
    seed: int = 0
    kind: Kind = "attack"
    """``floor``: on segments of other records."""

    @property
    def names(self) -> dict[str, Any]:
        """What journal and report call it."""
        return {
            "guard": self.guard.label if self.guard else "none",
            "policy": self.policy.name if self.policy else EDGE,
            "attack": self.attack.name if self.attack else RECEIVER,
            "seed": self.seed,
            "kind": self.kind,
        }


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs, whatever its topologies."""

    plan: Plan
    model: HFBackend
    guards: Mapping[str, FrozenGuard]
    """By label."""
    say: Callable[[str], None] = lambda text: None
    executor: Executor = side_by_side


class Runner:
    """Cases over a journal."""

    def __init__(self, setup: Setup, journal: Journal) -> None:
        self.s, self.journal = setup, journal
        self._clean: dict[tuple[str, int], BaseAttack] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a worker of another process gets, which fits and says and writes nothing."""
        setup = Setup(self.s.plan, self.s.model, self.s.guards)
        return {"s": setup, "_clean": self._clean}

    def identity(self, case: Case) -> dict[str, Any]:
        """What must be the same for a stored unit to count as done."""
        return {
            "topology": case.hops.name,
            **case.names,
            "model": self.s.plan.model,
            "detail": {
                "format": self.journal.FORMAT,
                "topology": case.hops.identity,
                "guard": self.s.guards[case.guard.label].digest if case.guard else None,
                "fixed_length": bool(case.guard and case.guard.fixed_length),
                "attack": asdict(case.attack) if case.attack else None,
                "broken_at": self.s.plan.broken_at,
            },
        }

    def utility(self, case: Case) -> list[Attempt]:
        """Is every question that the audiences may ask answered right from the segments?"""
        case = replace(case, attack=None, kind="utility")
        known = self.journal.done(self.identity(case))
        if known is None:
            known = [
                _attempt(
                    case,
                    a.record,
                    edge=a.record.edge,
                    category=a.question.category or "task",
                    field=a.name,
                    kind=a.kind,
                    outcome=Outcome.SUCCESS if a.right else Outcome.RESISTED,
                    score=a.score,
                )
                for a in case.hops.answers(case.guard, case.policy, case.seed)
            ]
            self.journal.write(self.identity(case), known)
        return known

    def fit(self, cases: Sequence[Case], *, apart: bool = True) -> list[list[Attempt]]:
        """Fresh attacks; those not yet in the journal side by side, in processes of their own
        unless ``apart`` is False."""
        missing = [c for c in cases if self.journal.done(self.identity(c)) is None]
        for c in missing:  # here, so that the children share it
            c.hops.prepare(c.guard, c.policy, c.seed)
            self.warm_start(c)
        jobs = [partial(self._job, c) for c in missing]
        device = self.s.model.source.device.type
        done = self.s.executor(jobs, device) if apart else enumerate(job() for job in jobs)
        for i, (guesses, seconds) in done:
            c = missing[i]
            n = c.names
            self.s.say(
                f"{c.kind:9} {n['guard']:20} {c.hops.name + ' ' + n['policy']:14} "
                f"{n['attack']:14} seed {c.seed} {seconds:6.1f} s"
            )
            self.journal.write(self.identity(c), self.score(c, guesses))
        return [self.journal.done(self.identity(c)) or [] for c in cases]

    def _job(self, case: Case) -> tuple[list[Guess], float]:
        """Guesses, and the seconds that fitting and guessing took."""
        assert case.attack is not None
        data = [self.pairs(case, side) for side in (ATTACKER, VICTIM)]
        if case.kind == "floor":
            data = [blind(d, case.seed + i) for i, d in enumerate(data)]
        started = time.perf_counter()
        attack = make_attack(
            self.s.model,
            case.attack,
            self.s.guards[case.guard.label] if case.guard else None,
            stop_at=None if case.kind == "floor" else self._won,
            start=self.warm_start(case),
        )
        return attack.fit(data[0], seed=case.seed).recover(data[1]), time.perf_counter() - started

    @property
    def _won(self) -> float | None:
        return WON if self.s.plan.broken_at else None

    def pairs(self, case: Case, side: Side) -> AttackData:
        """The segments that the attack reads: single ones, or all of a scenario together."""
        seen = case.hops.observed(case.guard, case.policy, case.seed, side)
        if not _joint(case):
            return seen.single
        assert seen.joint is not None
        return seen.joint

    def warm_start(self, case: Case) -> BaseAttack | None:
        """What a warm attack on a guard starts from: fitted on raw KV of the attackers' own."""
        spec = case.attack
        if spec is None or not spec.warm or case.guard is None:
            return None
        cls = attack_class(spec.attack)
        if not cls.starts_from:
            return None
        options = {**cls.clean_options(spec.options), "fit": spec.clean_fit}
        cold = AttackSpec(name="clean", attack=cls.starts_from, options=options)
        key = digest(asdict(cold)), case.seed
        if key not in self._clean:
            started = time.perf_counter()
            attack = make_attack(self.s.model, cold, stop_at=self._won)
            self._clean[key] = attack.fit(case.hops.unguarded(), seed=case.seed)
            seconds = time.perf_counter() - started
            self.s.say(f"clean {cold.attack} for warm starts, seed {case.seed} {seconds:6.1f} s")
        return self._clean[key]

    def run_guard(
        self, case: Case, attacks: Sequence[AttackSpec], *, everything: bool = False
    ) -> list[Attempt]:
        """All attacks on a guard; only the first, the cheapest, where that has broken it, unless
        ``everything`` is wanted."""
        first, *rest = [replace(case, attack=a) for a in attacks]
        found = self.fit([first])[0]
        if self.broken(found) and not everything:
            return found
        return found + [a for group in self.fit(rest) for a in group]

    def broken(self, attempts: Sequence[Attempt]) -> bool:
        """Did an attack recover so much that others are not asked?"""
        limit = self.s.plan.broken_at
        value = mean_over_categories(attempts, n_boot=2).value
        return limit is not None and value is not None and value >= limit

    def score(self, case: Case, guesses: Sequence[Guess]) -> list[Attempt]:
        """Guesses against the truth, as text; one attempt a secret, whose better outcome counts
        where it stands in several of the segments that were read together."""
        assert case.attack is not None
        replies = case.hops.replies and attack_class(case.attack.attack).replies
        out: dict[str, Attempt] = {}
        for record, secret, guess in self._judged(case, guesses):
            outcome = outcome_of(guess, secret, self.s.model.decode, replies)
            found = _attempt(
                case,
                record,
                edge=GRAPH if _joint(case) else record.edge,
                category=secret.category,
                field=f"{secret.field}/{secret.positions[0]}",
                kind=case.kind,
                outcome=outcome,
                score=guess.token_accuracy,
                nll_nats=guess.nll_nats,
                extra=as_extra(guess),
            )
            if found.key not in out or outcome is Outcome.SUCCESS:
                out[found.key] = found
        return list(out.values())

    def _judged(
        self, case: Case, guesses: Sequence[Guess]
    ) -> Iterator[tuple[TokenRecord, Secret, Guess]]:
        """Each guess with the secret that it is about. An attack may leave out whole records that
        it did not try; never part of one."""
        if _joint(case):
            left = iter(guesses)
            seen = case.hops.observed(case.guard, case.policy, case.seed, VICTIM)
            for record in (record for owners in seen.owners for record in owners):
                for secret in record.secrets():
                    yield record, secret, next(left)
            return
        rows = case.hops.secrets(case.guard, case.policy, case.seed)
        grouped: dict[str, list[Guess]] = {}
        for guess in guesses:
            grouped.setdefault(guess.record_id, []).append(guess)
        for name, group in grouped.items():
            for guess, secret in zip(group, rows[name].secrets(), strict=True):
                yield rows[name], secret, guess


def _joint(case: Case) -> bool:
    return (
        case.hops.several
        and case.attack is not None
        and attack_class(case.attack.attack).reads_joint
    )


def _attempt(case: Case, record: TokenRecord, **found: Any) -> Attempt:
    ids = {"scenario": record.scenario_id, "record": record.record_id}
    return Attempt(**{**ids, **case.names, **found})
