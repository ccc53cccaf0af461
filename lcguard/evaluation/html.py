"""The report as one HTML file that asks nothing of the network.

All text is escaped, because tokens come from contexts that an attacker may have written; a content
security policy forbids scripts and requests in case something slips through.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from typing import Any

from lcguard.evaluation.charts import Chart, charts
from lcguard.evaluation.style import CSS
from lcguard.evaluation.tables import Table, details, overview, provenance
from lcguard.evaluation.verdict import NOT_MEASURED, mapping, number, records

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
_BRACKETS = re.compile(r"(.+?) (\(.+\)|\[.+\])")


def to_html(report: Mapping[str, Any]) -> str:
    """The whole page. Raises ``ImportError`` without matplotlib."""
    title = str(report.get("title") or "LCGuard evaluation")
    sections = [_glance(overview(report)), *notes(report.get("notes"))]
    sections += [_chart(chart, f"chart-{i}") for i, chart in enumerate(charts(report))]
    sections.append("<h2>Explained contexts</h2>")
    explained = records(report.get("explained"))
    if explained:
        sections.append(_LEGEND)
    sections += [_context(c) for c in explained] or [_missing()]
    sections.append("<h2>All figures</h2>")
    sections += [table(t, "nowrap") for t in details(report)]
    sections += ["<h2>Where the figures come from</h2>", table(provenance(report), "provenance")]
    return page(title, sections, report)


def page(title: str, sections: Iterable[str], report: Mapping[str, Any]) -> str:
    """A whole page around sections of HTML; ``title`` is plain text."""
    shown = _text(title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{shown}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
            f'<h1>{shown}</h1>\n<p class="meta">{_meta(report)}</p>',
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _text(value: Any, newline: str = " ") -> str:
    """Escaped text; control characters, direction overrides and surrogates become visible."""
    kept = []
    for char in str(value):
        if char == "\n":
            kept.append(newline)
        elif char != "\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs"):
            kept.append("�")
        else:
            kept.append(char)
    return escape("".join(kept), quote=True)


def _meta(report: Mapping[str, Any]) -> str:
    seeds = report.get("seeds")
    n_seeds = len(seeds) if isinstance(seeds, list | tuple) else 0
    model = report.get("model")
    name = mapping(model).get("name") or mapping(model).get("id")
    parts = [
        str(report.get("created") or "date " + NOT_MEASURED),
        f"{n_seeds} seed{'s' if n_seeds != 1 else ''}" if n_seeds else "seeds " + NOT_MEASURED,
        *([f"model {name}"] if name else []),
    ]
    return _text(" · ".join(parts))


def _missing() -> str:
    return f'<p class="note">{NOT_MEASURED.capitalize()}.</p>'


def notes(found: Any) -> list[str]:
    """A list of notes, or nothing."""
    if not isinstance(found, list | tuple) or not found:
        return []
    items = "".join(f"<li>{_text(note)}</li>" for note in found)
    return [f'<h2>Notes</h2>\n<ul class="note">{items}</ul>']


def _cell(value: str, label: str = "") -> str:
    kind = ' class="none"' if value == NOT_MEASURED else ""
    shown = f' data-label="{_text(label)}"' if label else ""
    return f"<td{kind}{shown}>{_text(value)}</td>"


def _glance_cell(value: str, label: str) -> str:
    """The figure large; what stands behind it in brackets small, on a line of its own."""
    found = _BRACKETS.fullmatch(value)
    if not found:
        return _cell(value, label)
    return (
        f'<td data-label="{_text(label)}"><span class="figure">{_text(found[1])}</span> '
        f'<span class="why">{_text(found[2])}</span></td>'
    )


def _head(headers: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{_text(h)}</th>' for h in headers)
    return f"<thead><tr>{cells}</tr></thead>"


def _glance(table: Table) -> str:
    rows = []
    for guard, *cells, judged in table.rows:
        word, _, why = judged.partition(": ")
        plain = "".join(map(_glance_cell, cells, table.headers[1:]))
        rows.append(
            f'<tr><th scope="row">{_text(guard)}</th>{plain}'
            f'<td data-label="{_text(table.headers[-1])}">'
            f'<span class="badge {word.replace(" ", "-")}">{word}</span>'
            f'<span class="why">{_text(why)}</span></td></tr>'
        )
    empty = f'<tr><td colspan="{len(table.headers)}" class="none">{NOT_MEASURED}</td></tr>'
    body = "".join(rows) or empty
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}">'
        f'<table class="glance"><caption>{_text(table.title)}</caption>{_head(table.headers)}'
        f'<tbody>{body}</tbody></table></div>\n<p class="note">{_text(table.note)}</p>'
    )


def table(shown: Table, style: str) -> str:
    """A table with its caption; one without rows says so."""
    note = f'\n<p class="note">{_text(shown.note)}</p>' if shown.note and shown.rows else ""
    if not shown.rows:
        return f"<h3>{_text(shown.title)}</h3>\n{_missing()}"
    rows = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(map(_cell, rest))}</tr>'
        for first, *rest in shown.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(shown.title)}">'
        f'<table class="{style}"><caption>{_text(shown.title)}</caption>{_head(shown.headers)}'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _chart(chart: Chart, anchor: str) -> str:
    head = f'<h2 id="{anchor}">{_text(chart.title)}</h2>'
    if chart.wide is None or chart.narrow is None:
        return f"{head}\n{_missing()}"
    return (
        f'{head}\n<figure aria-labelledby="{anchor}"><figcaption>{_text(chart.caption)} '
        f'The same figures stand in the tables below.</figcaption>\n<div class="wide">'
        f'{chart.wide}</div>\n<div class="narrow">{chart.narrow}</div></figure>'
    )


_LEGEND = (
    '<p class="legend">Share of a token withheld from the receiver: '
    + "".join(
        f'<span><span class="t" style="--w:{w / 100}">{w}%</span></span>' for w in (0, 25, 50)
    )
    + '<span><span class="t hid">struck out</span> more than half</span>'
    '<span><span class="t unknown">dotted</span> not measured</span></p>'
)


def _context(context: Mapping[str, Any]) -> str:
    tokens = records(context.get("tokens"))
    where = f"Guard {context.get('guard', '?')}, policy {context.get('policy', '?')}"
    return (
        f'<section class="context"><h3>{_text(context.get("title") or "Context")}</h3>'
        f'<p class="meta">{_text(where)}</p>'
        f'<p class="tokens">{"".join(map(_token, tokens))}</p>{_withheld(tokens)}</section>'
    )


def _token(token: Mapping[str, Any]) -> str:
    text, share = _text(token.get("text", ""), newline="↵\n"), number(token.get("withheld"))
    category = f", {_text(token['category'])}" if token.get("category") else ""
    if share is None:
        return f'<span class="t unknown" title="{NOT_MEASURED}{category}">{text}</span>'
    share = min(1.0, max(0.0, share))
    hidden = " hid" if share > 0.5 else ""
    title = f"{share:.0%} withheld{category}"
    return f'<span class="t{hidden}" style="--w:{share:.2f}" title="{title}">{text}</span>'


def _withheld(tokens: list[Mapping[str, Any]]) -> str:
    """The struck-out stretches as a list: a title is out of reach for touch and keyboard."""
    items = []
    for hidden, run in groupby(tokens, key=lambda t: (number(t.get("withheld")) or 0.0) > 0.5):
        if not hidden:
            continue
        stretch = list(run)
        shares = [number(t.get("withheld")) or 0.0 for t in stretch]
        names = sorted({str(t["category"]) for t in stretch if t.get("category")})
        kind = f" ({', '.join(names)})" if names else ""
        words = "".join(str(t.get("text", "")) for t in stretch).strip()
        mean = sum(shares) / len(shares)
        items.append(f"<li>{_text(words)}{_text(kind)}: {mean:.0%} withheld on average</li>")
    body = f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing.</p>"
    return f"<details><summary>What was mostly withheld</summary>{body}</details>"
