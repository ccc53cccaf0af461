"""One report in three forms: JSON for machines, Markdown for a repository, HTML for people.

The dict is the report; this file adds no figure. JSON and Markdown are written before the charts
are drawn, so that a machine without matplotlib keeps its results.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcguard.evaluation.figures import readable
from lcguard.evaluation.folder import write_text
from lcguard.evaluation.graph_tables import graph_tables
from lcguard.evaluation.html import to_html
from lcguard.evaluation.results import Context, Report
from lcguard.evaluation.tables import Table, details, overview, provenance
from lcguard.evaluation.verdict import NOT_MEASURED

_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()#!|~$@]|:(?=//))")


def write_report(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes ``report.json``, ``report.md`` and ``report.html``, each in one step.

    A reader never sees half a file. Figures that are not finite become null.

    Raises ``ValueError`` where ``report`` is not JSON or no report, and ``ImportError`` without
    matplotlib (the JSON and the Markdown are on disk by then).
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(readable(report), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the report is not JSON ({error}): use strings, numbers, lists and dicts"
        ) from error
    paths = {kind: target / f"report.{kind}" for kind in ("json", "md", "html")}
    write_text(paths["json"], text + "\n")
    write_text(paths["md"], to_markdown(report))
    write_text(paths["html"], to_html(report))
    return paths


def to_markdown(found: Report | Mapping[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown; all its text is escaped."""
    report = Report.of(found)
    lines = [f"# {escape(report.title or 'LCGuard evaluation')}", ""]
    notes = [*(f"- {escape(n)}" for n in report.notes), ""]
    if report.over_graphs:
        lines += notes
        for table in graph_tables(report):
            lines += markdown_table(table, level=2)
    else:
        lines += markdown_table(overview(report), level=2)
        lines += ["## Notes", "", *notes] if report.notes else []
        for table in details(report):
            lines += markdown_table(table, level=2)
        lines += ["## Explained contexts", ""]
        for context in report.explained:
            lines += _explained(context)
        if not report.explained:
            lines += [NOT_MEASURED.capitalize() + ".", ""]
    lines += markdown_table(provenance(report), level=2)
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(table: Table, level: int) -> list[str]:
    """Lines of one table; one without rows says so."""
    lines = ["#" * level + f" {escape(table.title)}", ""]
    if not table.rows:
        return [*lines, NOT_MEASURED.capitalize() + ".", ""]
    lines.append("| " + " | ".join(map(escape, table.headers)) + " |")
    lines.append("|" + " --- |" * len(table.headers))
    lines += ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
    return [*lines, "", *([escape(table.note), ""] if table.note else [])]


def _explained(context: Context) -> list[str]:
    """The text with what was mostly withheld struck out."""
    text: list[str] = []
    struck = False
    for token in context.tokens:
        hidden = token.withheld is not None and token.withheld > 0.5
        if hidden != struck:
            text.append("<del>" if hidden else "</del>")
            struck = hidden
        text.append(escape(token.text, keep_spaces=True))
    text.append("</del>" if struck else "")
    legend = "Struck out: more than half of the token's entries were withheld."
    about = f"Guard {escape(context.guard)}, policy {escape(context.policy)}. {legend}"
    return [f"### {escape(context.title or 'Context')}", "", about, "", "".join(text), ""]


def escape(value: Any, keep_spaces: bool = False) -> str:
    """Text that Markdown renders as itself: no HTML, links, images, mentions or table cells."""
    text = "".join(c if _harmless(c) else "�" for c in str(value).replace("\n", " "))
    text = text if keep_spaces else " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _PUNCTUATION.sub(r"\\\1", text)


def _harmless(char: str) -> bool:
    # Control characters, direction overrides and lone surrogates can disguise what follows.
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs") or char == "\t"
