"""What one running proxy holds, and what every route asks of it."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lcguard.canonical import canonical_json
from lcguard.server.access.keyring import AuthError, Identity, Keyring
from lcguard.server.audit.edge_counts import CANARY_TENANT, EdgeCounts
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.authorization.active_reads import ActiveReads
from lcguard.server.authorization.approved_handoff import ApprovedHandoff, edge_name
from lcguard.server.authorization.authority import Authority
from lcguard.server.authorization.settlement import Settlement
from lcguard.server.authorization.text_hops import TextHops
from lcguard.server.database.connection import DatabaseError
from lcguard.server.database.writer import Database
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.health.metrics import Metrics
from lcguard.server.health.readiness import Readiness
from lcguard.server.leakage.canaries import CanaryRunner
from lcguard.server.leakage.meter import EdgeLeakage, LeakageMeter
from lcguard.server.limits.concurrency import ConcurrencyLimit
from lcguard.server.limits.key_limits import KeyLimits, Limited, Limits
from lcguard.server.limits.shared_limits import SharedLimits
from lcguard.server.settings import ServerSettings
from lcguard.server.tracing.spans import Tracing, Untraced
from lcguard.store import SegmentStore
from lcguard.store.line import StoreLine

if TYPE_CHECKING:
    from lcguard.server.gateway.exchange import Exchange

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class AgentCount:
    """An agent, since the start."""

    requests: int = 0
    in_flight: int = 0
    refused: int = 0
    tokens: int = 0


@dataclass
class TokenUsage:
    """What a request took."""

    reserved: int
    """Set aside before it ran."""
    used_tokens: int = 0
    """As vLLM counted them, consumed segments by the length that is shown; what was set aside where
    the answer broke off before that."""


@dataclass
class Proxy:
    """Everything that lives as long as the server."""

    settings: ServerSettings
    key: bytes
    model: str
    """As clients call it."""
    upstream: Upstream
    keyring: Keyring
    database: Database
    audit: AuditLog
    store: SegmentStore
    line: StoreLine
    """Where calls to the store are made."""
    meter: LeakageMeter
    authority: Authority
    settlement: Settlement
    text_hops: TextHops
    readiness: Readiness
    limits: KeyLimits
    concurrency: ConcurrencyLimit
    shared_limits: SharedLimits | None = None
    """Of all proxies of one database; None: each key's are counted here alone."""
    metrics: Metrics = field(default_factory=Metrics)
    active_reads: ActiveReads = field(default_factory=ActiveReads)
    agents: dict[tuple[str, str], AgentCount] = field(default_factory=dict)
    started_s: float = field(default_factory=time.time)
    counts: EdgeCounts = field(default_factory=EdgeCounts)
    policy_error: Callable[[], str] = lambda: ""
    """Why the policy's file as it is now cannot be used."""
    context: Callable[[], int | None] = lambda: None
    """Of the model, in tokens; None where it is not known yet."""
    tracing: Tracing = field(default_factory=Untraced)
    engine_starts: Callable[[], int] = lambda: 0
    """How often vLLM was started here."""
    canaries: CanaryRunner | None = None
    certificates: dict[str, float] = field(default_factory=dict)
    """Guard to the mean pair leak of its segments, in nats."""
    unproven: dict[str, str] = field(default_factory=dict)
    """Guard to why nothing shows that it withholds anything."""
    publish_ms: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    """The last publications of each edge."""

    def authenticate(self, headers: Mapping[str, str]) -> Identity:
        """Who asks. Raises ``ProxyError`` (401)."""
        try:
            return self.keyring.authenticate(headers.get("authorization"))
        except AuthError as error:
            raise ProxyError(401, str(error), code="unauthorized") from None

    def authenticate_basic(self, headers: Mapping[str, str]) -> Identity:
        """Who asks in a browser: the key is the password. Raises ``ProxyError`` (401)."""
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return self.authenticate(headers)
        try:
            password = b64decode(rest, validate=True).decode().partition(":")[2]
        except ValueError:
            password = ""
        return self.authenticate({"authorization": f"Bearer {password}"})

    def request_id(self, headers: Mapping[str, str]) -> str:
        """The client's, where it is a harmless one."""
        given = headers.get("x-request-id", "")
        return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)

    def tenants(self) -> set[str]:
        """Tenants that have a key or were seen."""
        seen = {tenant for tenant, _ in self.agents} | self.keyring.tenants()
        return seen - {CANARY_TENANT}

    def salt(self, who: Identity) -> str:
        """Names the caller's blocks in vLLM's prefix cache: nobody else hits them, or sees by the
        time of an answer that they are there. With ``prefix_cache: tenant`` agents of one tenant
        hit, and see, each other's plain prompts."""
        names = [who.tenant] if self.settings.prefix_cache == "tenant" else [who.tenant, who.agent]
        message = b"lcguard cache salt\0" + canonical_json(names)
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()

    def check_model(self, who: Identity, body: Mapping[str, Any]) -> None:
        """Raises ``ProxyError`` (403) for a model that the key is not for."""
        model = body.get("model")
        # a request that names none gets vLLM's own, which may be another
        if who.models and model not in who.models:
            raise ProxyError(
                403,
                f"this key is not for model {str(model or '')[:80]!r}: name one of "
                f"{', '.join(who.models)}",
                code="model",
                param="model",
            )

    async def edge_changed(self, edge: EdgeLeakage, old: str, new: str) -> None:
        """Writes it to the audit that canaries closed or opened an edge."""
        entry = Entry(
            "edge_closed" if new == "closed" else "edge_opened",
            tenant=edge.tenant,
            source=edge.source,
            audience=edge.audience,
            guard=edge.guard,
            guard_digest=edge.guard_digest,
            policy_digest=edge.policy_digest,
            reason=edge.reason,
            verdict="blocked" if new == "closed" else "allowed",
        )
        with suppress(DatabaseError):  # the edge is closed all the same
            await self.audit.append(entry)

    @asynccontextmanager
    async def admit(self, who: Identity, tokens: int) -> AsyncIterator[TokenUsage]:
        """A place for one request, within the limits of its key and of the proxy.

        Raises ``ProxyError`` (413, 429).
        """
        if self.readiness.draining:
            raise ProxyError(503, "the server is stopping", code="draining", retry_after_s=5)
        own, shared = who.limits, None
        if own is not None and self.shared_limits is not None and own != Limits():
            own, shared = Limits(concurrency=own.concurrency), own
        try:
            admission = self.limits.admit(who.key_id, own, tokens)
        except Limited as error:
            raise _limited(error) from None
        usage, count = TokenUsage(tokens), self._count(who)
        with admission:
            if shared is not None:
                await self._admit_shared(who.key_id, shared, tokens)
            try:
                async with self.concurrency:
                    count.in_flight += 1
                    try:
                        yield usage
                    finally:
                        count.in_flight -= 1
            except Limited as error:
                raise _limited(error) from None
            finally:
                admission.settle(usage.used_tokens)
                if shared is not None and self.shared_limits is not None:
                    self.shared_limits.end(who.key_id, shared, tokens, usage.used_tokens)
                self.metrics.tokens.inc(usage.used_tokens)
                count.tokens += usage.used_tokens

    async def _admit_shared(self, key_id: str, limits: Limits, tokens: int) -> None:
        """Raises ``ProxyError`` (413, 429), or 503 where nobody can count."""
        assert self.shared_limits is not None
        try:
            await self.shared_limits.admit(key_id, limits, tokens)
        except Limited as error:
            raise _limited(error) from None
        except DatabaseError as error:
            raise ProxyError(
                503,
                f"the key's limits cannot be counted now: {error}",
                code="unavailable",
                retry_after_s=2,
            ) from None

    @contextmanager
    def watch(self, x: Exchange, route: str) -> Iterator[None]:
        """Counts an exchange when it is over."""
        try:
            yield
        finally:
            m = self.metrics
            m.requests.labels(route, str(x.status or 499)).inc()
            if x.code:
                m.refused.labels(x.code).inc()
            if x.first_byte_s is not None and not x.code:
                passed = x.first_byte_s - x.started_s
                own = max(0.0, passed - x.upstream_s)
                m.first_byte.labels(route).observe(passed)
                m.overhead.labels(route).observe(own)
                m.recent_first_ms.append(passed * 1000)
                m.recent_overhead_ms.append(own * 1000)
            if x.who is not None:
                count = self._count(x.who)
                count.requests += 1
                count.refused += bool(x.code)
            if x.approved is not None and not x.code:
                self._handoff(x, x.approved)

    def _handoff(self, x: Exchange, approved: ApprovedHandoff) -> None:
        if approved.consumed:
            self.metrics.handoffs.labels("consumed").inc(len(approved.consumed))
        for publish in approved.publishes:
            self.metrics.handoffs.labels("published").inc()
            times = self.publish_ms.setdefault(edge_name(publish.hop.own), [])
            times.append((time.perf_counter() - x.started_s) * 1000)
            del times[:-256]

    def _count(self, who: Identity) -> AgentCount:
        return self.agents.setdefault((who.tenant, who.agent), AgentCount())


def _limited(error: Limited) -> ProxyError:
    code = "too_large" if error.status == 413 else "limited"
    return ProxyError(error.status, error.reason, code=code, retry_after_s=error.retry_after_s)
