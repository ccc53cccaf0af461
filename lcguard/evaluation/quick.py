"""``--quick``: the same evaluation with a quarter of the records and of the attack steps, one seed
and no further policies.

It shows that everything runs, and what the report looks like, before hours are spent. Its figures
judge no guard: attackers that were fitted so briefly fail where others would not, so its verdict is
never that a guard protects, and no card takes it. The result is an ordinary configuration, and as
such it is written beside the figures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lcguard.attacks.base import attack_class
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig

SHARE = 4
"""Records and steps are divided by it."""


def quickened(config: EvalConfig) -> EvalConfig:
    """``config`` with less of everything, marked as a quick run."""
    return replace(
        config,
        quick=True,
        title=f"{config.title} (quick run)",
        data=fewer_records(config.data),
        attacks=tuple(_shorter(a) for a in config.attacks),
        policies=(),
        derived=None,
        seeds=config.seeds[:1],
    )


def fewer_records(data: DataConfig) -> DataConfig:
    """Of both sides a quarter, and at least one of what there was."""
    return replace(
        data, train_records=fewer(data.train_records), test_records=fewer(data.test_records)
    )


def fewer(n: int) -> int:
    return -(-n // SHARE)


def _shorter(spec: AttackSpec) -> AttackSpec:
    """Fewer steps for whatever is fitted by steps, fewer records for what takes a list of them."""
    # once as many steps: its own, also where the options leave them to the default
    options: dict[str, Any] = attack_class(spec.attack).stressed(spec.options, 1, 1)
    if "fit" in options:
        options["fit"] = {**options["fit"], "steps": fewer(options["fit"]["steps"])}
    if "max_records" in options:
        options["max_records"] = fewer(options["max_records"])
    clean = dict(spec.clean_fit)
    if "steps" in clean:
        clean["steps"] = fewer(clean["steps"])
    return replace(spec, options=options, clean_fit=clean)
