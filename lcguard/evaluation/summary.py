"""From a run's attempts to the report: who recovered what, beside the floor and the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lcguard.evaluation.lists import list_figures
from lcguard.evaluation.outcomes import Attempt
from lcguard.evaluation.plan import GuardSpec, PolicySpec
from lcguard.evaluation.runner import EDGE, Runner, on_lists
from lcguard.evaluation.schedule import (
    INJECTION,
    Case,
    blind_lists,
    fit_ahead,
    floor_attack,
    list_seeds,
    policy_case,
)
from lcguard.evaluation.statistics import (
    any_of_k,
    asr,
    asr_by_category,
    best_attack,
    counts,
    mean_over_categories,
)
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import Mask
from lcguard.records import TokenRecord, masks
from lcguard.training.dataset import with_policy


def run_all(runner: Runner) -> dict[str, Any]:
    """Runs what is missing and returns the report's figures."""
    c = runner.s.config
    if not c.guards or all(a.lists for a in c.attacks):
        raise ValueError(
            "the evaluation names no guards or no attacks that write values; give at least one of "
            "each"
        )
    fit_ahead(runner)
    floor = _per_seed(c.seeds, lambda s: runner.attack(None, None, floor_attack(c), s, "floor"))
    vanilla = _per_seed(c.seeds[:1], lambda s: runner.utility(None, None, s))
    ceiling: list[Attempt] = []
    rows = []
    for spec in sorted(c.guards, key=lambda g: g.guard != "identity"):  # the ceiling first
        row, attempts = guard_row(runner, spec, floor, vanilla)
        if spec.guard == "identity":
            ceiling = attempts
        rows.append(row)
        runner.s.say(_line(row))
    top = best_attack(ceiling).value if ceiling else None
    by_category = asr_by_category(ceiling) if ceiling else {}
    for row in rows:
        row["ceiling"] = top
        for name, entry in row["asr_by_category"].items():
            entry["ceiling"] = by_category[name]["asr"] if name in by_category else None
    report: dict[str, Any] = {"results": rows}
    report["policies"] = [policy_row(runner, p, floor) for p in c.policies]
    report["derived"] = [] if c.derived is None else derived_rows(runner, c.derived)
    report["length_channel"] = _length_channel(rows)
    report["explained"] = explain(runner, c.explain)
    return report


def guard_row(
    runner: Runner, spec: GuardSpec, floor: Sequence[Attempt], vanilla: Sequence[Attempt]
) -> tuple[dict[str, Any], list[Attempt]]:
    """One guard's line of the main table."""
    c, guard = runner.s.config, runner.s.guards[spec.name]
    utility, attempts, injected = [], [], []
    for seed in c.seeds:
        utility += runner.utility(spec, None, seed)
        if c.injection:
            injected += runner.attack(spec, None, INJECTION, seed)
        attempts += runner.run_guard(spec, None, seed, c.attacks)
    useful = rate(utility, "utility")
    before = rate(vanilla, "utility")
    best = best_attack(attempts)
    blind = mean_over_categories(floor)
    floors = asr_by_category(floor)
    chosen = [a for a in attempts if a.attack == best.name]
    categories: dict[str, Any] = {
        name: {**entry, "floor": floors[name]["asr"] if name in floors else None}
        for name, entry in asr_by_category(chosen).items()
    }
    row = {
        "guard": spec.name,
        "utility": useful,
        "utility_vanilla": before,
        "utility_relative": useful / before if useful is not None and before else None,
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
        "likelihood": likelihood(runner, Case(spec, None, c.attacks)),
        "floor": blind.value,
        "floor_ci": blind.ci,
        "advantage": best.value - blind.value
        if best.value is not None and blind.value is not None
        else None,
        "any_of_k": any_of_k(attempts),
        "counts": counts(attempts),
        "asr_by_category": categories,
        "latency_ms": {
            "prefill": runner.s.timing.get("prefill", {}).get("ms"),
            "guard": runner.s.timing.get(spec.name, {}).get("ms"),
        },
        "certificate": guard.card.certificate,
        "claim": guard.card.claim,
        "guard_digest": guard.digest,
    }
    return row, attempts


def likelihood(runner: Runner, case: Case) -> dict[str, Any]:
    """What those who choose from lists recover; empty where no such attack is asked for."""
    fits = on_lists(*case, seeds=list_seeds(runner, case))
    attempts = [a for group in runner.fit(fits) for a in group]
    blind = [a for group in runner.fit(blind_lists(runner.s.config)) for a in group]
    categories = {a.category for a in attempts}
    return list_figures(attempts, [a for a in blind if a.category in categories])


