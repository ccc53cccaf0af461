"""The field ``lcguard.text`` of a generating request: its prompt, its answer or both guarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.lineage import Restricted
from lcguard.server.access.keyring import Identity
from lcguard.server.authorization.text_hops import TextHop, TextHops, stands_on
from lcguard.server.gateway.contract_fields import FIELDS, Endpoint
from lcguard.server.gateway.handoff_field import TextField
from lcguard.text.guard import Guarded, TextGuard
from lcguard.text.response_stream import ResponseStream
from lcguard.text.stream import AnswerStream

_READ_TOO = ("stop", "bad_words", "structured_outputs", "response_format")
"""Fields beside those that shape the prompt of which a model, or its answer, shows the text."""

_TEXTS, _LISTS = ("instructions", "prompt", "input"), ("messages", "input")
"""What a prompt is made of, as texts and as messages or items."""


class TextPass:
    """The hops of one request."""

    def __init__(self, hops: TextHops, wish: TextField, who: Identity, request_id: str) -> None:
        self._hops, self._wish, self._who, self._request_id = hops, wish, who, request_id
        self._incoming: TextHop | None = None
        self._outgoing: TextHop | None = None
        self._stream: AnswerStream | ResponseStream | None = None

    @property
    def guards_answer(self) -> bool:
        return self._wish.audience is not None

    async def request(self, endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
        """The body for vLLM. Raises ``ProxyError`` as ``TextHops.open``."""
        source = self._wish.source
        if source is None:
            return body
        hop = self._incoming = await self._open(source, self._who.agent)
        read = {
            name: value
            for name, value in body.items()
            if name in _READ_TOO or FIELDS[endpoint][name].kind == "guarded"
        }
        made = await self._hops.guarded(hop, lambda guard: _request(guard, read, hop.secrets))
        await self._hops.finish(hop)
        return {**body, **made}

    async def allow_answer(self, consumed: Sequence[Restricted]) -> None:
        """Decides the answer's hop, before vLLM hears of the request. Raises as ``request``."""
        if self._wish.audience is not None:
            behind = [*consumed, *([stands_on(self._incoming)] if self._incoming else ())]
            self._outgoing = await self._open(self._who.agent, self._wish.audience, behind)

    async def answer(self, choices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of a whole answer, guarded. Raises as ``request``."""
        hop = self._outgoing
        if hop is None:
            return [dict(c) for c in choices]
        return await self._hops.guarded(hop, lambda guard: guard.choices(choices, hop.secrets))

    async def output(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of a whole response, guarded. Raises as ``request``."""
        hop = self._outgoing
        if hop is None:
            return [dict(item) for item in items]
        return await self._hops.guarded(hop, lambda guard: guard.output(items, hop.secrets))

    async def chunk(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """What goes on of a stream's chunk. Raises as ``request``."""
        hop = self._outgoing
        if hop is None:
            return chunk
        if not isinstance(stream := self._stream, AnswerStream):
            stream = self._stream = AnswerStream(hop.guard, hop.secrets)
        made = await self._hops.guarded(hop, lambda _: Guarded(stream.feed(chunk), {}))
        hop.hidden, hop.originals = stream.hidden, stream.originals
        return made

    async def events(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """What goes on for an event of a response's stream. Raises as ``request``."""
        hop = self._outgoing
        if hop is None:
            return [event]
        if not isinstance(stream := self._stream, ResponseStream):
            stream = self._stream = ResponseStream(hop.guard, hop.secrets)
        made = await self._hops.guarded(hop, lambda _: Guarded(stream.feed(event), {}))
        hop.hidden, hop.originals = stream.hidden, stream.originals
        return made

    async def finish(self) -> dict[str, Any]:
        """What was applied, for the caller; the audit has it then. Raises ``ProxyError`` (503)."""
        out: dict[str, Any] = {}
        if self._incoming is not None:
            # the caller is who may not learn what was hidden, nor how much
            out["source"] = self._wish.source
        if (hop := self._outgoing) is not None:
            await self._hops.finish(hop)
            out |= {"audience": self._wish.audience, "hidden": hop.counts()}
        return out

    async def fail(self, event: Any, reason: str) -> None:
        """An answer that did not come about."""
        if self._outgoing is not None:
            await self._hops.end(self._outgoing, event, reason)

    async def _open(self, source: str, audience: str, behind: Sequence[Restricted] = ()) -> TextHop:
        return await self._hops.open(
            self._who,
            source,
            audience,
            secrets=self._wish.secrets,
            conversation=self._wish.conversation,
            request_id=self._request_id,
            behind=behind,
        )


def _request(
    guard: TextGuard, read: Mapping[str, Any], secrets: Sequence[str] | None
) -> Guarded[dict[str, Any]]:
    texts = {k: v for k, v in read.items() if k in _TEXTS and isinstance(v, str)}
    lists = {k: v for k, v in read.items() if k in _LISTS and isinstance(v, list)}
    prompt = read.get("prompt", "")
    if not isinstance(prompt, str):
        raise HandoffError(
            400, "prompt: send text, one, where it came from another agent", "prompt"
        )
    rest = {k: v for k, v in read.items() if k not in texts and k not in lists}
    messages = [{"content": text} for text in texts.values()]
    messages += [m for many in lists.values() for m in many]
    found = guard.request(messages, rest, secrets)
    made, others = found.value
    out = dict(others)
    for name in texts:
        out[name] = made.pop(0)["content"]
    for name, many in lists.items():
        out[name], made = made[: len(many)], made[len(many) :]
    return Guarded(out, found.hidden, found.originals)
