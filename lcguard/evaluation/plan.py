"""What one evaluation run does; one YAML file, unknown keys refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lcguard.categories import CATEGORIES

LIKELIHOOD = "likelihood"
"""The attack whose figures stand apart: its task, and so its floor, is another."""


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
    min_fields: int = 5
    max_fields: int = 8


@dataclass(frozen=True)
class EvalConfig:
    title: str = "LCGuard evaluation"
    model: str = "nano"
    """``nano`` or a model folder or repository."""
    data: DataConfig = field(default_factory=DataConfig)
    guards: tuple[GuardSpec, ...] = ()
    attacks: tuple[AttackSpec, ...] = ()
    policies: tuple[PolicySpec, ...] = ()
    """Policies under which the guard of ``policy_guard`` is measured."""
    policy_guard: str = "gate"
    policy_attacks: tuple[str, ...] = ()
    """Names of the fresh attacks used there."""
    derived: PolicySpec | None = None
    """Policy under which derived answers to forbidden values are measured."""
    seeds: tuple[int, ...] = (0,)
    broken_at: float | None = 0.9
    """Skip a guard's remaining attacks once one recovers this share; None runs all."""
    injection: bool = True
    scoring: Literal["auto", "exact", "said"] = "auto"
    """Whether a receiver's answer counts by what it says in a reply of its own, or by exact match
    of the bare value, teacher-forced; ``auto``: the latter for nano, which was trained to it."""
    explain: int = 2
    """Contexts shown token by token in the report."""
    error_budget: int = 0
    """Attempts that may end in an error before the run counts as failed."""

    @property
    def by_reply(self) -> bool:
        """True where answers count by what is said."""
        return self.scoring == "said" or (self.scoring == "auto" and self.model != "nano")

    def __post_init__(self) -> None:
        for kind, specs in (
            ("guards", self.guards),
            ("attacks", self.attacks),
            ("policies", self.policies),
        ):
            labels = [s.name for s in specs]
            twice = sorted({n for n in labels if labels.count(n) > 1})
            if twice:
                raise ValueError(f"{kind}: the name {twice[0]!r} is used twice")
        known = [a.name for a in self.attacks]
        for name in self.policy_attacks:
            if name not in known:
                raise ValueError(f"policy_attacks: {name!r} is not one of attacks: {known}")
        for guard in self.guards:
            for name in guard.attacks:
                if name not in known:
                    raise ValueError(
                        f"guard {guard.name!r}: {name!r} is not one of attacks: {known}"
                    )
        for what, names in (
            *((f"guard {g.name!r}: attacks", g.attacks) for g in self.guards),
            ("policy_attacks", self.policy_attacks),
        ):
            if names and all(a.lists for a in self.attacks if a.name in names):
                raise ValueError(f"{what}: beside {names[0]!r} name one that writes values")
        if self.policies and self.policy_guard not in [g.name for g in self.guards]:
            raise ValueError(f"policy_guard {self.policy_guard!r} is not one of guards")
        if not self.seeds:
            raise ValueError("seeds is empty; give at least one")
        if self.error_budget < 0:
            raise ValueError(f"error_budget is {self.error_budget}; give 0 or more")
