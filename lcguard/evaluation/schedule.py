"""Fits all that a report of one hop will ask for before it is put together, in two rounds, so that
every core is busy to the end: guard by guard, one long attack would keep the others waiting.

The first round holds the floors and the cheapest attack of each guard and policy; the second the
other attacks on whatever that did not break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lcguard.evaluation.hop_segments import HopSegments
from lcguard.evaluation.outcomes import Attempt
from lcguard.evaluation.plan import AttackSpec, EvalConfig, GuardSpec, PolicySpec
from lcguard.evaluation.runner import Case, Runner
from lcguard.evaluation.segments import VICTIM

INJECTION = AttackSpec("injection", "injection")


@dataclass(frozen=True)
class Challenge:
    """A guard under a policy (None: each record's own), and the attacks that it has to stand."""

    guard: GuardSpec
    policy: PolicySpec | None
    attacks: Sequence[AttackSpec]

    @property
    def writers(self) -> list[AttackSpec]:
        """Those that write values, the cheapest first."""
        return [a for a in self.guard.asked(self.attacks) if not a.lists]


@dataclass(frozen=True)
class HopRun:
    """One hop under a plan: the cases that its report is made of."""

    runner: Runner
    plan: EvalConfig
    hops: HopSegments

    def case(
        self, guard: GuardSpec | None, policy: PolicySpec | None = None, seed: int = 0
    ) -> Case:
        return Case(self.hops, guard, policy, seed=seed)

    def cases(self, challenge: Challenge) -> list[Case]:
        """One for every seed, without an attack yet."""
        return [self.case(challenge.guard, challenge.policy, s) for s in self.plan.seeds]

    def attacked(self, challenge: Challenge) -> list[Attempt]:
        """By all writers of values and seeds."""
        cases, writers = self.cases(challenge), challenge.writers
        return [a for case in cases for a in self.runner.run_guard(case, writers)]

    def injected(self, guard: GuardSpec) -> list[Attempt]:
        """By prompt injection, with all seeds."""
        return self._flat(
            [replace(self.case(guard, seed=s), attack=INJECTION) for s in self.plan.seeds]
        )

    def utility(self, guard: GuardSpec | None, policy: PolicySpec | None = None) -> list[Attempt]:
        """With all seeds; what passes raw has no noise, so the first will do, asked once a run."""
        if guard is not None and guard.passes_raw:
            guard = None
        seeds = self.plan.seeds if guard else self.plan.seeds[:1]
        return [a for s in seeds for a in self.runner.utility(self.case(guard, policy, s))]

    def floor(self) -> list[Attempt]:
        return self._flat(self.floors())

    def floors(self) -> list[Case]:
        """The blind floor of those who write values."""
        case = replace(self.case(None), attack=self.plan.floor_attack, kind="floor")
        return [replace(case, seed=s) for s in self.plan.seeds]

    def blind_lists(self) -> list[Case]:
        """The attacks on lists, on segments of other records; their long lists show nothing
        there."""
        blind = [
            replace(a, name=f"{a.name}-blind", options={**a.options, "long_records": 0})
            for a in self.plan.attacks
            if a.lists
        ]
        case = replace(self.case(None), kind="floor")
        return [replace(case, attack=a, seed=s) for s in self.plan.seeds for a in blind]

    def on_lists(self, challenge: Challenge) -> list[Case]:
        """The attacks that choose from lists: also on a guard that is broken already, but there
        one seed is enough."""
        cases = self.cases(challenge)
        cheapest = replace(cases[0], attack=challenge.writers[0])
        if self.runner.broken(self.runner.fit([cheapest])[0]):
            cases = cases[:1]
        lists = [a for a in challenge.guard.asked(challenge.attacks) if a.lists]
        return [replace(c, attack=a, kind="likelihood") for c in cases for a in lists]

    def chosen_from_lists(self, challenge: Challenge) -> tuple[list[Attempt], list[Attempt]]:
        """What they recover, and what they do blind, of the same categories."""
        found = self._flat(self.on_lists(challenge))
        categories = {a.category for a in found}
        blind = self._flat(self.blind_lists())
        return found, [a for a in blind if a.category in categories]

    def _flat(self, cases: Sequence[Case]) -> list[Attempt]:
        return [a for group in self.runner.fit(cases) for a in group]

    def fit_ahead(self) -> None:
        """Everything that the report asks for, into the runner's journal."""
        first = [*self.floors(), *self.blind_lists()]
        challenges = list(self.challenges())
        for c in challenges:
            for case in self.cases(c):
                if c.policy is None and self.plan.injection:
                    first.append(replace(case, attack=INJECTION))
                first.append(replace(case, attack=c.writers[0]))
        self.runner.fit(first)
        rest = []
        for c in challenges:
            cheapest, *others = c.writers
            for case in self.cases(c):
                if not self.runner.broken(self.runner.fit([replace(case, attack=cheapest)])[0]):
                    rest += [replace(case, attack=a) for a in others]
        for c in challenges:
            if c.policy is None or c.policy is not self.plan.derived:
                rest += self.on_lists(c)
        # the longest first, so that no core waits at the end for a long fit of another
        rank = {a.name: k for k, a in enumerate(a for a in self.plan.attacks if not a.lists)}
        self.runner.fit(sorted(rest, key=lambda c: -rank.get(c.names["attack"], 0)))

    def challenges(self) -> Iterator[Challenge]:
        """Every guard under the records' own policies, and one of them under the others."""
        for guard in self.plan.guards:
            yield Challenge(guard, None, self.plan.attacks)
        derived = self.plan.derived
        for policy in [*self.plan.policies, *([] if derived is None else [derived])]:
            challenge = self.challenge(policy)
            if policy.forbid and challenge.policy is not None:
                yield challenge

    def challenge(self, policy: PolicySpec) -> Challenge:
        """The chosen guard under a policy. Where the records' own edges say the same, their
        attacks are the answer already."""
        guard = next(g for g in self.plan.guards if g.name == self.plan.policy_guard)
        if policy is not self.plan.derived and self._is_edge_policy(policy):
            return Challenge(guard, None, self.plan.attacks)
        attacks = [a for a in self.plan.attacks if a.name in self.plan.policy_attacks]
        return Challenge(guard, policy, attacks or self.plan.attacks)

    def _is_edge_policy(self, policy: PolicySpec) -> bool:
        """Does every test record's edge forbid just what the policy does?"""
        wanted = (set(policy.forbid), set(policy.derive))
        return all((set(r.forbid), set(r.derive)) == wanted for r in self.hops.sides[VICTIM])
