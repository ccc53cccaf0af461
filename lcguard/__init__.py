"""LCGuard: guards for the KV caches that LLM agents hand to each other.

Names of the public API load on first use, so that ``import lcguard`` (and with it ``lcguard
--help`` or a policy check) does not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcguard.categories import CATEGORIES, DERIVABLE
    from lcguard.handoff.policy import Edge, Policy, PolicyError, load_policy
    from lcguard.protocols import Attack, Guard, Guarded, KVBatch, Mask

__version__ = "0.1.0"

_EXPORTS = {
    "CATEGORIES": "lcguard.categories",
    "DERIVABLE": "lcguard.categories",
    "Attack": "lcguard.protocols",
    "Edge": "lcguard.handoff.policy",
    "Guard": "lcguard.protocols",
    "Guarded": "lcguard.protocols",
    "KVBatch": "lcguard.protocols",
    "Mask": "lcguard.protocols",
    "Policy": "lcguard.handoff.policy",
    "PolicyError": "lcguard.handoff.policy",
    "load_policy": "lcguard.handoff.policy",
}

__all__ = [
    "CATEGORIES",
    "DERIVABLE",
    "Attack",
    "Edge",
    "Guard",
    "Guarded",
    "KVBatch",
    "Mask",
    "Policy",
    "PolicyError",
    "__version__",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    """Imports an exported name from its module and keeps it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
