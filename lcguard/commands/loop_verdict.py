"""What a candidate has to show to take the live guard's place, decided from figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcguard.evaluation.outcomes import Attempt
from lcguard.evaluation.results import GuardRow
from lcguard.evaluation.statistics import CategoryRow, asr_by_category
from lcguard.evaluation.verdict import UTILITY_SHARE, percent, percent_ci, verdict
from lcguard.guards.registry import Judgement
from lcguard.training.certificate import Certificate

TELLING_CEILING = 0.5
"""Attackers who read less of raw KV judge nothing."""


def decide(
    row: GuardRow,
    attempts: Sequence[Attempt],
    ceiling: float | None,
    certificates: tuple[Certificate | None, Certificate | None],
    *,
    limit: float,
    utility_share: float = UTILITY_SHARE,
) -> Judgement:
    """Accepted where nothing speaks against the candidate.

    Args:
        row: its line of the judgement's report.
        attempts: the fresh attackers' on it, one by one.
        ceiling: what the first of them recovers of raw KV.
        certificates: the candidate's and the live guard's on the same records; None without noise.
    """
    worst = worst_by_category(attempts)
    against = [
        *_attackers(row, ceiling, limit),
        *_categories(worst, row, limit),
        *_utility(row, utility_share),
        *_certificate(*certificates),
    ]
    figures: dict[str, Any] = {
        "verdict": verdict(row).word,
        "asr_fresh": row.asr_fresh,
        "asr_fresh_ci": None if row.asr_fresh_ci is None else list(row.asr_fresh_ci),
        "floor": row.floor,
        "ceiling": ceiling,
        "utility": row.utility,
        "utility_vanilla": row.utility_vanilla,
        "certificate_nats": certificates[0].mean_nats if certificates[0] else None,
        "certificate_nats_live": certificates[1].mean_nats if certificates[1] else None,
        "categories": {c: {"asr": e["asr"], "wilson": e["wilson"]} for c, e in worst.items()},
    }
    for_it = (
        f"fresh attackers recover {percent_ci(row.asr_fresh, row.asr_fresh_ci)}, the receiver "
        f"keeps {percent(row.utility_share)} of its right answers"
    )
    return Judgement(accepted=not against, reason="; ".join(against) or for_it, figures=figures)


def worst_by_category(attempts: Sequence[Attempt]) -> dict[str, CategoryRow]:
    """For every category the attack that recovers most of it, whichever is best on the whole: a
    guard that lets one category pass must not hide behind six that it keeps."""
    found: dict[str, CategoryRow] = {}
    for name in sorted({a.attack for a in attempts}):
        for category, row in asr_by_category([a for a in attempts if a.attack == name]).items():
            if category not in found or (row["asr"] or 0.0) > (found[category]["asr"] or 0.0):
                found[category] = row
    return dict(sorted(found.items()))


def _attackers(row: GuardRow, ceiling: float | None, limit: float) -> list[str]:
    """Whether they can judge at all, and what they recover together."""
    if ceiling is None or ceiling < TELLING_CEILING:
        return [f"the attackers read {percent(ceiling)} of raw KV, so that they judge nothing"]
    if row.asr_fresh is None or row.asr_fresh_ci is None or row.floor is None:
        return ["what fresh attackers recover was not measured"]
    if row.counts and row.counts.error:
        return [f"{row.counts.error} attempts ended in an error"]
    out, allowed = [], max(limit, row.floor)
    if row.asr_fresh_ci[1] > allowed:
        found = percent_ci(row.asr_fresh, row.asr_fresh_ci)
        out.append(f"fresh attackers recover {found}, which may be above {allowed:.0%}")
    listed = row.listed
    if listed.asr is not None and listed.floor is not None and listed.asr > listed.floor + limit:
        out.append(f"from a list of candidates {percent(listed.asr)} are picked")
    return out


def _categories(worst: Mapping[str, CategoryRow], row: GuardRow, limit: float) -> list[str]:
    out = []
    for name, found in worst.items():
        known = row.asr_by_category.get(name)
        allowed = max(limit, (known.floor if known else None) or 0.0)
        low = found["wilson"][0] if found["wilson"] else 0.0
        if low > allowed:
            out.append(f"{name} leaks: {percent(found['asr'])}, at least {low:.0%}")
    return out


def _utility(row: GuardRow, share: float) -> list[str]:
    if row.utility_share is None:
        return ["what the receiver still answers was not measured"]
    if row.utility_share < share:
        return [f"the receiver keeps {row.utility_share:.1%} of its right answers, not {share:.0%}"]
    return []


def _certificate(own: Certificate | None, live: Certificate | None) -> list[str]:
    """A vacuous one is refused where the live guard's is better: beyond its confidence bound."""
    if own is None or not own.vacuous or live is None or own.mean_nats <= live.upper_nats:
        return []
    return [
        f"its segments tell up to {own.mean_nats:.3g} nats, the live guard's at most "
        f"{live.upper_nats:.3g}"
    ]