def policy_row(runner: Runner, policy: PolicySpec, floor: Sequence[Attempt]) -> dict[str, Any]:
    """The chosen guard under another policy."""
    c = runner.s.config
    spec, attacked, attacks = policy_case(runner, policy)
    attempts, utility, vanilla = [], [], []
    for seed in c.seeds:
        utility += runner.utility(spec, policy, seed)
        if policy.forbid:
            attempts += runner.run_guard(spec, attacked, seed, attacks)
    vanilla += runner.utility(None, policy, c.seeds[0])
    best = best_attack(attempts) if attempts else None
    blind = mean_over_categories([a for a in floor if a.category in policy.forbid])
    row: dict[str, Any] = {
        "policy": policy.name,
        "guard": spec.name,
        "forbidden": list(policy.forbid),
        "utility": rate(utility, "utility"),
        "utility_vanilla": rate(vanilla, "utility"),
        "allowed_accuracy": rate(utility, "allowed"),
        "allowed_accuracy_vanilla": rate(vanilla, "allowed"),
        "asr_forbidden": best.value if best else None,
        "asr_forbidden_ci": best.ci if best else None,
        "asr_forbidden_by_attack": {k: e.value for k, e in best.by_attack.items()} if best else {},
        "floor": blind.value if policy.forbid else None,
        "likelihood": likelihood(runner, Case(spec, attacked, attacks)) if policy.forbid else {},
        "counts": counts(attempts),
    }
    runner.s.say(
        f"policy {policy.name}: ASR {_f(row['asr_forbidden'])}, floor {_f(row['floor'])}, "
        f"allowed {_f(row['allowed_accuracy'])}"
    )
    return row


def derived_rows(runner: Runner, policy: PolicySpec) -> list[dict[str, Any]]:
    """Derived answers whose source is forbidden: are they right, and is the exact value safe?

    The exact value's ASR stands beside the best guess of somebody who knows the derived value:
    the most frequent training value of that field and band.
    """
    c = runner.s.config
    spec, _, attacks = policy_case(runner, policy)
    train, test = runner.records(policy)
    guess = _band_guesses(train)
    rows = []
    attempts, utility = [], []
    for seed in c.seeds:
        utility += runner.utility(spec, policy, seed)
        attempts += runner.run_guard(spec, policy, seed, attacks)
    vanilla = runner.utility(None, policy, c.seeds[0])
    banded = {
        (r.record_id, f"{secret.field}/{i}"): (span.band, secret.ids)
        for r in test
        for i, (span, secret) in enumerate(
            zip([s for s in r.spans if s.secret], r.secrets(), strict=True)
        )
        if span.band is not None
    }
    for category in policy.derive:
        hit = [
            guess.get((key[1].split("/")[0], band)) == ids
            for key, (band, ids) in banded.items()
            if _category(test, key) == category
        ]
        exact = [a for a in attempts if a.category == category and (a.record, a.field) in banded]
        best = best_attack(exact) if exact else None
        rows.append(
            {
                "guard": spec.name,
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


def _category(records: Sequence[TokenRecord], key: tuple[str, str]) -> str | None:
    record = next(r for r in records if r.record_id == key[0])
    return record.secrets()[int(key[1].split("/")[1])].category


def _band_guesses(records: Sequence[TokenRecord]) -> dict[tuple[str, str], tuple[int, ...]]:
    seen: dict[tuple[str, str], dict[tuple[int, ...], int]] = {}
    for r in records:
        for s in r.spans:
            if s.band is not None:
                values = seen.setdefault((s.field, s.band), {})
                ids = r.ids[s.start : s.end]
                values[ids] = values.get(ids, 0) + 1
    return {k: max(v, key=lambda i: v[i]) for k, v in seen.items()}


def explain(runner: Runner, n: int) -> list[dict[str, Any]]:
    """Contexts with the share of each token that the policy guard withheld."""
    spec = next((g for g in runner.s.config.guards if g.name == runner.s.config.policy_guard), None)
    if spec is None or n == 0:
        return []
    guard, out = runner.s.guards[spec.name], []
    for record in runner.s.test[:n]:
        for policy in runner.s.config.policies[-1:] or [None]:
            view = with_policy([record], policy.forbid)[0] if policy else record
            out.append(explain_record(runner, guard, view, policy.name if policy else EDGE))
    return out


def explain_record(
    runner: Runner, guard: FrozenGuard, record: TokenRecord, policy: str
) -> dict[str, Any]:
    """One context, token by token."""
    return {
        "title": record.record_id,
        "guard": guard.name,
        "policy": policy,
        "tokens": explain_tokens(
            guard, record, runner.s.source.prefill([record.ids]), masks([record]), runner.s.decode
        ),
    }


def explain_tokens(
    guard: FrozenGuard,
    record: TokenRecord,
    kv: Any,
    mask: Mask,
    decode: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """Token texts with the share withheld and the category of the value they belong to."""
    marks = guard.marks(kv, mask)
    if marks is not None:
        withheld = (marks[0, : len(record.ids)] >= 0).float()
    elif guard.needs_twin:
        withheld = torch.zeros(len(record.ids))
        for s in record.spans:
            withheld[s.start : s.end] = float(s.secret)
    else:
        withheld = guard(kv, mask).withheld[0].cpu()
    category = {i: s.category for s in record.spans for i in range(s.start, s.end)}
    return [
        {"text": decode([t]), "withheld": round(float(withheld[i]), 4), "category": category.get(i)}
        for i, t in enumerate(record.ids)
    ]


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


def _per_seed(seeds: Sequence[int], run: Callable[[int], list[Attempt]]) -> list[Attempt]:
    return [a for seed in seeds for a in run(seed)]


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
