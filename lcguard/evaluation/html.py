"""The report as one HTML file that asks nothing of the network.

All text is escaped, because tokens come from contexts that an attacker may have written; a content
security policy forbids scripts and requests in case something slips through.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lcguard.evaluation.charts import charts
from lcguard.evaluation.graph_tables import graph_tables
from lcguard.evaluation.results import Report, Token
from lcguard.evaluation.style import CSS
from lcguard.evaluation.tables import details, overview, provenance
from lcguard.evaluation.verdict import NOT_MEASURED

_BRACKETS = re.compile(r"(.+?) (\(.+\)|\[.+\])")


class Stretch(NamedTuple):
    """Tokens behind each other that were mostly withheld."""

    text: str
    categories: list[str]
    mean: float


def to_html(found: Report | Mapping[str, Any]) -> str:
    """The whole page. Raises ``ImportError`` without matplotlib."""
    report = Report.of(found)
    pictures = [] if report.over_graphs else charts(report)
    safe = [
        replace(c, wide=c.wide and Markup(c.wide), narrow=c.narrow and Markup(c.narrow))
        for c in pictures
    ]
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            title=report.title or "LCGuard evaluation",
            meta=_meta(report),
            overview=None if report.over_graphs else overview(report),
            charts=safe,
            tables=graph_tables(report) if report.over_graphs else details(report),
            provenance=provenance(report),
        )
    )


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        keep_trailing_newline=True,
    )
    made.globals |= {
        "css": Markup(CSS),
        "not_measured": NOT_MEASURED,
        "in_brackets": _in_brackets,
        "lines": lambda text: Markup("↵\n").join(map(_visible, text.split("\n"))),
        "percent": lambda share: f"{share:.0%}",
        "withheld": _withheld,
    }
    return made


def _visible(value: Any) -> Any:
    """Control characters, direction overrides and surrogates become visible."""
    if isinstance(value, Markup):
        return value
    return "".join(
        "\ufffd" if c != "\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs") else c
        for c in str(value).replace("\n", " ")
    )


def _in_brackets(value: str) -> Sequence[str] | None:
    """A figure, and what stands behind it in brackets, to go small on a line of its own."""
    found = _BRACKETS.fullmatch(value)
    return found.groups() if found else None


def _meta(report: Report) -> list[str]:
    n, model = len(report.seeds), report.model.get("name") or report.model.get("id")
    return [
        report.created or f"date {NOT_MEASURED}",
        f"{n} seed{'s' if n != 1 else ''}" if n else f"seeds {NOT_MEASURED}",
        *([f"model {model}"] if model else []),
    ]


def _withheld(tokens: Sequence[Token]) -> Iterator[Stretch]:
    """The struck-out stretches: a title is out of reach for touch and keyboard."""
    for hidden, run in groupby(tokens, key=lambda t: (t.withheld or 0.0) > 0.5):
        if hidden:
            stretch = list(run)
            yield Stretch(
                "".join(t.text for t in stretch).strip(),
                sorted({t.category for t in stretch if t.category}),
                sum(t.withheld or 0.0 for t in stretch) / len(stretch),
            )
