"""The figures of this moment, gathered for the dashboard, the metrics and the leakage route."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import quantiles

from lcguard import __version__
from lcguard.handoff.names import ANY
from lcguard.handoff.policy import Edge, Policy
from lcguard.server.audit.edge_counts import CANARY_TENANT, DONE
from lcguard.server.audit.trail import recent
from lcguard.server.dashboard.guard_versions import guard_versions
from lcguard.server.dashboard.view import (
    AgentRow,
    AuditRow,
    Check,
    DashboardView,
    EdgeRow,
    Latency,
    NextStep,
    Totals,
)
from lcguard.server.health.metrics import percentiles
from lcguard.server.leakage.ledger import Segment, live, received_counts
from lcguard.server.leakage.meter import EdgeLeakage
from lcguard.server.state import Proxy

Name = tuple[str, str, str]
"""Tenant, source, audience."""
RECENT_ROWS = 20
NEXT_STEPS = (
    NextStep("Give each agent a key of its own.", "lcguard keys new intake billing"),
    NextStep("Write in policy.yaml what each audience may not learn.", "lcguard policy schema"),
    NextStep("Point the agents' OpenAI clients here: one publishes, another consumes."),
)


def edge_rows(proxy: Proxy) -> list[EdgeRow]:
    """Every hop that ``known_edges`` gives. Raises ``DatabaseError``."""
    policy = proxy.authority.policy
    measured = {(m.tenant, m.source, m.audience): m for m in proxy.meter.snapshot()}
    counts = proxy.database.read(proxy.counts.update)
    closed = {name for name, m in measured.items() if m.state == "closed"}
    names = closed | known_edges(proxy, policy, counts)
    return [
        _row(
            proxy,
            name,
            policy.for_edge(f"{name[0]}/{name[1]}", f"{name[0]}/{name[2]}"),
            measured.get(name),
            counts.get(name, Counter()),
        )
        for name in sorted(names)
    ]


def known_edges(proxy: Proxy, policy: Policy, counts: Mapping[Name, Counter[str]]) -> set[Name]:
    """Hops that the policy names by name, and those that were used between agents that have a key
    or a name in the policy.

    No client makes one of a name that it thinks of: each costs a screening and has its metrics.
    """
    agents = proxy.keyring.agents()
    agents |= {
        (edge.tenant, name) for edge in policy.edges for name in (edge.source, edge.audience)
    }

    def known(tenant: str, name: str) -> bool:
        return bool({(tenant, name), (ANY, name)} & agents)

    used = {
        (tenant, source, audience)
        for (tenant, source, audience), n in counts.items()
        if any(n[event] for event in DONE) and known(tenant, source) and known(tenant, audience)
    }
    return used | named_edges(policy.edges, proxy.tenants())


def named_edges(edges: Iterable[Edge], tenants: Iterable[str]) -> set[Name]:
    """Concrete hops of a policy: an entry for any tenant is one hop in each."""
    out: set[Name] = set()
    known = sorted(tenants)
    for edge in edges:
        if ANY in (edge.source, edge.audience):
            continue
        for tenant in known if edge.tenant == ANY else [edge.tenant]:
            out.add((tenant, edge.source, edge.audience))
    return out


def _row(
    proxy: Proxy, name: Name, edge: Edge, leak: EdgeLeakage | None, counts: Counter[str]
) -> EdgeRow:
    times = proxy.publish_ms.get(name, [])
    cuts = quantiles(times, n=20) if len(times) > 1 else [times[0]] * 19 if times else []
    received = proxy.database.read(
        lambda c: received_counts(c, name[0], edge.window_s, proxy.authority.clock())
    )
    leak = leak or EdgeLeakage(*name, since_s=0.0)
    return EdgeRow(
        *name,
        guard="text" if edge.channel == "text" else edge.guard,
        forbid=edge.forbid,
        state=leak.state,
        on_leak=edge.on_leak,
        reason=leak.reason,
        published=counts["published"],
        consumed=counts["consumed"],
        blocked=counts["refused"],
        asr=leak.asr,
        asr_low=leak.asr_low,
        asr_high=leak.asr_high,
        floor=leak.floor,
        n_secrets=leak.n_secrets,
        measured_at_s=leak.measured_at_s,
        stale=leak.stale,
        history=tuple(p.asr for p in leak.history),
        publish_p50_ms=cuts[9] if cuts else None,
        publish_p95_ms=cuts[18] if cuts else None,
        nats=proxy.certificates.get(edge.guard),
        budget=edge.max_segments,
        received=received.get((name[1], name[2]), 0),
    )


async def overview(proxy: Proxy, tenant: str = "") -> DashboardView:
    """The dashboard's view; with ``tenant`` what its auditor may see: its audit, and whether the
    server works. Raises ``DatabaseError``."""
    return await asyncio.to_thread(_overview, proxy, tenant)


def _overview(proxy: Proxy, tenant: str) -> DashboardView:
    state, now = proxy.readiness, time.time()
    codes = Counter[str]()
    n_requests = n_5xx = 0
    for metric in proxy.metrics.registry.collect():
        for sample in metric.samples:
            if sample.name == "lcguard_requests_total":
                n_requests += int(sample.value)
                n_5xx += int(sample.value) * (sample.labels["status"][0] == "5")
            elif sample.name == "lcguard_refused_total":
                codes[sample.labels["code"]] += int(sample.value)
    head = proxy.audit.head()
    segments: list[Segment] = []
    for name in [tenant] if tenant else proxy.tenants():
        segments += proxy.database.read(partial(live, tenant=name, now_s=now))
    rows = proxy.database.read(partial(recent, last=RECENT_ROWS * 20, tenant=tenant or None))
    rows = [r for r in rows if r["tenant"] != CANARY_TENANT][-RECENT_ROWS:]
    versions, changes, broken = guard_versions({} if tenant else proxy.settings.engine.guards)
    return DashboardView(
        model=proxy.model,
        version=__version__,
        now_s=now,
        uptime_s=now - proxy.started_s,
        ready=state.ready,
        checks=tuple(Check(c.name, c.ok, c.detail) for c in state.conditions.values()),
        policy_digest=proxy.authority.policy.digest,
        policy_error=proxy.policy_error(),
        threshold=proxy.settings.canaries.threshold,
        agents=tuple(
            AgentRow(of, agent, n.requests, n.in_flight, n.refused, n.tokens)
            for (of, agent), n in sorted(proxy.agents.items())
            if not tenant
        ),
        edges=() if tenant else tuple(edge_rows(proxy)),
        versions=versions,
        changes=changes,
        registry_errors=broken,
        totals=Totals(n_requests, tuple(codes.most_common()), n_5xx),
        ttfb=Latency(*percentiles(proxy.metrics.recent_first_ms)),
        overhead=Latency(*percentiles(proxy.metrics.recent_overhead_ms)),
        live_segments=len(segments),
        audit_rows=head.count,
        audit_head=head.mac[:12],
        recent=tuple(
            AuditRow(
                r["at_ms"] / 1000,
                r["event"],
                r["tenant"],
                r["agent"],
                r["source"],
                r["audience"],
                r["verdict"],
                r["reason"],
            )
            for r in reversed(rows)
        ),
        next_steps=NEXT_STEPS,
        unproven=tuple(sorted(proxy.unproven.items())),
        tenant=tenant,
    )


def refresh_metrics(proxy: Proxy) -> None:
    """Brings the gauges up to date."""
    m = proxy.metrics
    m.in_flight.set(proxy.concurrency.running)
    m.queued.set(proxy.concurrency.waiting)
    for c in proxy.readiness.conditions.values():
        m.ready.labels(c.name).set(c.ok)
    m.audit_rows.set(proxy.audit.head().count)
    m.engine_starts.set(proxy.engine_starts())
    known = known_edges(proxy, proxy.authority.policy, proxy.database.read(proxy.counts.update))
    for (event, verdict), n in Counter(proxy.counts.verdicts).items():
        m.events.labels(event, verdict).set(n)
    for leak in proxy.meter.snapshot():
        name = (leak.tenant, leak.source, leak.audience)
        if name not in known and leak.state == "open":
            continue
        m.edge_open.labels(*name).set(leak.state == "open")
        for bound, value in (("mean", leak.asr), ("low", leak.asr_low), ("high", leak.asr_high)):
            if value is not None:
                m.leak.labels(*name, bound).set(value)
