"""The dashboard: one page made on the server, which asks nothing of any other host.

Every name in it may have been chosen by an attacker. The template escapes all text, characters
that would hide or reorder text become visible, and the content security policy runs no script and
takes no style but the page's own.
"""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from lcguard.evaluation.style import CSS
from lcguard.evaluation.verdict import NOT_MEASURED, figure, percent
from lcguard.handoff.names import ANY
from lcguard.server.dashboard.graph_svg import graph
from lcguard.server.dashboard.leak_svg import history_line, leak_bar, scale_top
from lcguard.server.dashboard.view import (
    AgentRow,
    AuditRow,
    ChangeRow,
    Check,
    DashboardView,
    EdgeRow,
    Latency,
    NextStep,
    Totals,
    VersionRow,
)
from lcguard.server.dashboard.visible_text import visible

__all__ = [
    "AgentRow",
    "AuditRow",
    "ChangeRow",
    "Check",
    "DashboardView",
    "EdgeRow",
    "Latency",
    "NextStep",
    "Totals",
    "VersionRow",
    "headers",
    "new_nonce",
    "render",
]

REFRESH_S = 5.0
_NONCE = re.compile(r"[A-Za-z0-9_-]{22,64}")


def new_nonce() -> str:
    """128 random bits, for one response only."""
    return secrets.token_urlsafe(16)


def headers(nonce: str) -> dict[str, str]:
    """The headers that a page rendered with ``nonce`` must be sent with.

    Raises ``ValueError`` for a nonce that is short or could end the directive.
    """
    if not _NONCE.fullmatch(nonce):
        raise ValueError(f"nonce {nonce[:64]!r} is not from new_nonce(): make a new one")
    policy = (
        "default-src 'none'",
        f"style-src 'nonce-{nonce}'",
        f"script-src 'nonce-{nonce}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
    )
    return {
        "content-security-policy": "; ".join(policy),
        "content-type": "text/html; charset=utf-8",
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cross-origin-resource-policy": "same-origin",
    }


def render(view: DashboardView, nonce: str, refresh_s: float = REFRESH_S) -> str:
    """The whole page. Raises ``ValueError`` for a malformed nonce."""
    headers(nonce)
    # closed ones first; otherwise an order that does not jump from one refresh to the next
    edges = sorted(view.edges, key=lambda e: (e.state, e.tenant, e.source, e.audience))
    agents = sorted(view.agents, key=lambda a: (a.tenant, a.name))
    top = scale_top(edges, view.threshold)
    return _template().render(
        view=view,
        nonce=nonce,
        refresh_s=refresh_s,
        edges=edges,
        agents=agents,
        closed=[e for e in edges if e.state == "closed"],
        unmeasured=sum(e.asr is None for e in edges),
        failing=[c for c in view.checks if not c.ok],
        refused=sum(n for _, n in view.totals.refused),
        tenants=len({e.tenant for e in edges} | {a.tenant for a in agents}) > 1,
        graph=graph(edges, agents),
        top=top,
        bar=lambda edge: leak_bar(edge, view.threshold, top),
        line=lambda edge: history_line(edge, view.threshold, top),
        base_css=Markup(CSS),
    )


@cache
def _template() -> Template:
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "agent": lambda name: "any agent" if name == ANY else name,
        "ago": _ago,
        "clock": lambda at_s: _utc(at_s).strftime("%H:%M:%S"),
        "count": lambda n: f"{n:,}",
        "date": lambda at_s: _utc(at_s).strftime("%Y-%m-%d"),
        "figure": figure,
        "iso": lambda at_s: _utc(at_s).isoformat(timespec="seconds"),
        "percent": percent,
        "span": _span,
    }
    env.globals["NOT_YET"] = f"{NOT_MEASURED} yet"
    return env.get_template("dashboard.html")


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _utc(at_s: float) -> datetime:
    return datetime.fromtimestamp(at_s, UTC)


def _span(seconds: float) -> str:
    """Two units at most: ``3 d 4 h``, ``12 min``, ``8 s``."""
    whole = max(int(seconds), 0)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def _ago(at_s: float, now_s: float) -> str:
    return f"{_span(now_s - at_s)} ago"
