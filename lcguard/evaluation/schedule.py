"""Fits all that a report will ask for before it is put together, in two rounds, so that every core
is busy to the end: guard by guard, one long attack would keep the others waiting.

The first round holds the floors and the cheapest attack of each guard and policy; the second the
other attacks on whatever that did not break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lcguard.evaluation.plan import AttackSpec, EvalConfig, GuardSpec, PolicySpec
from lcguard.evaluation.runner import Fit, Runner, chosen, on_lists

INJECTION = AttackSpec("injection", "injection")


class Case(NamedTuple):
    """A guard under a policy (None: each record's own), and the attacks that it has to stand."""

    spec: GuardSpec
    policy: PolicySpec | None
    attacks: Sequence[AttackSpec]


def fit_ahead(runner: Runner) -> None:
    """Everything that ``summary.run_all`` asks for, into the runner's journal."""
    c = runner.s.config
    cases = [(case, seed) for case in cases_of(runner) for seed in c.seeds]
    first = [Fit(None, None, floor_attack(c), seed, "floor") for seed in c.seeds]
    first += blind_lists(c)
    for case, seed in cases:
        if case.policy is None and c.injection:
            first.append(Fit(case.spec, None, INJECTION, seed))
        first.append(Fit(case.spec, case.policy, chosen(case.spec, case.attacks)[0], seed))
    runner.fit(first)
    rest = []
    for case, seed in cases:
        cheapest, *others = chosen(case.spec, case.attacks)
        if not runner.broken(runner.attack(case.spec, case.policy, cheapest, seed)):
            rest += [Fit(case.spec, case.policy, a, seed) for a in others]
    for case in cases_of(runner):
        if case.policy is None or case.policy is not c.derived:
            rest += on_lists(*case, seeds=list_seeds(runner, case))
    runner.fit(rest)


def list_seeds(runner: Runner, case: Case) -> Sequence[int]:
    """One seed is enough for what the cheapest attack has broken."""
    seeds = runner.s.config.seeds
    cheapest = chosen(case.spec, case.attacks)[0]
    found = runner.attack(case.spec, case.policy, cheapest, seeds[0])
    return seeds[:1] if runner.broken(found) else seeds


def blind_lists(c: EvalConfig) -> list[Fit]:
    """The attacks on lists, on segments of other records; their long lists show nothing there."""
    blind = [
        replace(a, name=f"{a.name}-blind", options={**a.options, "long_records": 0})
        for a in c.attacks
        if a.lists
    ]
    return [Fit(None, None, a, seed, "floor") for seed in c.seeds for a in blind]


def cases_of(runner: Runner) -> Iterator[Case]:
    """Every guard under the records' own policies, and one of them under the others."""
    c = runner.s.config
    for spec in c.guards:
        yield Case(spec, None, c.attacks)
    for policy in [*c.policies, *([] if c.derived is None else [c.derived])]:
        case = policy_case(runner, policy)
        if policy.forbid and case.policy is not None:
            yield case


def policy_case(runner: Runner, policy: PolicySpec) -> Case:
    """The chosen guard under a policy. Where the records' own edges say the same, their attacks
    are the answer already."""
    c = runner.s.config
    spec = next(g for g in c.guards if g.name == c.policy_guard)
    if policy is not c.derived and is_edge_policy(runner, policy):
        return Case(spec, None, c.attacks)
    attacks = [a for a in c.attacks if a.name in c.policy_attacks]
    return Case(spec, policy, attacks or c.attacks)


def is_edge_policy(runner: Runner, policy: PolicySpec) -> bool:
    """Does every test record's edge forbid just what the policy does?"""
    wanted = (set(policy.forbid), set(policy.derive))
    return all((set(r.forbid), set(r.derive)) == wanted for r in runner.s.test)


def floor_attack(c: EvalConfig) -> AttackSpec:
    """Nothing is to be found in another record's segment, so the cheapest writer of values will
    do; one that starts warm starts cold here."""
    writers = [a for a in c.attacks if not a.lists]
    writer = next((a for a in writers if a.attack != "probe"), writers[0])
    return replace(writer, name=f"{writer.name}-blind", warm=False)
