"""What of a policy decides how a segment is guarded."""

from __future__ import annotations

import hashlib

from lcguard.handoff.policy import Edge
from lcguard.rope import canonical

_FIELDS = {"forbid", "derive", "guard", "fixed_length", "detect"}


def rule_digest(edge: Edge) -> str:
    """SHA-256 over the part of a rule that a segment made under it depends on.

    A segment outlives a change of lifetimes and budgets, and no change of what is hidden.
    """
    return hashlib.sha256(canonical(edge.model_dump(mode="json", include=_FIELDS))).hexdigest()
