"""Prometheus metrics. Labels come from closed sets: routes, codes, the policy's edges; never from
what a client sends."""

from __future__ import annotations

from collections import deque
from statistics import quantiles

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry for each proxy, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "lcguard_requests", "Requests by route and status.", ["route", "status"], registry=r
        )
        self.refused = Counter(
            "lcguard_refused", "Requests not served, by reason.", ["code"], registry=r
        )
        self.handoffs = Counter(
            "lcguard_handoffs", "Segments published and consumed.", ["kind"], registry=r
        )
        self.events = Gauge(
            "lcguard_audit_events",
            "Rows of the audit by what happened and its verdict.",
            ["event", "verdict"],
            registry=r,
        )
        self.engine_starts = Gauge(
            "lcguard_engine_starts", "Starts of the vLLM that the server started.", registry=r
        )
        self.details = d = CollectorRegistry()
        """What names edges, or tells by its change how long a request was."""
        self.tokens = Counter("lcguard_tokens", "Tokens of served requests.", registry=d)
        self.in_flight = Gauge("lcguard_in_flight", "Requests at vLLM.", registry=r)
        self.queued = Gauge("lcguard_queued", "Requests that wait for a place.", registry=r)
        self.first_byte = Histogram(
            "lcguard_first_byte_seconds",
            "From a request's head to the first byte of its answer.",
            ["route"],
            registry=r,
            buckets=_SECONDS,
        )
        self.overhead = Histogram(
            "lcguard_overhead_seconds",
            "To the first byte, without the wait for vLLM.",
            ["route"],
            registry=r,
            buckets=_SECONDS,
        )
        self.ready = Gauge(
            "lcguard_ready", "Whether a condition of readiness holds.", ["check"], registry=r
        )
        self.edge_open = Gauge(
            "lcguard_edge_open",
            "0 where canaries closed the edge.",
            ["tenant", "source", "audience"],
            registry=d,
        )
        self.leak = Gauge(
            "lcguard_canary_asr",
            "Attack success rate on planted records, and its interval.",
            ["tenant", "source", "audience", "bound"],
            registry=d,
        )
        self.files = Counter(
            "lcguard_reload_errors",
            "Changes of a followed file that could not be used.",
            ["file"],
            registry=r,
        )
        self.audit_rows = Gauge("lcguard_audit_rows", "Rows of the audit.", registry=r)
        # there from the start: an alert on a series that is absent never fires
        for kind in ("published", "consumed"):
            self.handoffs.labels(kind)
        for file in ("policy", "keys"):
            self.files.labels(file)
        self.recent_first_ms: deque[float] = deque(maxlen=2048)
        self.recent_overhead_ms: deque[float] = deque(maxlen=2048)

    def text(self, details: bool) -> bytes:
        """In Prometheus' format; ``details``: also what is not for everybody."""
        return generate_latest(self.registry) + (generate_latest(self.details) if details else b"")


def percentiles(values_ms: deque[float]) -> tuple[float | None, float | None]:
    """Median and 95th percentile; None of nothing."""
    found = list(values_ms)
    if len(found) < 2:
        return (found[0], found[0]) if found else (None, None)
    cuts = quantiles(found, n=20)
    return cuts[9], cuts[18]
