"""What the dashboard shows: figures and names, filled in by the server, never text of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One condition of readiness."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class AgentRow:
    """An agent, counted since the server started."""

    tenant: str
    name: str
    requests: int
    in_flight: int
    refused: int
    tokens: int


@dataclass(frozen=True)
class EdgeRow:
    """A hop that the policy names or that was used; None is what nobody has measured."""

    tenant: str
    source: str
    audience: str
    guard: str
    forbid: tuple[str, ...]
    state: Literal["open", "closed"]
    on_leak: Literal["refuse", "redact"] = "refuse"
    reason: str = ""
    """Why the edge is closed."""
    published: int = 0
    consumed: int = 0
    blocked: int = 0
    asr: float | None = None
    """Attack success rate of the last screening, 0..1."""
    asr_low: float | None = None
    asr_high: float | None = None
    floor: float | None = None
    """The same attack without the segments."""
    n_secrets: int | None = None
    measured_at_s: float | None = None
    """Unix time."""
    stale: bool = False
    """The screening is too old, or was of another guard or policy."""
    history: tuple[float, ...] = ()
    """ASR of the last screenings, oldest first."""
    publish_p50_ms: float | None = None
    publish_p95_ms: float | None = None
    nats: float | None = None
    """The guard's certificate: mean information of one segment about its forbidden secrets."""
    budget: int | None = None
    """Distinct segments of one source that the audience may receive in the window; None: any."""
    received: int = 0
    """Of that budget, by the receiver that has used most of it."""


@dataclass(frozen=True)
class AuditRow:
    """A recent row of the audit."""

    at_s: float
    """Unix time."""
    event: str
    tenant: str
    agent: str
    source: str
    audience: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class VersionRow:
    """A version of a guard that is served from a registry."""

    guard: str
    """As the policy names it."""
    name: str
    state: str
    """live, ready, refused, withdrawn; or live though it leaks."""
    digest: str
    parent: str
    """Name or digest of the version that it was trained on from; may be empty."""
    why: str
    """Why it was taken in, refused or withdrawn."""


@dataclass(frozen=True)
class ChangeRow:
    """A change of a registry."""

    at_s: float
    """Unix time."""
    guard: str
    what: str
    version: str
    why: str


@dataclass(frozen=True)
class Totals:
    """Counts since the server started."""

    requests: int = 0
    refused: tuple[tuple[str, int], ...] = ()
    """Refusals by reason."""
    errors_5xx: int = 0


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile; None before the first request."""

    p50_ms: float | None = None
    p95_ms: float | None = None


@dataclass(frozen=True)
class NextStep:
    """What to do after a fresh start; ``command`` may be empty."""

    text: str
    command: str = ""


NEXT_STEPS = (
    NextStep("Give each agent a key of its own."),
    NextStep("Write in the policy what each audience may not learn."),
    NextStep("Point the agents' OpenAI clients at this server; one publishes, another consumes."),
)


@dataclass(frozen=True)
class DashboardView:
    """One moment of a deployment."""

    model: str
    version: str
    now_s: float
    """Unix time of this view."""
    uptime_s: float
    ready: bool
    checks: tuple[Check, ...]
    policy_digest: str
    threshold: float
    """ASR above which an edge closes."""
    policy_error: str = ""
    """Why the policy file as it is now cannot be used; empty while it can."""
    agents: tuple[AgentRow, ...] = ()
    edges: tuple[EdgeRow, ...] = ()
    versions: tuple[VersionRow, ...] = ()
    changes: tuple[ChangeRow, ...] = ()
    """The last ones of all registries, the newest first."""
    registry_errors: tuple[tuple[str, str], ...] = ()
    """Guard and why its registry must not be used."""
    totals: Totals = Totals()
    ttfb: Latency = Latency()
    """Time to first byte."""
    overhead: Latency = Latency()
    """What the proxy adds to a request."""
    live_segments: int = 0
    audit_rows: int = 0
    audit_head: str = ""
    """First 12 hexadecimal digits."""
    recent: tuple[AuditRow, ...] = ()
    """Newest first."""
    next_steps: tuple[NextStep, ...] = NEXT_STEPS
    unproven: tuple[tuple[str, str], ...] = ()
    """Guards that are served though nothing shows that they withhold anything, and why."""
    tenant: str = ""
    """Whose audit alone is shown, for an auditor; empty: everything, for an admin."""
