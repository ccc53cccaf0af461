"""A response's stream on its way from vLLM to the client, event by event.

The event that ends it holds the whole response, and vLLM's count of tokens: what a handoff came to
stands in it.
"""

from __future__ import annotations

from typing import Any

from lcguard.server.authorization.settlement import Settlement
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.handoff_field import FIELD
from lcguard.server.gateway.outcome import applied, cleaned
from lcguard.server.gateway.sse import named_data_of, named_event
from lcguard.server.gateway.streaming import Stream
from lcguard.text.response_stream import END

_FAILED = ("error", "response.failed")
# where nothing is handed over, what says no more than a piece of text is not read
_PIECE = b"event: response.output_text.delta\n"


class ResponseEvents(Stream):
    """One response of vLLM's in pieces."""

    def __init__(self, x: Exchange, settlement: Settlement) -> None:
        super().__init__(x, settlement, {})

    async def _passed(self, raw: bytes) -> list[bytes]:
        x = self._x
        plain = x.approved is None and x.text is None
        found = None if plain and raw.startswith(_PIECE) else named_data_of(raw)
        if found is None and not plain and b"data:" in raw:
            raise ProxyError(502, "vLLM sent an event that is no JSON", code="upstream")
        if found is None:
            out = [raw]
        elif found.get("type") in END:
            self._ended = True
            self._counted = _total(found["response"])
            out = [raw] if plain else await self._last(found)
        elif found.get("type") in _FAILED or "type" not in found:
            await self._failed()
            out = [raw]
        else:
            out = [raw] if plain else await self._shown(found)
        x.n_events += len(out)
        return out

    async def _shown(self, found: dict[str, Any]) -> list[bytes]:
        """What goes to the client for an event of a handoff's answer."""
        x, event = self._x, cleaned(self._x, found)
        events = [event] if x.text is None else await x.text.events(event)
        return [named_event(e) for e in events]

    async def _last(self, found: dict[str, Any]) -> list[bytes]:
        """The event that ended it, with what was applied, and what was held back before it."""
        x, event = self._x, cleaned(self._x, found)
        *before, last = [event] if x.text is None else await x.text.events(event)
        outcome = await applied(x, self._settlement)
        last = {**last, "response": {**last["response"], FIELD: outcome}}
        return [named_event(e) for e in (*before, last)]


def _total(response: dict[str, Any]) -> int | None:
    total = (response.get("usage") or {}).get("total_tokens")
    return total if isinstance(total, int) else None
