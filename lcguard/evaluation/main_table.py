"""The table that the command line shows of a report."""

from __future__ import annotations

from lcguard.evaluation.graph_tables import graph_tables
from lcguard.evaluation.results import LIST, GuardRow, Report
from lcguard.evaluation.tables import Table
from lcguard.evaluation.verdict import verdict

COLUMNS = ("utility", "training-time ASR", "fresh ASR", "injection", "floor", "ceiling")


def main_table(report: Report) -> Table:
    """One line a guard; errors have a column of their own."""
    if report.over_graphs:
        return graph_tables(report)[0]
    headers = ("guard", *COLUMNS, f"likelihood@{LIST}", "verdict", "errors")
    return Table(str(report.title), headers, [_line(row) for row in report.results])


def _line(row: GuardRow) -> tuple[str, ...]:
    fresh, ci, listed = shown(row.asr_fresh), row.asr_fresh_ci, shown(row.listed.asr)
    if ci is not None:
        fresh += f" [{shown(ci[0])}, {shown(ci[1])}]"
    if row.listed.model_fields_set:
        listed += f" (chance {shown(row.listed.floor)})"
    rest = map(shown, (row.asr_injection, row.floor, row.ceiling))
    errors = str(row.counts.error if row.counts else None)
    first = (row.guard, shown(row.utility), shown(row.asr_train), fresh)
    return (*first, *rest, listed, verdict(row).word, errors)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
