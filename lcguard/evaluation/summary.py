"""From the attempts on one hop to its figures: who recovered what, beside floor and ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lcguard.evaluation.detection import asr_ceiling, hidden_tokens, measure
from lcguard.evaluation.explained import explain
from lcguard.evaluation.lists import list_figures
from lcguard.evaluation.outcomes import Attempt
from lcguard.evaluation.plan import GuardSpec, PolicySpec
from lcguard.evaluation.schedule import Challenge, HopRun
from lcguard.evaluation.segments import ATTACKER, VICTIM
from lcguard.evaluation.statistics import (
    any_of_k,
    asr,
    asr_by_category,
    best_attack,
    counts,
    mean_over_categories,
)
from lcguard.guards.frozen import FrozenGuard
from lcguard.records import TokenRecord


def hop_figures(run: HopRun) -> dict[str, Any]:
    """Runs what is missing and returns the report's figures."""
    plan = run.plan
    if not plan.guards or all(a.lists for a in plan.attacks):
        raise ValueError(
            "the evaluation names no guards or no attacks that write values; give at least one of "
            "each"
        )
    run.fit_ahead()
    ceiling: list[Attempt] = []
    rows = []
    for spec in sorted(plan.guards, key=lambda g: g.guard != "identity"):  # the ceiling first
        attempts = run.attacked(Challenge(spec, None, plan.attacks))
        row = guard_row(run, spec, attempts)
        if spec.guard == "identity":
            ceiling = attempts
        rows.append(row)
        run.runner.s.say(_line(row))
    top = best_attack(ceiling).value if ceiling else None
    by_category = asr_by_category(ceiling) if ceiling else {}
    for row in rows:
        row["ceiling"] = top
        for name, entry in row["asr_by_category"].items():
            entry["ceiling"] = by_category[name]["asr"] if name in by_category else None
    return {
        "results": rows,
        "policies": [policy_row(run, p) for p in plan.policies],
        "derived": [] if plan.derived is None else derived_rows(run, plan.derived),
        "length_channel": _length_channel(rows),
        "explained": explain(run),
    }


