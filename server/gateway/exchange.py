"""One request and its answer, as the relay and the counters see it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from starlette.types import Message, Send

from lcguard.server.access.keyring import Identity
from lcguard.server.authorization.approved_handoff import ApprovedHandoff
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.contract_fields import Endpoint
from lcguard.server.gateway.sse import event, named_event
from lcguard.server.gateway.text_pass import TextPass
from lcguard.server.tracing.spans import Tracing, Untraced


class Exchange:
    """One request and what became of it."""

    def __init__(
        self,
        headers: Mapping[str, str],
        send: Send,
        request_id: str,
        endpoint: Endpoint = "chat",
        tracing: Tracing | None = None,
    ) -> None:
        self.headers, self.request_id, self.endpoint = headers, request_id, endpoint
        self.tracing = tracing or Untraced()
        self._send = send
        self.started_s = time.perf_counter()
        self.upstream_s = 0.0
        """Spent waiting for vLLM."""
        self.first_byte_s: float | None = None
        self.status = 0
        self.who: Identity | None = None
        self.approved: ApprovedHandoff | None = None
        self.text: TextPass | None = None
        """Its hops of text."""
        self.code = ""
        self.n_events = 0
        """Sent, of a response's stream."""

    @property
    def responds(self) -> bool:
        """Whether it is a request of the Responses API."""
        return self.endpoint == "responses"

    async def head(self, status: int, kind: str, more: Mapping[str, str]) -> None:
        """Sends the answer's head."""
        self.status = status
        headers = {"content-type": kind, "x-request-id": self.request_id, **more}
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode(), v.encode("latin-1", "replace")) for k, v in headers.items()],
        }
        await self._send(message)

    async def piece(self, data: bytes, more: bool = True) -> None:
        """Sends a piece of the answer's body at once."""
        if self.first_byte_s is None:
            self.first_byte_s = time.perf_counter()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, status: int, kind: str, data: bytes, more: Mapping[str, str]) -> None:
        await self.head(status, kind, {"content-length": str(len(data)), **more})
        await self.piece(data, more=False)

    async def refuse(self, error: ProxyError) -> None:
        """The error as the answer, or as the last event of a stream that has begun."""
        self.code = error.code
        if self.status:
            body = error.body()
            if self.responds:  # an event of its own; OpenAI's clients read the object in it
                more = {"type": "error", "sequence_number": self.n_events, **body}
                await self.piece(named_event(body["error"] | more), more=False)
                return
            await self.piece(event(body), more=False)
            return
        verdict = "blocked" if error.status < 500 else "error"
        told = {"x-lcguard-verdict": verdict, **error.headers()}
        if error.status in (408, 413):
            told["connection"] = "close"  # the rest of the body is not wanted
        await self.whole(error.status, "application/json", json.dumps(error.body()).encode(), told)
