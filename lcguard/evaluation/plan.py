"""What one evaluation run does; one YAML file, unknown keys refused.

``Plan`` is what every evaluation says. ``EvalConfig`` adds what there is over one hop, a chain of
two agents; ``multihop_plan.MultihopConfig`` what there is over a graph. The file's key ``kind``
tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lcguard.categories import CATEGORIES

LIKELIHOOD = "likelihood"
"""The attack whose figures stand apart: its task, and so its floor, is another."""


ENTRY_READERS = ("probe", "inversion", "linear")
"""Attacks that name what stands at an entry, and learn no values: their guess is no floor."""


@dataclass(frozen=True)
class GuardSpec:
    """A guard under test."""

    name: str
    """Label in the report."""
    guard: str = ""
    """Registered name, for guards without weights; else give ``path``."""
    path: str = ""
    """A guard's folder, a repository, or ``nano:NAME`` for one shipped with the nano agent."""
    options: dict[str, Any] = field(default_factory=dict)
    fixed_length: bool = False
    """Redaction that also hides how long each value was."""
    attacks: tuple[str, ...] = ()
    """Names of the attacks that are run on it; empty: all."""

    @property
    def label(self) -> str:
        """What a journal calls it."""
        return self.name

    @property
    def passes_raw(self) -> bool:
        """What it lets through is what the unguarded receiver reads."""
        return self.guard == "identity" and not self.options

    def asked(self, attacks: Sequence[AttackSpec]) -> list[AttackSpec]:
        """Those of the attacks that are run on it."""
        return [a for a in attacks if not self.attacks or a.name in self.attacks]


@dataclass(frozen=True)
class AttackSpec:
    """A fresh attack."""

    name: str
    attack: str = "decoder"
    options: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    """Start from the same attack fitted on clean KV."""
    clean_fit: dict[str, Any] = field(default_factory=lambda: {"steps": 500})
    """How that one is fitted."""

    @property
    def lists(self) -> bool:
        """Does it choose from lists of candidates, instead of writing a value?"""
        return self.attack == LIKELIHOOD


@dataclass(frozen=True)
class PolicySpec:
    name: str
    forbid: tuple[str, ...] = CATEGORIES
    derive: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """Where records come from. Attackers are fitted on ``train``, everything is measured on
    ``test``; the two share no scenario."""

    source: Literal["generator", "agentleak", "privacylens", "magpie", "jsonl"] = "generator"
    path: str = ""
    """Folder or file of the source; for the benchmarks the default is ``LCGUARD_DATA``."""
    seed: int = 1000
    train_records: int = 1200
    test_records: int = 256
    train_share: float | None = None
    """Share of a benchmark's scenarios on the attackers' side, so that a detector's split stays
    when fewer records are measured; these are then taken evenly. None: by the records asked for,
    the first ones."""
    min_fields: int = 5
    max_fields: int = 8
    forms: tuple[str, ...] = ("note",)
    """Layouts of generated records: note, json, table, mail, chat, ticket, sections."""


@dataclass(frozen=True)
class Plan:
    """What evaluations of every kind say."""

    title: str = "LCGuard evaluation"
    model: str = "nano"
    """``nano`` or a model folder or repository."""
    attacks: tuple[AttackSpec, ...] = ()
    """The cheapest first: where it breaks a guard the others are not run."""
    seeds: tuple[int, ...] = (0,)
    broken_at: float | None = 0.9
    """Skip a guard's remaining attacks once one recovers this share; None runs all."""
    error_budget: int = 0
    """Attempts that may end in an error before the run counts as failed."""
    quick: bool = False
    """As ``--quick`` makes it, with less of everything: its figures judge no guard."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty; give at least one")
        if self.error_budget < 0:
            raise ValueError(f"error_budget is {self.error_budget}; give 0 or more")


def twice(names: Iterable[str]) -> str | None:
    """The first of the names, in the alphabet's order, that stands more than once."""
    listed = list(names)
    return min((n for n in listed if listed.count(n) > 1), default=None)


@dataclass(frozen=True)
class EvalConfig(Plan):
    """One hop: a chain of two agents."""

    kind: Literal["hop"] = "hop"
    data: DataConfig = field(default_factory=DataConfig)
    guards: tuple[GuardSpec, ...] = ()
    policies: tuple[PolicySpec, ...] = ()
    """Policies under which the guard of ``policy_guard`` is measured."""
    policy_guard: str = "gate"
    policy_attacks: tuple[str, ...] = ()
    """Names of the fresh attacks used there."""
    derived: PolicySpec | None = None
    """Policy under which derived answers to forbidden values are measured."""
    injection: bool = True
    scoring: Literal["auto", "exact", "said"] = "auto"
    """Whether a receiver's answer counts by what it says in a reply of its own, or by exact match
    of the bare value, teacher-forced; ``auto``: the latter for nano, which was trained to it."""
    explain: int = 2
    """Contexts shown token by token in the report."""

    @property
    def by_reply(self) -> bool:
        """True where answers count by what is said."""
        return self.scoring == "said" or (self.scoring == "auto" and self.model != "nano")

    @property
    def floor_attack(self) -> AttackSpec:
        """Nothing is to be found in another record's segment, so the cheapest writer of values will
        do; one that starts warm starts cold here."""
        writers = [a for a in self.attacks if not a.lists]
        writer = next((a for a in writers if a.attack not in ENTRY_READERS), writers[0])
        return replace(writer, name=f"{writer.name}-blind", warm=False)

    @property
    def units(self) -> int:
        """Units at most: fewer are made where the first attack breaks a guard."""
        seeds = len(self.seeds)
        # floors, and the unguarded receiver
        total = seeds * (1 + sum(a.lists for a in self.attacks)) + 1
        for guard in self.guards:
            utility = int(not guard.passes_raw)
            total += seeds * (utility + int(self.injection) + len(guard.asked(self.attacks)))
        chosen = len(self.policy_attacks) or len(self.attacks)
        extra = [*self.policies, *([self.derived] if self.derived else [])]
        return total + sum(1 + seeds * (1 + (chosen if p.forbid else 0)) for p in extra)

    def __post_init__(self) -> None:
        for kind, specs in (
            ("guards", self.guards),
            ("attacks", self.attacks),
            ("policies", self.policies),
        ):
            if name := twice(s.name for s in specs):
                raise ValueError(f"{kind}: the name {name!r} is used twice")
        known = [a.name for a in self.attacks]
        named = {
            **{f"guard {g.name!r}": g.attacks for g in self.guards},
            "policy_attacks": self.policy_attacks,
        }
        for what, names in named.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"{what}: {name!r} is not one of attacks: {known}")
            if names and all(a.lists for a in self.attacks if a.name in names):
                raise ValueError(f"{what}: beside {names[0]!r} name one that writes values")
        if self.policies and self.policy_guard not in [g.name for g in self.guards]:
            raise ValueError(f"policy_guard {self.policy_guard!r} is not one of guards")
        super().__post_init__()
