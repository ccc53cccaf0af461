"""AG2, the successor of AutoGen: a middleware that guards what an agent reads.

guard = lcguard.text_guard("policy.yaml", "intake", "billing")
billing = Agent("billing", config=config, middleware=[guard_events(guard)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ag2 import Context, Middleware
from ag2.events import BaseEvent, ModelResponse
from ag2.events.base import ProviderReplay
from ag2.middleware import BaseMiddleware

from lcguard.handoff.errors import HandoffError
from lcguard.text.guard import TextGuard

_READABLE = frozenset({"TextInput", "DataInput"})
"""Inputs that are text through and through; others name a file, or hold its bytes."""


def guard_events(guard: TextGuard, secrets: Sequence[str] | None = None) -> Middleware:
    """For ``Agent(middleware=[...])``: before every call of its model the conversation, which other
    agents may have written, is made what the guard's audience may read: requests, replies, tool
    calls and their results.

    ``secrets``: values to hide beside those that the guard knows. The turn ends with
    ``HandoffError`` where something cannot be looked through (images, files, a provider's sealed
    reasoning). The stream itself stays as it was: who reads it reads all.
    """
    return Middleware(_GuardedCalls, guard=guard, secrets=secrets)


class _GuardedCalls(BaseMiddleware):
    def __init__(
        self,
        event: BaseEvent,
        context: Context,
        *,
        guard: TextGuard,
        secrets: Sequence[str] | None,
    ) -> None:
        super().__init__(event, context)
        self._guard, self._secrets = guard, secrets

    async def on_llm_call(
        self, call_next: Any, events: Sequence[BaseEvent], context: Context
    ) -> ModelResponse:
        for event in events:
            if isinstance(event, ProviderReplay):
                raise _unreadable(type(event).__name__)
        # not the times: numbers that no model reads, and that look like others
        said = [_checked(event.to_dict()) for event in events]
        made = self._guard.json(said, self._secrets).value
        again = [type(e).from_dict(m) for e, m in zip(events, made, strict=True)]
        answer: ModelResponse = await call_next(again, context)
        return answer


def _checked(value: Any) -> Any:
    """Without times. Raises ``HandoffError`` for what is no text."""
    if isinstance(value, list):
        return [_checked(v) for v in value]
    if not isinstance(value, dict):
        return value
    name = str(value.get("__event__", "")).rpartition(".")[2]
    if name.endswith("Input") and name not in _READABLE:
        raise _unreadable(name)
    if value.get("files"):
        raise _unreadable("files of a reply")
    return {k: _checked(v) for k, v in value.items() if k != "created_at"}


def _unreadable(what: str) -> HandoffError:
    return HandoffError(
        400, f"{what} cannot be looked through: leave it out of what is handed over"
    )
