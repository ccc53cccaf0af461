"""What of an evaluation goes to an MLflow server: figures and verdicts by guard, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard.evaluation.figures import number
from lcguard.evaluation.results import Report
from lcguard.evaluation.verdict import verdict
from lcguard.tracking import TrackedRun

_LABELS = ("topology", "guard", "variant")


def track_report(run: TrackedRun, found: Mapping[str, Any]) -> None:
    """``found`` is the report as it is written."""
    report = Report.of(found)
    for row in found["results"]:
        label = " ".join(str(row[k]) for k in _LABELS if row.get(k))
        run.figures({f"{label}/{k}": v for k, v in row.items() if number(v) is not None})
    if not report.over_graphs:
        run.tags({f"lcguard.verdict.{row.guard}": verdict(row).word for row in report.results})
    run.artefact("report.json", found)
