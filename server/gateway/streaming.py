"""A stream on its way from vLLM to the client, event by event.

vLLM is always asked for its count of tokens, which a client that did not ask does not see. The
chunk that ends the last answer is held back until then: what a handoff came to stands in it.
"""

from __future__ import annotations

from typing import Any

import aiohttp

from lcguard.server.authorization.settlement import Settlement
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.outcome import applied, cleaned, stream_headers, with_outcome
from lcguard.server.gateway.sse import DONE, Events, data_of, event
from lcguard.server.gateway.upstream import broken

# Inside a JSON string the quotes would be escaped.
_ENDS_CHOICE = b'"finish_reason":"'
_NO_CHOICES = b'"choices":[]'
_ERROR = b'data: {"error"'


class Stream:
    """One answer of vLLM's in pieces."""

    def __init__(self, x: Exchange, settlement: Settlement, body: dict[str, Any]) -> None:
        """``body``: of the request for vLLM, which is told to count."""
        self._x, self._settlement = x, settlement
        asked = body.get("stream_options") or {}
        self._shows_usage = asked.get("include_usage") is True
        if asked.get("include_usage") in (None, False):
            body["stream_options"] = {"include_usage": True}
        self._held = b""
        """The event that ended a choice, where it was the last one."""
        self._counted: int | None = None
        self._ended = False
        self._said = False
        """Whether the client was told what was applied."""

    async def relay(self, answer: aiohttp.ClientResponse, kind: str) -> int | None:
        """Passes everything on; returns the tokens that vLLM counted, if it came to that.

        Raises ``ProxyError`` where vLLM broke off, or the handoff did not come about.
        """
        x = self._x
        more = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        await x.head(answer.status, kind, more | stream_headers(x))
        events = Events()
        try:
            async for piece in answer.content.iter_any():
                out = [part for raw in events.feed(piece) for part in await self._passed(raw)]
                if out:
                    await x.piece(b"".join(out))
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            raise broken(error) from None
        if not self._ended and not x.code:
            raise ProxyError(502, "vLLM broke off its answer", code="upstream_broke_off")
        await x.piece(b"", more=False)
        return self._counted

    async def _passed(self, raw: bytes) -> list[bytes]:
        """What goes to the client for an event of vLLM's."""
        x, approved = self._x, self._x.approved
        if raw.startswith(_ERROR):
            await self._failed()
            return [*self._released(), raw]
        if raw == DONE:
            self._ended = True
            if self._x.code:  # vLLM ends a stream that failed as well
                return [*self._released(), raw]
            return [*await self._settled({}), raw]
        usage = _NO_CHOICES in raw
        if approved is None and x.text is None and not usage:
            shown = raw
        else:
            found = data_of(raw)
            if found is None:  # a comment
                return [raw]
            if usage:
                total = (found.get("usage") or {}).get("total_tokens")
                self._counted = total if isinstance(total, int) else self._counted
                before = [] if self._x.code else await self._settled(found)
                return (
                    [*before, event(cleaned(x, found)) if approved or x.text else raw]
                    if self._shows_usage
                    else before
                )
            piece: dict[str, Any] | None = cleaned(x, found)
            if x.text is not None and piece is not None:
                piece = await x.text.chunk(piece)
                if piece is None:  # held back
                    return []
            shown = event(piece)
        out = self._released()
        if _ENDS_CHOICE in raw:
            self._held = shown
            return out
        return [*out, shown]

    async def _failed(self) -> None:
        """Writes down that vLLM said an error in place of the rest."""
        x = self._x
        if x.approved is not None:
            await self._settlement.fail(x.approved, "failed", "vLLM broke off")
        if x.text is not None:
            await x.text.fail("failed", "vLLM broke off")
        x.code = "upstream_error"

    def _released(self) -> list[bytes]:
        held, self._held = self._held, b""
        return [held] if held else []

    async def _settled(self, usage: dict[str, Any]) -> list[bytes]:
        """The chunk that ended the answer, with what was applied."""
        x, (held,) = self._x, self._released() or [b""]
        if (x.approved is None or x.approved.done) and (x.text is None or self._said):
            fingerprint = usage.get("system_fingerprint")
            if not held or fingerprint is None or self._shows_usage:
                return [held] if held else []
            # vLLM has it in its very last chunk, which this client did not ask for
            return [event({**data_of(held), "system_fingerprint": fingerprint})]
        if not held:
            raise ProxyError(502, "vLLM ended no answer", code="upstream_broke_off")
        outcome = await applied(x, self._settlement)
        self._said = True
        return [event(with_outcome(data_of(held), outcome))]
