"""LCGuard: guards for the KV caches that LLM agents hand to each other.

The public API, by what one does with it:

- ``load_agent``, ``load_guard``: a model on transformers, and a guard that fits it
- ``Guard``, ``Guarded``, ``KVBatch``: what a guard is, gives back and rewrites
- ``KVSegment``: guarded KV as it crosses a hop, with a signed manifest
- ``GuardedLLM``, ``AsyncGuardedLLM``: the same inside vLLM
- ``Policy``, ``load_policy``, ``PolicyError``, ``CATEGORIES``: who may learn what
- ``detect``: what is private in a text, for models without a detector of their own
- ``text_guard``: text between agents under the same policy, in a process of your own
- ``evaluate``, ``Attack``: what still leaks

Names load on first use, so that ``import lcguard`` (and with it ``lcguard --help`` or a policy
check) does not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcguard.categories import CATEGORIES
    from lcguard.commands.api import evaluate, load_agent, load_guard
    from lcguard.commands.text_detector import detect
    from lcguard.commands.text_guard import text_guard
    from lcguard.handoff.policy import Policy, PolicyError, load_policy
    from lcguard.protocols import Attack, Guard, Guarded, KVBatch
    from lcguard.segment import KVSegment
    from lcguard.vllm.llm import AsyncGuardedLLM, GuardedLLM

__version__ = "0.1.0"

_EXPORTS = {
    "CATEGORIES": "lcguard.categories",
    "AsyncGuardedLLM": "lcguard.vllm.llm",
    "Attack": "lcguard.protocols",
    "Guard": "lcguard.protocols",
    "Guarded": "lcguard.protocols",
    "GuardedLLM": "lcguard.vllm.llm",
    "KVBatch": "lcguard.protocols",
    "KVSegment": "lcguard.segment",
    "Policy": "lcguard.handoff.policy",
    "PolicyError": "lcguard.handoff.policy",
    "detect": "lcguard.commands.text_detector",
    "evaluate": "lcguard.commands.api",
    "load_agent": "lcguard.commands.api",
    "load_guard": "lcguard.commands.api",
    "load_policy": "lcguard.handoff.policy",
    "text_guard": "lcguard.commands.text_guard",
}

__all__ = [
    "CATEGORIES",
    "AsyncGuardedLLM",
    "Attack",
    "Guard",
    "Guarded",
    "GuardedLLM",
    "KVBatch",
    "KVSegment",
    "Policy",
    "PolicyError",
    "__version__",
    "detect",
    "evaluate",
    "load_agent",
    "load_guard",
    "load_policy",
    "text_guard",
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
