"""``lcguard eval record``: what a run measured of a guard goes onto the guard's card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcguard.evaluation.compare import read_report
from lcguard.evaluation.verdict import verdict
from lcguard.guards import FrozenGuard
from lcguard.nearest import unknown

FIGURES = ("asr_fresh", "asr_fresh_ci", "floor", "ceiling", "utility", "utility_vanilla")


def record(run: Path, name: str, folder: Path) -> dict[str, Any]:
    """Writes the figures of guard ``name`` in a finished run onto the card in ``folder``; they take
    the place of an earlier run's. Returns them.

    Raises ``ValueError`` where the run has no such guard, or measured another than lies there.
    """
    report = read_report(run)
    rows = {r.guard: r for r in report.results if r.topology is None and r.variant is None}
    if name not in rows:
        raise ValueError(f"{run}: {unknown('guard', name, rows)}")
    if rows[name].quick:
        raise ValueError(
            f"{run} is a quick run, which judges no guard: run the evaluation without --quick"
        )
    guard, row = FrozenGuard.from_pretrained(folder), rows[name]
    if row.guard_digest != guard.digest:
        raise ValueError(
            f"{run} measured a guard {name!r} of digest {str(row.guard_digest)[:12]}, in {folder} "
            f"lies {guard.digest[:12]}: run the evaluation on this one"
        )
    found = verdict(row)
    plain = report.plain()
    figures = plain["results"][report.results.index(row)]
    evaluation = {
        "title": report.title,
        "verdict": found.word,
        "reason": found.reason,
        **{key: figures.get(key) for key in FIGURES},
        "command": plain.get("command"),
        "data": plain.get("data"),
    }
    kept = guard.card.evaluation or {}
    guard.with_card(evaluation=kept | evaluation).save_pretrained(folder)
    return evaluation
