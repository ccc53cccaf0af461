"""Whether a segment that is there may be consumed now, under the policy and the edges of now."""

from __future__ import annotations

from lcguard.handoff.errors import LineageError
from lcguard.handoff.lineage import check_current
from lcguard.handoff.names import split_tenant
from lcguard.handoff.policy import Policy
from lcguard.manifest import Manifest
from lcguard.server.authorization.approved_handoff import edge_name, gone
from lcguard.server.authorization.rule_digest import rule_digest
from lcguard.server.errors import ProxyError
from lcguard.server.leakage.ledger import Segment
from lcguard.server.leakage.meter import LeakageMeter


def check_consumable(
    row: Segment, manifest: Manifest, me: str, policy: Policy, meter: LeakageMeter, now_s: float
) -> None:
    """Raises ``ProxyError`` (403, 404) where agent ``me`` may not consume it.

    Args:
        row: the segment's in the ledger.
        manifest: as stored, its seal already verified.
    """
    shown = f"segment {manifest.handle[:6]}..."
    if row.revoked_at_s is not None:
        raise gone(shown)
    if manifest.audience != me:
        raise ProxyError(
            403, f"{shown} is not for agent {split_tenant(me)[1]!r}", code="not_audience"
        )
    if 0 < manifest.expires_at_s <= now_s:
        raise gone(shown)
    edge = policy.for_edge(manifest.source_agent, me)
    if rule_digest(edge) != row.policy_digest:
        raise ProxyError(
            403,
            f"{shown} was published under a policy that has changed: publish it again",
            code="policy_changed",
        )
    tenant, source, audience = edge_name(edge)
    if meter.verdict(tenant, source, audience) == "closed" and not (
        edge.on_leak == "redact" and row.guard == "redact"
    ):
        raise ProxyError(
            403,
            f"{shown}: the edge from {source!r} is closed, planted records were read off "
            "its segments",
            code="edge_closed",
        )
    try:
        check_current(manifest, policy)
    except LineageError as error:
        raise ProxyError(403, f"{shown}: {error}", code="policy_changed") from None
