"""Guards: one file each, registered by name."""

from __future__ import annotations

from lcguard.guards import (
    cloak,
    compose,
    erasure,
    gate,
    gaussian,
    identity,
    redact,
    regress,
    residual,
    twin,
)
from lcguard.guards.base import GuardModule, KVShape, guard_class, names, register
from lcguard.guards.frozen import Card, FrozenGuard, GuardError

__all__ = [
    "Card",
    "FrozenGuard",
    "GuardError",
    "GuardModule",
    "KVShape",
    "cloak",
    "compose",
    "erasure",
    "gate",
    "gaussian",
    "guard_class",
    "identity",
    "names",
    "redact",
    "register",
    "regress",
    "residual",
    "twin",
]
