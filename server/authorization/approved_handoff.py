"""A handoff on its way through vLLM, its rows in the audit, and how it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lcguard.handoff.audiences import Hop
from lcguard.handoff.grants import sign_order
from lcguard.handoff.names import split_tenant
from lcguard.handoff.policy import Edge
from lcguard.handoff.request import PARAM, parse_handoff
from lcguard.manifest import Manifest
from lcguard.server.access.keyring import Identity
from lcguard.server.audit.trail import Entry, Event
from lcguard.server.errors import ProxyError
from lcguard.server.leakage.draw_budget import Text

GRANT_S = 600
"""Life of what the proxy shows the engine for one request: its signature and its grants."""


@dataclass(frozen=True)
class ApprovedPublish:
    """What one audience gets of a publish."""

    hop: Hop
    """The rules that it goes by."""
    handle: str
    rule: str
    """``rule_digest`` of the policy's own edge."""
    text: Text | None = None
    """Of what is published, where its draws are counted."""
    declassified: tuple[str, ...] = ()
    """Categories that the rule lets pass from what was consumed."""


@dataclass
class ApprovedHandoff:
    """A handoff that may happen, on its way through vLLM."""

    who: Identity
    request_id: str
    params: dict[str, Any]
    """``kv_transfer_params["lcguard"]`` for vLLM."""
    consumed: tuple[Manifest, ...] = ()
    shown_tokens: tuple[int, ...] = ()
    """Of each consumed segment, as far as its reader may know."""
    publishes: tuple[ApprovedPublish, ...] = ()
    """One for each audience."""
    listed: bool = False
    """Whether its client gave the audiences as a list, and gets one."""
    n_redacted: int | None = None
    """Values that were covered in the prompt before any guard, every occurrence counted: what guard
    ``redact`` hides, and what belongs to the policy's own categories."""
    done: bool = field(default=False, compare=False)

    @property
    def edge(self) -> Edge | None:
        """How a publish is guarded; the edges of several audiences differ in their names alone."""
        return self.publishes[0].hop.joint if self.publishes else None

    @property
    def handle(self) -> str:
        """What the answer's id is made of: the handle, where there is one alone."""
        return self.publishes[0].handle if len(self.publishes) == 1 else ""

    @property
    def unsaid_tokens(self) -> int:
        """What is shown of the consumed lengths beyond what they are."""
        return sum(self.shown_tokens) - sum(m.n_tokens for m in self.consumed)


def signed_order(key: bytes, params: Mapping[str, Any], now_s: float) -> dict[str, Any]:
    """``params`` of a handoff with the proxy's signature, for an engine that takes no others."""
    handoff = parse_handoff({PARAM: params})
    assert handoff is not None
    return {**params, "order": sign_order(key, handoff.text(), int(now_s) + GRANT_S)}


def consumption(approved: ApprovedHandoff, m: Manifest, event: Event, reason: str = "") -> Entry:
    """The audit's row for one consumed segment."""
    return _entry(
        approved,
        event,
        reason,
        source=split_tenant(m.source_agent)[1],
        audience=split_tenant(m.audience)[1],
        handle=m.handle,
        guard_digest=m.guard_digest,
        policy_digest=m.policy_digest,
        n_tokens=m.n_tokens,
    )


def publication(
    approved: ApprovedHandoff,
    publish: ApprovedPublish,
    event: Event,
    manifest: Manifest | None = None,
    reason: str = "",
) -> Entry:
    """The audit's row for what one audience gets; ``manifest``: of what was stored."""
    edge = publish.hop.alone
    return _entry(
        approved,
        event,
        reason,
        source=split_tenant(edge.source)[1],
        audience=split_tenant(edge.audience)[1],
        handle=publish.handle,
        guard=edge.guard,
        policy_digest=edge.digest,
        guard_digest=manifest.guard_digest if manifest else "",
        n_tokens=manifest.n_tokens if manifest else 0,
    )


def publications(approved: ApprovedHandoff, event: Event, reason: str = "") -> list[Entry]:
    """``publication`` for every audience."""
    return [publication(approved, p, event, reason=reason) for p in approved.publishes]


def _entry(approved: ApprovedHandoff, event: Event, reason: str = "", **more: Any) -> Entry:
    verdict: Any = "error" if event in ("failed", "aborted") else "allowed"
    return Entry(
        request_id=approved.request_id,
        event=event,
        tenant=approved.who.tenant,
        agent=approved.who.agent,
        verdict=verdict,
        reason=reason,
        **more,
    )


def edge_name(edge: Edge) -> tuple[str, str, str]:
    """Tenant, source and audience."""
    tenant, source = split_tenant(edge.source)
    return tenant, source, split_tenant(edge.audience)[1]


def qualified(tenant: str, agent: str) -> str:
    """An agent's name inside vLLM and in manifests."""
    return f"{tenant}/{agent}"


def gone(shown: str) -> ProxyError:
    """404, the same for never, expired and revoked."""
    return ProxyError(
        404, f"{shown} does not exist: it expired, was revoked or never was", code="no_segment"
    )


def unavailable(error: Exception) -> ProxyError:
    """503: nobody can tell whether it may happen, so it does not."""
    return ProxyError(
        503, f"handoffs are not possible now: {error}", code="unavailable", retry_after_s=2
    )
