"""``--quick``: the same evaluation with a quarter of the records, an eighth of the attack steps,
the first seed, no further policies, no long lists, and of several attacks of a kind the first.

It shows that everything runs, and what the report looks like, before hours are spent. Its figures
judge no guard: attackers that were fitted so briefly fail where others would not, so its verdict is
never that a guard protects, and no card takes it. The result is an ordinary configuration, and as
such it is written beside the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lcguard.attacks.base import attack_class
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig

SHARE = 4
"""Records are divided by it, attack steps by twice as much."""
LONGEST = 100
"""Candidates in a list."""


def quickened(config: EvalConfig) -> EvalConfig:
    """``config`` with less of everything, marked as a quick run."""
    # fitted so briefly none breaks a guard, so that larger ones of its kind would all be run
    kept = [
        a
        for i, a in enumerate(config.attacks)
        if a.attack not in {b.attack for b in config.attacks[:i]}
    ]
    return replace(
        config,
        quick=True,
        title=f"{config.title} (quick run)",
        data=fewer_records(config.data),
        attacks=tuple(_shorter(a) for a in kept),
        guards=tuple(replace(g, attacks=_named(g.attacks, kept)) for g in config.guards),
        policies=(),
        policy_attacks=_named(config.policy_attacks, kept),
        derived=None,
        seeds=config.seeds[:1],
    )


def _named(names: tuple[str, ...], kept: Sequence[AttackSpec]) -> tuple[str, ...]:
    """Of a guard's own attacks those that are run; where none is left, all."""
    return tuple(a.name for a in kept if a.name in names)


def fewer_records(data: DataConfig) -> DataConfig:
    """Of both sides a quarter, and at least one of what there was."""
    return replace(
        data, train_records=fewer(data.train_records), test_records=fewer(data.test_records)
    )


def fewer(n: int) -> int:
    return -(-n // SHARE)


def _steps(n: int) -> int:
    return -(-n // (2 * SHARE))


def _shorter(spec: AttackSpec) -> AttackSpec:
    """Fewer steps for whatever is fitted by steps, fewer records for what takes a list of them."""
    # once as many steps: its own, also where the options leave them to the default
    options: dict[str, Any] = attack_class(spec.attack).stressed(spec.options, 1, 1)
    if "fit" in options:
        options["fit"] = {**options["fit"], "steps": _steps(options["fit"]["steps"])}
    if "max_records" in options:
        options["max_records"] = fewer(options["max_records"])
    if "lists" in options:
        options["lists"] = [n for n in options["lists"] if n <= LONGEST] or options["lists"][:1]
    clean = dict(spec.clean_fit)
    if "steps" in clean:
        clean["steps"] = _steps(clean["steps"])
    return replace(spec, options=options, clean_fit=clean)
