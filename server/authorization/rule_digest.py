"""What of a policy decides how a segment is guarded."""

from __future__ import annotations

from lcguard.canonical import canonical_digest
from lcguard.handoff.policy import Edge

_FIELDS = {"forbid", "derive", "guard", "fixed_length", "detect"}


def rule_digest(edge: Edge) -> str:
    """SHA-256 over the part of a rule that a segment made under it depends on.

    A segment outlives a change of lifetimes and budgets, and no change of what is hidden. Kept in
    the ledger and shown to nobody: it tells terms of own categories to whoever tries them.
    """
    data = edge.model_dump(mode="json", include=_FIELDS)
    if edge.custom:
        data["custom"] = edge.definitions
    return canonical_digest(data)
