"""What a client is shown of a segment, by who asks.

The audience's view holds nothing that was computed from the sender's text without the guard's
noise: with such a figure at hand it could publish candidates of its own until one has the same. The
number of tokens is one: the audience gets it rounded up (``length_bucket`` of the policy), the
publisher and an admin as it is.
"""

from __future__ import annotations

from typing import Any

from lcguard.handoff.names import EdgeName, split_tenant
from lcguard.handoff.policy import Edge, Policy
from lcguard.manifest import Manifest
from lcguard.server.access.keyring import Identity
from lcguard.server.authorization.approved_handoff import qualified
from lcguard.server.leakage.ledger import Segment

_MANIFEST = (
    "format_version",
    "model_id",
    "revision",
    "config_digest",
    "rope",
    "n_layers",
    "n_kv_heads",
    "head_dim",
    "dtype",
    "source_agent",
    "edge",
    "hop",
    "policy_digest",
    "guard_digest",
    "created_at",
    "handle",
    "audience",
    "expires_at_s",
)
"""Digests of tensors are left out: nobody here has the tensors to hold against them."""


def knows_text(who: Identity, source: str) -> bool:
    """Whether the caller has the text of what ``source`` published, or answers for all."""
    return who.role == "admin" or (who.role == "agent" and who.agent == source)


def shown_tokens_for(reader: str, edge: Edge, n_tokens: int) -> int:
    """A segment's length as agent ``reader`` may know it; names with their tenant."""
    return n_tokens if reader == edge.source else edge.shown_tokens(n_tokens)


def ledger_view(who: Identity, row: Segment, policy: Policy) -> dict[str, Any]:
    """A row of the ledger."""
    edge = policy.for_edge(qualified(row.tenant, row.source), qualified(row.tenant, row.audience))
    full = knows_text(who, row.source)
    out = {
        "handle": row.handle,
        "source": row.source,
        "audience": row.audience,
        "created_at_s": row.created_at_s,
        "expires_at_s": row.expires_at_s,
        "n_tokens": row.n_tokens if full else edge.shown_tokens(row.n_tokens),
        "guard": row.guard,
        "guard_digest": row.guard_digest,
    }
    # whose segments the publisher read is not the audience's business
    return out | ({"parents": list(row.parents)} if full or who.role == "auditor" else {})


def manifest_view(row: Segment, manifest: Manifest) -> dict[str, Any]:
    """A manifest, without what only a holder of the tensors can use."""
    out = manifest.model_dump(mode="json", include=set(_MANIFEST))
    for name in ("source_agent", "audience"):
        out[name] = split_tenant(out[name])[1]
    return out | {"edge": EdgeName(row.source, row.audience).in_manifest}
