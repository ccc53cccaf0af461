"""Two runs side by side: did a guard get better, worse, or merely other?

Only runs on the same records and secrets have figures that can be set against each other. A figure
counts as worse where it moved by more than a threshold in the wrong direction, and where the first
run has it and the second does not; whether the intervals of the two ASRs overlap stands beside it,
because a move within noise is no news.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lcguard.evaluation.results import GuardRow, Report
from lcguard.evaluation.verdict import ASR_MARGIN

THRESHOLD = ASR_MARGIN
FIGURES = ("utility", "asr", "injection", "likelihood")
_MORE_IS_BETTER = ("utility",)


@dataclass(frozen=True)
class Move:
    """One figure of one guard in both runs."""

    before: float | None
    after: float | None
    worse: bool
    overlap: bool | None = None
    """Do the two intervals share a value? None where a run has no interval of the figure."""

    @property
    def difference(self) -> float | None:
        if self.before is None or self.after is None:
            return None
        return self.after - self.before


@dataclass(frozen=True)
class GuardComparison:
    guard: str
    moves: Mapping[str, Move]
    """By the names of ``FIGURES``."""
    note: str
    """``changed`` where the guard is not the same one, or which run has no such guard."""

    @property
    def worse(self) -> bool:
        return any(m.worse for m in self.moves.values())


@dataclass(frozen=True)
class Comparison:
    titles: tuple[str, str]
    guards: tuple[GuardComparison, ...]
    differences: tuple[str, ...]
    """In what the two runs are not alike; only with ``force`` can the records be among it."""

    def regressions(self) -> list[str]:
        """One line per figure that got worse."""
        lines = []
        for g in self.guards:
            for name, m in g.moves.items():
                if m.worse:
                    same = " (the intervals overlap)" if m.overlap else ""
                    lines.append(f"{g.guard}: {name} {_f(m.before)} -> {_f(m.after)}{same}")
        return lines


def _figures(row: GuardRow | None) -> tuple[float | None, ...]:
    """In the order of ``FIGURES``."""
    if row is None:
        return (None,) * len(FIGURES)
    return row.utility, row.headline[0], row.asr_injection, row.listed.asr


def read_report(path: Path) -> Report:
    """From a run's folder or from the JSON file itself. Raises ``ValueError`` where it is none."""
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path}: no report.json there; give a finished run's folder or its file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); make it with `lcguard eval report`") from (
            error
        )
    if not isinstance(found, dict) or not found.get("results"):
        raise ValueError(f"{file} is no evaluation report: it has no results")
    try:
        return Report.of(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file} is no evaluation report: {where}: {first['msg']}") from None


def compare(
    one: Report | Mapping[str, Any],
    other: Report | Mapping[str, Any],
    threshold: float = THRESHOLD,
    force: bool = False,
) -> Comparison:
    """``other`` against ``one``, guard by guard.

    Raises ``ValueError`` for runs on other records or secrets, unless ``force``, and for a
    threshold below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold {threshold} is below 0; give such as {THRESHOLD}")
    a, b = Report.of(one), Report.of(other)
    apart = records_apart(a, b)
    if apart and not force:
        raise ValueError(
            f"the two runs are not on the same records: {'; '.join(apart)}; compare runs of one "
            "data configuration, or add --force"
        )
    rows_a, rows_b = ({r.label: r for r in x.results} for x in (a, b))
    names = [*rows_a, *(n for n in rows_b if n not in rows_a)]
    return Comparison(
        (str(a.title), str(b.title)),
        tuple(_guard(n, rows_a.get(n), rows_b.get(n), threshold) for n in names),
        (*apart, *_other_differences(a, b)),
    )


def records_apart(a: Report, b: Report) -> list[str]:
    """What shows that the records are not the same; empty where nothing does."""
    found = []
    digests = [x.hashes.get("data") for x in (a, b)]
    if all(digests) and digests[0] != digests[1]:
        found.append(f"records {str(digests[0])[:12]} and {str(digests[1])[:12]}")
    # older reports have no digest, and even so the counts name what a reader can understand
    for key in ("source", "train_records", "test_records", "secrets", "task_questions"):
        there, here = (x.data.get(key) for x in (a, b))
        if there != here:
            found.append(f"{key.replace('_', ' ')} {there} and {here}")
    return found


def _other_differences(a: Report, b: Report) -> list[str]:
    """Legitimate differences that a reader should know of."""
    found = []
    models = [x.model.get("name") for x in (a, b)]
    seeds = [list(x.seeds) for x in (a, b)]
    for what, (there, here) in (("model", models), ("seeds", seeds)):
        if there != here:
            found.append(f"{what} {there} and {here}")
    sources = [x.hashes.get("source") for x in (a, b)]
    if sources[0] != sources[1]:
        found.append("the code of lcguard")
    attacks = [
        {name for r in x.results for name in (*r.asr_fresh_by_attack, *r.asr_graph_by_attack)}
        for x in (a, b)
    ]
    if attacks[0] != attacks[1]:
        found.append(f"attacks {sorted(attacks[0])} and {sorted(attacks[1])}")
    if not all(x.hashes.get("data") for x in (a, b)):
        found.append("a report without a digest of its records: only their counts were compared")
    return found


def _guard(name: str, a: GuardRow | None, b: GuardRow | None, threshold: float) -> GuardComparison:
    note = ""
    if a is None or b is None:
        note = "only in the second run" if a is None else "only in the first run"
    elif a.guard_digest != b.guard_digest:
        note = "changed"
    overlap = None
    if a is not None and b is not None:
        overlap = _overlap(a.headline[1], b.headline[1])
    moves = {
        figure: Move(
            before,
            after,
            _worse(figure, before, after, threshold),
            overlap if figure == "asr" else None,
        )
        for figure, before, after in zip(FIGURES, _figures(a), _figures(b), strict=True)
    }
    return GuardComparison(name, moves, note)


def _worse(figure: str, before: float | None, after: float | None, threshold: float) -> bool:
    if before is None:
        return False
    if after is None:  # what is no longer measured may be anything
        return True
    loss = before - after if figure in _MORE_IS_BETTER else after - before
    return loss > threshold + 1e-12


def _overlap(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool | None:
    if a is None or b is None:
        return None
    return a[0] <= b[1] and b[0] <= a[1]


def _f(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
