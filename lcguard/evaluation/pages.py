"""Tables, notes and provenance as one Markdown or HTML page, for reports of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcguard.evaluation import html, report
from lcguard.evaluation.tables import Table, provenance


def markdown_page(title: str, tables: Sequence[Table], found: Mapping[str, Any]) -> str:
    """All text is escaped."""
    lines = [f"# {report.escape(title)}", ""]
    lines += [f"- {report.escape(n)}" for n in found.get("notes") or []] + [""]
    for table in [*tables, provenance(found)]:
        lines += report.markdown_table(table, level=2)
    return "\n".join(lines).rstrip() + "\n"


def html_page(title: str, tables: Sequence[Table], found: Mapping[str, Any]) -> str:
    """One file that asks nothing of the network."""
    sections = html.notes(found.get("notes"))
    sections += [html.table(t, "nowrap") for t in tables]
    sections += ["<h2>Where the figures come from</h2>",
                 html.table(provenance(found), "provenance")]  # fmt: skip
    return html.page(title, sections, found)
