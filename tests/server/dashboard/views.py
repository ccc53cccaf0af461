"""Views for the dashboard: fresh, small, large and hostile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lcguard.server.dashboard.page import (
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

NOW_S = 1_780_000_000.0
LONG = "an-agent-whose-name-is-as-long-as-the-key-ring-allows-00"
HOSTILE = "<img src=x onerror=alert(1)>"


def edge(source: str, audience: str, **changes: Any) -> EdgeRow:
    made = EdgeRow(
        tenant="default",
        source=source,
        audience=audience,
        guard="gate",
        forbid=("government_id", "health"),
        state="open",
        published=140,
        consumed=133,
        asr=0.031,
        asr_low=0.009,
        asr_high=0.107,
        floor=0.016,
        n_secrets=64,
        measured_at_s=NOW_S - 240,
        history=(0.02, 0.05, 0.031),
        publish_p50_ms=38.2,
        publish_p95_ms=71.9,
        nats=0.42,
        budget=50,
        received=7,
    )
    return replace(made, **changes)


def closed(source: str, audience: str, **changes: Any) -> EdgeRow:
    reason = "12 of 64 planted secrets were read off it"
    return edge(
        source,
        audience,
        state="closed",
        asr=0.19,
        asr_low=0.11,
        asr_high=0.3,
        reason=reason,
        **changes,
    )


def unmeasured(source: str, audience: str) -> EdgeRow:
    return EdgeRow("default", source, audience, "gate", ("health",), "open")


def agent(name: str, tenant: str = "default", requests: int = 12) -> AgentRow:
    return AgentRow(tenant, name, requests, 1, 0, 3456)


FRESH = DashboardView(
    model="nano",
    version="0.1.0",
    now_s=NOW_S,
    uptime_s=90,
    ready=True,
    checks=(Check("upstream", True, "answers"),),
    policy_digest="8f" * 32,
    threshold=0.1,
    next_steps=(NextStep("Give each agent a key.", "a command"),),
)


THREE = replace(
    FRESH,
    agents=(agent("intake"), agent("billing"), agent("triage")),
    edges=(edge("intake", "billing"), closed("intake", "triage"), unmeasured("triage", "billing")),
    totals=Totals(2240, (("edge closed", 12), ("limit", 4))),
    ttfb=Latency(182, 410),
    recent=(AuditRow(NOW_S, "publish", "default", "intake", "intake", "triage", "blocked", "no"),),
)


_NAMES = [f"worker-{i:02d}" for i in range(40)]
FORTY = replace(
    FRESH,
    agents=tuple(agent(name) for name in _NAMES),
    edges=(
        *(edge(_NAMES[i], _NAMES[(i + 1) % 40]) for i in range(40)),
        *(edge(_NAMES[i], _NAMES[(i + 7) % 40], stale=True) for i in range(38)),
        closed(_NAMES[38], _NAMES[5]),
        closed(_NAMES[39], _NAMES[6], on_leak="redact"),
    ),
)


HARD = replace(
    FRESH,
    ready=False,
    checks=(Check("upstream", False, "connection refused"),),
    policy_error="policy.yaml: edges.0.forbid: 'helth' is no category",
    agents=(agent(LONG), agent(HOSTILE), agent("<script>alert(1)</script>", tenant=LONG)),
    edges=(edge(LONG, HOSTILE), closed(HOSTILE, LONG + "'\""), edge("*", "a\u202eb\x07")),
    recent=(AuditRow(NOW_S, "refused", "t", HOSTILE, LONG, LONG, "blocked", LONG + HOSTILE),),
)


LOOP = replace(
    THREE,
    versions=(
        VersionRow("gate", "v4", "withdrawn", "9d3f" * 3, "v2", "33 of 33 planted secrets read"),
        VersionRow("gate", "v3", "refused", "7c1e" * 3, "", "health leaks: 42.9%, at least 21%"),
        VersionRow("gate", "v2", "live", "ad32" * 3, "v1", "fresh attackers recover 0.6%"),
        VersionRow("gate", "v1", "withdrawn", "5484" * 3, "", HOSTILE + LONG),
    ),
    changes=(
        ChangeRow(NOW_S - 60, "gate", "rollback", "v2", "33 of 33 planted secrets read"),
        ChangeRow(NOW_S - 90, "gate", "promote", "v4", "by hand"),
        ChangeRow(NOW_S - 99, "gate", "add", "v3", "refused: health leaks: 42.9%"),
    ),
    registry_errors=((LONG, "registry.json is not signed with this deployment's key"),),
)


VIEWS = {"fresh": FRESH, "three": THREE, "forty": FORTY, "hard": HARD, "loop": LOOP}