def guard_row(run: HopRun, spec: GuardSpec, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """One guard's line of the main table."""
    plan, guard, timing = run.plan, run.runner.s.guards[spec.name], run.hops.timing
    utility, vanilla, floor = run.utility(spec), run.utility(None), run.floor()
    injected = run.injected(spec) if plan.injection else []
    best, blind = best_attack(attempts), mean_over_categories(floor)
    floors = asr_by_category(floor)
    categories: dict[str, Any] = {
        name: {**entry, "floor": floors[name]["asr"] if name in floors else None}
        for name, entry in asr_by_category([a for a in attempts if a.attack == best.name]).items()
    }
    return {
        "guard": spec.name,
        **utility_figures(utility, vanilla),
        "utility_kept": kept(utility, vanilla),
        "utility_teacher_forced": _mean(a.score for a in utility if a.kind == "utility"),
        "allowed_accuracy": rate(utility, "allowed"),
        "asr_train": (guard.card.training or {}).get("asr_train"),
        "asr_fresh": best.value,
        "asr_fresh_ci": best.ci,
        "asr_fresh_best": best.name,
        "asr_fresh_by_attack": {
            name: {
                "asr": e.value,
                "ci": e.ci,
                "token_accuracy": _mean(a.score for a in attempts if a.attack == name),
                "ce_gap_nats": _gap(floor, [a for a in attempts if a.attack == name]),
            }
            for name, e in best.by_attack.items()
        },
        "asr_injection": mean_over_categories(injected).value if injected else None,
        "likelihood": list_figures(*run.chosen_from_lists(Challenge(spec, None, plan.attacks))),
        "floor": blind.value,
        "floor_ci": blind.ci,
        "advantage": best.value - blind.value
        if best.value is not None and blind.value is not None
        else None,
        "any_of_k": any_of_k(attempts),
        "counts": counts(attempts),
        "asr_by_category": categories,
        "latency_ms": {
            "prefill": timing.get("prefill", {}).get("ms"),
            "guard": timing.get(spec.name, {}).get("ms"),
        },
        "certificate": guard.card.certificate,
        "detection": detection(run, guard),
        **({"quick": True} if plan.quick else {}),
        "claim": guard.card.claim,
        "guard_digest": guard.digest,
    }


def detection(run: HopRun, guard: FrozenGuard) -> dict[str, Any] | None:
    """What a guard that finds values itself finds of the test records', and the ceiling that its
    recall puts on every attacker; None for the others."""
    if not guard.module.finds_secrets:
        return None
    records, kv = run.hops.sides[VICTIM], run.hops.raw(VICTIM)
    marks = hidden_tokens(guard, kv, records)
    assert marks is not None
    found, blind = measure(records, marks), mean_over_categories(run.floor())
    guess = blind.ci[1] if blind.ci else blind.value
    if guess is None or not found["total"]:
        return found
    limit = asr_ceiling(found["found"], found["total"], guess)
    return {**found, "blind_guess": guess, "asr_ceiling": limit}


def policy_row(run: HopRun, policy: PolicySpec) -> dict[str, Any]:
    """The chosen guard under another policy."""
    challenge = run.challenge(policy)
    attempts = run.attacked(challenge) if policy.forbid else []
    utility, vanilla = run.utility(challenge.guard, policy), run.utility(None, policy)
    best = best_attack(attempts) if attempts else None
    blind = mean_over_categories([a for a in run.floor() if a.category in policy.forbid])
    listed = list_figures(*run.chosen_from_lists(challenge)) if policy.forbid else {}
    row: dict[str, Any] = {
        "policy": policy.name,
        "guard": challenge.guard.name,
        "forbidden": list(policy.forbid),
        "utility": rate(utility, "utility"),
        "utility_vanilla": rate(vanilla, "utility"),
        "allowed_accuracy": rate(utility, "allowed"),
        "allowed_accuracy_vanilla": rate(vanilla, "allowed"),
        "asr_forbidden": best.value if best else None,
        "asr_forbidden_ci": best.ci if best else None,
        "asr_forbidden_by_attack": {k: e.value for k, e in best.by_attack.items()} if best else {},
        "floor": blind.value if policy.forbid else None,
        "likelihood": listed,
        "counts": counts(attempts),
    }
    run.runner.s.say(
        f"policy {policy.name}: ASR {_f(row['asr_forbidden'])}, floor {_f(row['floor'])}, "
        f"allowed {_f(row['allowed_accuracy'])}"
    )
    return row


def derived_rows(run: HopRun, policy: PolicySpec) -> list[dict[str, Any]]:
    """Derived answers whose source is forbidden: are they right, and is the exact value safe?

    The exact value's ASR stands beside the best guess of somebody who knows the derived value:
    the most frequent training value of that field and band.
    """
    challenge = run.challenge(policy)
    guess = _band_guesses(run.hops.records(policy, ATTACKER))
    attempts = run.attacked(Challenge(challenge.guard, policy, challenge.attacks))
    utility, vanilla = run.utility(challenge.guard, policy), run.utility(None, policy)
    banded = {
        (r.record_id, f"{s.field}/{s.start}"): (s, r.ids[s.start : s.end])
        for r in run.hops.records(policy, VICTIM)
        for s in r.spans
        if s.secret and s.band is not None
    }
    rows = []
    for category in policy.derive:
        hit = [
            guess.get((span.field, span.band or "")) == ids
            for span, ids in banded.values()
            if span.category == category
        ]
        exact = [a for a in attempts if a.category == category and (a.record, a.field) in banded]
        best = best_attack(exact) if exact else None
        rows.append(
            {
                "guard": challenge.guard.name,
                "policy": policy.name,
                "question": "derived value of a forbidden " + category + " field",
                "source_category": category,
                "accuracy": rate([a for a in utility if a.category == category], "derived"),
                "accuracy_vanilla": rate([a for a in vanilla if a.category == category], "derived"),
                "asr_exact": best.value if best else None,
                "asr_exact_ci": best.ci if best else None,
                "asr_exact_best_guess": float(np.mean(hit)) if hit else None,
                "n": len(hit),
            }
        )
    return rows


def _band_guesses(records: Sequence[TokenRecord]) -> dict[tuple[str, str], tuple[int, ...]]:
    seen: dict[tuple[str, str], dict[tuple[int, ...], int]] = {}
    for r in records:
        for s in r.spans:
            if s.band is not None:
                values = seen.setdefault((s.field, s.band), {})
                ids = r.ids[s.start : s.end]
                values[ids] = values.get(ids, 0) + 1
    return {k: max(v, key=lambda i: v[i]) for k, v in seen.items()}


def utility_figures(
    utility: Sequence[Attempt], vanilla: Sequence[Attempt]
) -> dict[str, float | None]:
    """Of task questions, with a guard and without, and the one over the other."""
    useful, before = rate(utility, "utility"), rate(vanilla, "utility")
    return {
        "utility": useful,
        "utility_vanilla": before,
        "utility_relative": useful / before if useful is not None and before else None,
    }


def rate(attempts: Sequence[Attempt], kind: str) -> float | None:
    """Share of questions of a kind that were answered right; None where none was asked."""
    return asr([a for a in attempts if a.kind == kind])


def kept(utility: Sequence[Attempt], vanilla: Sequence[Attempt]) -> float | None:
    """Of the task questions answered right from raw KV, the share still answered right."""
    right = {(a.record, a.field) for a in vanilla if a.kind == "utility" and a.outcome == "success"}
    asked = [a for a in utility if a.kind == "utility" and (a.record, a.field) in right]
    return asr(asked)


def _gap(floor: Sequence[Attempt], attempts: Sequence[Attempt]) -> float | None:
    """Nats per secret that the attack knows beyond the blind floor."""
    a, b = _mean(x.nll_nats for x in floor), _mean(x.nll_nats for x in attempts)
    return a - b if a is not None and b is not None else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _length_channel(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    by_name = {r["guard"]: r for r in rows}
    if "redact" not in by_name:
        return None
    fixed = by_name.get("redact-fixed-length")
    return {
        "redact": by_name["redact"]["asr_fresh"],
        "redact_fixed_length": fixed["asr_fresh"] if fixed else None,
        "floor": by_name["redact"]["floor"],
    }


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(row: dict[str, Any]) -> str:
    return (
        f"==> {row['guard']}: utility {_f(row['utility'])} of {_f(row['utility_vanilla'])}, "
        f"fresh ASR {_f(row['asr_fresh'])} ({row['asr_fresh_best']}), "
        f"injection {_f(row['asr_injection'])}, floor {_f(row['floor'])}, likelihood "
        + ", ".join(
            f"@{n} {_f(e['asr'])} (floor {_f(e['floor'])})"
            for n, e in row["likelihood"].items()
            if n.isdigit()
        )
    )
